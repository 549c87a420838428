"""Train CLIP: `python main.py` (Flickr8k), `python main.py --preset demo` (needs no data), `python main.py --help`."""

import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from utils.cli import STOPPING, default_sigchld, exit_on_input_error, sigterm_as_interrupt, stop_signals
from utils.runs import claim_run, resolve_run

if __name__ == "__main__":
    exit_on_input_error(resolve_run)()  # before the heavy imports, so that --help and flag errors return at once

import torch

from clip import CLIP, contrastive_loss, format_metrics, load_model, retrieval_metrics, save_model
from config import PRESETS, InputError
from dataset import (
    PairSampler,
    TokenStore,
    TrainingPairs,
    derive_seed,
    describe_splits,
    load_splits,
    make_loader,
    open_images,
    pair_targets,
    train_tokenizer,
)
from utils.checkpoint import create_run_folder, load_checkpoint, save_checkpoint
from utils.device import setup_device
from utils.device_augmentation import LoaderWithImages, augment_images
from utils.distributed import (
    GradientReducer,
    average_batchnorm_stats,
    first_process_first,
    init_processes,
    is_first_process,
    process_group,
    rank_and_world_size,
)
from utils.ema import EMA
from utils.embed import embed_split, precompute_features
from utils.files import write_json
from utils.flags import format_config
from utils.grad_cache import cached_backward, frozen_batchnorm_stats
from utils.log import check_training, describe_model, epoch_bar, log_epoch, log_step, print_once
from utils.match_rates import save_match_threshold
from utils.model_checks import check_model
from utils.overflow import OverflowGuard
from utils.plotting import plot_curves, plot_matches
from utils.report_page import write_page
from utils.synthetic import generate_dataset
from utils.tracking import Tracker


@dataclass
class TrainState:
    """The mutable state of training, and the position in the run."""

    model: CLIP
    ema: EMA | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    augmentation: object | None  # gan.GANAugmentation
    loss_sum: torch.Tensor  # over the batches of this epoch, on the device
    epoch: int = 0  # completed epochs
    batch: int = 0  # completed batches of the current epoch
    step: int = 0  # completed steps of the run
    best_rsum: float = -1.0
    history: list = field(default_factory=list)  # the lines of metrics.jsonl
    tracker: Tracker | None = None

    @property
    def eval_model(self):
        return self.ema.module if self.ema else self.model

    def stateful_parts(self):
        """The parts that a checkpoint saves via `state_dict`."""
        ema = self.ema.module if self.ema else None
        parts = {"model": self.model, "ema": ema, "augmentation": self.augmentation}
        parts |= {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        return {name: part for name, part in parts.items() if part is not None}


# ---- training ---------------------------------------------------------------------------------------------------


def train(config):
    """Train from the last checkpoint, if there is one, and evaluate the best model; returns the final results."""
    device, amp_dtype = setup_device(config.device, config.precision)
    folder, tracker = Path(config.run), Tracker(config)
    splits = load_data(config)
    model = build_model(config, splits["train"].captions, device)
    print_once(describe_splits(config, splits), describe_model(config, model, amp_dtype))
    if config.head_epochs and not (folder / "last.pt").exists():
        train_heads(model, splits, config)
    open_images(splits, config)
    precompute_features(model, splits, amp_dtype, config)  # of frozen encoders
    sampler, loader = build_loader(model, splits["train"], config)
    steps = config.epochs * sampler.num_batches

    optimizer = build_optimizer(model, config)
    state = TrainState(
        model=model,
        ema=EMA(model, config.ema_decay) if config.ema_decay else None,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config, steps),
        scaler=torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16),
        augmentation=build_gan_augmentation(model, splits["train"], amp_dtype, config, steps),
        loss_sum=torch.zeros((), device=device, dtype=torch.float32 if device.type == "mps" else torch.float64),
        tracker=tracker,
    )
    resumed = load_checkpoint(state, folder)
    create_run_folder(folder, config, state.history, splits)
    if resumed and state.epoch < config.epochs:
        print_once(f"resuming {folder} at epoch {state.epoch + 1}, batch {state.batch}")

    with stop_signals() as stop:
        while state.epoch < config.epochs:
            stats = train_one_epoch(state, sampler, loader, config, amp_dtype, stop)
            check_training(state, state.loss_sum)
            with stop.interruptible():
                if not stop.requested:
                    metrics, validation_loss = evaluate(state.eval_model, splits["validation"], amp_dtype, config)
            if stop.requested:
                save_checkpoint(state, folder)
                raise stop.reason
            if config.scheduler == "plateau":
                state.scheduler.step(validation_loss)
            log_epoch(state, stats, metrics, validation_loss, config)
            rsum = metrics.get("equal_captions", metrics)["rsum"]
            if rsum > state.best_rsum:
                state.best_rsum = rsum
                if is_first_process():
                    save_model(state.eval_model, folder / "best")
            save_checkpoint(state, folder)
        if stop.requested:
            raise stop.reason

    return report(state, splits, config, device, amp_dtype)


