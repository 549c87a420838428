"""CLIP (Radford et al. 2021, arXiv:2103.00020): the model, the contrastive loss, retrieval metrics, saving and loading.

Shapes: B images with T captions, L tokens, F width of an encoder, D width of the shared space, N images of a gallery.
"""

import math
import shutil
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from config import DivergenceError, InputError, build_config
from modules import (
    ImageEncoder,
    ProjectionHead,
    TextEncoder,
    build_image_encoder,
    build_text_backbone,
    build_text_encoder,
    freeze_stages,
)
from utils.bootstrap import bootstrap_intervals
from utils.cli import one_line
from utils.device import full_float32
from utils.distributed import all_gather_rows, row_counts
from utils.files import atomic_write, read_json, write_json
from utils.model_checks import check_encoders
from utils.pretrained import load_tokenizer
from utils.runs import model_folder
from utils.saved_model import build_empty, check_files, checked_content, read_header, read_tensors
from utils.tiled_loss import EqualTexts, dropped_pairs, tiled_contrastive_loss

MAX_LOGIT_SCALE = math.log(100)  # section 2.5: similarities are multiplied by at most 100
MAX_DENSE_LOGITS = 2**20  # larger (T, T) logit matrices are computed in tiles, which is then faster and smaller
TILE, IMAGE_TILE = 2048, 16_384  # captions and images per similarity matrix in the evaluation


class CLIP(nn.Module):
    """Image encoder, text encoder, two projection heads and a temperature, together with the matching tokenizer.

    Args:
        tokenizer: used instead of the one named in the config.
        saved: contents of a config.json written by `save_model`; if given, nothing is looked up or downloaded.

    Raises InputError for an encoder or a tokenizer that cannot be found.
    """

    def __init__(self, config, tokenizer=None, saved=None):
        super().__init__()
        self.config = config
        image_projection = text_projection = None
        if saved is None:
            self.tokenizer = tokenizer or load_tokenizer(config.text_tokenizer)
            self.image_encoder, self.image_config, image_projection = build_image_encoder(
                config.model_name, config.size, config.encoder_flag("pretrained", "image")
            )
            self.text_encoder, text_projection = build_text_encoder(
                config.text_encoder_model,
                config.text_pooling,
                config.encoder_flag("pretrained", "text"),
                len(self.tokenizer),
                config.text_layers,
                config.text_width,
            )
        else:
            self.tokenizer, self.image_config = tokenizer, saved["image_encoder"]
            self.image_encoder = ImageEncoder(size=config.size, **saved["image_encoder"])
            self.text_encoder = TextEncoder(build_text_backbone(saved["text_encoder"]), config.text_pooling)
        head = (config.projection_dim, config.num_projection_layers, config.dropout)
        self.image_projection = ProjectionHead(self.image_encoder.width, *head, self.image_encoder.projection_bias)
        self.text_projection = ProjectionHead(self.text_encoder.width, *head)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # t
        for encoder in ("image", "text"):
            getattr(self, f"{encoder}_encoder").requires_grad_(config.encoder_flag("trainable", encoder))
        freeze_stages(self.image_encoder.backbone, config.frozen_stages)
        if config.num_projection_layers == 1:  # deeper heads are trained from scratch
            self.load_pretrained_projections(image_projection, text_projection)

    def forward(self, batch):
        """Embed a `dataset.Batch`: float32 unit vectors, (B, D) for its images and (T, D) for its captions.

        An encoder whose precomputed features are in the batch is skipped.
        """
        image_features, text_features = batch.image_features, batch.text_features
        if image_features is None:
            image_features = self.image_encoder(batch.images)  # I_f: (B, 3, H, W) -> (B, F)
        image_embeddings = self.project_image(image_features)  # I_e: (B, F) -> (B, D)
        if text_features is None:
            tokens = batch.input_ids, batch.attention_mask
            text_features = self.text_encoder(*tokens, batch.text_parts)  # T_f: (T, L) -> (T, F)
        text_embeddings = self.project_text(text_features)  # T_e: (T, F) -> (T, D)
        return image_embeddings, text_embeddings

    def project_image(self, features):
        """(B, F) -> (B, D) unit vectors, float32."""
        return F.normalize(self.image_projection(features).float(), dim=-1)

    def project_text(self, features):
        """(T, F) -> (T, D) unit vectors, float32."""
        return F.normalize(self.text_projection(features).float(), dim=-1)

    def encode_image(self, images):
        """(B, 3, H, W) uint8, or float in [0, 1] -> (B, D) unit vectors, float32."""
        return self.project_image(self.image_encoder(images))

    def encode_text(self, input_ids, attention_mask):
        """(T, L) token ids and mask -> (T, D) unit vectors, float32."""
        return self.project_text(self.text_encoder(input_ids, attention_mask))

    @property
    def saved_config(self):
        """The content of config.json, from which the model is rebuilt."""
        return {
            "settings": asdict(replace(self.config, resume=False)),
            "image_encoder": self.image_config,
            "text_encoder": self.text_encoder.model_config,
        }

    @property
    def device(self):
        return self.logit_scale.device

    @property
    def max_length(self):
        """Maximum caption length in tokens: the setting, or the text encoder's limit if that is lower."""
        return min(self.config.max_length, self.text_encoder.max_tokens)

    def train(self, mode=True):
        """Set training mode; frozen encoders and frozen BatchNorm layers stay in evaluation mode."""
        super().train(mode)
        for encoder in ("image", "text"):
            if not self.config.encoder_flag("trainable", encoder):
                getattr(self, f"{encoder}_encoder").eval()
        if self.config.freeze_batchnorm:
            for module in self.image_encoder.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    @torch.no_grad()
    def clamp_temperature(self):
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    @torch.no_grad()
    def load_pretrained_projections(self, image, text):
        """Copy the linear projections of a pretrained CLIP (`PretrainedProjection` or None), and its temperature if
        both encoders come from one; raises InputError if the widths do not match."""
        if image and text and len(image.weight) != len(text.weight):
            raise InputError(
                f"model_name {self.config.model_name} projects to {len(image.weight)} dimensions, text_encoder_model "
                f"{self.config.text_encoder_model} to {len(text.weight)}: use the two encoders of one CLIP"
            )
        for name, head, pretrained in (
            (self.config.model_name, self.image_projection, image),
            (self.config.text_encoder_model, self.text_projection, text),
        ):
            if pretrained is None:
                continue
            if len(pretrained.weight) != self.config.projection_dim:
                raise InputError(
                    f"projection_dim is {self.config.projection_dim}, but {name} comes with a projection to "
                    f"{len(pretrained.weight)} dimensions: pass --projection_dim {len(pretrained.weight)}"
                )
            head.layers[-1].weight.copy_(pretrained.weight)
            if head.layers[-1].bias is not None:
                head.layers[-1].bias.copy_(pretrained.bias)
        if image and text and text.logit_scale is not None:
            self.logit_scale.fill_(text.logit_scale)


