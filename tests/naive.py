"""Naive reference implementations for the tests."""

import torch
import torch.nn.functional as F


def naive_loss(images, texts, t, image_index=None, image_ids=None, weights=None, text_ids=None):
    """The contrastive loss pair by pair, from the whole similarity matrix.

    A pair's denominator holds the pair itself and its negatives: the captions of images with another id, or the
    images with another id; but no caption that equals one of the image's, and no image with a caption equal to it.
    """
    image_index = torch.arange(len(images)) if image_index is None else image_index
    ids = (torch.arange(len(images)) if image_ids is None else image_ids).tolist()
    weights = [1.0] * len(images) if weights is None else weights.tolist()
    rows = image_index.tolist()
    texts_of = [set() for _ in images]
    for j, i in enumerate(rows if text_ids is not None else []):
        texts_of[i].add(int(text_ids[j]))
    text = [None] * len(rows) if text_ids is None else text_ids.tolist()
    logits = t.exp() * images @ texts.T
    image_loss, text_loss = 0, 0
    for j, i in enumerate(rows):
        captions = [j] + [c for c, row in enumerate(rows) if ids[row] != ids[i] and text[c] not in texts_of[i]]
        others = [row for row in range(len(images)) if ids[row] != ids[i] and text[j] not in texts_of[row]]
        candidates = [i, *others]
        image_loss = image_loss + weights[i] / rows.count(i) * (logits[i, captions].logsumexp(0) - logits[i, j])
        text_loss = text_loss + weights[i] * (logits[candidates, j].logsumexp(0) - logits[i, j])
    return (image_loss / sum(weights) + text_loss / sum(weights[i] for i in rows)) / 2


def random_embeddings(image_index, dim=16, num_images=None, closeness=0.5):
    """Unit vectors (B, D) and (T, D), float32; a caption lies near its image, as in a partly trained model."""
    images = F.normalize(torch.randn(num_images or int(image_index.max()) + 1, dim), dim=-1)
    noise = F.normalize(torch.randn(len(image_index), dim), dim=-1)
    return images, F.normalize(closeness * images[image_index] + noise, dim=-1)


def loss_and_gradients(function, images, texts, t, dtype, **targets):
    """The loss and its gradients with respect to the images, the texts and t; inputs converted to `dtype`."""
    inputs = [x.to(dtype).requires_grad_() for x in (images, texts, torch.as_tensor(t))]
    targets = {name: x.to(dtype) if name == "weights" else x for name, x in targets.items()}
    loss = function(*inputs, **targets)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def loss_cases():
    """{name: targets} of eleven images: image_index, and in some cases image_ids, weights and text_ids."""
    generator = torch.Generator().manual_seed(0)
    counts = {k: torch.full((11,), k) for k in (1, 2, 3, 4, 5)}
    counts["ragged"] = torch.tensor([1, 5, 2, 1, 3, 4, 1, 2, 7, 1, 1])
    cases = {}
    for name, count in counts.items():
        index = torch.arange(11).repeat_interleave(count)
        cases[f"k={name}"] = {"image_index": index}
    shuffled = cases["k=ragged"]["image_index"]
    shuffled = shuffled[torch.randperm(len(shuffled), generator=generator)]
    repeated = torch.tensor([7, 3, 7, 1, 9, 3, 7, 4, 5, 6, 8])  # images 7 and 3 occur several times
    weights = torch.rand(11, generator=generator, dtype=torch.float64) + 0.1
    cases["k=ragged, shuffled"] = {"image_index": shuffled}
    cases["k=1, repeated images"] = {"image_index": torch.arange(11), "image_ids": repeated}
    cases["k=2, repeated images"] = {"image_index": cases["k=2"]["image_index"], "image_ids": repeated}
    cases["k=ragged, repeated images"] = {"image_index": shuffled, "image_ids": repeated}
    cases["weights"] = {"image_index": shuffled, "weights": weights}
    cases["weights, repeated images"] = {"image_index": shuffled, "image_ids": repeated, "weights": weights}
    texts = torch.randint(0, 40, (len(shuffled),), generator=generator)  # some captions are equal
    cases["k=1, equal captions"] = {"image_index": torch.arange(11), "text_ids": repeated}
    cases["k=ragged, equal captions"] = {"image_index": shuffled, "text_ids": texts}
    cases["all targets"] = {"image_index": shuffled, "image_ids": repeated, "text_ids": texts, "weights": weights}
    cases["no equal captions"] = {"image_index": shuffled, "text_ids": torch.arange(len(shuffled)) - 5}
    return cases
