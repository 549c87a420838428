"""What only a GPU can tell: host waits, parity, throughput of each option, loss, loader, GAN, embedding, overflow.

    python benchmarks/gpu.py first        # also: second, third; each takes at most ten minutes on one GPU
    python benchmarks/gpu.py steps loss   # single parts
    python benchmarks/gpu.py all --dry    # tiny, on the CPU: only shows that the script runs

Each part runs in its own process with a time limit; a part that fails does not stop the others. Each finding is a line
of JSON, printed and appended to benchmarks/results/gpu.jsonl (`--output`). All encoders have random weights and all
images are synthetic, so nothing is downloaded. The part `flickr8k` needs the environment variables FLICKR8K and
PRETRAINED (see tests/conftest.py) and is skipped without them.
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from common import ROOT, TrainingLoop, benchmark_config, hardware, synchronized_time  # noqa: E402

LIMITS = {"waits": 90, "parity": 90, "overflow": 60, "loss": 120, "gan": 90, "embedding": 90}  # seconds
LIMITS |= {"steps": 560, "loader": 300, "flickr8k": 280}
CALLS = {"first": ["waits", "parity", "overflow", "loss", "gan", "embedding"], "second": ["steps"]}
CALLS |= {"third": ["loader", "flickr8k"], "all": list(LIMITS)}
TINY = {"model_name": "test_resnet", "text_encoder_model": "transformer", "text_layers": 1, "text_width": 64}
TINY |= {"size": 32, "projection_dim": 32, "batch_size": 8, "num_workers": 0, "device": "cpu", "precision": "float32"}
ENCODERS = {
    "resnet50 + distilbert": {"model_name": "resnet50", "text_encoder_model": "distilbert-base-uncased"},
    "ViT-B/32 + transformer": {"model_name": "ViT-B/32", "text_encoder_model": "transformer", "projection_dim": 512},
    "RN50 + transformer": {"model_name": "RN50", "text_encoder_model": "transformer", "projection_dim": 1024},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="+", choices=[*CALLS, *LIMITS])
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--output", default=ROOT / "benchmarks" / "results" / "gpu.jsonl", type=Path)
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # the working folder, in the process of one part
    arguments = parser.parse_args()
    if arguments.inside:
        warnings.filterwarnings("ignore")
        part = Part(arguments.parts[0], arguments.dry, arguments.output, Path(arguments.inside))
        return globals()[f"measure_{part.name}"](part)
    names = list(itertools.chain.from_iterable(CALLS.get(name, [name]) for name in arguments.parts))
    import torch

    part = Part("machine", arguments.dry, arguments.output, None)
    if not (torch.cuda.is_available() or arguments.dry):
        return part.note(parts=names, status="not measured: no CUDA GPU")
    part.note(**hardware(), torch=torch.__version__)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            command = [sys.executable, __file__, name, "--output", str(arguments.output), "--inside", folder]
            started, part = time.time(), Part(name, arguments.dry, arguments.output, None)
            try:
                options = {"timeout": LIMITS[name], "stdout": sys.stdout, "stderr": subprocess.PIPE, "text": True}
                done = subprocess.run([*command, *["--dry"] * arguments.dry], check=False, **options)
                status = "done" if done.returncode == 0 else done.stderr.strip()[-300:]
            except subprocess.TimeoutExpired:
                status = f"stopped after {LIMITS[name]} s"
            part.note(status=status, seconds=round(time.time() - started))
    return None


class Part:
    """One part: its sizes, its data and its lines of results."""

    def __init__(self, name, dry, output, folder):
        self.name, self.dry, self.output, self.folder = name, dry, output, folder

    def note(self, **found):
        line = json.dumps({"part": self.name, **found}, default=str)
        print(line, flush=True)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with open(self.output, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def config(self, **changes):
        """The `Config` of a run on synthetic images, which are written and decoded once for all parts."""
        settings = {"num_workers": min(16, os.cpu_count()), "device": "cuda", "max_length": 76, "batch_size": 256}
        settings |= {"scheduler": "cosine", "epochs": 1000, "dropout": 0.0, **changes}
        if self.dry:
            kept = {name: value for name, value in changes.items() if name not in (*TINY, "gan_size")}
            settings |= {**TINY, **kept}
            settings["micro_batch_size"] = min(4, settings.get("micro_batch_size", 0))
        data, argv = self.folder / "data", []
        if data.exists():
            argv = ["--image_path", str(data / "Images"), "--captions_path", str(data / "captions.txt")]
        return benchmark_config(self.folder, argv, 30 if self.dry else 320, **settings)

    def loop(self, **changes):
        """The program's own training loop."""
        return TrainingLoop(self.config(**changes))

    def step_ms(self, step, device, steps=10):
        """Milliseconds of a call, and of its queueing alone: where they are close, the host is what is slow."""
        steps, warm = (1, 1) if self.dry else (steps, 3)
        for _ in range(warm):
            step()
        start = synchronized_time(device)
        for _ in range(steps):
            step()
        queued = time.perf_counter() - start
        return round((synchronized_time(device) - start) / steps * 1e3, 2), round(queued / steps * 1e3, 2)


