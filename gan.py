"""A GAN that paints pictures from captions: `python gan.py --run runs/x` trains one for a trained CLIP.

Both networks are told the caption by the unit vector that the run's CLIP gives it, so a generated picture comes with
its caption. The generator sees noise and a caption's embedding. The discriminator scores how real a picture is and
how well it fits a caption, and is also shown real pictures with wrong captions (Reed et al. 2016, arXiv:1605.05396):
without these it could ignore the captions, and so could the generator.

Shapes: B images, Z width of the noise, D width of CLIP's shared space, C channels, S side in pixels. Pictures are
(B, 3, S, S) in [-1, 1].
"""

import contextlib
import copy
import dataclasses
import json
import os
import signal
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from clip import autocast, load_model, setup_device
from config import (
    InputError,
    build_config,
    exit_on_input_error,
    parse_flags,
    progress_bar,
    read_json,
    write_json,
)
from dataset import SIDED, load_splits, pairs_naming, resize_image
from gan_networks import NOISE, Architecture, Discriminator
from images import ImageStore, build_image_cache, stored_side
from index import embed_captions

BETAS = (0.0, 0.9)  # of Adam, as DF-GAN has them
WRONG = 8  # captions that each real picture is shown with wrongly,
WRONG_AMONG = 256  # those most alike of so many
MOST_BYTES = 16e9  # of pictures
PENALTY_EVERY = 8  # steps; the penalty is multiplied by as much (lazy regularisation, StyleGAN2)


# ---- losses -----------------------------------------------------------------------------------------------------


def discriminator_loss(real, fake, mismatched):
    """Binary cross entropy of logits, real and fake (B,), mismatched (B, K).

    A real pair is 1; a fake picture and a picture with a wrong caption are 0, half each.
    """
    return F.softplus(-real).mean() + 0.5 * F.softplus(fake).mean() + 0.5 * F.softplus(mismatched).mean()


def generator_loss(fake):
    """Binary cross entropy of fakes that are to be taken for real (the non-saturating loss)."""
    return F.softplus(-fake).mean()