# ---- the loss ---------------------------------------------------------------------------------------------------


def contrastive_loss(
    image_embeddings,
    text_embeddings,
    logit_scale,
    image_index=None,
    image_ids=None,
    weights=None,
    group=None,
    text_ids=None,
):
    """The symmetric contrastive loss of CLIP, a float32 scalar.

    With one caption per image this is figure 3 of the paper: the mean cross entropy over the rows and over the columns
    of exp(t) I T^T. With several, each caption of an image is a positive, and the others are masked: captions of one
    image are never each other's negatives. Nor is a caption that equals one of the image's.

    Args:
        image_embeddings: (B, D) unit vectors.
        text_embeddings: (T, D) unit vectors.
        logit_scale: t, the logarithm of the inverse temperature; a scalar.
        image_index: (T,) the row of the image that each caption belongs to; None: caption j belongs to image j.
        image_ids: (B,) images with the same id, and their captions, are never each other's negatives; None: all differ.
            `tiled_loss.DROPPED`: the image and its captions, of weight 0, are nobody's negatives.
        weights: (B,) weight of each image and its captions in the means; None: all 1.
        group: process group over which the batch is spread; see `tiled_contrastive_loss`.
        text_ids: (T,) captions with the same id are equal; None: all differ.
    """
    device = image_embeddings.device
    if image_index is None:
        if len(image_embeddings) != len(text_embeddings):
            raise ValueError(f"{len(image_embeddings)} images and {len(text_embeddings)} captions: pass image_index")
        image_index = torch.arange(len(text_embeddings), device=device)
    exact = full_float32() if device.type == "cuda" else nullcontext()
    with torch.autocast(device.type, enabled=False), exact:
        dtype = torch.promote_types(image_embeddings.dtype, torch.float32)  # float64 stays float64
        images, texts, t = image_embeddings.to(dtype), text_embeddings.to(dtype), logit_scale.to(dtype)
        with_dropped = weights is not None
        weights = torch.ones_like(images[:, 0]) if weights is None else weights
        image_ids = torch.arange(len(images), device=device) if image_ids is None else image_ids
        if group is not None or len(texts) ** 2 > MAX_DENSE_LOGITS:
            equal = None
            if text_ids is not None:
                all_text_ids = all_gather_rows(text_ids, group, row_counts(len(texts), group))
                equal = EqualTexts(image_index, text_ids, all_text_ids)
            return tiled_contrastive_loss(images, texts, t, image_index, image_ids, weights, group, with_dropped, equal)
        return dense_contrastive_loss(images, texts, t, image_index, image_ids, weights, with_dropped, text_ids)


