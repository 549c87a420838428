"""CLIP (Radford et al. 2021, arXiv:2103.00020): the model, its loss, gradient caching, retrieval metrics, files.

The loss never holds the matrix of all similarities, so a batch may be as large as the embeddings that fit in memory.
"""

import contextlib
import math
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from config import Config, InputError, build_config, read_json, write_json
from modules import (
    ImageEncoder,
    ProjectionHead,
    TextEncoder,
    build_text_backbone,
    load_image_encoder,
    load_text_encoder,
    load_tokenizer,
)

MAX_LOGIT_SCALE = math.log(100)  # the paper's section 2.5: similarities are multiplied by at most 100
TILE = 2048  # rows and columns of the similarity matrix held at once: 16 MiB in float32
IMAGE_TILE = 8 * TILE  # columns in evaluation, which keeps no gradients
LOWEST = -1e30  # stands for "no entry yet" where -inf would make inf - inf


class CLIP(nn.Module):
    """Two encoders, two projections and a temperature; knows its tokenizer and the image size it was made for.

    `saved` is what `save_model` wrote beside the weights: with it, nothing is looked up or fetched.
    Raises InputError when an encoder or tokenizer cannot be found.
    """

    def __init__(self, config, tokenizer=None, saved=None):
        super().__init__()
        self.config = config
        if saved is None:
            self.tokenizer = tokenizer or load_tokenizer(config.text_tokenizer)
            pretrained = config.encoder_flag("pretrained", "image")
            self.image_encoder, self.image_recipe, released_image = load_image_encoder(
                config.model_name, config.size, pretrained
            )
            self.text_encoder, released_text = load_text_encoder(
                config.text_encoder_model,
                config.text_pooling,
                config.encoder_flag("pretrained", "text"),
                len(self.tokenizer),
                config.text_layers,
                config.text_width,
            )
        else:
            self.tokenizer, self.image_recipe = tokenizer, saved["image_encoder"]
            self.image_encoder = ImageEncoder(size=config.size, **saved["image_encoder"])
            self.text_encoder = TextEncoder(build_text_backbone(saved["text_encoder"]), config.text_pooling)
        head = (config.projection_dim, config.num_projection_layers, config.dropout)
        self.image_projection = ProjectionHead(self.image_encoder.width, *head, self.image_encoder.projection_bias)
        self.text_projection = ProjectionHead(self.text_encoder.width, *head)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # t: similarities are multiplied by exp(t)
        for encoder in ("image", "text"):
            getattr(self, f"{encoder}_encoder").requires_grad_(config.encoder_flag("trainable", encoder))
        if saved is None and config.num_projection_layers == 1:  # more layers: heads of another kind, from scratch
            self.start_as_released(released_image, released_text)

    @torch.no_grad()
    def start_as_released(self, image, text):
        """Take the linear projections of released CLIPs, `Released` or None; raises InputError.

        With both towers a CLIP's, its temperature comes along where it is known.
        """
        own_dim = self.config.projection_dim
        if image and text and len(image.weight) != len(text.weight):
            raise InputError(
                f"model_name {self.config.model_name} projects to {len(image.weight)} values, text_encoder_model "
                f"{self.config.text_encoder_model} to {len(text.weight)}: give the two encoders of one CLIP"
            )
        for name, head, released in (
            (self.config.model_name, self.image_projection, image),
            (self.config.text_encoder_model, self.text_projection, text),
        ):
            if released is None:
                continue
            if len(released.weight) != own_dim:
                raise InputError(
                    f"projection_dim is {own_dim}, but {name} comes with a projection to {len(released.weight)} "
                    f"values: give --projection_dim {len(released.weight)}"
                )
            head.layers[-1].weight.copy_(released.weight)
            if head.layers[-1].bias is not None:
                head.layers[-1].bias.copy_(released.bias)
        if image and text and text.logit_scale is not None:
            self.logit_scale.fill_(text.logit_scale)

    @property
    def device(self):
        return self.logit_scale.device

    @property
    def max_length(self):
        """Longest caption in tokens: the setting's, or what the text encoder can take if that is less."""
        return min(self.config.max_length, self.text_encoder.max_tokens)

    def train(self, mode=True):
        """Training mode for what is trained; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        for encoder in ("image", "text"):
            if not self.config.encoder_flag("trainable", encoder):
                getattr(self, f"{encoder}_encoder").eval()
        return self

    def image_features(self, images):
        """(B, 3, H, W) uint8, or float in [0, 1] -> (B, F)."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return self.image_encoder(images)

    def encode_image(self, images):
        """(B, 3, H, W) uint8, or float in [0, 1] -> (B, D) unit vectors, float32."""
        return self.project_image(self.image_features(images))

    def encode_text(self, input_ids, attention_mask):
        """(T, L) token ids and mask -> (T, D) unit vectors, float32."""
        return self.project_text(self.text_encoder(input_ids, attention_mask))

    def project_image(self, features):
        return F.normalize(self.image_projection(features).float(), dim=-1)

    def project_text(self, features):
        return F.normalize(self.text_projection(features).float(), dim=-1)

    def forward(self, batch):
        """Embeddings (B, D) and (T, D) of a batch; `image_features`/`text_features` in it skip an encoder."""
        if "image_features" in batch:
            image_embeddings = self.project_image(batch["image_features"])
        else:
            image_embeddings = self.encode_image(batch["images"])
        if "text_features" in batch:
            text_embeddings = self.project_text(batch["text_features"])
        else:
            text_embeddings = self.encode_text(batch["input_ids"], batch["attention_mask"])
        return image_embeddings, text_embeddings

    @torch.no_grad()
    def clamp_temperature(self):
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def setup_device(device="auto", precision="auto"):
    """The torch device and the autocast dtype of the encoders (None: float32); raises InputError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # which, depends on the build of torch
        raise InputError(f"device is {str(device)!r}, which is not to be had here ({str(error)[:80]})") from None
    if precision == "auto":
        precision = "float32"
        if device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and device.type == "cpu":
        raise InputError("precision is fp16, which a CPU does not train in: give bf16 or float32")
    return device, {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(device, dtype):
    """The context in which encoders run: mixed precision if dtype is given, else float32."""
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


@torch.no_grad()
def update_average(average, model, decay, step):
    """Move the averaged weights towards the model's; early steps count more, so that the start is forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    own, new = average.state_dict(), model.state_dict()
    floats = [name for name in own if own[name].is_floating_point()]
    torch._foreach_lerp_([own[name] for name in floats], [new[name] for name in floats], 1 - decay)
    for name in own.keys() - set(floats):
        own[name].copy_(new[name])