def gradient_penalty(discriminator, pictures, embeddings):
    """R1 of Mescheder et al. 2018 (arXiv:1801.04406): the mean squared norm of the logit's gradient at real pairs."""
    pictures = pictures.detach().requires_grad_()
    logits = discriminator(pictures, embeddings)
    (gradient,) = torch.autograd.grad(logits.sum(), pictures, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def match_gradient(clip, texts, share, dtype, fake, gradient):
    """`share` times the gradient, at the fakes (B, 3, S, S), of their distance from their captions in a CLIP's eyes.

    The distance is 1 - cosine of the fakes' embeddings and `texts` (B, D). Its gradient is brought to the length of
    `gradient`, the discriminator's: for the generator only the ratio of the two counts. The CLIP sees the fakes
    shifted and cut, so that signs which only it would read do not pay.
    """
    fake = fake.detach().requires_grad_()
    with autocast(fake.device, dtype):
        images = clip.encode_image(resize_pictures((augment(fake) + 1) / 2, clip.config.size))
    distance = (1 - F.cosine_similarity(images, texts)).mean()
    (own,) = torch.autograd.grad(distance, fake)
    return share * gradient.norm() / own.norm().clamp(min=1e-12) * own


def penalty_weight(size):
    """gamma / 2 of R1: more for larger pictures, whose gradients have more parts (0.01 at 32 px, 0.08 at 64)."""
    return 0.01 * (size / 32) ** 3


def augment(pictures):
    """Shift by up to an eighth and cut out a square of a third of the side, at random (Zhao et al. 2020, DiffAugment).

    Shown to the discriminator in place of the pictures, real and generated: it cannot learn few pictures by heart.
    Colours stay, since captions name them. Differentiable. arXiv:2006.10738.
    """
    count, _, side, _ = pictures.shape
    device, most, cut = pictures.device, side // 8, side // 3
    line, rows = torch.arange(side, device=device), torch.arange(count, device=device)[:, None, None]
    y, x = line + torch.randint(0, 2 * most + 1, (2, count, 1), device=device)  # (B, S): where each pixel comes from
    padded = F.pad(pictures, [most] * 4)
    shifted = padded[rows, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
    top, left = torch.randint(0, side, (2, count, 1), device=device) - cut // 2
    in_y, in_x = (line >= top) & (line < top + cut), (line >= left) & (line < left + cut)
    return shifted * ~(in_y[:, None, :, None] & in_x[:, None, None, :])


# ---- the two players --------------------------------------------------------------------------------------------


class GAN:
    """Generator, discriminator, their optimizers, and the moving average of the generator that is used in the end.

    The discriminator learns twice as fast. Each step makes one set of fakes for both players.
    """

    def __init__(self, architecture, embeddings, lr, device, dtype):
        self.architecture, self.device = architecture, device
        self.dtype = dtype if dtype == torch.bfloat16 else None  # float16 would need a loss scale in the penalty
        self.generator = architecture.build_generator()
        self.discriminator = Discriminator(architecture.dim, architecture.size, architecture.width)
        for network in (self.generator, self.discriminator):
            network.caption.measure(embeddings)
            network.to(device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.generator).requires_grad_(False).eval()
        fused = device.type in ("cuda", "cpu")
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr, BETAS, fused=fused)
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), 2 * lr, BETAS, fused=fused)
        self.step = 0

    def set_learning_rate(self, lr):
        for optimizer, factor in ((self.generator_optimizer, 1), (self.discriminator_optimizer, 2)):
            for group in optimizer.param_groups:
                group["lr"] = factor * lr

    def train_step(self, real, embeddings, wrong, match=None):
        """One step of both players on (B, 3, S, S) real pictures, (B, D) their captions and (B, K, D) wrong captions;
        measurements as a dict.

        `match(fakes, gradient)`, if given, is a further gradient at the fakes beside the discriminator's: see
        `generated.py`.
        """
        noise = torch.randn(len(real), NOISE, device=self.device)
        with autocast(self.device, self.dtype):
            fake = self.generator(noise, embeddings)
        measured = self.discriminator_step(real, embeddings, wrong, fake.detach())
        measured |= self.generator_step(fake, embeddings, match)
        self.update_average(len(real))
        self.step += 1
        return measured

    def discriminator_step(self, real, embeddings, wrong, fake):
        with autocast(self.device, self.dtype):
            features = self.discriminator.features(torch.cat([augment(real), augment(fake)]))
        of_real, of_fake = features.chunk(2)
        on_real = self.discriminator.score(of_real, embeddings)
        on_fake = self.discriminator.score(of_fake, embeddings)
        on_mismatched = self.discriminator.score(of_real[:, None], wrong)
        loss = discriminator_loss(on_real, on_fake, on_mismatched)
        total = loss
        if self.step % PENALTY_EVERY == 0:
            penalty = gradient_penalty(self.discriminator, real, embeddings)
            total = loss + PENALTY_EVERY * penalty_weight(self.architecture.size) * penalty
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.discriminator_optimizer.step()
        return {
            "discriminator_loss": loss.detach(),
            "real_above_fake": (on_real > on_fake).float().mean(),
            "real_above_mismatched": (on_real[:, None] > on_mismatched).float().mean(),
        }

    def generator_step(self, fake, embeddings, match=None):
        """The gradient goes by way of the pictures: it passes through the discriminator and leaves nothing there."""
        with autocast(self.device, self.dtype):
            features = self.discriminator.features(augment(fake))
        loss = generator_loss(self.discriminator.score(features, embeddings))
        (gradient,) = torch.autograd.grad(loss, fake, retain_graph=True)
        if match is not None:
            gradient = gradient + match(fake, gradient)
        self.generator_optimizer.zero_grad(set_to_none=True)
        fake.backward(gradient)
        self.generator_optimizer.step()
        return {"generator_loss": loss.detach()}

    @torch.no_grad()
    def update_average(self, count):
        """Half of the average is from the last 5% of the pictures seen, at most 10,000 (StyleGAN2-ADA's rule)."""
        half_life = min(10_000, 0.05 * (self.step + 1) * count)
        own, new = list(self.average.parameters()), list(self.generator.parameters())
        torch._foreach_lerp_(own, new, 1 - 0.5 ** (count / half_life))

    def state_dict(self):
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "average": self.average.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state):
        for name in state.keys() - {"step"}:
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]


