"""Generated pictures in CLIP's training: a frozen GAN's (`--gan pairs`) or a GAN's that goes on learning (`joint`).

With theta the parameters of CLIP, its temperature included, phi those of the generator G and psi those of the
discriminator D, a step of `joint` lowers three losses, each for its own parameters alone:

    theta:  CE(real pairs and [G(z, c)] with their captions)                    the contrastive loss, weighted
    psi:    BCE(D(x, c), 1) + BCE(D([G], c), 0) / 2 + BCE(D(x, c'), 0) / 2 + R1     x real, c' eight wrong captions
    phi:    BCE(D(G(z, c), c), 1) + mu (1 - cos(f(G(z, c)), g(c)))              f, g: a slow, frozen copy of CLIP

[.] stops the gradient. What each term reaches:

    term                          theta   phi     psi
    CE of real pairs              yes     -       -
    CE of generated pairs         yes     no      -      else CLIP and G would agree on signs that nobody can see
    BCE and R1 of D               no      no      yes    else CLIP would learn to tell generated pictures from real
    BCE of G                      no      yes     no     it passes through D
    match of G with its caption   no      yes     -      it passes through the frozen copy of CLIP

A plain sum CE + lambda BCE over separate parameters would do nothing: no gradient would pass from one loss to the
other's parameters, and Adam, which divides by the size of the gradients, would cancel lambda. Here the losses meet in
two places: CLIP learns from G's pictures, and G learns from CLIP what matches its caption. For phi only the ratio of
its two terms matters: mu is chosen in each step so that, at the pictures, the gradient of the second is `gan_match`
times as long as that of the first.
"""

import copy
import hashlib
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from clip import autocast, load_model, update_average, world
from config import InputError, gan_run_of
from dataset import TokenStore, load_splits, names_one_of, pad_tokens, read_lines
from gan import (
    GAN,
    PictureStore,
    conditioning_run,
    gan_settings,
    load_checkpoint,
    load_generator,
    match_gradient,
    resize_pictures,
    save_generator,
)
from gan_networks import NOISE
from index import embed_captions

JUDGED_AMONG = 100  # captions from which a trained CLIP must find a picture's own
COPY_DECAY = 0.99  # of the slow copy of CLIP, per step


def gan_folder(config):
    """The run whose GAN is used: the one named, or the one that this run trains before itself."""
    return gan_run_of(config.gan_run) if config.gan_run else Path(config.run) / "first"


