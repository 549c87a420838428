"""Quality of a GAN's images, measured with a CLIP of another seed (the evaluator).

`python benchmarks/gan_evaluate.py --run runs/demo/stage1 --evaluator runs/other` generates an image for one caption of
each test image (without a test split: validation image) and reports, beside the same metrics of the real images at the
GAN's resolution:

- how often the caption ranks first, or in the top 10, of 100 captions of 100 images (chance: 1%, 10%);
- kernel distance (KID) of the evaluator's features to those of real test images (Binkowski et al. 2018,
  arXiv:1801.01401), with real training images as the floor;
- memorisation: how often an image is closer to its nearest training image than a real test image is to its own (50%:
  as close as real ones), and how many are closer than all but 1% of the test images (1%: as real ones);
- diversity: the mean distance between images of one caption, relative to that between images of different captions;
- on the synthetic data set: how often the background and the objects have the colours of the caption, and how often a
  classifier, trained with labels on newly rendered images at that resolution, has an object of the caption (colour and
  shape) in its top 2. Unlike with a CLIP, no generator was trained against it.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from common import parse_caption, report  # noqa: E402
from tqdm import tqdm  # noqa: E402

from clip import load_model  # noqa: E402
from config import InputError  # noqa: E402
from dataset import SIDED, load_splits, resize_image, subset_pairs  # noqa: E402
from gan import generate, load_generator  # noqa: E402
from utils.cli import exit_on_input_error  # noqa: E402
from utils.device import setup_device  # noqa: E402
from utils.embed import embed_captions  # noqa: E402
from utils.flags import OneLineParser  # noqa: E402
from utils.gan_data import GANData, resize_images  # noqa: E402
from utils.gan_settings import conditioning_run  # noqa: E402
from utils.runs import gan_run_folder  # noqa: E402
from utils.synthetic import BACKGROUNDS, COLORS, SHAPES, all_scenes, render_scene  # noqa: E402

NUM_CAPTIONS = 100
BATCH_SIZE = 100


def in_batches(function, *tensors):
    parts = zip(*(tensor.split(BATCH_SIZE) for tensor in tensors), strict=True)
    return torch.cat([function(*part) for part in parts])


# ---- metrics ----------------------------------------------------------------------------------------------------


def caption_ranks(images, texts, rng):
    """(N,) the rank of each image's caption among it and 99 captions of other images; (N, D) embeddings each."""
    scores = (images @ texts.T).cpu().numpy()
    num_others = min(NUM_CAPTIONS - 1, len(scores) - 1)
    ranks = np.empty(len(scores), dtype=np.int64)
    for row, line in enumerate(scores):
        chosen = rng.permutation(np.delete(np.arange(len(line)), row))[:num_others]
        ranks[row] = 1 + (line[chosen] >= line[row]).sum()
    return ranks


