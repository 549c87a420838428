"""The contrastive loss for large batches and several processes, exact and without the (B, T) similarity matrix.

With s_ij = exp(t) <x_i, y_j>, a caption j of image i has the loss -log(e^s_ij / (e^s_ij + sum of e^negatives)) =
softplus(logsumexp(negatives) - s_ij). Only the log-sum-exps of the negatives need the matrix. They are computed tile
by tile with running maxima and sums (as in Inf-CLIP, Cheng et al. 2024, arXiv:2410.17243), and the backward pass
recomputes each tile, so memory grows with B + T instead of B T.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from utils.device import full_float32
from utils.distributed import all_gather_rows, global_sum, row_counts, rows_before

TILE = 2048  # rows and columns of a tile: 16 MiB in float32
LOWEST = -1e30  # in place of -inf, where inf - inf would be NaN
DROPPED = -(2**62)  # the id of images that take no part in the loss; their weight is 0


def tiled_contrastive_loss(
    image_embeddings, text_embeddings, t, image_index, image_ids, weights, group=None, with_dropped=False, equal=None
):
    """Like `clip.contrastive_loss`, for float32 or float64 embeddings (B, D) and (T, D).

    With a process group, each process passes its own images with their captions and gets the loss of its own rows: the
    losses of all processes, and their gradients, add up to those of the whole batch. equal: `EqualTexts` of its images
    and the captions of all processes, or None.
    """
    text_ids, own_weights = image_ids[image_index], weights[image_index]
    row_lse, column_lse = NegativesLogSumExp.apply(
        image_embeddings, text_embeddings, t, image_ids, text_ids, group, with_dropped, equal
    )  # (B,), (T,)
    positives = t.exp() * (image_embeddings[image_index] * text_embeddings).sum(-1)  # (T,)
    image_losses = F.softplus(row_lse[image_index] - positives)  # (T,), one per (image, own caption)
    text_losses = F.softplus(column_lse - positives)  # (T,)
    captions_per_image = weights.new_zeros(len(weights)).index_add_(0, image_index, torch.ones_like(own_weights))
    image_losses = own_weights * (image_losses / captions_per_image[image_index])
    image_total, text_total = global_sum(weights.sum(), group), global_sum(own_weights.sum(), group)
    return (image_losses.sum() / image_total + (own_weights * text_losses).sum() / text_total) / 2


class NegativesLogSumExp(torch.autograd.Function):
    """The log-sum-exp over the negatives of each image, (B,), and of each caption, (T,).

    With a_i, c_j the incoming gradients and r_i, q_j the results, G_ij = a_i exp(s_ij - r_i) + c_j exp(s_ij - q_j),
    dX = exp(t) G Y, dY = exp(t) G^T X and dt = sum_ij G_ij s_ij = sum_i <x_i, dX_i>. Each process computes the tiles
    of its own rows against the captions of all processes.
    """

    @staticmethod
    def forward(ctx, images, texts, t, image_ids, text_ids, group, with_dropped, equal):
        counts = row_counts(len(texts), group)
        scale, start = t.exp(), rows_before(counts, group)
        own = slice(start, start + len(texts))  # this process's captions among all
        texts, text_ids = all_gather_rows(texts, group, counts), all_gather_rows(text_ids, group, counts)
        row_max, column_max = images.new_full((len(images),), LOWEST), images.new_full((len(texts),), LOWEST)
        row_sum, column_sum = torch.zeros_like(row_max), torch.zeros_like(column_max)
        for i, j in tiles(len(images), len(texts)):
            s = negative_logits(images[i], texts[j], scale, image_ids[i], text_ids[j], with_dropped)
            mask_equal(s, equal, i, j)
            add_logsumexp(row_max[i], row_sum[i], s, 1)
            add_logsumexp(column_max[j], column_sum[j], s, 0)
        if group is not None:
            global_max = column_max.clone()
            dist.all_reduce(global_max, dist.ReduceOp.MAX, group)
            column_sum *= (column_max - global_max).exp()
            dist.all_reduce(column_sum, group=group)
            column_max = global_max
        row_lse = (row_max + row_sum.log()).clamp(min=LOWEST)
        column_lse = (column_max + column_sum.log()).clamp(min=LOWEST)
        ctx.save_for_backward(images, texts, t, image_ids, text_ids, row_lse, column_lse)
        ctx.own, ctx.counts, ctx.group, ctx.with_dropped, ctx.equal = own, counts, group, with_dropped, equal
        return row_lse, column_lse[own].clone()

    @staticmethod
    @full_float32()
    def backward(ctx, grad_row_lse, grad_column_lse):
        images, texts, t, image_ids, text_ids, row_lse, column_lse = ctx.saved_tensors
        scale, grad_column_lse = t.exp(), all_gather_rows(grad_column_lse, ctx.group, ctx.counts)
        grad_images, grad_texts = torch.zeros_like(images), torch.zeros_like(texts)
        for i, j in tiles(len(images), len(texts)):
            s = negative_logits(images[i], texts[j], scale, image_ids[i], text_ids[j], ctx.with_dropped)
            mask_equal(s, ctx.equal, i, j)
            g = (s - column_lse[j]).exp_().mul_(grad_column_lse[j])
            g.addcmul_(s.sub_(row_lse[i, None]).exp_(), grad_row_lse[i, None])
            grad_images[i].addmm_(g, texts[j])
            grad_texts[j].addmm_(g.T, images[i])
        grad_images *= scale
        grad_texts *= scale
        if ctx.group is not None:
            dist.all_reduce(grad_texts, group=ctx.group)
        return grad_images, grad_texts[ctx.own], (images * grad_images).sum().reshape(t.shape), *5 * (None,)


def tiles(rows, columns):
    for i in range(0, rows, TILE):
        for j in range(0, columns, TILE):
            yield slice(i, i + TILE), slice(j, j + TILE)


def negative_logits(images, texts, scale, image_ids, text_ids, with_dropped):
    """exp(t) X Y^T of a tile, with -inf where the pair is not a negative."""
    s = (images @ texts.T).mul_(scale)
    masked = image_ids[:, None] == text_ids
    if with_dropped:
        masked |= dropped_pairs(image_ids, text_ids)
    return s.masked_fill_(masked, -math.inf)


class EqualTexts:
    """Which of T captions equal a caption of which of B images, by blocks; only those that occur twice are compared.

    image_index, text_ids: (T',) the image and the text id of the captions of these images; all_text_ids: (T,).
    """

    def __init__(self, image_index, text_ids, all_text_ids):
        values, counts = all_text_ids.unique(return_counts=True)
        repeated = values[counts > 1]
        self.columns = torch.isin(all_text_ids, repeated).nonzero()[:, 0]  # sorted
        self.ids = all_text_ids[self.columns]
        own = torch.isin(text_ids, repeated).nonzero()[:, 0]
        own = own[image_index[own].argsort(stable=True)]
        self.rows, counts = image_index[own].unique_consecutive(return_counts=True)  # sorted
        # (R, K): the text ids of each image, the last one repeated where it has fewer.
        position = torch.arange(int(counts.max()) if len(counts) else 1, device=own.device)
        position = (counts.cumsum(0) - counts)[:, None] + torch.minimum(position, counts[:, None] - 1)
        self.own_ids = text_ids[own][position]
        self.bounds = self.rows.cpu(), self.columns.cpu()

    def block(self, i, j):
        """Image rows (R, 1) and caption columns (C,) within the slices i and j, and which pairs are equal (R, C)."""
        rows, columns = (
            slice(*torch.searchsorted(each, torch.tensor([part.start, part.stop])).tolist())
            for each, part in zip(self.bounds, (i, j), strict=True)
        )
        ids = self.ids[columns]
        equal = torch.zeros((rows.stop - rows.start, len(ids)), dtype=torch.bool, device=ids.device)
        for own in self.own_ids[rows].unbind(1) if equal.numel() else ():
            equal |= own[:, None] == ids
        return (self.rows[rows] - i.start)[:, None], self.columns[columns] - j.start, equal


def mask_equal(s, equal, i, j):
    """Set the logits of a tile to -inf where the caption equals one of the image's, in place."""
    if equal is not None:
        rows, columns, pairs = equal.block(i, j)
        if pairs.numel():
            s[rows, columns] = s[rows, columns].masked_fill(pairs, -math.inf)


def dropped_pairs(image_ids, text_ids):
    """(B, T) booleans: pairs with a dropped image or caption."""
    return (image_ids == DROPPED)[:, None] | (text_ids == DROPPED)


def add_logsumexp(running_max, running_sum, s, dim):
    """Add a tile to the running maxima and sums of exponentials, in place."""
    new_max = torch.maximum(running_max, s.amax(dim))
    running_sum *= (running_max - new_max).exp()
    running_sum += (s - new_max.unsqueeze(dim)).exp_().sum(dim)
    running_max.copy_(new_max)