def relative_path(path, folder):
    """The way from `folder` to `path`: it stays right when the two are moved together."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive (Windows)
        return Path(path).absolute().as_posix()


def step_seed(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class GeneratedPairs:
    """Captioned pictures of a frozen generator for each step of a training.

    A caption without a photograph is its own group; one of the training captions belongs to its photograph's, so that
    the two, and other pictures for the same captions, never count as each other's negatives. The trained CLIP of the
    GAN's run is the judge: a picture stays if its caption is in the first `gan_gate` of it and the 99 most like it
    among these and the training captions.
    """

    def __init__(self, config, pairs, model, device, dtype):
        self.config, self.device, self.dtype = config, device, dtype
        check_settings(config)
        folder = gan_folder(config)
        self.told_by = conditioning_run(folder)
        self.judge = load_model(self.told_by, device).requires_grad_(False)
        check_split(self.judge.config, pairs)
        self.generator = load_generator(folder / "gan", device)
        captions, image_ids = list(pairs.captions), pairs.image_index.tolist()
        if config.gan_captions:
            captions, groups = read_caption_list(config.gan_captions)
            image_ids = group_captions(captions, groups, pairs)
        kept = naming(captions, (gan_settings(folder / "gan") or {}).get("gan_subset", ""))
        captions, image_ids = [captions[number] for number in kept], [image_ids[number] for number in kept]
        self.image_ids = torch.as_tensor(image_ids, device=device)  # (T,)
        self.embeddings = embed_captions(self.judge, captions, description="embedding captions")  # (T, D)
        self.rivals, self.rival_ids = self.embeddings, self.image_ids  # (R, D), (R,): what the judge chooses from
        if config.gan_captions:  # too few by themselves, perhaps, or all unlike each other
            self.rivals = torch.cat([self.rivals, embed_captions(self.judge, pairs.captions)])
            of_pairs = torch.from_numpy(pairs.image_index).to(device)
            self.rival_ids = torch.cat([self.rival_ids, of_pairs])
        self.tokens, self.pad_id = TokenStore(model.tokenizer, captions, model.max_length), model.tokenizer.pad_token_id
        self.digest = hashlib.sha256(self.tokens.ids.tobytes()).hexdigest()
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # pictures made and kept, this epoch

    @torch.no_grad()
    def micro_batches(self, images, step, progress, rank=0):
        """Generated micro-batches beside `images` real ones, at a share `progress` of the training; None: not now.

        They depend on the seed and the step alone.
        """
        config = self.config
        if not config.gan_ratio or not self.is_active(progress):
            return None
        random = torch.Generator().manual_seed(step_seed(config.seed, step, rank, 1))
        order = torch.randperm(len(self.tokens), generator=random)
        chosen = order[: round(config.gan_ratio * images)]
        if len(chosen) < 2:
            return []
        parts = -(-len(chosen) // (config.micro_batch_size or config.batch_size))
        parts = min(parts, len(chosen) // 2)  # a single picture would be none: see `make`
        made = [self.make(part.to(self.device), random) for part in chosen.tensor_split(max(1, parts))]
        return [batch for batch in made if batch is not None]

    def is_active(self, progress):
        return self.config.gan_start <= progress < self.config.gan_end

    def make(self, chosen, random):
        """One micro-batch of pictures for the captions with these numbers, those that fail the gate left out.

        None if fewer than two are left: BatchNorm would stumble over a single one.
        """
        pictures = self.paint(chosen, random)
        chosen_ids, kept = self.image_ids[chosen], self.passes(pictures, chosen)
        number = kept.sum()
        self.counts += torch.stack([torch.tensor(len(kept), device=self.device), number * (number > 1)])
        chosen, pictures, chosen_ids = chosen[kept], pictures[kept], chosen_ids[kept]
        if len(chosen) < 2:
            return None
        input_ids, attention_mask = pad_tokens([self.tokens[number] for number in chosen.tolist()], self.pad_id)
        return {
            "images": pictures,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "image_index": torch.arange(len(chosen)),
            "image_ids": chosen_ids,
            "weights": torch.full((len(chosen),), self.config.gan_weight, device=self.device),
        }

    def paint(self, chosen, random):
        """(S, 3, size, size) pictures in [0, 1] for the captions with these numbers."""
        noise = torch.randn(len(chosen), NOISE, generator=random).to(self.device)
        with autocast(self.device, self.dtype):
            pictures = (self.generator(noise, self.embeddings[chosen]) + 1) / 2
        return resize_pictures(pictures, self.config.size)

    def passes(self, pictures, chosen):
        """(S,) whether the judge ranks each picture's own caption high enough among the captions most like it.

        Those are captions of other images: beside any others, a picture with the right colours alone would pass.
        """
        with autocast(self.device, self.dtype):
            images = self.judge.encode_image(pictures)
        likeness = self.embeddings[chosen] @ self.rivals.T  # (S, R)
        likeness.masked_fill_(self.image_ids[chosen][:, None] == self.rival_ids, -2)
        likeness, others = likeness.topk(min(JUDGED_AMONG - 1, likeness.shape[1]))  # (S, 99)
        scores = torch.einsum("sd,sod->so", images, self.rivals[others])
        own = (images * self.embeddings[chosen]).sum(1, keepdim=True)
        return ((scores >= own) & (likeness > -2)).sum(1) < self.config.gan_gate

    def end_epoch(self, folder):
        """What is noted about the epoch, a dict."""
        if world():
            dist.all_reduce(self.counts)
        made, kept = self.counts.tolist()
        self.counts.zero_()
        return {"generated": made, "dropped_by_gate": made - kept}

    def state_dict(self):
        return {"counts": self.counts, "captions": self.digest}

    def load_state_dict(self, state):
        if state["captions"] != self.digest:
            raise InputError("gan_captions holds other captions than the run was started with")
        self.counts.copy_(state["counts"])


def check_split(config, pairs):
    """Raise InputError if a GAN's run (its `config`) learned from pictures that are not training pictures here.

    Without official split files another seed splits otherwise: the GAN would have seen this run's test pictures.
    """
    try:
        learned = load_splits(config)["train"].names
    except InputError:
        return  # its data are no longer there to be compared
    foreign = sorted(set(learned) - set(pairs.names))
    if len(foreign) == len(learned):
        raise InputError(
            f"gan_run learned from other pictures ({foreign[0]}, say) than are trained on here: give its data"
        )
    if foreign:
        raise InputError(
            f"gan_run learned from {foreign[0]} and {len(foreign) - 1} more pictures that are not training pictures "
            f"here: give the same data, and its --seed {config.seed}"
        )


def check_settings(config):
    """Raise InputError for settings of generated pictures that cannot be, before anything is trained for them."""
    images = config.batch_size // (dist.get_world_size() if world() else 1)
    if config.gan_ratio and round(config.gan_ratio * images) < 2:
        raise InputError(
            f"gan_ratio is {config.gan_ratio:g}, which of a process's batch of {images} is fewer than two "
            "pictures: give a larger gan_ratio or batch_size, or --gan none"
        )
    if config.gan == "joint" and not config.gan_run and config.gan_subset:
        raise InputError("gan_subset is for --gan pairs: jointly, CLIP and the GAN learn from the same pictures")
    if config.gan_captions:
        naming(read_caption_list(config.gan_captions)[0], "" if config.gan_run else config.gan_subset)


def naming(captions, words):
    """The numbers of the captions that name one of a GAN's words, a list; raises InputError for fewer than two."""
    kept = [number for number, caption in enumerate(captions) if names_one_of(caption, words)]
    if len(kept) < 2:
        raise InputError(f"{len(kept)} captions name what the GAN knows ({words}): give others")
    return kept