# ---- the loss ---------------------------------------------------------------------------------------------------


def contrastive_loss(
    image_embeddings, text_embeddings, logit_scale, image_index=None, group=None, image_ids=None, weights=None
):
    """The symmetric contrastive loss, a scalar.

    With one caption per image it is the paper's: the mean of the cross entropies over the rows and over the columns
    of exp(t) I T^t. Captions of one image are all its positives and never each other's negatives: an image's loss is
    the mean over its captions of the cross entropy of that caption against the captions of other images, a caption's
    loss the cross entropy of its image against the other images. Since -log(e^s / (e^s + sum of e^negatives)) =
    softplus(logsumexp(negatives) - s), only the log-sum-exps of the negatives need the large matrix.

    Args:
        image_embeddings: (B, D) unit vectors.
        text_embeddings: (T, D) unit vectors.
        logit_scale: scalar t, the logarithm of the factor on the similarities.
        image_index: (T,) the row of the image that each caption belongs to; None: caption j belongs to image j.
        group: a torch.distributed group over which the batch is spread. Each process passes its own images with
            their captions and computes its own rows; the losses, and the gradients, of all processes add up to
            those of the whole batch.
        image_ids: (B,) whole numbers. Images with the same one are siblings (a photograph and pictures generated for
            its captions): an image and a sibling's captions are never each other's negatives. None: no siblings.
        weights: (B,) the weight of each image and its captions in the two means; None: all the same.
    """
    rows, device = len(image_embeddings), image_embeddings.device
    if image_index is None:
        if rows != len(text_embeddings):
            raise ValueError(f"{rows} images and {len(text_embeddings)} captions: give image_index")
        image_index = torch.arange(rows, device=device)
    if image_ids is None:
        image_ids = sum(counts_before(rows, device, group)) + torch.arange(rows, device=device)
    with torch.autocast(device.type, enabled=False):
        images, texts, t = upcast(image_embeddings), upcast(text_embeddings), upcast(logit_scale)
        over_texts, over_images = NegativesLogSumExp.apply(images, texts, t, image_ids, image_ids[image_index], group)
        positives = t.exp() * (images[image_index] * texts).sum(-1)  # (T,)
        image_losses = F.softplus(over_texts[image_index] - positives)  # (T,): one for each (image, own caption)
        text_losses = F.softplus(over_images - positives)  # (T,)
        captions_per_image = images.new_zeros(rows).index_add_(0, image_index, images.new_ones(len(texts)))
        image_losses = image_losses / captions_per_image[image_index]
        of_images, of_texts = total(rows, device, group), total(len(texts), device, group)
        if weights is not None:
            of_images, of_texts = total_weight(weights, group), total_weight(weights[image_index], group)
            image_losses, text_losses = weights[image_index] * image_losses, weights[image_index] * text_losses
        return (image_losses.sum() / of_images + text_losses.sum() / of_texts) / 2


