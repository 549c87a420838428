"""Text-conditional GAN: generates images from the caption embeddings of a trained CLIP.

`python gan.py --run runs/x` trains the GAN of a run; `python main.py --gan pairs --gan_run runs/x` trains a CLIP on
real and generated images. Generator and discriminator are conditioned on the caption embeddings of the run's CLIP. The
discriminator also sees real images with mismatched captions (Reed et al. 2016, arXiv:1605.05396): without them it
could ignore the captions, and so could the generator.

Shapes: B images, K hard negatives, Z width of the noise, D width of CLIP's shared space, C channels, S resolution.
Images are (B, 3, S, S), in [-1, 1] inside the GAN and in [0, 1] outside.
"""

import contextlib
import copy
import dataclasses
import hashlib
import math
import time
from functools import partial
from pathlib import Path

from config import InputError
from utils.cli import exit_on_input_error, progress_bar, sigterm_as_interrupt
from utils.files import write_json
from utils.gan_settings import SETTINGS, check_split, conditioning_run, gan_settings, parse_gan_config
from utils.runs import gan_run_folder, lock_run, stage_1_folder

if __name__ == "__main__":
    exit_on_input_error(parse_gan_config)()  # before the heavy imports, so that --help and flag errors return at once

import torch
import torch.nn.functional as F
from torch import nn

from clip import load_model
from dataset import SIDED, Batch, TokenStore, derive_seed, filter_pairs, load_splits, mentions, pad_tokens
from utils import gan_data
from utils.captions import text_ids
from utils.clip_filter import CLIPFilter, captions_to_generate, check_settings, kept_rows
from utils.device import autocast, setup_device, to_device
from utils.distributed import all_reduce_sum
from utils.embed import embed_captions
from utils.gan_layers import CONDITION_DIM, NOISE_DIM, CaptionConditioning, DownBlock, UpBlock, leaky, stage_channels
from utils.tiled_loss import DROPPED
from utils.tracking import Tracker

ADAM_BETAS = (0.0, 0.9)  # as in DF-GAN
R1_INTERVAL = 8  # steps; the penalty is multiplied by it (lazy regularisation, StyleGAN2)


class Generator(nn.Module):
    """Similar to DF-GAN (Tao et al. 2022, arXiv:2008.05865): noise and caption modulate every block."""

    def __init__(self, size, width, dim):
        super().__init__()
        self.caption = CaptionConditioning(dim)
        channels = stage_channels(size, width)
        self.bottom = nn.Linear(NOISE_DIM + CONDITION_DIM, channels[0] * 16)
        self.blocks = nn.ModuleList(UpBlock(a, b) for a, b in zip(channels, channels[1:], strict=False))
        self.to_rgb = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, noise, embeddings):
        """Normal noise (B, Z) and caption embeddings (B, D) -> images (B, 3, S, S) in [-1, 1]."""
        condition = torch.cat([noise, self.caption(embeddings)], 1)
        h = self.bottom(condition).view(len(noise), -1, 4, 4).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            h = block(h, condition)
        return torch.tanh(self.to_rgb(leaky(h)).float())