def random_batch(model, count, length=24, pin=False):
    """A `Batch` of random images and captions, on the CPU."""
    import torch

    from dataset import Batch

    size, vocabulary = model.config.size, len(model.tokenizer)
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    lengths = torch.randint(length // 3, length + 1, (count, 1))
    mask = (torch.arange(length) < lengths).long()
    ids = torch.randint(5, vocabulary, (count, length)) * mask
    batch = Batch(torch.arange(count), torch.arange(count), images, input_ids=ids, attention_mask=mask)
    return batch.pin_memory() if pin else batch


# ---- correctness ------------------------------------------------------------------------------------------------


def measure_waits(part):
    """Every wait of the host for the GPU in three training steps, by line: PyTorch's own detector."""
    import torch

    cases = {"plain": {}, "gradient caching": {"micro_batch_size": 64}, "EMA, fp16": {"precision": "fp16"}}
    for name, changes in cases.items():
        loop, found = part.loop(ema_decay=0.99, **changes), Counter()
        loop.train(2)

        def count(message, category, file, line, *_, found=found):
            found[f"{Path(file).name}:{line}"] += "called a synchronizing" in str(message)

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = count
            if not part.dry:
                torch.cuda.set_sync_debug_mode("warn")
            loop.train(3)
            if not part.dry:
                torch.cuda.set_sync_debug_mode("default")
        part.note(case=name, waits={place: number for place, number in found.items() if number})


def measure_parity(part):
    """Loss and gradients of the GPU against the CPU, in each precision, whole and with gradient caching."""
    import torch

    import main

    config = part.config(**ENCODERS["ViT-B/32 + transformer"], batch_size=32, micro_batch_size=8, device="cpu")
    captions = main.load_data(config)["train"].captions
    model = main.build_model(config, captions, torch.device("cpu")).eval()
    batches = [random_batch(model, 8) for _ in range(2 if part.dry else 4)]
    expected = loss_and_gradient(model, batches, None)
    model.to("cpu" if part.dry else "cuda")
    dtypes = {"float32": None, "TF32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    for name, dtype in dtypes.items():
        torch.set_float32_matmul_precision("high" if name == "TF32" else "highest")
        for kind, parts in (("whole", [merge(batches)]), ("cached", batches)):
            loss, gradient = loss_and_gradient(model, parts, None if part.dry else dtype)
            error = (gradient - expected[1]).norm() / expected[1].norm()
            part.note(precision=name, kind=kind, loss_difference=loss - expected[0], gradient_error=error.item())


def merge(batches):
    import torch

    from dataset import Batch, pair_targets

    names = ("images", "input_ids", "attention_mask")
    parts = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    targets = pair_targets(batches)
    return Batch(targets["image_index"], torch.arange(len(parts["images"])), **parts)


def loss_and_gradient(model, batches, dtype):
    """The loss, a float, and all gradients in one float64 vector on the CPU."""
    import torch

    from main import TrainState, backward

    model.zero_grad()
    batches = [batch.to(model.device) for batch in batches]
    for number, batch in enumerate(batches):
        batch.image_ids = torch.arange(len(batch), device=model.device) + number * 1000
    scaler = torch.amp.GradScaler(model.device.type, enabled=False)
    state = TrainState(model, None, None, None, scaler, None, torch.zeros(()))
    loss = backward(state, batches, [], dtype)
    return loss.item(), torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])