def upcast(x):
    return x if x.dtype == torch.float64 else x.float()


class NegativesLogSumExp(torch.autograd.Function):
    """For each image the log-sum-exp of its similarities to other images' captions, and for each caption that of
    its similarities to other images: (B,) and (T,).

    Forward and backward walk over tiles of exp(t) X Y^t with running maxima and sums; the backward pass computes
    each tile again, so memory grows with B + T and not with B T. With a_i, c_j the incoming gradients and r_i, q_j
    the results, G_ij = a_i exp(s_ij - r_i) + c_j exp(s_ij - q_j), dX = exp(t) G Y, dY = exp(t) G^t X and
    dt = sum_ij G_ij s_ij = sum_i <x_i, dX_i>. Over W processes each computes its own rows against all captions.
    """

    @staticmethod
    def forward(ctx, images, texts, t, image_ids, text_ids, group):
        scale, before = t.exp(), sum(counts_before(len(texts), texts.device, group))
        own = slice(before, before + len(texts))  # this process's captions among all
        texts, text_ids = gather(texts, group), gather(text_ids, group)
        row_max, column_max = images.new_full((len(images),), LOWEST), images.new_full((len(texts),), LOWEST)
        row_sum, column_sum = torch.zeros_like(row_max), torch.zeros_like(column_max)
        for i, j in tiles(len(images), len(texts)):
            s = masked_similarities(images[i], texts[j], scale, image_ids[i], text_ids[j])
            add_logsumexp(row_max[i], row_sum[i], s, 1)
            add_logsumexp(column_max[j], column_sum[j], s, 0)
        if group is not None:
            common = column_max.clone()
            dist.all_reduce(common, dist.ReduceOp.MAX, group)
            column_sum *= (column_max - common).exp()
            dist.all_reduce(column_sum, group=group)
            column_max = common
        over_texts = (row_max + row_sum.log()).clamp(min=LOWEST)
        over_images = (column_max + column_sum.log()).clamp(min=LOWEST)
        ctx.save_for_backward(images, texts, t, image_ids, text_ids, over_texts, over_images)
        ctx.own, ctx.group = own, group
        return over_texts, over_images[own].clone()

    @staticmethod
    def backward(ctx, grad_over_texts, grad_over_images):
        images, texts, t, image_ids, text_ids, over_texts, over_images = ctx.saved_tensors
        scale, grad_over_images = t.exp(), gather(grad_over_images, ctx.group)
        grad_images, grad_texts = torch.zeros_like(images), torch.zeros_like(texts)
        for i, j in tiles(len(images), len(texts)):
            s = masked_similarities(images[i], texts[j], scale, image_ids[i], text_ids[j])
            g = (s - over_images[j]).exp_().mul_(grad_over_images[j])
            g.addcmul_(s.sub_(over_texts[i, None]).exp_(), grad_over_texts[i, None])
            grad_images[i].addmm_(g, texts[j])
            grad_texts[j].addmm_(g.T, images[i])
        grad_images *= scale
        grad_texts *= scale
        if ctx.group is not None:
            dist.all_reduce(grad_texts, group=ctx.group)
        return grad_images, grad_texts[ctx.own], (images * grad_images).sum().reshape(t.shape), None, None, None