class Discriminator(nn.Module):
    """Logits of (image, caption) pairs: u.h(x) + <V h(x), W e> / sqrt(CONDITION_DIM), with image features h(x).

    Projection discriminator (Miyato and Koyama 2018, arXiv:1802.05637), without BatchNorm, which would mix the images
    of a batch in the gradient penalty.
    """

    penalised = True  # by R1

    def __init__(self, size, width, dim):
        super().__init__()
        self.caption = CaptionConditioning(dim)
        channels = stage_channels(size, width)[::-1]
        self.from_rgb = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(DownBlock(a, b) for a, b in zip(channels, channels[1:], strict=False))
        self.flatten = nn.Linear(channels[-1] * 16, 2 * CONDITION_DIM)
        self.realness = nn.Linear(2 * CONDITION_DIM, 1)
        self.projection = nn.Linear(2 * CONDITION_DIM, CONDITION_DIM)

    def features(self, images):
        """(B, 3, S, S) -> (B, 2 CONDITION_DIM)."""
        h = self.from_rgb(images.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            h = block(h)
        return leaky(self.flatten(leaky(h).flatten(1)))

    def score(self, features, embeddings):
        """Logits (B,), float32, of features (B, .) and captions (B, D); (B, K) of (B, 1, .) and (B, K, D)."""
        features = features.float()
        with torch.autocast(features.device.type, enabled=False):
            match = (self.projection(features) * self.caption(embeddings)).sum(-1) / math.sqrt(CONDITION_DIM)
            return self.realness(features)[..., 0] + match

    def forward(self, images, embeddings):
        return self.score(self.features(images), embeddings)


def build_generator(generator, size, width, dim):
    """A generator, "affine" or "style"; size: S, width: channels at full resolution, dim: D."""
    kind = Generator
    if generator == "style":
        from extras.stylegan import StyleGenerator as kind
    network = kind(size, width, dim)
    network.architecture = {"generator": generator, "size": size, "width": width, "dim": dim}
    return network


def build_discriminator(config, clip, architecture):
    """A discriminator for `config.gan_discriminator`, "convolutional" or "projected"; clip: of the GAN's run."""
    size, width, dim = (architecture[name] for name in ("size", "width", "dim"))
    if config.gan_discriminator == "convolutional":
        return Discriminator(size, width, dim)
    from extras.projected_gan import ProjectedDiscriminator

    return ProjectedDiscriminator(clip.image_encoder, size, dim, clip.config.size)


def discriminator_loss(real, fake, mismatched):
    """Binary cross-entropy of logits, (B, ...): real ones against 1, fake and mismatched ones against 0, half each."""
    return F.softplus(-real).mean() + 0.5 * F.softplus(fake).mean() + 0.5 * F.softplus(mismatched).mean()


def generator_loss(fake):
    """The non-saturating loss: binary cross-entropy of the logits of generated images, (B, ...), against 1."""
    return F.softplus(-fake).mean()


def gradient_penalty(discriminator, images, embeddings):
    """R1 (Mescheder et al. 2018, arXiv:1801.04406): the mean squared norm of the logit's gradient at real pairs."""
    images = images.detach().requires_grad_()
    logits = discriminator(images, embeddings)
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def clip_guidance(clip, texts, weight, amp_dtype, fake, gradient):
    """Gradient of 1 - cosine(clip(fake), texts) at `fake` (B, 3, S, S), with `weight` times the norm of `gradient`.

    `gradient` comes from the discriminator. CLIP encodes augmented images, which suppresses adversarial patterns.
    """
    fake = fake.detach().requires_grad_()
    with autocast(fake.device, amp_dtype):
        images = clip.encode_image(gan_data.resize_images((gan_data.augment(fake) + 1) / 2, clip.config.size))
    distance = (1 - F.cosine_similarity(images, texts)).mean()
    (guidance,) = torch.autograd.grad(distance, fake)
    return weight * gradient.norm() / guidance.norm().clamp(min=1e-12) * guidance


class GAN:
    """Generator, discriminator, their Adam optimizers, and the EMA of the generator, which is used for sampling.

    Both updates of a step use the same generated images.
    """

    PARTS = ("generator", "discriminator", "ema", "generator_optimizer", "discriminator_optimizer")

    def __init__(self, architecture, discriminator, embeddings, lr, device, amp_dtype):
        self.device, self.step = device, 0
        self.amp_dtype = amp_dtype if amp_dtype == torch.bfloat16 else None  # float16 would need a loss scale in R1
        self.generator = build_generator(**architecture)
        self.discriminator = discriminator
        for network in (self.generator, self.discriminator):
            network.caption.fit(embeddings)
            network.to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.generator).requires_grad_(False).eval()
        self.averaged = [list(network.parameters()) for network in (self.ema, self.generator)]
        adam = partial(torch.optim.Adam, betas=ADAM_BETAS, fused=device.type in ("cuda", "cpu"))
        self.generator_optimizer = adam(self.generator.parameters(), lr)
        self.discriminator_optimizer = adam(self.discriminator.parameters(), 2 * lr)

    def train_step(self, real, embeddings, mismatched, guidance=None):
        """One update of both networks; returns scalar statistics, a dict.

        real: (B, 3, S, S) images; embeddings: (B, D) of their captions; mismatched: (B, K, D) of other captions.
        `guidance(fake, gradient)` is added to the gradient at the generated images.
        """
        noise = torch.randn(len(real), NOISE_DIM, device=self.device)
        with autocast(self.device, self.amp_dtype):
            fake = self.generator(noise, embeddings)
        stats = self.discriminator_step(real, embeddings, mismatched, fake.detach())
        stats |= self.generator_step(fake, embeddings, guidance)
        self.update_ema(len(real))
        self.step += 1
        return stats

    def discriminator_step(self, real, embeddings, mismatched, fake):
        with autocast(self.device, self.amp_dtype):
            features = self.discriminator.features(torch.cat([gan_data.augment(real), gan_data.augment(fake)]))
        real_features, fake_features = features.chunk(2)
        real_logits = self.discriminator.score(real_features, embeddings)
        fake_logits = self.discriminator.score(fake_features, embeddings)
        mismatched_logits = self.discriminator.score(real_features[:, None], mismatched)
        total = loss = discriminator_loss(real_logits, fake_logits, mismatched_logits)
        if self.discriminator.penalised and self.step % R1_INTERVAL == 0:
            weight = 0.01 * (real.shape[-1] / 32) ** 3  # gamma / 2: the gradient of larger images has more components
            total = loss + R1_INTERVAL * weight * gradient_penalty(self.discriminator, real, embeddings)
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.discriminator_optimizer.step()
        return {
            "discriminator_loss": loss.detach(),
            "real_above_fake": (real_logits > fake_logits).float().mean(),
            "real_above_mismatched": (real_logits[:, None] > mismatched_logits).float().mean(),
        }

    def generator_step(self, fake, embeddings, guidance=None):
        """Gradients are computed up to the images first, so the discriminator's parameters accumulate none."""
        with autocast(self.device, self.amp_dtype):
            features = self.discriminator.features(gan_data.augment(fake))
        loss = generator_loss(self.discriminator.score(features, embeddings))
        (gradient,) = torch.autograd.grad(loss, fake, retain_graph=True)
        if guidance is not None:
            gradient = gradient + guidance(fake, gradient)
        self.generator_optimizer.zero_grad(set_to_none=True)
        fake.backward(gradient)
        self.generator_optimizer.step()
        return {"generator_loss": loss.detach()}

    @torch.no_grad()
    def update_ema(self, count):
        """The half-life is 5% of the images seen so far, at most 10,000 images (StyleGAN2-ADA)."""
        half_life = min(10_000, 0.05 * (self.step + 1) * count)
        torch._foreach_lerp_(*self.averaged, 1 - 0.5 ** (count / half_life))

    def state_dict(self):
        return {"step": self.step, **{name: getattr(self, name).state_dict() for name in self.PARTS}}

    def load_state_dict(self, state):
        state = {"ema": state.get("average"), **state}  # its name in earlier versions
        self.step = state["step"]
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])