def dense_contrastive_loss(images, texts, t, image_index, image_ids, weights, with_dropped=False, text_ids=None):
    """`contrastive_loss` from the whole similarity matrix."""
    captions = torch.arange(len(texts), device=images.device)
    logits = t.exp() * images @ texts.T  # (B, T)
    positive = torch.arange(len(images), device=images.device)[:, None] == image_index  # (B, T)
    masked = image_ids[:, None] == image_ids[image_index]  # (B, T)
    if with_dropped:
        masked |= dropped_pairs(image_ids, image_ids[image_index])
    if text_ids is not None:
        same_text = (text_ids[:, None] == text_ids).to(logits.dtype)  # (T, T)
        masked |= torch.zeros_like(logits.detach()).index_add_(0, image_index, same_text) > 0
    masked &= ~positive
    other_captions = (image_index[:, None] == image_index) & (captions[:, None] != captions)  # (T, T)
    # One row per caption, against all images; one row per (image, own caption), against other images' captions.
    text_logits = logits.T.masked_fill(masked.T, -math.inf)  # (T, B)
    image_logits = logits[image_index].masked_fill(masked[image_index] | other_captions, -math.inf)  # (T, T)
    text_loss = F.cross_entropy(text_logits, image_index, reduction="none")  # (T,)
    image_loss = F.cross_entropy(image_logits, captions, reduction="none")  # (T,)
    image_weights, text_weights = (weights / positive.sum(1))[image_index], weights[image_index]
    image_loss = (image_weights * image_loss).sum() / weights.sum()
    text_loss = (text_weights * text_loss).sum() / text_weights.sum()
    return (image_loss + text_loss) / 2


# ---- retrieval metrics ------------------------------------------------------------------------------------------


@torch.no_grad()
@full_float32()
def retrieval_metrics(image_embeddings, text_embeddings, image_index, num_draws=0, text_ids=None):
    """Recall at 1, 5 and 10 (percent), median ranks and rsum, under the five-caption protocol, as a dict.

    Every caption is a query for its one image; the query of an image is a hit if any of its own captions is in the
    top K. Candidates with an equal score rank before the right one, so a collapsed model scores zero.

    Args:
        image_embeddings: (N, D), text_embeddings: (T, D).
        image_index: (T,) the row of each caption's image.
        num_draws: bootstrap draws for "ci95", the half widths of the recalls' 95% confidence intervals; 0: none.
        text_ids: (T,) ids of equal captions, or None. With ids, "equal_captions" holds the same metrics where a caption
            belongs to every image that has an equal one.

    Raises DivergenceError for embeddings that are not finite.
    """
    for name, embeddings in (("image", image_embeddings), ("text", text_embeddings)):
        if not embeddings.isfinite().all():
            raise DivergenceError(f"{name} embeddings are not finite: lower the learning rates, or use float32")
    image_index = torch.as_tensor(image_index, device=image_embeddings.device)
    metrics = metrics_of(rank_positives(image_embeddings, text_embeddings, image_index), image_index, num_draws)
    if text_ids is not None:
        text_ids = torch.as_tensor(text_ids, device=image_index.device)
        equal = EqualTexts(image_index, text_ids, text_ids)
        ranks = rank_positives(image_embeddings, text_embeddings, image_index, equal)
        metrics["equal_captions"] = metrics_of(ranks, image_index, num_draws)
    return metrics