def measure_overflow(part):
    """fp16 with one infinite activation: the loss of the next steps, and whether all of the state is finite."""
    import torch

    loop = part.loop(precision="fp16", ema_decay=0.9, model_name="resnet18", text_layers=2, text_width=128)
    if part.dry:
        loop.state.scaler = torch.amp.GradScaler("cpu")
    loop.train(3)
    conv = next(module for module in loop.model.modules() if isinstance(module, torch.nn.Conv2d))
    hook = conv.register_forward_hook(lambda module, inputs, output: output * torch.inf)
    loop.train(1)
    hook.remove()
    loop.train(3)
    tensors = [*loop.model.state_dict().values(), *loop.state.ema.module.state_dict().values()]
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
    part.note(state_finite=finite, loss_sum=loop.state.loss_sum.item(), scale=loop.state.scaler.get_scale())


# ---- speed ------------------------------------------------------------------------------------------------------


def measure_steps(part):
    """Images/s of `train_one_epoch` on batches in memory, with each option, beside the plain tutorial loop.

    The most telling come first, in case the time ends.
    """
    first, compiled = {"program": {}, "tutorial loop": None}, {"compile": {"compile": True}}
    more = {"float32 (TF32)": {"precision": "float32"}, "fp16": {"precision": "fp16"}, "EMA": {"ema_decay": 0.99}}
    large = {"micro-batches of 64": {"micro_batch_size": 64}, "5 captions": {"captions_per_image": 5}}
    calls = [(256, first), (256, compiled), (256, large), (256, more), (32, {**first, **compiled, **more})]
    for batch_size, options in calls:
        for encoders, name in itertools.product(ENCODERS, options):
            values = {**ENCODERS[encoders], "batch_size": batch_size}
            if name == "tutorial loop":
                measure_tutorial(part, encoders, values)
            elif not (part.dry and name == "compile"):
                measure_step(part, encoders, name, {**values, **options[name]})