def load_gan_splits(config, seed):
    """The `Pairs` to train and validate the GAN on, restricted to `gan_subset`; raises InputError."""
    splits = load_splits(dataclasses.replace(config, seed=seed))
    train, validation = filter_pairs(splits["train"], config.gan_subset), splits["validation"]
    with contextlib.suppress(InputError):  # too few images: all are used
        validation = filter_pairs(validation, config.gan_subset)
    if config.gan_batch_size > len(train.files):
        raise InputError(f"gan_batch_size is {config.gan_batch_size}, but there are {len(train.files)} training images")
    return train, validation


@sigterm_as_interrupt()
def train_gan(config):
    """Train the GAN of the run `config.run` up to `config.gan_epochs`; returns its folder, <run>/gan.

    An epoch shows each image once and ends with a checkpoint. Random numbers depend on the seed and the epoch
    alone, so resuming gives the same result. Ctrl-C and SIGTERM raise KeyboardInterrupt.
    """
    folder = Path(config.run) / "gan"
    tracker = Tracker(config)
    device, amp_dtype = setup_device(config.device, config.precision)
    clip = load_model(config.run, device).requires_grad_(False)
    splits = load_gan_splits(config, clip.config.seed)  # the split of the CLIP: test images stay unseen
    train, validation = (gan_data.GANData(clip, pairs, config, SIDED, device) for pairs in splits)
    torch.manual_seed(config.seed)
    architecture = {"generator": config.gan_generator, "size": config.gan_size, "width": config.gan_width}
    architecture["dim"] = train.embeddings.shape[1]
    discriminator = build_discriminator(config, clip, architecture)
    gan = GAN(architecture, discriminator, train.embeddings, config.gan_lr, device, amp_dtype)
    history, settings = gan_data.load_checkpoint(gan, folder), {name: getattr(config, name) for name in SETTINGS}
    write_json(folder / "config.json", {"settings": settings})  # makes the first epoch resumable
    sample, steps = partial(generate, gan.ema), len(train.images) // config.gan_batch_size
    if history:
        gan_data.save_generator(gan.ema, folder, settings=settings)  # in case it was deleted
        gan_data.write_history(history, folder)  # a killed process may have left these two one epoch behind
        gan_data.plot_samples(sample, validation, folder / "samples.png")
    with progress_bar(total=config.gan_epochs * steps, initial=len(history) * steps, desc="GAN", unit="step") as bar:
        for epoch in range(len(history), config.gan_epochs):
            torch.manual_seed(derive_seed(config.seed, epoch))
            line = {"epoch": epoch + 1, **train_epoch(gan, clip, train, config, steps, bar)}
            line["image_to_caption_R@10_of_100"] = gan_data.recall_at_10(clip, sample, validation, train)
            history.append(line)
            gan_data.save_generator(gan.ema, folder, settings=settings)
            gan_data.save_checkpoint(gan, folder, history)  # last: it marks the epoch as finished
            gan_data.plot_samples(sample, validation, folder / "samples.png")
            tracker.numbers({"gan": line}, gan.step)
            tracker.figure("gan/samples", folder / "samples.png", gan.step)
            bar.write(gan_data.format_epoch(line, config.gan_epochs))
    return folder