def rank_positives(image_embeddings, text_embeddings, image_index, equal=None):
    """The rank of each image's best own caption among all, (N,), and of each caption's best image, (T,), from 1 on.

    equal: `EqualTexts`, whose pairs are positives, too, or None.
    """
    num_images, device = len(image_embeddings), image_embeddings.device
    best = torch.full((num_images,), -math.inf, device=device)  # the score of each image's best own caption
    own = torch.full((len(text_embeddings),), -math.inf, device=device)  # of each caption's best image

    def tiles():
        """Yield tiles of the (T, N) matrix: caption slice, image slice, scores, and positions of the positives."""
        for start in range(0, len(text_embeddings), TILE):
            texts = slice(start, start + TILE)
            for first in range(0, num_images, IMAGE_TILE):
                images = slice(first, first + IMAGE_TILE)
                scores = text_embeddings[texts] @ image_embeddings[images].T
                columns = image_index[texts] - first
                rows = ((columns >= 0) & (columns < scores.shape[1])).nonzero()[:, 0]
                columns = columns[rows]
                if equal is not None:
                    image_rows, captions, pairs = equal.block(images, texts)
                    a, b = pairs.nonzero(as_tuple=True)
                    rows, columns = torch.cat([rows, captions[b]]), torch.cat([columns, image_rows[a, 0]])
                yield texts, images, scores, (rows, columns)

    for texts, images, scores, (rows, columns) in tiles():
        found = scores[rows, columns]
        own[texts].scatter_reduce_(0, rows, found, "amax")
        best[images].scatter_reduce_(0, columns, found, "amax")
    image_ranks = torch.ones(num_images, dtype=torch.int64, device=device)
    text_ranks = torch.ones(len(text_embeddings), dtype=torch.int64, device=device)
    for texts, images, scores, positives in tiles():
        for ranks, part, scores_of_best, dim in (
            (text_ranks, texts, own[texts][:, None], 1),
            (image_ranks, images, best[images], 0),
        ):
            before = scores >= scores_of_best
            before[positives] = False
            ranks[part] += before.sum(dim)
    return image_ranks, text_ranks


def metrics_of(ranks, image_index, num_draws=0):
    """The metrics of the ranks of N images and T captions; see `retrieval_metrics`."""
    metrics, hits, num_images = {}, {}, len(ranks[0])
    owners = torch.arange(num_images), image_index.cpu()
    for name, ranks_, owner in zip(("image_to_text", "text_to_image"), ranks, owners, strict=True):
        values = ranks_.cpu().numpy()
        for k in (1, 5, 10):
            hits[f"{name}_R@{k}"] = owner.numpy(), values <= k
            metrics[f"{name}_R@{k}"] = 100 * int((values <= k).sum()) / len(values)
        metrics[f"{name}_median_rank"] = float(np.median(values))
    metrics["rsum"] = sum(value for name, value in metrics.items() if "R@" in name)
    if num_draws:
        metrics["ci95"] = bootstrap_intervals(hits, num_images, num_draws)
    return metrics


def format_metrics(metrics):
    """The retrieval metrics as a small table, with the half widths of their 95% confidence intervals if known."""
    ci95 = metrics.get("ci95", {})

    def value(name):
        return f"{metrics[name]:.1f}" + (f" ± {ci95[name]:.1f}" if name in ci95 else "")

    lines = [f"{'':<15}{'R@1':>12}{'R@5':>12}{'R@10':>12}{'median rank':>13}"]
    for way in ("image_to_text", "text_to_image"):
        values = "".join(f"{value(f'{way}_R@{k}'):>12}" for k in (1, 5, 10))
        lines.append(f"{way.replace('_', ' '):<15}{values}{metrics[f'{way}_median_rank']:13.0f}")
    if "equal_captions" in metrics:
        lines += [f"rsum {value('rsum')}", "\nwith every image that has the caption as correct:"]
        return "\n".join([*lines, format_metrics(metrics["equal_captions"])])
    return "\n".join([*lines, f"rsum {value('rsum')}"])


# ---- saving and loading -----------------------------------------------------------------------------------------


def save_model(model, folder):
    """Write `folder` (model.safetensors, config.json, tokenizer/): all that inference needs, without a network."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)  # incomplete
        with atomic_write(folder / "tokenizer", is_folder=True) as temporary:
            model.tokenizer.save_pretrained(temporary)
    write_json(folder / "config.json", model.saved_config)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})


def read_saved_model(folder):
    """The folder of a run's saved model (best/, or the folder itself) and its config.json; raises InputError."""
    folder = model_folder(folder)
    check_files(folder)
    content = read_json(folder / "config.json")
    try:
        return folder, checked_content(content)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None


def load_model(folder, device="cpu"):
    """The CLIP saved in `folder` (a run, or its best/), in evaluation mode; raises InputError.

    Reads only JSON, a tokenizer file and safetensors, none of which can execute code, and never contacts the hub.
    """
    folder, content = read_saved_model(folder)
    path, tokenizer = folder / "model.safetensors", load_tokenizer(folder / "tokenizer")
    header = read_header(path)
    try:
        config = build_config({**content["settings"], "run": str(folder)})  # it may have been moved
        model = build_empty(lambda: CLIP(config, tokenizer, saved=content), header)
        model.load_state_dict(read_tensors(path), assign=True)
        check_encoders(model.eval())
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from error
    except Exception as error:  # what timm and transformers raise for sizes that do not go together
        message = f"{folder / 'config.json'} does not describe a model that can be built ({one_line(error)})"
        raise InputError(message) from error
    return model.to(device).eval()
