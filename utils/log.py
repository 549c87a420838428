"""Output of a training run: lines about device and model, the progress bar, a line per epoch."""

import time
from pathlib import Path

import torch

from config import DivergenceError
from utils.cli import progress_bar
from utils.distributed import is_first_process, rank_and_world_size

MIN_SCALE = 2**-20  # of the loss in float16; halved at each overflow, from 65,536 on


def print_once(*lines):
    """Print lines in the first process only."""
    if is_first_process():
        print(*lines, sep="\n", flush=True)


def describe_model(config, model, amp_dtype):
    """Two lines: the device and the model."""
    precision = "float32" if amp_dtype is None else f"mixed precision ({str(amp_dtype).removeprefix('torch.')})"
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
    world_size = rank_and_world_size()[1]
    device += f" x {world_size} processes" if world_size > 1 else ""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    names = []
    for encoder, name in (("image", config.model_name), ("text", config.text_encoder_model)):
        layers, width = (config.text_layers, config.text_width) if encoder == "text" else (0, 0)
        details = [f"{layers} layer" + "s" * (layers > 1)] if layers else []
        details += [f"width {width}"] if width else []
        details.append("pretrained" if config.encoder_flag("pretrained", encoder) else "from scratch")
        names.append(f"{name} ({', '.join(details)})")
    model_line = f"{' and '.join(names)}, {total / 1e6:.1f} M parameters"
    model_line += f" ({trained / 1e6:.1f} M trained)" if trained < total else ""
    return f"device: {device}, {precision}\nmodel: {model_line}"


def epoch_bar(state, sampler, config):
    return progress_bar(
        total=sampler.num_batches,
        initial=state.batch,
        desc=f"epoch {state.epoch + 1}/{config.epochs}",
        unit="step",
        disable=not is_first_process(),
    )


def log_step(bar, loss, state, stats):
    check_training(state, loss)
    seconds = time.perf_counter() - stats["start"]
    bar.set_postfix_str(
        f"loss {loss:.3f}, temperature {(-state.model.logit_scale).exp():.4f}, "
        f"{stats['images'] / seconds:.0f} images/s, data time {100 * stats['data_time'] / seconds:.0f}%",
        refresh=False,
    )
    if state.tracker:
        values = {"loss": float(loss), "images_per_second": stats["images"] / seconds}
        state.tracker.numbers({"step": values}, state.step)


def log_epoch(state, stats, metrics, validation_loss, config):
    """Complete the epoch: add its line to the history, print it, and move the position to the next epoch."""
    train_loss = state.loss_sum / state.batch
    state.epoch, state.batch = state.epoch + 1, 0
    state.loss_sum.zero_()
    line = {
        "epoch": state.epoch,
        "steps": state.step,
        "train_loss": train_loss.item(),
        "validation_loss": validation_loss,
        **metrics,
        "temperature": (-state.model.logit_scale).exp().item(),
        "learning_rates": {group["name"]: group["lr"] for group in state.optimizer.param_groups},
        "seconds": round(stats["seconds"], 2),
        "images_per_second": round(stats["images"] / stats["seconds"], 1),
        "data_time_share": round(stats["data_time"] / stats["seconds"], 4),
        **(state.augmentation.end_epoch(Path(config.run)) if state.augmentation else {}),
    }
    state.history.append(line)
    if state.tracker:
        state.tracker.numbers({"epoch": line}, state.step)
    print_once(
        f"epoch {state.epoch}: loss {line['train_loss']:.3f} (validation {validation_loss:.3f}), validation "
        f"text-to-image R@1 {metrics['text_to_image_R@1']:.1f} R@5 {metrics['text_to_image_R@5']:.1f} "
        f"R@10 {metrics['text_to_image_R@10']:.1f}, rsum {metrics['rsum']:.1f}" + describe_generated(line)
    )


def describe_generated(line):
    if not line.get("generated"):
        return ""
    if line["dropped_by_filter"] == line["generated"]:
        return (
            f"; the CLIP filter dropped all {line['generated']} generated images: they do not match their captions; "
            "train the GAN longer (--gan_epochs), or raise --gan_filter_top_k"
        )
    return f"; {line['generated']} images generated, {line['dropped_by_filter']} dropped by the CLIP filter"


def check_training(state, loss):
    """Raise DivergenceError if the loss is not finite, or if the steps overflow."""
    if not torch.isfinite(loss):
        raise DivergenceError(
            f"the loss is {loss:.3f} at step {state.step}: lower the learning rates, or pass --precision float32"
        )
    if state.scaler.is_enabled() and state.scaler.get_scale() < MIN_SCALE:
        raise DivergenceError(f"every step up to {state.step} overflows: pass --precision float32, or bf16")