def tiles(rows, columns):
    for i in range(0, rows, TILE):
        for j in range(0, columns, TILE):
            yield slice(i, i + TILE), slice(j, j + TILE)


def masked_similarities(images, texts, scale, image_ids, text_ids):
    """exp(t) X Y^t of a tile, with -inf where the caption belongs to the image."""
    s = (images @ texts.T).mul_(scale)
    return s.masked_fill_(image_ids[:, None] == text_ids, -math.inf)


def add_logsumexp(running_max, running_sum, s, dim):
    """Take a tile into the running maxima and sums of exponentials, in place."""
    new_max = torch.maximum(running_max, s.amax(dim))
    running_sum *= (running_max - new_max).exp()
    running_sum += (s - new_max.unsqueeze(dim)).exp_().sum(dim)
    running_max.copy_(new_max)


# ---- several processes ------------------------------------------------------------------------------------------


def world():
    """The group of all processes, or None if this one is alone."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None


def counts_of(count, device, group):
    """How many rows each process holds, a list."""
    if group is None:
        return [count]
    own = torch.tensor([count], device=device)
    counts = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own, group)
    return torch.cat(counts).tolist()


def counts_before(count, device, group):
    """How many rows each process of lower rank holds."""
    return [] if group is None else counts_of(count, device, group)[: dist.get_rank(group)]


def total(count, device, group):
    return sum(counts_of(count, device, group))


def total_weight(weights, group):
    """The sum of the weights of all processes, a scalar tensor."""
    summed = weights.sum()
    if group is not None:
        dist.all_reduce(summed, group=group)
    return summed


def gather(x, group):
    """The rows of all processes in the order of their ranks, without gradient; they may differ in number."""
    if group is None:
        return x
    counts = counts_of(len(x), x.device, group)
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


# ---- one step's gradient ----------------------------------------------------------------------------------------


def contrastive_backward(model, micro_batches, device, dtype=None, scaler=None, generated=None):
    """Add the gradient of the batch's loss, times the scale of `scaler` if any, to the parameters; returns the loss.

    A batch in several micro-batches is encoded twice with gradient caching (Gao et al. 2021, arXiv:2101.06983):
    first without gradient, for the embeddings and the loss's gradient with respect to them; then again with
    gradient, one micro-batch at a time, each pushing its share back through the encoders. Dropout draws the same
    masks both times. The result is the whole batch's gradient, the temperature's included, exactly, where a
    sample's embedding depends on that sample alone. BatchNorm in training mode couples the samples of a
    micro-batch: then it is the exact gradient of the loss with statistics taken per micro-batch, and the running
    statistics move once per step, by the mean over the micro-batches.

    `generated`, if not None, is a list of micro-batches of generated pictures, with their `weights` (B,). They join
    the others in the one loss, in which pictures with the same of `image_ids` are siblings; BatchNorm's running
    statistics stay those of real pictures.
    """
    if len(micro_batches) == 1 and generated is None:
        batch = to_device(micro_batches[0], device)
        with autocast(device, dtype):
            image_embeddings, text_embeddings = model(batch)
        loss = contrastive_loss(image_embeddings, text_embeddings, model.logit_scale, batch["image_index"], world())
        (scaler.scale(loss) if scaler else loss).backward()
        return loss.detach()

    parts, cached = [*micro_batches, *(generated or [])], len(micro_batches) > 1
    embeddings, random_states = [], []
    for number, batch in enumerate(parts):
        # The running statistics move here only in the one case in which there is no second pass.
        keep = cached or number >= len(micro_batches)
        random_states.append(random_state(device))
        statistics = batchnorm_statistics(model, 1, "kept") if keep else contextlib.nullcontext()
        with statistics, torch.set_grad_enabled(not cached), autocast(device, dtype):
            embeddings.append(model(to_device(batch, device)))
    image_embeddings = torch.cat([images for images, _ in embeddings])
    text_embeddings = torch.cat([texts for _, texts in embeddings])
    if cached:
        image_embeddings.requires_grad_(), text_embeddings.requires_grad_()
    known = describe_parts(parts, embeddings, device, siblings=generated is not None)
    loss = contrastive_loss(image_embeddings, text_embeddings, model.logit_scale, **known)
    (scaler.scale(loss) if scaler else loss).backward()
    if not cached:
        return loss.detach()
    image_grads = image_embeddings.grad.split([len(images) for images, _ in embeddings])
    text_grads = text_embeddings.grad.split([len(texts) for _, texts in embeddings])
    del embeddings

    def push_back(batch, state, *output_grads):
        set_random_state(state, device)
        with autocast(device, dtype):
            outputs = model(to_device(batch, device))
        grads = [(x, grad) for x, grad in zip(outputs, output_grads, strict=True) if x.requires_grad]
        torch.autograd.backward([x for x, _ in grads], [grad for _, grad in grads])

    second_pass = list(zip(parts, random_states, image_grads, text_grads, strict=True))
    with batchnorm_statistics(model, len(micro_batches), "averaged") as next_micro_batch:
        for part in second_pass[: len(micro_batches)]:
            next_micro_batch()
            push_back(*part)
    with batchnorm_statistics(model, 1, "kept"):
        for part in second_pass[len(micro_batches) :]:
            push_back(*part)
    return loss.detach()


def describe_parts(parts, embeddings, device, siblings):
    """What `contrastive_loss` has to know about the concatenated parts of a batch, as its keyword arguments."""
    image_index, rows = [], 0
    for part, (images, _) in zip(parts, embeddings, strict=True):
        image_index.append(part["image_index"].to(device, non_blocking=True) + rows)
        rows += len(images)
    known = {"image_index": torch.cat(image_index), "group": world()}
    if siblings:
        ids = [part["image_ids"].to(device, non_blocking=True) for part in parts]
        weights = [
            part["weights"].to(device) if "weights" in part else torch.ones(len(images), device=device)
            for part, (images, _) in zip(parts, embeddings, strict=True)
        ]
        known |= {"image_ids": torch.cat(ids), "weights": torch.cat(weights)}
    return known


def to_device(batch, device):
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


@contextlib.contextmanager
def batchnorm_statistics(model, micro_batches, mode):
    """BatchNorm's running statistics over several micro-batches: "kept", or moved once by their mean ("averaged").

    Yields a function to call before each micro-batch.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    before = [
        (m.momentum, m.running_mean.clone(), m.running_var.clone(), m.num_batches_tracked.clone()) for m in layers
    ]
    seen = 0

    def next_micro_batch():
        nonlocal seen
        seen += 1
        for layer in layers:
            layer.momentum = 0.0 if mode == "kept" else 1 / seen  # 1/n: the mean of those seen so far

    if mode == "kept":
        next_micro_batch()
    try:
        yield next_micro_batch
    finally:
        for layer, (momentum, mean, variance, batches) in zip(layers, before, strict=True):
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(batches + (mode == "averaged"))
            if mode == "averaged":
                layer.running_mean.copy_(torch.lerp(mean, layer.running_mean, momentum))
                layer.running_var.copy_(torch.lerp(variance, layer.running_var, momentum))