def train_epoch(gan, clip, data, config, steps, bar):
    """One epoch of `steps` steps; returns the means of the statistics of `GAN.train_step`."""
    start, sums = time.perf_counter(), {}
    order = torch.randperm(len(data.images), device=gan.device)
    for images in order[: steps * config.gan_batch_size].split(config.gan_batch_size):
        batch = data.batch(images)
        embeddings, guidance = batch.mix(data.embed), None
        if config.gan_clip_weight:
            guidance = partial(clip_guidance, clip, embeddings, config.gan_clip_weight, gan.amp_dtype)
        stats = gan.train_step(batch.real, embeddings, data.embed(batch.hard_negatives), guidance)
        sums = {name: sums.get(name, 0) + value for name, value in stats.items()}
        if bar.update():  # redrawn about twice a second; the host waits for the device only then
            gan_data.check_finite(stats, gan.step)
            bar.set_postfix_str(", ".join(f"{name} {value:.2f}" for name, value in stats.items()), refresh=False)
    gan_data.check_finite(sums, gan.step)
    means = {name: value.item() / steps for name, value in sums.items()}
    return {"steps": gan.step, **means, "seconds": round(time.perf_counter() - start, 2)}


@torch.no_grad()
def generate(generator, embeddings, seed, size=None):
    """Images (B, 3, S, S) in [0, 1] for embeddings (B, D), resized to `size`; seed: an integer or a torch.Generator."""
    random = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    noise = to_device(torch.randn(len(embeddings), NOISE_DIM, generator=random), embeddings.device)
    images = (generator(noise, embeddings) + 1) / 2
    return images if size is None else gan_data.resize_images(images, size)


def load_generator(folder, device="cpu"):
    """Load the generator in `folder` (<run>/gan), frozen; raises InputError."""
    generator = gan_data.read_generator(Path(folder), build_generator)
    return generator.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()


# ---- generated pairs for training CLIP --------------------------------------------------------------------------