def train_heads(model, splits, config):
    """Train the projection heads and the temperature on frozen encoders, in heads/ of the run folder, and copy them.

    Fine-tuning from random heads would distort the pretrained features (LP-FT, Kumar et al. 2022, arXiv:2202.10054).
    """
    create_run_folder(Path(config.run), config, splits=splits)
    frozen = {**PRESETS["frozen"], "trainable_image_encoder": None, "trainable_text_encoder": None, "ema_decay": 0.0}
    run = (Path(config.run) / "heads").as_posix()
    print_once("\n==== projection heads, on frozen encoders ====")
    if not (Path(run) / "results.json").exists():
        train(replace(config, **{**frozen, "epochs": config.head_epochs}, head_epochs=0, gan="none", run=run))
    print_once("\n==== fine-tuning ====")
    heads = load_model(run)
    model.image_projection.load_state_dict(heads.image_projection.state_dict())
    model.text_projection.load_state_dict(heads.text_projection.state_dict())
    model.logit_scale.data.copy_(heads.logit_scale)


def train_one_epoch(state, sampler, loader, config, amp_dtype, stop):
    """Train from `state.batch` to the end of the epoch, or until a stop is requested; returns its statistics."""
    model, group = state.model, process_group()
    rank, world_size = rank_and_world_size()
    sampler.epoch, sampler.start = state.epoch, state.batch
    model.train()
    guard = OverflowGuard(model, state.scaler) if state.scaler.is_enabled() else None
    reducing = GradientReducer(model) if group else nullcontext()
    stats = {"images": 0, "data_time": 0.0, "start": time.perf_counter()}
    saved = stats["start"]
    with epoch_bar(state, sampler, config) as bar, reducing as reducer:
        for batches in load_steps(loader, sampler, model, stop, stats):
            # Random numbers depend on the step alone, so a resumed run draws the same dropout masks.
            torch.manual_seed(derive_seed(config.seed, state.step, rank))
            image_ids, generated = torch.cat([batch.image_ids for batch in batches]), []
            progress = state.step / (config.epochs * sampler.num_batches)
            if state.augmentation:
                generated = state.augmentation.sample(len(image_ids), state.step, progress, rank)

            if guard:
                guard.save()
            loss = backward(state, batches, generated, amp_dtype, group, reducer)
            if group:
                reducer.finish(loss)
                average_batchnorm_stats(model)
            state.scaler.unscale_(state.optimizer)
            if config.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            overflow = guard.restore(state.optimizer) if guard else None
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.optimizer.zero_grad(set_to_none=True)
            model.clamp_temperature()
            if config.scheduler == "cosine":
                state.scheduler.step()
            if state.ema:
                state.ema.update(state.step, overflow)
            if state.augmentation:
                state.augmentation.train_step(model, image_ids, state.step, progress)

            if overflow is not None:  # the mean of the epoch in place of a loss that is not finite
                loss = torch.where(overflow & ~loss.isfinite(), state.loss_sum / max(1, state.batch), loss)
            state.loss_sum += loss
            state.batch, state.step = state.batch + 1, state.step + 1
            stats["images"] += world_size * len(image_ids)
            if bar.update():  # about twice a second, so the host rarely waits for the device
                log_step(bar, loss, state, stats)
            if time.perf_counter() - saved > 60 * config.save_every_minutes:
                save_checkpoint(state, config.run)
                saved = time.perf_counter()
    return {**stats, "seconds": time.perf_counter() - stats["start"]}


def backward(state, batches, generated, amp_dtype, group=None, reducer=None):
    """Accumulate the gradients of the (scaled) loss of a step; returns the loss.

    batches: micro-batches of real images; generated: batches of generated ones; reducer: a `GradientReducer`.
    """
    model, targets = state.model, pair_targets([*batches, *generated])
    loss_function = partial(contrastive_loss, logit_scale=model.logit_scale, **targets, group=group)
    if len(batches) > 1:
        return cached_backward(model, batches, generated, loss_function, amp_dtype, state.scaler, reducer)
    loss = loss_function(*encode(model, batches[0], generated, amp_dtype))
    if reducer:
        reducer.start()
    state.scaler.scale(loss).backward()
    return loss.detach()


