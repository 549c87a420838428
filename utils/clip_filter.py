"""Generated pairs: the selection of captions, and the CLIP filter for the images."""

import torch

from config import InputError
from utils.captions import group_captions, read_caption_list, text_ids
from utils.device import autocast
from utils.distributed import rank_and_world_size
from utils.embed import embed_captions

NUM_CAPTIONS = 100  # captions ranked per generated image: its own and 99 distractors


class CLIPFilter:
    """Keeps generated images whose caption ranks in the top k, by `clip`, against its hardest distractors.

    Distractors are other captions, of other image ids. The hardest are the most similar: with easy ones, images
    with only the right colours would be kept.

    captions: T captions; embeddings: (T, D) and image_ids: (T,) of them.
    """

    def __init__(self, clip, captions, embeddings, image_ids, pairs, config, amp_dtype):
        self.clip, self.top_k, self.amp_dtype = clip, config.gan_filter_top_k, amp_dtype
        self.embeddings, self.image_ids = self.distractors, self.distractor_ids = embeddings, image_ids
        self.text_ids = self.distractor_texts = torch.from_numpy(text_ids(captions)).to(image_ids.device)
        # Too few captions, or too different from each other, to be the only distractors.
        if config.gan_captions and self.top_k < NUM_CAPTIONS:
            self.distractors = torch.cat([embeddings, embed_captions(clip, pairs.captions)])  # (R, D)
            self.distractor_ids = torch.cat([image_ids, torch.from_numpy(pairs.image_index).to(image_ids.device)])
            texts = torch.from_numpy(text_ids(pairs.captions)).to(image_ids.device)
            self.distractor_texts = torch.cat([self.text_ids, texts])

    @torch.no_grad()
    def __call__(self, images, captions):
        """(B,) booleans for images (B, 3, size, size) in [0, 1], generated for the captions with these indices (B,)."""
        if self.top_k >= NUM_CAPTIONS:
            return torch.ones(len(images), dtype=torch.bool, device=images.device)
        with autocast(images.device, self.amp_dtype):
            image_embeddings = self.clip.encode_image(images)
        similarity = self.embeddings[captions] @ self.distractors.T  # (B, R)
        similarity.masked_fill_(self.image_ids[captions][:, None] == self.distractor_ids, -2)
        similarity.masked_fill_(self.text_ids[captions][:, None] == self.distractor_texts, -2)
        similarity, hardest = similarity.topk(min(NUM_CAPTIONS - 1, similarity.shape[1]))  # (B, 99)
        scores = torch.einsum("bd,bkd->bk", image_embeddings, self.distractors[hardest])
        own_scores = (image_embeddings * self.embeddings[captions]).sum(1, keepdim=True)
        before = ~(scores < own_scores)  # also where a score is not a number
        return (before & (similarity > -2)).sum(1) < self.top_k


def kept_rows(kept):
    """Row indices (R,) and which of these rows take part in the loss, for booleans (B,).

    On a CPU they are the true rows. On a GPU the host would have to wait for their number: there R is B, and copies of
    true rows that take no part replace the false ones.
    """
    if kept.device.type == "cpu":
        rows = kept.nonzero()[:, 0]
        return rows, torch.ones_like(rows, dtype=torch.bool)
    number, count = torch.arange(len(kept), device=kept.device), kept.sum()
    true_first = kept.to(torch.uint8).argsort(descending=True, stable=True)
    return true_first[number % count.clamp(min=1)], number < count


def captions_to_generate(config, pairs, words, mentions):
    """The captions of `config.gan_captions` or `pairs` that contain one of `words`, and their image ids, two lists.

    No words: all captions. The id is the index of the training image that has a caption of the same group, or
    negative. Raises InputError for fewer than two captions.
    """
    captions, image_ids = pairs.captions, pairs.image_index.tolist()
    if config.gan_captions:
        captions, groups = read_caption_list(config.gan_captions)
        image_ids = group_captions(captions, groups, pairs)
    kept = select_captions(captions, words, mentions)
    return [captions[j] for j in kept], [image_ids[j] for j in kept]


def select_captions(captions, words, mentions):
    kept = [number for number, caption in enumerate(captions) if mentions(caption, words)]
    if len(kept) < 2:
        raise InputError(f"{len(kept)} captions contain a word of the GAN's subset ({words}): use other captions")
    return kept


def check_settings(config, mentions):
    """Raise InputError for invalid settings of generated pairs before any training starts."""
    images = config.batch_size // rank_and_world_size()[1]
    if config.gan_ratio and round(config.gan_ratio * images) < 2:
        raise InputError(
            f"gan_ratio is {config.gan_ratio:g}, which gives fewer than two generated images per {images} real ones: "
            "use a larger gan_ratio or batch_size, or pass --gan none"
        )
    if config.gan == "joint" and not config.gan_run and config.gan_subset:
        raise InputError("gan_subset requires --gan pairs: in joint training CLIP and the GAN share the images")
    if config.gan_captions:
        words = "" if config.gan_run else config.gan_subset
        select_captions(read_caption_list(config.gan_captions)[0], words, mentions)