class Batch(NamedTuple):
    """What both players learn from in a step: B pictures, each with a caption and K wrong ones, given by their numbers.

    The captions' embeddings lie `share` of the way from the first caption of each picture to the second.
    """

    real: torch.Tensor  # (B, 3, S, S) in [-1, 1]
    captions: torch.Tensor  # (B,)
    others: torch.Tensor  # (B,)
    share: torch.Tensor  # (B, 1)
    wrong: torch.Tensor  # (B, K)

    def blend(self, encode):
        """(B, D) unit vectors of the captions; `encode` gives those of the captions with the numbers it is given."""
        return F.normalize(torch.lerp(encode(self.captions), encode(self.others), self.share), dim=1)


class PictureStore:
    """The pictures of a split at the GAN's size and the embeddings of their captions, all on the device."""

    def __init__(self, clip, pairs, config, size, device):
        side, cache = max(stored_side(config.size), size), None
        if config.cache_images:
            cache = build_image_cache(pairs.files, side, config.cache_path, config.num_workers)
        store = ImageStore(pairs.files, side, cache)
        if len(store) * size * size * 3 > MOST_BYTES:
            raise InputError(
                f"the GAN keeps all pictures in memory, of {len(store)} at {size} pixels "
                f"{len(store) * size * size * 3 / 1e9:.0f} GB (at most {MOST_BYTES / 1e9:.0f}): give --gan_subset"
            )
        pictures = np.empty((len(store), size, size, 3), dtype=np.uint8)
        for image in range(len(store)):
            pictures[image] = resize_image(store[image], size)
        self.pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device)  # (N, 3, S, S) uint8
        self.embeddings = embed_captions(clip, pairs.captions).to(device)  # (T, D)
        self.sided = torch.tensor([bool(SIDED.search(caption)) for caption in pairs.captions], device=device)
        self.first = torch.from_numpy(pairs.first).to(device)
        self.image_index = torch.from_numpy(pairs.image_index).to(device)

    @property
    def sample_embeddings(self):
        """(100, D) embeddings, of the first caption of each of 100 pictures (fewer if there are fewer)."""
        return self.embeddings[self.first[:-1][:100]]

    def batch(self, images):
        """The `Batch` of B images, given by their numbers.

        Half of the pictures are mirrored, unless the caption says left or right. Half of the embeddings lie between
        two captions of the picture: the generator has to know the space between the training captions, too.
        """
        chosen, other = self.draw_captions(images), self.draw_captions(images)
        mirrored = (torch.rand(len(images), device=images.device) < 0.5) & ~self.sided[chosen]
        blended = torch.rand(len(images), 1, device=images.device) < 0.5
        mirrored &= ~(blended[:, 0] & self.sided[other])
        real = self.pictures[images].float() / 127.5 - 1
        real = torch.where(mirrored[:, None, None, None], real.flip(3), real)
        share = torch.rand(len(images), 1, device=images.device) * blended
        return Batch(real, chosen, other, share, self.wrong_captions(images, chosen))

    def embed(self, captions):
        """The embeddings of the captions with these numbers, in one more dimension."""
        return self.embeddings[captions]

    def wrong_captions(self, images, chosen):
        """(B, K) the numbers of captions of other pictures: of some drawn at random, the most like each of the chosen.

        Any other captions would mostly name other scenes altogether, and the discriminator, and so the generator,
        would never have to look at what tells apart two captions that are alike. Several cost no more than one: the
        picture's features are the same.
        """
        drawn = torch.randint(len(self.embeddings), (WRONG_AMONG,), device=images.device)
        likeness = self.embeddings[chosen] @ self.embeddings[drawn].T  # (B, WRONG_AMONG)
        likeness.masked_fill_(self.image_index[drawn] == images[:, None], -2)
        return drawn[likeness.topk(WRONG, 1).indices]

    def draw_captions(self, images):
        counts = self.first[images + 1] - self.first[images]
        return self.first[images] + (torch.rand(len(images), device=images.device) * counts).long()


# ---- using a generator ------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(generator, embeddings, seed, size=None):
    """Pictures for (B, D) caption embeddings, (B, 3, S, S) float in [0, 1]; enlarged or reduced to `size` if given."""
    noise = torch.randn(len(embeddings), NOISE, generator=torch.Generator().manual_seed(seed))
    pictures = (generator(noise.to(embeddings.device), embeddings) + 1) / 2
    return pictures if size is None else resize_pictures(pictures, size)


def resize_pictures(pictures, size):
    if pictures.shape[-1] == size:
        return pictures
    return F.interpolate(pictures, (size, size), mode="bilinear", antialias=True)