def encode(model, batch, generated, amp_dtype):
    """The embeddings of a batch and of generated batches, concatenated.

    Generated images do not change the running statistics of BatchNorm.
    """
    mixed = partial(torch.autocast, batch.image_ids.device.type, amp_dtype, enabled=amp_dtype is not None)
    with mixed():
        outputs = [model(batch)]
    if not generated:
        return outputs[0]
    with frozen_batchnorm_stats(model):
        for batch in generated:
            with mixed():
                outputs.append(model(batch))
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


def load_steps(loader, sampler, model, stop, stats):
    """Yield the micro-batches of each step on the device, and measure the time spent waiting for them."""
    iterator, device = iter(loader), model.device
    default_sigchld()
    for count in sampler.micro_batch_counts():
        start = time.perf_counter()
        if stop.requested:
            return
        try:
            stop.waiting = True
            batches = [next(iterator).to(device) for _ in range(count)]
            stop.waiting = False
        except STOPPING as error:
            stop.failed(error)
            return
        stats["data_time"] += time.perf_counter() - start
        for batch in batches:
            if batch.augmentation is not None:  # not yet augmented
                batch.images = augment_images(batch.images, batch.augmentation, model.config.size)
        yield batches


def build_model(config, captions, device):
    """The CLIP of the config, with a tokenizer built from the captions if the config asks for one."""
    torch.manual_seed(config.seed)
    tokenizer = train_tokenizer(captions) if config.text_tokenizer == "wordpiece" else None
    model = first_process_first(lambda: CLIP(config, tokenizer))  # the first process may download weights
    check_model(model, device)
    if config.compile:
        model.image_encoder.compile()
        model.text_encoder.compile(dynamic=True)
    return model.to(device, memory_format=torch.channels_last)


def build_optimizer(model, config):
    """AdamW with separate learning rates for the encoders and the heads; weight decay for matrices only."""
    groups, heads = [], [child for name, child in model.named_children() if not name.endswith("_encoder")]
    for name, lr, modules in (
        ("image_encoder", config.image_encoder_lr, [model.image_encoder]),
        ("text_encoder", config.text_encoder_lr, [model.text_encoder]),
        ("heads", config.head_lr, heads),
    ):
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        parameters += model.parameters(recurse=False) if name == "heads" else []  # the temperature
        for decay in (True, False):  # no weight decay for biases, norms and the temperature
            group = [p for p in parameters if (p.ndim >= 2) == decay]
            weight_decay = config.weight_decay if decay else 0.0
            if group:
                groups.append({"params": group, "lr": lr, "weight_decay": weight_decay, "name": name})
    return torch.optim.AdamW(groups, fused=model.device.type in ("cuda", "cpu"))