class GANAugmentation:
    """Image-caption pairs from a frozen generator, added to CLIP's training batches.

    A generated image has the id of the training image with the same caption, or a negative id if there is none: in
    the loss, images and captions with the same id are not negatives. The CLIP of the GAN's run filters the images.
    """

    def __init__(self, config, pairs, model, device, amp_dtype):
        check_settings(config, mentions)
        self.config, self.device, self.amp_dtype = config, device, amp_dtype
        self.run = gan_run_folder(config.gan_run) if config.gan_run else stage_1_folder(config.run)
        self.clip_run = conditioning_run(self.run)
        self.clip = load_model(self.clip_run, device).requires_grad_(False)
        check_split(self.clip.config, pairs.names, load_splits)
        self.generator = load_generator(self.run / "gan", device)
        words = (gan_settings(self.run / "gan") or {}).get("gan_subset", "")
        captions, image_ids = captions_to_generate(config, pairs, words, mentions)
        self.image_ids = torch.as_tensor(image_ids, device=device)  # (T,)
        self.embeddings = embed_captions(self.clip, captions, desc="embedding captions")  # (T, D)
        self.clip_filter = CLIPFilter(self.clip, captions, self.embeddings, self.image_ids, pairs, config, amp_dtype)
        # As in the real batches; captions that equal those of training images have their ids (`group_captions`).
        self.text_ids = None if pairs.text_ids is None else torch.from_numpy(text_ids(captions)).to(device)
        self.tokens, self.pad_id = TokenStore(model.tokenizer, captions, model.max_length), model.tokenizer.pad_token_id
        self.tokens_hash = hashlib.sha256(self.tokens.ids.tobytes()).hexdigest()
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # images generated and kept, this epoch

    def is_active(self, progress):
        """Whether pairs are added at this fraction of training."""
        return self.config.gan_start <= progress < self.config.gan_end

    @torch.no_grad()
    def sample(self, num_images, step, progress, rank=0):
        """A list of `Batch`es of generated pairs for a step with `num_images` real images; empty when inactive.

        They depend only on the seed, the step and the rank. progress: fraction of training completed, in [0, 1).
        """
        config = self.config
        random = torch.Generator().manual_seed(derive_seed(config.seed, step, rank, 1))
        chosen = torch.randperm(len(self.tokens), generator=random)[: round(config.gan_ratio * num_images)]
        if not self.is_active(progress) or len(chosen) < 2:
            return []
        num_parts = math.ceil(len(chosen) / (config.micro_batch_size or config.batch_size))
        parts = chosen.tensor_split(min(num_parts, len(chosen) // 2))  # a single-image part would be dropped
        batches = [self.generate_batch(part, random) for part in parts]
        return [batch for batch in batches if batch is not None]

    def generate_batch(self, chosen, random):
        """A `Batch` for caption indices (B,), of images that pass the filter; None if fewer than two (BatchNorm).

        chosen: on the CPU.
        """
        tokens = pad_tokens([self.tokens[caption] for caption in chosen.tolist()], self.pad_id)
        chosen, *tokens = (to_device(x, self.device) for x in (chosen, *tokens))
        images = self.generate_images(chosen, random)
        rows, kept = kept_rows(self.clip_filter(images, chosen))
        self.counts[0] += len(chosen)
        if len(rows) < 2:
            return None
        self.counts[1] += kept.sum()
        images, weights = images[rows], self.config.gan_weight * kept
        if self.device.type != "cpu":
            images = torch.where(kept[:, None, None, None], images, images.nan_to_num())  # 0 times NaN would be NaN
        image_ids = self.image_ids[chosen[rows]].masked_fill(~kept, DROPPED)
        input_ids, mask = (x[rows] for x in tokens)
        targets = torch.arange(len(rows), device=self.device), image_ids
        texts = None if self.text_ids is None else self.text_ids[chosen[rows]]
        tokens = {"input_ids": input_ids, "attention_mask": mask}
        return Batch(*targets, images, **tokens, weights=weights, text_ids=texts)

    def generate_images(self, chosen, random):
        """(B, 3, size, size) images in [0, 1] for caption indices (B,)."""
        with autocast(self.device, self.amp_dtype):
            return generate(self.generator, self.embeddings[chosen], random, self.config.size)

    def train_step(self, model, image_ids, step, progress):
        """Called after each step of CLIP with the ids of its real images; a no-op for a frozen GAN."""

    def end_epoch(self, folder):
        """Statistics of the epoch; `folder` is the run folder."""
        all_reduce_sum([self.counts])
        generated, kept = self.counts.tolist()
        self.counts.zero_()
        return {"generated": generated, "dropped_by_filter": generated - kept}

    def state_dict(self):
        return {"counts": self.counts, "captions": self.tokens_hash}

    def load_state_dict(self, state):
        if state["captions"] != self.tokens_hash:
            raise InputError("gan_captions differs from the captions that the run was started with")
        self.counts.copy_(state["counts"])


def build_augmentation(config, pairs, model, device, amp_dtype):
    """The `GANAugmentation` for `config.gan`, "pairs" or "joint"."""
    kind = GANAugmentation
    if config.gan == "joint":
        from extras.joint_gan import JointGAN as kind
    return kind(config, pairs, model, device, amp_dtype)


@exit_on_input_error
def main(argv=None):
    """Train the GAN of a trained run."""
    config = parse_gan_config(argv)
    with lock_run(config.run):
        try:
            folder = train_gan(config)
        except KeyboardInterrupt:
            print(f"\nstopped; to continue: python gan.py --resume --run {config.run}", flush=True)
            raise SystemExit(130) from None
    print(f"generator.safetensors and samples.png are in {folder}")
    print(f"to train CLIP with its images: python main.py --gan pairs --gan_run {config.run} ...", flush=True)


if __name__ == "__main__":
    main()