def random_state(device):
    own = {"cuda": lambda: torch.cuda.get_rng_state(device), "mps": torch.mps.get_rng_state}
    return torch.get_rng_state(), own[device.type]() if device.type in own else None


def set_random_state(state, device):
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state[1])


# ---- retrieval metrics ------------------------------------------------------------------------------------------


@torch.no_grad()
def retrieval_metrics(image_embeddings, text_embeddings, image_index):
    """Recall at 1, 5 and 10 (per cent), median ranks and rsum, by the five-caption protocol.

    Every caption is a query for its one image; an image's query is a hit when any of its own captions is in the
    top K. Candidates with an equal score count as ranked before the right one, so a collapsed model earns nothing.

    Args:
        image_embeddings: (N, D), text_embeddings: (T, D).
        image_index: (T,) the row of each caption's image.
    """
    image_index = torch.as_tensor(image_index, device=image_embeddings.device)
    number, device = len(image_embeddings), image_embeddings.device
    best = torch.full((number,), -math.inf, device=device)  # each image's best own caption
    own = torch.empty(len(text_embeddings), device=device)  # each caption's score with its image

    def tiles():
        """No (N, T) matrix: (captions, images, their scores, which of them belong together) in parts."""
        for start in range(0, len(text_embeddings), TILE):
            texts = slice(start, start + TILE)
            for first in range(0, number, IMAGE_TILE):
                images = slice(first, first + IMAGE_TILE)
                scores = text_embeddings[texts] @ image_embeddings[images].T
                owner = image_index[texts] - first
                rows = ((owner >= 0) & (owner < scores.shape[1])).nonzero()[:, 0]
                yield texts, images, scores, (rows, owner[rows])

    for texts, images, scores, (rows, columns) in tiles():
        found = scores[rows, columns]
        own[texts][rows] = found
        best[images].scatter_reduce_(0, columns, found, "amax")
    not_before = torch.zeros(len(text_embeddings), dtype=torch.int64, device=device)
    others_before = torch.zeros(number, dtype=torch.int64, device=device)
    for texts, images, scores, belong in tiles():
        not_before[texts] += (scores < own[texts][:, None]).sum(1)
        before = ~(scores < best[images])
        before[belong] = False
        others_before[images] += before.sum(0)
    metrics = {}
    for name, ranks in (("image_to_text", others_before + 1), ("text_to_image", number - not_before)):
        for k in (1, 5, 10):
            metrics[f"{name}_R@{k}"] = 100 * int((ranks <= k).sum()) / len(ranks)
        metrics[f"{name}_median_rank"] = float(np.median(ranks.cpu().numpy()))
    metrics["rsum"] = sum(value for name, value in metrics.items() if "R@" in name)
    return metrics


