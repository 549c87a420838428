"""Training throughput against a plain loop of the tutorial kind, and what a step costs beyond its forward and backward.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --model_name resnet18 --text_layers 2 --text_width 256 --size 96 --steps 4

Both loops train the same encoders from scratch on the same data with the same number of loader processes and the same
number of images per step, in turn, in one run. The plain loop takes the (image, caption) pairs one by one, decodes the
JPEG each time, pads every caption to the longest of the data set, and trains in float32 and NCHW. The program's is
`Trainer`'s own step and loader; five captions come with an image, so both loops see every pair once per epoch.

"Bare" is forward and backward on the very batches of the steps before, kept in memory: no loading, no clipping, no
optimizer. Any setting of the program may be given as a flag (`--image_path` and `--captions_path` for other pictures).
"""

import argparse
import itertools
import statistics
import tempfile
import time

import albumentations as A
import cv2
import torch
import torch.nn.functional as F
from albumentations.pytorch import ToTensorV2
from common import benchmark_config, report, spread
from torch.utils.data import DataLoader, Dataset

from clip import CLIP, contrastive_backward, to_device
from modules import MEAN, STD
from training import Trainer


class TutorialPairs(Dataset):
    """Every pair an item: its JPEG decoded anew, its caption padded to the longest of all."""

    def __init__(self, pairs, tokenizer, config):
        self.pairs = pairs
        self.tokens = tokenizer(pairs.captions, padding=True, truncation=True, max_length=config.max_length)
        self.transforms = A.Compose([A.Resize(config.size, config.size), A.Normalize(MEAN, STD), ToTensorV2()])

    def __len__(self):
        return len(self.pairs.captions)

    def __getitem__(self, index):
        image = cv2.imread(str(self.pairs.files[self.pairs.image_index[index]]))
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        item = {key: torch.tensor(self.tokens[key][index]) for key in ("input_ids", "attention_mask")}
        return {"image": self.transforms(image=image)["image"], **item}


class TutorialLoop:
    """The plain training loop; its model has the encoders, heads and loss of the program's."""

    def __init__(self, trainer):
        config, self.device = trainer.config, trainer.device
        self.model = CLIP(config, trainer.model.tokenizer).to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=config.weight_decay)
        pairs = TutorialPairs(trainer.splits["train"], self.model.tokenizer, config)
        loader = DataLoader(pairs, config.batch_size, shuffle=True, num_workers=config.num_workers, drop_last=True)
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step(self, batch):
        batch = {key: value.to(self.device) for key, value in batch.items()}
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


class OurLoop:
    """The program's own loader and step; remembers the batches of the last round."""

    def __init__(self, trainer):
        self.trainer, self.device, self.seen = trainer, trainer.device, []
        trainer.model.train()
        self.batches = self.endless()

    def endless(self):
        for epoch in itertools.count():
            self.trainer.sampler.epoch = epoch
            yield from self.trainer.batches()

    def step(self, batch):
        self.seen.append(batch)
        return self.trainer.train_step(batch)

    def bare(self):
        """Seconds per step of forward and backward alone on the batches timed, and of the optimizer's update."""
        trainer, times = self.trainer, []
        for micro_batches in self.seen:
            batch = [to_device(micro_batch, self.device) for micro_batch in micro_batches]
            started = now(self.device)
            contrastive_backward(trainer.model, batch, self.device, trainer.dtype)
            middle = now(self.device)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            times.append((middle - started, now(self.device) - middle))
        return [statistics.mean(part) for part in zip(*times[1:], strict=True)]  # the first, again, is not timed


def now(device):
    """The time once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run(loop, steps):
    """Seconds per step, and of those the seconds spent waiting for data; an untimed step comes before.

    That step gives the allocator the blocks this loop needs: the loop before has left it others.
    """
    loop.step(next(loop.batches))
    waited, started = 0.0, now(loop.device)
    for _ in range(steps):
        before = time.perf_counter()
        batch = next(loop.batches)
        waited += time.perf_counter() - before
        loop.step(batch)
    return (now(loop.device) - started) / max(1, steps), waited / max(1, steps)


def main():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=200)
    own, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        config = benchmark_config(folder, flags, own.pictures, batch_size=16, captions_per_image=5)
        trainer = Trainer(config)
        measure(trainer, own.steps, own.rounds)


def measure(trainer, steps, rounds):
    config, loops = trainer.config, {"tutorial loop": TutorialLoop(trainer), "this program": OurLoop(trainer)}
    ours = loops["this program"]
    for loop in loops.values():  # start the loaders, choose the kernels
        run(loop, 0)
    times, bare = {name: [] for name in loops}, []
    for _ in range(rounds):
        for name, loop in loops.items():
            ours.seen.clear()
            time.sleep(2)  # until the other loop's loader processes have filled their queues
            times[name].append(run(loop, steps))
        time.sleep(2)
        bare.append(ours.bare())
    ours.batches.close()
    trainer.loader = None  # ends its processes
    pairs = {"tutorial loop": config.batch_size, "this program": config.batch_size * config.captions_per_image}
    rows = [
        {
            "loop": name,
            "pairs/s": spread([pairs[name] / step for step, _ in found], 1),
            "images encoded/s": spread([config.batch_size / step for step, _ in found], 1),
            "step, s": spread([step for step, _ in found], 3),
            "of it waiting for data, ms": spread([1000 * waited for _, waited in found], 1),
        }
        for name, found in times.items()
    ]
    steps_ours = [step for step, _ in times["this program"]]
    ratios = zip(steps_ours, (step for step, _ in times["tutorial loop"]), strict=True)
    times_pairs = [config.captions_per_image * plain / step for step, plain in ratios]
    report(
        "throughput-" + config.model_name,
        rows,
        pairs_per_second_ratio=spread(times_pairs),
        bare_forward_backward_seconds=spread([passes for passes, _ in bare], 3),
        optimizer_seconds=spread([update for _, update in bare], 3),
        step_over_bare=spread([s / passes for s, (passes, _) in zip(steps_ours, bare, strict=True)], 3),
        step_over_bare_and_optimizer=spread([s / sum(b) for s, b in zip(steps_ours, bare, strict=True)], 3),
        settings={key: getattr(config, key) for key in SHOWN},
        device=str(trainer.device),
        precision=str(trainer.dtype or torch.float32),
    )


SHOWN = ("model_name", "text_layers", "text_width", "size", "batch_size", "captions_per_image", "num_workers")

if __name__ == "__main__":
    main()