def measure_step(part, encoders, option, values):
    import torch

    loop = part.loop(**values)
    loop.train(1)  # the first step compiles and allocates
    config, count = loop.config, max(1, loop.config.batch_size // (loop.config.micro_batch_size or 10**9))
    steps = [list(itertools.islice(loop.batches, count)) for _ in range(2)]
    memory, size = itertools.chain.from_iterable(itertools.cycle(steps)), len(steps[0])
    loop.batches, loop.counts = memory, itertools.repeat(size)
    ms, host = part.step_ms(lambda: loop.train(1), loop.device)
    peak = None if part.dry else round(torch.cuda.max_memory_allocated() / 1e9, 2)
    speed = {"ms": ms, "host_ms": host, "images_per_second": round(config.batch_size / ms * 1e3), "peak_GB": peak}
    part.note(encoders=encoders, batch=config.batch_size, option=option, **speed)
    if not part.dry:
        del loop, memory, steps
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure_tutorial(part, encoders, values):
    """The peer: float32 without TF32, NCHW, captions padded to the longest of the data set, `loss.item()` each step."""
    import torch
    from throughput import TutorialLoop

    loop = part.loop(**{**values, "num_workers": 0})
    torch.set_float32_matmul_precision("highest")
    tutorial = TutorialLoop(loop)
    batch = next(tutorial.batches)
    ms, host = part.step_ms(lambda: tutorial.step({k: v.to(loop.device) for k, v in batch.items()}), loop.device)
    speed = {"ms": ms, "host_ms": host, "images_per_second": round(len(batch["image"]) / ms * 1e3)}
    part.note(encoders=encoders, batch=len(batch["image"]), option="tutorial loop", **speed)
    torch.set_float32_matmul_precision("high")


def measure_loss(part):
    """The loss, forward and backward, over N and D: dense, and in tiles of several sizes."""
    import torch
    import torch.nn.functional as F

    import clip
    from utils import tiled_loss

    device = torch.device("cpu" if part.dry else "cuda")
    for number, width in ((64, 16),) if part.dry else itertools.product((1024, 4096, 8192, 32_768), (256, 1024)):
        x, y = (F.normalize(torch.randn(number, width, device=device), dim=1).requires_grad_() for _ in range(2))
        t = torch.tensor(2.66, device=device, requires_grad=True)
        for tile in (0, 2048, 4096, 8192):
            clip.MAX_DENSE_LOGITS, tiled_loss.TILE = (0 if tile else 10**12), tile or tiled_loss.TILE
            found = {"N": number, "D": width, "tile": tile or "dense"}
            try:
                ms, _ = part.step_ms(lambda x=x, y=y, t=t: clip.contrastive_loss(x, y, t).backward(), device, 3)
                part.note(**found, ms=ms)
            except torch.OutOfMemoryError:
                part.note(**found, ms="out of memory")


def measure_loader(part):
    """Whole steps with loading: images/s and the share of waiting, over loader processes and micro-batches."""
    cores = os.cpu_count()
    for workers, micro in itertools.product(sorted({4, min(8, cores), min(16, cores)}), (0, 64)):
        loop = part.loop(**ENCODERS["resnet50 + distilbert"], num_workers=workers, micro_batch_size=micro)
        rounds, steps = 1 if part.dry else 3, 2 if part.dry else 10
        loop.train(2)
        speeds, waits = [], []
        for _ in range(rounds):
            start = synchronized_time(loop.device)
            waited = loop.train(steps)
            seconds = synchronized_time(loop.device) - start
            speeds.append(steps * loop.config.batch_size / seconds)
            waits.append(waited / seconds)
        speed = {"images_per_second": round(statistics.median(speeds)), "waiting": round(statistics.median(waits), 3)}
        part.note(workers=workers, micro_batch=micro, **speed)


def measure_gan(part):
    """A training step of the GAN."""
    import torch

    from gan import GAN, Discriminator

    device, dtype = (torch.device("cpu"), None) if part.dry else (torch.device("cuda"), torch.bfloat16)
    for size, compiled in ((32, False),) if part.dry else itertools.product((64, 128), (False, True)):
        architecture = {"generator": "affine", "size": size, "width": 8 if part.dry else 64, "dim": 256}
        discriminator = Discriminator(size, architecture["width"], 256)
        gan = GAN(architecture, discriminator, torch.randn(500, 256), 2e-4, device, dtype)
        count = 4 if part.dry else 64
        if compiled:
            gan.generator.compile()
        real = torch.rand(count, 3, size, size, device=device) * 2 - 1
        embeddings, mismatched = (torch.randn(count, *shape, 256, device=device) for shape in ((), (8,)))
        ms, host = part.step_ms(lambda gan=gan, data=(real, embeddings, mismatched): gan.train_step(*data), device, 16)
        part.note(size=size, batch=count, compiled_generator=compiled, ms=ms, host_ms=host)


def measure_embedding(part):
    """Images/s of the image encoder alone, in each precision, and with decoding from the files."""
    import torch

    from inference import embed_images
    from utils.device import autocast

    loop = part.loop(**ENCODERS["ViT-B/32 + transformer"], num_workers=4)
    model, device = copy.copy(loop.model).eval(), loop.device
    images = random_batch(model, 8 if part.dry else 256).images.to(device)
    for name, dtype in (("float32", None), ("TF32", None), ("bf16", torch.bfloat16)):
        torch.set_float32_matmul_precision("high" if name == "TF32" else "highest")
        with torch.no_grad(), autocast(device, dtype):
            ms, _ = part.step_ms(lambda: model.encode_image(images), device)
        start = synchronized_time(device)
        embed_images(model, loop.pairs.files, amp_dtype=dtype, desc=None)
        whole = round(len(loop.pairs.files) / (synchronized_time(device) - start))
        part.note(precision=name, encoder_images_per_second=round(len(images) / ms * 1e3), with_decoding=whole)


def measure_flickr8k(part):
    """Fine-tuning on Flickr8k: seconds and test metrics of `--preset finetune`."""
    data, encoders = os.environ.get("FLICKR8K"), os.environ.get("PRETRAINED")
    if part.dry or not data or not encoders:
        return part.note(status="not measured: needs FLICKR8K and PRETRAINED")
    run, text = part.folder / "finetune", Path(encoders) / "all-MiniLM-L6-v2"
    flags = ["--preset", "finetune", "--run", run, "--cache_path", part.folder / "cache", "--image_path"]
    flags += [Path(data) / "Images", "--captions_path", data, "--model_name", Path(encoders) / "tf_efficientnet_lite0"]
    flags += ["--text_encoder_model", text, "--text_tokenizer", text]
    start = time.time()
    subprocess.run([sys.executable, ROOT / "main.py", *map(str, flags)], stdout=subprocess.DEVNULL, check=True)
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    return part.note(seconds=round(time.time() - start), rsum=results["rsum"], r10=results["text_to_image_R@10"])


if __name__ == "__main__":
    main()