@torch.no_grad()
def matched_share(clip, generator, embeddings, rivals):
    """How many pictures for (N, D) captions have their own in the first ten, per cent, as `clip` sees it.

    Each is ranked among the (R, D) `rivals`, of which the first N are the captions themselves.
    """
    images = clip.encode_image(generate(generator, embeddings, seed=0, size=clip.config.size))
    places = ((images @ rivals.T) >= (images * embeddings).sum(1, keepdim=True)).sum(1)
    return 100 * (places <= 10).float().mean().item()


def save_settings(gan, folder, **more):
    write_json(folder / "config.json", {"architecture": dataclasses.asdict(gan.architecture), **more})


def save_generator(gan, folder, **more):
    """Write generator.safetensors, the moving average, and config.json, with which it can be built again."""
    save_settings(gan, folder, **more)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in gan.average.state_dict().items()}
    save_file(state, folder / "generator.safetensors.tmp")
    (folder / "generator.safetensors.tmp").replace(folder / "generator.safetensors")


def conditioning_run(run):
    """The run whose CLIP tells the generator of `run` its captions: itself, unless the two learned jointly."""
    path = Path(run) / "gan" / "config.json"
    told_by = read_json(path).get("told_by") if path.exists() else None
    if told_by is None:
        return Path(run)
    found = Path(os.path.normpath(Path(run) / told_by))
    if not found.exists():
        raise InputError(f"the GAN of {run} was told its captions by the run {found}, which is gone: put it back there")
    return found


def gan_settings(folder):
    """The settings that the GAN in `folder` was started with, a dict; None for one that learned jointly."""
    settings = read_json(Path(folder) / "config.json").get("settings")
    if settings is not None and not isinstance(settings, dict):
        raise InputError(f"{Path(folder) / 'config.json'} is damaged: its settings are {settings!r}")
    return settings