def kernel_distance(a, b, rng, subsets=50, size=200):
    """1000 times the KID of features (N, F) and (M, F), mean and standard deviation over random subsets.

    The unbiased squared maximum mean discrepancy with a cubic kernel.
    """
    values, size = [], min(size, len(a), len(b))
    for _ in range(subsets):
        x, y = (features[rng.permutation(len(features))[:size]].astype(np.float64) for features in (a, b))
        width = x.shape[1]
        xx, yy, xy = ((p @ q.T / width + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        within = sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in (xx, yy))
        values.append(1000 * (within - 2 * xy.mean()))
    return float(np.mean(values)), float(np.std(values))


def nearest_distance(embeddings, training):
    """(N,) the distance of each unit vector to the nearest training one."""
    return torch.cdist(embeddings, training).min(1).values.cpu().numpy()


def diversity(embeddings):
    """The mean distance within a caption relative to that between captions; embeddings (captions, images each, D)."""
    captions, each, _ = embeddings.shape
    distances = torch.cdist(embeddings.flatten(0, 1), embeddings.flatten(0, 1))
    caption_ids = torch.arange(captions, device=embeddings.device).repeat_interleave(each)
    same = caption_ids[:, None] == caption_ids
    within = distances[same].sum() / (same.sum() - len(caption_ids))
    return (within / distances[~same].mean()).item()


# ---- colours of synthetic images --------------------------------------------------------------------------------


def dominant_colors(image):
    """The background's name and the object colours, the most frequent first, of a (3, S, S) image in [0, 1]."""
    pixels = (image * 255).permute(1, 2, 0).cpu().numpy()  # (S, S, 3)
    rim = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    background = closest_names(np.median(rim, axis=0)[None], BACKGROUNDS)[0]
    names = closest_names(pixels.reshape(-1, 3), {**COLORS, background: BACKGROUNDS[background]})
    counts = {name: names.count(name) for name in COLORS}
    return background, sorted(counts, key=lambda name: -counts[name])


def closest_names(pixels, palette):
    distances = np.linalg.norm(pixels[:, None] - np.array(list(palette.values())), axis=2)
    names = list(palette)
    return [names[i] for i in distances.argmin(1)]


def color_accuracy(images, captions):
    """The shares (%) of correct backgrounds and of objects in the colour of the caption; (None, None) without any.

    An object counts if its colour is among the two most frequent ones (or the most frequent, if both have the same).
    """
    background_hits, object_hits = [], []
    for image, caption in zip(images, captions, strict=True):
        scene = parse_caption(caption)
        if scene is not None:
            background, found = dominant_colors(image)
            colors = [color for color, _ in scene[1]]
            background_hits.append(background == scene[0])
            object_hits += [color in found[: len(set(colors))] for color in colors]
    return (100 * np.mean(background_hits), 100 * np.mean(object_hits)) if background_hits else (None, None)


# ---- objects of synthetic images --------------------------------------------------------------------------------

NUM_TRAINING_IMAGES, NUM_EPOCHS = 5000, 5  # of the classifier
OBJECTS = [(color, shape) for color in COLORS for shape in SHAPES]


class Classifier(torch.nn.Module):
    """(B, 3, S, S) images in [0, 1] -> (B, 20) logits of the objects."""

    def __init__(self, size):
        super().__init__()
        layers, channels = [], 3
        for out, stride in ((32, 1), (32, 2), (64, 1), (64, 2), (96, 1)):
            layers += [torch.nn.Conv2d(channels, out, 3, stride, 1), torch.nn.BatchNorm2d(out), torch.nn.ReLU()]
            channels = out
        width = channels * (size // 4) ** 2
        self.layers = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(width, len(OBJECTS)))

    def forward(self, images):
        return self.layers(images)


@torch.enable_grad()
def train_classifier(size, device, seed=0):
    """A classifier for images of that size, trained on newly rendered scenes, some of them blurred or noisy."""
    rng, scenes = np.random.default_rng(seed), all_scenes()
    chosen = [scenes[i] for i in rng.integers(len(scenes), size=NUM_TRAINING_IMAGES)]
    rendered = [np.asarray(resize_image(np.asarray(render_scene(scene, rng)), size)) for scene in chosen]
    images = torch.from_numpy(np.stack(rendered)).permute(0, 3, 1, 2).to(device)
    truth = torch.zeros(NUM_TRAINING_IMAGES, len(OBJECTS), device=device)
    for row, (_, first, _, second) in zip(truth, chosen, strict=True):
        row[[OBJECTS.index(first), OBJECTS.index(second)]] = 1
    torch.manual_seed(seed)
    model, steps = Classifier(size).to(device), NUM_EPOCHS * -(-NUM_TRAINING_IMAGES // 64)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    with tqdm(total=steps, desc="classifier", unit="step", disable=not sys.stderr.isatty()) as bar:
        for _ in range(NUM_EPOCHS):
            for rows in torch.randperm(NUM_TRAINING_IMAGES, device=device).split(64):
                batch = images[rows].float() / 255
                if torch.rand(()) < 0.3:
                    batch = resize_images(resize_images(batch, size // 2), size)
                batch = batch + 0.05 * torch.rand(()).to(device) * torch.randn_like(batch)
                loss = torch.nn.functional.binary_cross_entropy_with_logits(model(batch), truth[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return model.requires_grad_(False).eval()


def object_accuracy(classifier, images, captions):
    """The share (%) of the objects in the captions that are in the classifier's top 2; None without any."""
    named = [(i, scene[1]) for i, scene in enumerate(map(parse_caption, captions)) if scene]
    if not named:
        return None
    top_2 = in_batches(lambda x: classifier(x).topk(2).indices, images).tolist()
    return 100 * np.mean([OBJECTS.index(item) in top_2[i] for i, objects in named for item in objects])


# ---- the table --------------------------------------------------------------------------------------------------


def evaluate(run, evaluator_run, device, seed=0, paths=None):
    """The rows of the table (generated images, and real test images at that resolution) and the number of images.

    paths: image_path and captions_path, if the data set was moved.
    """
    run, rng = gan_run_folder(run), np.random.default_rng(seed)
    clip, evaluator = load_model(conditioning_run(run), device), load_model(evaluator_run, device)
    if clip.config.seed == evaluator.config.seed:
        raise InputError(f"run and evaluator were both trained with seed {clip.config.seed}: they must differ")
    generator = load_generator(run / "gan", device)
    size = generator.architecture["size"]
    config = dataclasses.replace(clip.config, gan_size=size, **(paths or {}))
    splits = load_splits(config)
    train, test = splits["train"], unseen_test_pairs(splits, dataclasses.replace(evaluator.config, **(paths or {})))
    known = set(train.captions)
    chosen = np.array([unseen_caption(test, image, known, rng) for image in range(len(test.files))])
    captions = [test.captions[j] for j in chosen]
    train_images = GANData(clip, train, config, SIDED, device).images.float() / 255
    data = GANData(clip, test, config, SIDED, device)
    generated, real = generate(generator, data.embeddings[chosen], seed), data.images.float() / 255

    def encode(images):  # features (N, F) and embeddings (N, D) of the evaluator
        resized_features = in_batches(
            lambda x: evaluator.image_encoder(resize_images(x, evaluator.config.size)), images
        )
        return resized_features.cpu().numpy(), in_batches(evaluator.project_image, resized_features)

    texts = embed_captions(evaluator, captions)
    train_features, train_embeddings = encode(train_images)
    real_features, real_embeddings = encode(real)
    repeated = data.embeddings[chosen[:50]].repeat_interleave(8, 0)
    repeated_embeddings = encode(generate(generator, repeated, seed + 1))[1].view(-1, 8, texts.shape[1])
    real_distances = nearest_distance(real_embeddings, train_embeddings)
    close = np.quantile(real_distances, 0.01)
    classifier = train_classifier(size, device) if any(map(parse_caption, captions)) else None
    rows = []
    for name, images in (("generated", generated), ("real test images at that resolution", real)):
        features, embeddings = encode(images)
        ranks, distances = caption_ranks(embeddings, texts, rng), nearest_distance(embeddings, train_embeddings)
        closer = (distances[:, None] < real_distances).mean() + 0.5 * (distances[:, None] == real_distances).mean()
        # The floor: real training images in place of generated ones.
        distance, std = kernel_distance(features if name == "generated" else train_features, real_features, rng)
        background, objects = color_accuracy(images, captions)
        classified = object_accuracy(classifier, images, captions) if classifier else None
        rows.append(
            {
                "images": name,
                "caption ranks first of 100 (%)": round(100 * (ranks == 1).mean(), 1),
                "in the top 10 (%)": round(100 * (ranks <= 10).mean(), 1),
                "kernel distance x 1000": f"{distance:.2f} +- {std:.2f}",
                "closer to training images (%)": round(100 * closer, 1),
                "closer than all but 1% of test (%)": round(100 * (distances < close).mean(), 1),
                "diversity": round(diversity(repeated_embeddings), 2) if name == "generated" else "",
                "background colour correct (%)": "" if background is None else round(background, 1),
                "object colours correct (%)": "" if objects is None else round(objects, 1),
                "objects classified correctly (%)": "" if classified is None else round(classified, 1),
            }
        )
    return rows, len(captions)


def unseen_test_pairs(splits, evaluator_config):
    """The test `Pairs` (without a test split: validation) that the evaluator was not trained on."""
    seen = set(load_splits(evaluator_config)["train"].names)
    test = splits["test"] if splits["test"].files else splits["validation"]
    test = subset_pairs(test, [i for i, name in enumerate(test.names) if name not in seen])
    if len(test.files) < NUM_CAPTIONS:
        raise InputError(
            f"{len(test.files)} test images are unseen by run and evaluator: at least {NUM_CAPTIONS} are needed"
        )
    return test


def unseen_caption(pairs, image, known, rng):
    """The number of a random caption of an image, one that is not in `known` if possible."""
    numbers = pairs.captions_of(image)
    return rng.choice([j for j in numbers if pairs.captions[j] not in known] or list(numbers))


@exit_on_input_error
def main(argv=None):
    parser = OneLineParser(prog="gan_evaluate.py", description="Quality of a GAN's images.")
    parser.add_argument("--run", required=True, help="run with the GAN")
    parser.add_argument("--evaluator", required=True, help="run with another seed on the same data set")
    parser.add_argument("--image_path", help="image folder, if it was moved since training")
    parser.add_argument("--captions_path", help="captions file, if it was moved since training")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    arguments = parser.parse_args(argv)
    device, _ = setup_device(arguments.device)
    paths = {name: value for name in ("image_path", "captions_path") if (value := getattr(arguments, name))}
    with torch.no_grad():
        rows, number = evaluate(arguments.run, arguments.evaluator, device, paths=paths)
    names = {"run": arguments.run, "evaluator": arguments.evaluator}
    report("gan_evaluate", rows, folder=gan_run_folder(arguments.run) / "gan", images=number, **names)


if __name__ == "__main__":
    main()