# ---- saving and loading -----------------------------------------------------------------------------------------


def save_model(model, folder):
    """Write `folder` (model.safetensors, config.json, tokenizer/): all that inference needs, without a network."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        model.tokenizer.save_pretrained(folder / "tokenizer")
    content = {
        "settings": asdict(model.config),
        "image_encoder": model.image_recipe,
        "text_encoder": model.text_encoder.recipe,
    }
    write_json(folder / "config.json", content)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    (folder / "model.safetensors.tmp").replace(folder / "model.safetensors")


def read_saved(folder):
    """The folder that holds the model of a run (its best/, or itself) and its config.json; raises InputError."""
    folder = Path(folder)
    folder = folder / "best" if (folder / "best").is_dir() else folder
    for name in ("config.json", "model.safetensors", "tokenizer"):
        if not (folder / name).exists():
            raise InputError(f"{folder} is not a trained run: it holds no {name}")
    content = read_json(folder / "config.json")
    for part, names in (
        ("settings", [field.name for field in fields(Config)]),
        ("image_encoder", ["architecture", "mean", "std"]),
        ("text_encoder", ["model_type"]),
    ):
        for name in names:
            if name not in (content.get(part) or {}):
                raise InputError(f"{folder / 'config.json'} lacks {part}.{name}: is it from another version?")
    return folder, content


def load_model(folder, device="cpu"):
    """The CLIP saved in `folder` (a run, or its best/), in evaluation mode; raises InputError.

    Only JSON, a tokenizer file and safetensors are read: nothing that could run code.
    """
    folder, content = read_saved(folder)
    try:
        state = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{folder / 'model.safetensors'} is not a safetensors file ({error})") from None
    tokenizer = load_tokenizer(folder / "tokenizer")
    try:
        model = CLIP(build_config(content["settings"]), tokenizer, saved=content)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder / 'config.json'} does not describe a model that can be built ({error})") from None
    own = model.state_dict()
    for name in [*own, *state]:
        if name not in state or name not in own or own[name].shape != state[name].shape:
            problem = "lacks" if name not in state else "has an unknown" if name not in own else "has a misshapen"
            raise InputError(f"{folder / 'model.safetensors'} {problem} tensor {name}")
    model.load_state_dict(state)
    return model.to(device).eval()