def load_generator(folder, device="cpu"):
    """The frozen generator saved in `folder` (a run's gan/); raises InputError."""
    folder = Path(folder)
    if not (folder / "generator.safetensors").exists():
        command = f"python gan.py --run {folder.parent.as_posix()}"
        raise InputError(f"{folder} holds no generator: train one with {command} (--resume if one was begun)")
    content = read_json(folder / "config.json")
    try:
        generator = Architecture(**content["architecture"]).build_generator()
        generator.load_state_dict(load_file(folder / "generator.safetensors"))
    except (KeyError, TypeError, RuntimeError, SafetensorError, OSError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise InputError(f"{folder} does not hold a generator of this version ({reason[:100]})") from None
    return generator.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()


# ---- training ---------------------------------------------------------------------------------------------------

# What decides how a GAN is trained; the data are those of its run.
SETTINGS = (
    *("gan_generator", "gan_subset", "gan_size", "gan_width", "gan_epochs", "gan_batch_size", "gan_lr", "gan_match"),
    "seed",
)
PLACES = ("run", "resume", "image_path", "captions_path", "cache_path", "cache_images", "num_workers", "device")


def train_gan(config):
    """Train the GAN of the run `config.run`, from wherever the run's folder gan/ says it is; its folder.

    Ctrl-C and SIGTERM stop it (KeyboardInterrupt); the last whole epoch has been saved.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return train_epochs(config)
    finally:
        signal.signal(signal.SIGTERM, before)


def train_epochs(config):
    """The epochs that are left, each saved when it is done; the GAN's folder.

    An epoch shows each picture once. What is random depends on the seed and the epoch alone, so a training that is
    resumed goes on as if it had never stopped.
    """
    folder = Path(config.run) / "gan"
    device, dtype = setup_device(config.device, config.precision)
    clip = load_model(config.run, device).requires_grad_(False)
    # Split as for the run's CLIP, whatever the GAN's own seed: its test pictures stay unseen.
    splits = learned_splits(config, clip.config.seed)
    count = len(splits["train"].files)
    store = PictureStore(clip, splits["train"], config, config.gan_size, device)
    validation = PictureStore(clip, splits["validation"], config, config.gan_size, device)
    torch.manual_seed(config.seed)
    architecture = Architecture(config.gan_generator, config.gan_size, config.gan_width, store.embeddings.shape[1])
    gan = GAN(architecture, store.embeddings, config.gan_lr, device, dtype)
    history = load_checkpoint(gan, folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(config, name) for name in SETTINGS}
    if history and not (folder / "generator.safetensors").exists():
        save_generator(gan, folder, settings=settings)
    if not history:  # what was asked for is known to a resumed training, even if the first epoch was not finished
        save_settings(gan, folder, settings=settings)
    sample = validation.sample_embeddings  # and, if they are fewer than a hundred captions, some of the training's
    rivals = torch.cat([sample, store.sample_embeddings])[:100]
    steps = count // config.gan_batch_size
    bar = progress_bar(total=config.gan_epochs * steps, initial=len(history) * steps, desc="GAN", unit="step")
    with bar:
        while len(history) < config.gan_epochs:
            torch.manual_seed(int(np.random.SeedSequence((config.seed, len(history))).generate_state(1)[0]))
            line = {"epoch": len(history) + 1, **train_epoch(gan, clip, store, config, steps, bar)}
            line["right_caption_in_first_10_of_100"] = matched_share(clip, gan.average, sample, rivals)
            history.append(line)
            save_generator(gan, folder, settings=settings)
            save_checkpoint(gan, folder, history)  # last: what it says is done has been written
            draw_samples(gan.average, splits["validation"], validation, folder / "samples.png")
            bar.write(describe(line, config.gan_epochs))
    return folder


def describe(line, epochs):
    """A line about an epoch, for people."""
    return (
        f"GAN, epoch {line['epoch']}/{epochs}: real above generated {100 * line['real_above_fake']:.0f}%, "
        f"right caption above wrong {100 * line['real_above_mismatched']:.0f}%, "
        f"own caption in CLIP's first 10 of 100: {line['right_caption_in_first_10_of_100']:.0f}%"
    )


def learned_splits(config, seed):
    """The `Pairs` that a GAN learns from and is watched on, by "train" and "validation"; raises InputError."""
    splits = load_splits(dataclasses.replace(config, seed=seed))
    splits = {name: splits[name] for name in ("train", "validation")}
    splits["train"] = pairs_naming(splits["train"], config.gan_subset)
    with contextlib.suppress(InputError):  # too few of them: the GAN is watched on all
        splits["validation"] = pairs_naming(splits["validation"], config.gan_subset)
    count = len(splits["train"].files)
    if config.gan_batch_size > count:
        raise InputError(f"gan_batch_size is {config.gan_batch_size}, but there are {count} training images")
    return splits


def train_epoch(gan, clip, store, config, steps, bar):
    """One epoch of both players; the means of what they measured."""
    batch_size = config.gan_batch_size
    started, sums = time.perf_counter(), {}
    order = torch.randperm(len(store.pictures), device=gan.device)
    for images in order[: steps * batch_size].split(batch_size):
        batch = store.batch(images)
        embeddings = batch.blend(store.embed)
        match = partial(match_gradient, clip, embeddings, config.gan_match, gan.dtype) if config.gan_match else None
        measured = gan.train_step(batch.real, embeddings, store.embed(batch.wrong), match)
        sums = {name: sums.get(name, 0) + value for name, value in measured.items()}
        if bar.update():  # drawn about twice a second; only then does the host wait for the device
            check_finite(measured, gan.step)
            bar.set_postfix_str(", ".join(f"{name} {value:.2f}" for name, value in measured.items()), refresh=False)
    check_finite(sums, gan.step)
    means = {name: value.item() / steps for name, value in sums.items()}
    return {"steps": gan.step, **means, "seconds": round(time.perf_counter() - started, 2)}


def check_finite(measured, step):
    for name, value in measured.items():
        if not torch.isfinite(value):
            raise InputError(f"the GAN's {name} is {value:.3f} at step {step}: start it anew with a lower --gan_lr")


def save_checkpoint(gan, folder, history):
    """Write last.pt, all that a resumed training needs, and metrics.jsonl; each whole or not at all."""
    lines = "".join(json.dumps(line) + "\n" for line in history)
    (folder / "metrics.jsonl.tmp").write_text(lines, encoding="utf-8")
    torch.save({"gan": gan.state_dict(), "history": history}, folder / "last.pt.tmp")
    for name in ("last.pt", "metrics.jsonl"):
        (folder / f"{name}.tmp").replace(folder / name)


def load_checkpoint(gan, folder):
    """Bring the GAN to where last.pt was written, if it is there; the metrics of the epochs done, a list."""
    path = folder / "last.pt"
    if not path.exists():
        if (folder / "metrics.jsonl").exists():
            raise InputError(f"{folder} lacks last.pt, without which its GAN cannot go on: remove that folder")
        return []
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        gan.load_state_dict(checkpoint["gan"])
        return checkpoint["history"]
    except Exception as error:
        reason = (str(error).splitlines() or [repr(error)])[0][:100]
        raise InputError(f"{path} cannot be read as a checkpoint of this GAN ({reason})") from None


def draw_samples(generator, pairs, store, path, rows=4, columns=2, each=3):
    """Unseen captions with a real picture and a few generated ones, as a picture."""
    chosen = np.random.default_rng(0).permutation(len(pairs.captions))[: rows * columns]
    figure = Figure(figsize=(1.9 * columns * (each + 1), 2.25 * rows))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.04, wspace=0.04, hspace=0.28)
    axes = figure.subplots(rows, columns).ravel()
    for axis in axes[len(chosen) :]:
        axis.set_axis_off()
    for axis, caption in zip(axes, chosen, strict=False):
        embeddings = store.embeddings[caption].expand(each, -1)
        generated = generate(generator, embeddings, seed=int(caption)).permute(0, 2, 3, 1).cpu().numpy()
        real = store.pictures[pairs.image_index[caption]].permute(1, 2, 0).cpu().numpy() / 255
        side = len(real)
        gap = np.ones((side, max(1, side // 16), 3))
        # One axis for all pictures of a caption: an axis for each takes longer than a small epoch.
        axis.imshow(np.hstack([real, *(part for picture in generated for part in (gap, picture))]))
        centres = [number * (side + gap.shape[1]) + side / 2 for number in range(each + 1)]
        axis.set_xticks(centres, ["real", *["generated"] * each], fontsize=8)
        axis.set_title(textwrap.shorten(pairs.captions[caption], 80), fontsize=11, parse_math=False)
        axis.set(yticks=[], frame_on=False)
        axis.tick_params(length=0)
    figure.savefig(path, dpi=80)


# ---- the command ------------------------------------------------------------------------------------------------


def resolve_config(argv=None):
    """The settings of a GAN: those of its run, changed by the flags; with --resume those it was started with."""
    known = {*SETTINGS, *PLACES, "precision"}
    given = parse_flags(argv, "gan.py", "Train a GAN for a trained run of CLIP (--run).", known)
    if not given.get("run"):
        raise InputError("name the trained run: python gan.py --run runs/x")
    foreign = sorted(given.keys() - known)
    if foreign:
        raise InputError(f"{foreign[0]} is no setting of the GAN, which has {', '.join(SETTINGS)}")
    folder = Path(given["run"])
    if not (folder / "config.json").exists():
        raise InputError(f"run is {folder}, which holds no run: train one with python main.py")
    saved, place = read_json(folder / "config.json"), folder / "gan" / "config.json"
    begun = (place.parent / "metrics.jsonl").exists() or (place.parent / "generator.safetensors").exists()
    if place.exists() and (begun or given.get("resume")):  # one that stopped in its first epoch may be begun anew
        if not given.get("resume"):
            raise InputError(f"{place.parent} already holds a GAN: give --resume to continue it, or remove that folder")
        started = gan_settings(place.parent)
        if started is None:
            raise InputError(f"{place.parent} holds a GAN that learned jointly with CLIP: it is not continued alone")
        for name in set(SETTINGS) - {"gan_epochs"}:
            if given.get(name, started.get(name)) != started.get(name):
                raise InputError(
                    f"{name} is {given[name]}, but the GAN was started with {started.get(name)}: drop the flag"
                )
        saved |= started
    return build_config({**saved, **given, "run": folder.as_posix()})


@exit_on_input_error
def main(argv=None):
    """Train a GAN for a trained run."""
    config = resolve_config(argv)
    try:
        folder = train_gan(config)
    except KeyboardInterrupt:
        print(f"\nstopped; to go on from the last whole epoch: python gan.py --resume --run {config.run}", flush=True)
        raise SystemExit(130) from None
    print(f"generator.safetensors and samples.png are in {folder}")
    print(f"to train with its pictures: python main.py --gan pairs --gan_run {config.run} ...", flush=True)


if __name__ == "__main__":
    main()