def build_scheduler(optimizer, config, steps):
    """ReduceLROnPlateau on the validation loss, stepped per epoch; or linear warm-up and cosine to zero, per step.

    transformers' cosine schedule is not used: its first step has a learning rate of zero.
    """
    if config.scheduler == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=config.factor, patience=config.patience)
    warmup = min(config.warmup_steps, steps // 2)

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def build_gan_augmentation(model, pairs, amp_dtype, config, steps):
    """The generated pairs that `--gan` adds to the batches, or None."""
    if config.gan == "none":
        return None
    from gan import build_augmentation

    augmentation = build_augmentation(config, pairs, model, model.device, amp_dtype)
    if config.gan_ratio and not any(augmentation.is_active(step / steps) for step in range(steps)):
        raise InputError(
            f"gan_start is {config.gan_start:g}, gan_end {config.gan_end:g}: none of the {steps} steps is in between"
        )
    return augmentation


# ---- data -------------------------------------------------------------------------------------------------------


def load_data(config):
    """The splits of the data set, generated first if the config asks for a synthetic one."""
    if config.sample_images and is_first_process():
        generate_dataset(config.image_path, config.captions_path, config.sample_images)
    splits = first_process_first(lambda: load_splits(config))
    smallest = min(len(pairs.files) for pairs in splits.values() if pairs.files)
    if smallest < (world_size := rank_and_world_size()[1]):
        raise InputError(f"a split has {smallest} images, too few for {world_size} processes: start fewer processes")
    return splits


def build_loader(model, pairs, config):
    """The sampler of the training pairs, and the loader of its micro-batches."""
    tokens = TokenStore(model.tokenizer, pairs.captions, model.max_length)
    features = pairs.image_features, pairs.text_features
    pad_id, on_device = model.tokenizer.pad_token_id, model.device.type == "cuda"
    on_gpu = pairs.images.copy_to(model.device) if on_device and pairs.image_features is None else None
    store = pairs.images if on_gpu is None else None
    dataset = TrainingPairs(pairs, store, tokens, pad_id, config, *features, on_device=on_device)
    sampler = PairSampler(pairs, config, *rank_and_world_size())
    workers = 0 if all(x is not None for x in features) else config.num_workers
    options = {"pin_memory": model.device.type == "cuda", "batch_sampler": sampler, "collate_fn": dataset.collate}
    loader = make_loader(dataset, workers, max(sampler.micro_batch_counts()), **options)
    return sampler, loader if on_gpu is None else LoaderWithImages(loader, on_gpu)


# ---- evaluation -------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, pairs, amp_dtype, config):
    """The retrieval metrics of a split, and its mean loss over batches shaped as in training."""
    image_embeddings, text_embeddings = embed_split(model, pairs, amp_dtype, config)
    metrics = retrieval_metrics(image_embeddings, text_embeddings, pairs.image_index, text_ids=pairs.text_ids)
    all_ids = None if pairs.text_ids is None else torch.from_numpy(pairs.text_ids).to(image_embeddings.device)
    loss_sum = 0.0
    for start in range(0, len(pairs.files), config.batch_size):
        images = image_embeddings[start : start + config.batch_size]
        captions = [pairs.captions_of(start + row)[: config.captions_per_image] for row in range(len(images))]
        image_index = torch.tensor([row for row, own in enumerate(captions) for _ in own], device=images.device)
        chosen = torch.tensor([j for own in captions for j in own], device=images.device)
        texts, ids = text_embeddings[chosen], None if all_ids is None else all_ids[chosen]
        loss = contrastive_loss(images, texts, model.logit_scale, image_index, text_ids=ids)
        loss_sum += len(images) * loss.item()
    return metrics, loss_sum / len(pairs.files)


def report(state, splits, config, device, amp_dtype):
    """Evaluate the best model on the test split (else the validation split); write results.json and figures."""
    folder, split = Path(config.run), "test" if splits["test"].files else "validation"
    pairs = splits[split]
    best = first_process_first(lambda: load_model(folder / "best", device))  # written by the first process
    images, texts = embed_split(best, pairs, amp_dtype, config)
    validation = (images, texts)
    if split != "validation":
        validation = embed_split(best, splits["validation"], amp_dtype, config)
    metrics = retrieval_metrics(images, texts, pairs.image_index, num_draws=1000, text_ids=pairs.text_ids)
    results = {"split": split, "images": len(pairs.files), **metrics}
    if is_first_process():
        plot_curves(state.history, folder / "curves.png")
        plot_matches(pairs, images, texts, folder / "matches.png")
        save_match_threshold(folder, splits["validation"], *validation)  # so that a search needs no validation images
        write_page(folder, config, results, pairs, images, texts)
        state.tracker.figure("matches", folder / "matches.png", state.step)
        write_json(folder / "results.json", results)  # last: it marks the run as finished
        print(f"\n{split} split, {results['images']:,} images:\n{format_metrics(metrics)}")
        print(f"model, figures and report.html are in {folder}")
        print(f'to search: python inference.py "a sentence" --run {folder.as_posix()}', flush=True)
    return results


# ---- the command ------------------------------------------------------------------------------------------------


@exit_on_input_error
def main(argv=None):
    """Train CLIP; `--gan` without `--gan_run` first trains a CLIP on real images and a GAN."""
    config, sources = resolve_run(argv)
    if config.check:
        from extras.check_data import check_data

        return check_data(config, load_data, build_model, build_loader)
    with claim_run(config, sources) if is_first_process() else nullcontext(config) as config:
        print_once(format_config(config, sources))
        return train_all(config)


def train_all(config):
    """The results of all stages of a training, in one or several processes; a stop is reported in a line."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    all_stages = config.gan != "none" and not config.gan_run
    with nullcontext() if several else sigterm_as_interrupt():
        try:
            config = init_processes(config)
            if all_stages:
                from extras.gan_stages import train_stages

                results = train_stages(config, train)
            else:
                results = train(config)
        except KeyboardInterrupt:
            started = any((Path(config.run) / name).exists() for name in ("last.pt", "heads", "stage1", "first"))
            hint = f"to continue: python main.py --resume --run {config.run}" if started else "no step was completed"
            print_once(f"\nstopped; {hint}")
            raise SystemExit(130) from None
    if several:  # not after an error, where it would deadlock
        torch.distributed.destroy_process_group()
    return results


if __name__ == "__main__":
    main()
