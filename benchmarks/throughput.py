"""Training throughput compared with a plain tutorial loop, and the overhead of a step over its forward and backward.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --model_name resnet18 --text_layers 2 --text_width 256 --size 96 --batch_size 32

Both loops train the same encoders from scratch on the same data, with the same number of loader processes and of images
per step, in turn within one process. The tutorial loop iterates over (image, caption) pairs, decodes the JPEG each
time, pads every caption to the longest of the data set, and trains in float32 and NCHW. The program's loop is
`main.train_one_epoch` with its own loader; an image comes with five captions, so that both loops see every pair once
per epoch.

"Bare" is forward and backward alone on the same batches, kept in memory: no loading, no gradient clipping and no
optimizer. Flags: `--steps` (per round, default 1), `--rounds` (default 3), `--num_images` (synthetic ones, default 200)
and any setting of the program (`--image_path` and `--captions_path` for other images).
"""

import argparse
import itertools
import statistics
import tempfile
import time
from functools import partial

import albumentations as A
import cv2
import torch
import torch.nn.functional as F
from albumentations.pytorch import ToTensorV2
from common import TrainingLoop, benchmark_config, report, spread, synchronized_time
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, Dataset

from clip import CLIP, contrastive_loss
from dataset import pair_targets
from utils.device import autocast
from utils.device_augmentation import augment_images
from utils.grad_cache import cached_backward

SETTINGS = ("model_name", "text_layers", "text_width", "size", "batch_size", "captions_per_image", "num_workers")


class TutorialPairs(Dataset):
    """One item per pair: the JPEG is decoded each time, the caption padded to the longest of the data set."""

    def __init__(self, pairs, tokenizer, config):
        self.pairs = pairs
        self.tokens = tokenizer(pairs.captions, padding=True, truncation=True, max_length=config.max_length)
        normalize = A.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        self.transforms = A.Compose([A.Resize(config.size, config.size), normalize, ToTensorV2()])

    def __len__(self):
        return len(self.pairs.captions)

    def __getitem__(self, index):
        image = cv2.imread(str(self.pairs.files[self.pairs.image_index[index]]))
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        item = {key: torch.tensor(self.tokens[key][index]) for key in ("input_ids", "attention_mask")}
        return {"image": self.transforms(image=image)["image"], **item}


class TutorialLoop:
    """A plain training loop with the encoders, heads and loss of a `TrainingLoop`."""

    def __init__(self, program):
        config, self.device = program.config, program.device
        self.model = CLIP(config, program.model.tokenizer).to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=config.weight_decay)
        pairs = TutorialPairs(program.pairs, self.model.tokenizer, config)
        loader = DataLoader(pairs, config.batch_size, shuffle=True, num_workers=config.num_workers, drop_last=True)
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def train(self, steps):
        """Train for some steps; returns the seconds spent waiting for data."""
        data_time = 0.0
        for _ in range(steps):
            start = time.perf_counter()
            batch = next(self.batches)
            data_time += time.perf_counter() - start
            self.step({key: value.to(self.device) for key, value in batch.items()})
        return data_time

    def step(self, batch):
        image_features = self.model.image_encoder.backbone(batch["image"])
        text_features = self.model.text_encoder.encode(batch["input_ids"], batch["attention_mask"])
        images, texts = self.model.project_image(image_features), self.model.project_text(text_features)
        logits = self.model.logit_scale.exp() * images @ texts.T
        labels = torch.arange(len(logits), device=self.device)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