def read_caption_list(path):
    """The different captions of a text file and their groups; raises InputError.

    A line is a caption, or the name of a group, a tab, and a caption: those of one group say the same. A caption alone
    is a group by itself.
    """
    if not Path(path).is_file():
        raise InputError(f"gan_captions is {path}, which is not a file: give a text file with one caption a line")
    found = {}
    lines = read_lines(Path(path))
    first = lines[0].lower() if lines else ""
    if first in ("image,caption", "image\tcaption") or re.match(r"[^\t]+\.\w+#\d+\t", first):
        raise InputError(f"gan_captions is {path}, which names images, too: give a text file with one caption a line")
    for line in lines:
        group, tab, caption = line.partition("\t")
        found.setdefault(caption.strip() if tab else line, group if tab else line)
    if len(found) < 2:
        raise InputError(f"{path} holds {len(found)} captions: give at least 2, one a line")
    return list(found), list(found.values())


def group_captions(captions, groups, pairs):
    """For each caption the number of its group: of the training image that has one of its captions, else negative."""
    known = dict(zip(pairs.captions, pairs.image_index.tolist(), strict=True))
    numbers = {group: -1 - number for number, group in enumerate(dict.fromkeys(groups))}
    numbers |= {group: known[caption] for caption, group in zip(captions, groups, strict=True) if caption in known}
    return [known.get(caption, numbers[group]) for caption, group in zip(captions, groups, strict=True)]


class LearningPairs(GeneratedPairs):
    """As `GeneratedPairs`, from a GAN that goes on learning with CLIP: see the objective at the top of this file."""

    def __init__(self, config, pairs, model, device, dtype):
        super().__init__(config, pairs, model, device, dtype)
        folder, architecture = gan_folder(config) / "gan", self.generator.architecture
        if not (folder / "last.pt").exists():
            raise InputError(f"{folder} holds no last.pt, from which a GAN could go on learning: give --gan pairs")
        if (gan_settings(folder) or {}).get("gan_subset"):
            raise InputError(f"{folder} learned from a subset of the pictures, CLIP does not: give --gan pairs")
        self.store = PictureStore(self.judge, pairs, config, architecture.size, device)
        self.gan = GAN(architecture, self.store.embeddings, config.gan_lr, device, dtype)
        load_checkpoint(self.gan, folder)
        self.gan.set_learning_rate(config.gan_lr)
        self.generator = self.gan.average
        self.copy = copy.deepcopy(model).requires_grad_(False).eval()
        self.all_tokens = TokenStore(model.tokenizer, pairs.captions, model.max_length)

    def learn(self, model, image_ids, step, progress):
        """A step of the discriminator and the generator on the pictures that CLIP has just learned from.

        Only while generated pictures are in use: before, CLIP knows too little to say what matches.
        """
        update_average(self.copy, model, COPY_DECAY, step)
        if not self.is_active(progress):
            return
        images = image_ids.to(self.device)[: self.config.gan_batch_size]
        batch, embed = self.store.batch(images), self.store.embed
        match = partial(match_gradient, self.copy, batch.blend(self.encode), self.config.gan_match, self.dtype)
        self.gan.train_step(batch.real, batch.blend(embed), embed(batch.wrong), match)

    @torch.no_grad()
    def encode(self, captions):
        """(B, D) what the slow copy of CLIP makes of the training captions with these numbers."""
        ids, mask = pad_tokens([self.all_tokens[number] for number in captions.tolist()], self.pad_id)
        with autocast(self.device, self.dtype):
            return self.copy.encode_text(ids.to(self.device), mask.to(self.device))

    def end_epoch(self, folder):
        (folder / "gan").mkdir(exist_ok=True)
        save_generator(self.gan, folder / "gan", told_by=relative_path(self.told_by, folder))
        return super().end_epoch(folder)

    def state_dict(self):
        return {**super().state_dict(), "gan": self.gan.state_dict(), "copy": self.copy.state_dict()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.gan.load_state_dict(state["gan"])
        self.copy.load_state_dict(state["copy"])


def generated_pairs(config, pairs, model, device, dtype):
    """What `--gan` asks for, or None."""
    kinds = {"none": lambda *_: None, "pairs": GeneratedPairs, "joint": LearningPairs}
    return kinds[config.gan](config, pairs, model, device, dtype)