class ProgramLoop(TrainingLoop):
    """The program's own loop; records the micro-batches of its steps."""

    def __init__(self, config):
        super().__init__(config)
        self.seen, self.seen_counts = [], []
        self.batches = record(self.batches, self.seen)
        self.counts = record(self.counts, self.seen_counts)

    def forget(self):
        self.seen.clear()
        self.seen_counts.clear()

    def time_bare_steps(self):
        """Mean seconds of forward and backward, and of the optimizer's update, on the recorded steps but the first."""
        times, batches, optimizer = [], iter(self.seen), self.state.optimizer
        for count in self.seen_counts:
            micro_batches = [batch.to(self.device) for batch in itertools.islice(batches, count)]
            for batch in micro_batches:
                if batch.augmentation is not None:
                    batch.images = augment_images(batch.images, batch.augmentation, self.config.size)
            start = synchronized_time(self.device)
            forward_backward(self.model, micro_batches, self.amp_dtype)
            middle = synchronized_time(self.device)
            optimizer.step()
            optimizer.zero_grad()
            times.append((middle - start, synchronized_time(self.device) - middle))
        return [statistics.mean(part) for part in zip(*times[1:], strict=True)]


def record(items, seen):
    """Yield the items and append each to `seen`."""
    for item in items:
        seen.append(item)
        yield item


def forward_backward(model, batches, amp_dtype):
    """Forward and backward of `main.train_one_epoch`, without loss scaling."""
    targets, no_scaling = pair_targets(batches), torch.amp.GradScaler(model.device.type, enabled=False)
    if len(batches) > 1:
        loss_function = partial(contrastive_loss, logit_scale=model.logit_scale, **targets)
        cached_backward(model, batches, [], loss_function, amp_dtype, no_scaling)
        return
    with autocast(model.device, amp_dtype):
        image_embeddings, text_embeddings = model(batches[0])
    contrastive_loss(image_embeddings, text_embeddings, model.logit_scale, **targets).backward()


def time_steps(loop, steps):
    """Seconds per step, and how many of them were spent waiting for data.

    An untimed step comes first: the previous loop left the memory allocator with blocks of other sizes.
    """
    loop.train(1)
    start = synchronized_time(loop.device)
    data_time = loop.train(steps)
    return (synchronized_time(loop.device) - start) / steps, data_time / steps


def main():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num_images", type=int, default=200)
    own, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        config = benchmark_config(folder, flags, own.num_images, batch_size=16, captions_per_image=5)
        measure(config, own.steps, own.rounds)


def measure(config, steps, rounds):
    program = ProgramLoop(config)
    loops = {"tutorial loop": TutorialLoop(program), "this program": program}
    for loop in loops.values():  # starts the loader processes and selects the kernels
        loop.train(1)
    times, bare = {name: [] for name in loops}, []
    for _ in range(rounds):
        for name, loop in loops.items():
            program.forget()
            time.sleep(2)  # until the loader processes of the other loop have filled their queues
            times[name].append(time_steps(loop, steps))
        time.sleep(2)
        bare.append(program.time_bare_steps())
    pairs = {"tutorial loop": config.batch_size, "this program": config.batch_size * config.captions_per_image}
    rows = [
        {
            "loop": name,
            "pairs/s": spread([pairs[name] / step for step, _ in found], 1),
            "images encoded/s": spread([config.batch_size / step for step, _ in found], 1),
            "step, s": spread([step for step, _ in found], 3),
            "data time per step, ms": spread([1000 * data_time for _, data_time in found], 1),
        }
        for name, found in times.items()
    ]
    tutorial_steps, steps = ([step for step, _ in found] for found in times.values())
    ratios = [config.captions_per_image * a / b for a, b in zip(tutorial_steps, steps, strict=True)]
    report(
        "throughput-" + config.model_name,
        rows,
        pairs_per_second_ratio=spread(ratios),
        bare_forward_backward_seconds=spread([passes for passes, _ in bare], 3),
        optimizer_seconds=spread([update for _, update in bare], 3),
        step_over_bare=spread([step / passes for step, (passes, _) in zip(steps, bare, strict=True)], 3),
        step_over_bare_and_optimizer=spread([step / sum(both) for step, both in zip(steps, bare, strict=True)], 3),
        settings={key: getattr(config, key) for key in SETTINGS},
        device=str(program.device),
        precision=str(program.amp_dtype or torch.float32),
    )


if __name__ == "__main__":
    main()
