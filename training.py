"""The training engine: optimizer and schedule, the step, the epoch, evaluation, checkpoints that resume exactly."""

import copy
import datetime
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from calibration import calibration_of
from clip import (
    CLIP,
    contrastive_backward,
    contrastive_loss,
    gather,
    load_model,
    retrieval_metrics,
    save_model,
    setup_device,
    update_average,
    world,
)
from config import InputError, progress_bar, write_json
from dataset import (
    EvaluationImages,
    PairSampler,
    TokenStore,
    TrainingPairs,
    load_splits,
    make_loader,
    train_tokenizer,
)
from generated import generated_pairs
from images import ImageStore, build_image_cache, stored_side
from index import Captions, open_run, run_encoder
from inference import format_metrics
from pictures import draw_queries
from shapes import draw_sample


class Stopped(Exception):
    """A training was told to end, and has left a checkpoint."""


def train(config):
    """Run a configured training from wherever its folder says it is; returns the final results."""
    config = start_processes(config)
    trainer = Trainer(config)
    try:
        trainer.fit()
    except Stopped:
        if is_first_process():
            print(f"\nstopped; to go on: python main.py --resume --run {config.run}", flush=True)
        raise SystemExit(130) from None
    results = trainer.report()
    if dist.is_initialized():  # not after an error: it would wait for processes that wait for this one
        dist.destroy_process_group()
    return results


# ---- processes --------------------------------------------------------------------------------------------------


def is_first_process():
    return int(os.environ.get("RANK", 0)) == 0


def start_processes(config):
    """Join the other processes if torchrun started this one; each gets a GPU of its own where there are GPUs.

    Returns the first process's settings: a run folder named by the time may differ between the processes.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return config
    if config.batch_size < 2 * count:
        raise InputError(f"batch_size is {config.batch_size}, for {count} processes: give at least {2 * count}")
    if config.device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device is {config.device}, for {count} processes: give auto, cuda or cpu")
    use_cuda = config.device in ("auto", "cuda") and torch.cuda.is_available()
    if use_cuda:
        number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= gpus:
            raise InputError(f"process {number} of this machine has no GPU, of which there are {gpus}: start fewer")
        torch.cuda.set_device(number)
    # One process may decode all pictures, or fetch weights, while the others wait.
    dist.init_process_group("nccl" if use_cuda else "gloo", timeout=datetime.timedelta(hours=12))
    common = [config]
    dist.broadcast_object_list(common)
    return common[0]


def first_process_first(function):
    """The result of `function()`, called by the first process before the others: it may fetch or build files."""
    if not world():
        return function()
    if not is_first_process():
        dist.barrier()
    result = function()
    if is_first_process():
        dist.barrier()
    return result


# ---- optimisation -----------------------------------------------------------------------------------------------


def build_optimizer(model, config, device):
    """AdamW with a learning rate for each encoder and the heads; weight decay on matrices only."""
    groups = []
    for name, lr, modules in (
        ("image_encoder", config.image_encoder_lr, [model.image_encoder]),
        ("text_encoder", config.text_encoder_lr, [model.text_encoder]),
        ("heads", config.head_lr, [model.image_projection, model.text_projection]),
    ):
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        parameters += [model.logit_scale] if name == "heads" else []
        for decayed in (True, False):  # biases, norms and the temperature are not decayed
            chosen = [p for p in parameters if (p.ndim >= 2) == decayed]
            decay = config.weight_decay if decayed else 0.0
            if chosen:
                groups.append({"params": chosen, "lr": lr, "weight_decay": decay, "name": name})
    return torch.optim.AdamW(groups, fused=device.type in ("cuda", "cpu"))


def build_scheduler(optimizer, config, steps_per_epoch):
    """ReduceLROnPlateau on the validation loss, stepped per epoch; or warm-up and cosine to zero, per step."""
    if config.scheduler == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=config.factor, patience=config.patience)
    steps = config.epochs * steps_per_epoch
    warmup = min(config.warmup_steps, steps // 2)

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def sum_over_processes(tensors):
    """Add up tensors over all processes, in one message."""
    if world() and tensors:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


# ---- the run ----------------------------------------------------------------------------------------------------


class Trainer:
    """One run: its data, model, optimizer and position; `fit` trains, `report` evaluates and draws."""

    def __init__(self, config):
        self.config, self.folder = config, Path(config.run)
        self.device, self.dtype = setup_device(config.device, config.precision)
        if self.device.type == "cuda" and world():
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if world() else (0, 1)
        if config.sample_images and self.rank == 0:
            draw_sample(config.image_path, config.captions_path, config.sample_images)
        self.splits = first_process_first(lambda: load_splits(config))
        fewest = min(len(pairs.files) for pairs in self.splits.values() if pairs.files)
        if fewest < self.processes:
            raise InputError(f"a split has {fewest} images, for {self.processes} processes: start fewer")
        torch.manual_seed(config.seed)
        tokenizer = train_tokenizer(self.splits["train"].captions) if config.text_tokenizer == "captions" else None
        self.model = first_process_first(lambda: CLIP(config, tokenizer))
        self.model.to(self.device, memory_format=torch.channels_last)
        if config.compile:
            self.model.image_encoder.compile()
            self.model.text_encoder.compile(dynamic=True)
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval() if config.ema_decay else None
        self.stores = self.open_images()
        self.features = self.frozen_features()
        self.sampler, self.loader = self.build_loader()
        self.optimizer = build_optimizer(self.model, config, self.device)
        self.scheduler = build_scheduler(self.optimizer, config, self.sampler.batches)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.epoch, self.batch, self.step = 0, 0, 0  # epochs done, batches of this one done, steps in all
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        self.loss_sum = torch.zeros((), device=self.device, dtype=exact)
        self.best_rsum, self.history = -1.0, []
        self.generated = generated_pairs(config, self.splits["train"], self.model, self.device, self.dtype)
        self.stop_requested = False
        steps = config.epochs * self.sampler.batches
        if self.generated and config.gan_ratio and not any(map(self.generated.is_active, np.arange(steps) / steps)):
            raise InputError(
                f"gan_start is {config.gan_start:g}, gan_end {config.gan_end:g}: none of the {steps} steps lies there"
            )
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "config.json", {**vars(config), "resume": False})
        if world():
            dist.barrier()
            if not (self.folder / "config.json").exists():
                raise InputError(
                    f"run is {self.folder}, which process {self.rank} does not see: on several machines the working "
                    "folder must be a shared one"
                )
        self.load_checkpoint()

    @property
    def evaluated_model(self):
        return self.average or self.model

    # ---- data

    def open_images(self):
        """An `ImageStore` per split; with `cache_images` all pictures are decoded now, once."""
        config, side = self.config, stored_side(self.config.size)
        if not config.cache_images:
            return {split: ImageStore(pairs.files, side) for split, pairs in self.splits.items()}
        options = (side, config.cache_path, config.num_workers, self.rank == 0)
        everything = sorted(file for pairs in self.splits.values() for file in pairs.files)
        first_process_first(lambda: build_image_cache(everything, *options))
        return {
            split: ImageStore(pairs.files, side, build_image_cache(pairs.files, *options))
            for split, pairs in self.splits.items()
        }

    def frozen_features(self):
        """{(encoder, split): features} of the encoders that are not trained: each sample is encoded once."""
        features = {}
        for split in ("train", "validation"):
            if not self.config.encoder_flag("trainable", "image"):
                features["image", split] = self.encode_split(split, "image", self.model.image_features)
            if not self.config.encoder_flag("trainable", "text"):
                features["text", split] = self.encode_split(split, "text", self.model.text_encoder)
        return features

    def encode_split(self, split, encoder, function):
        """`function` of every picture or caption of a split, on the device; the processes share the work."""
        pairs, collate = self.splits[split], None
        number = len(pairs.files) if encoder == "image" else len(pairs.captions)
        block = range(number)[self.rank * number // self.processes : (self.rank + 1) * number // self.processes]
        if encoder == "image":
            dataset = EvaluationImages(self.stores[split], block, self.config.size)
        else:
            captions = pairs.captions[block.start : block.stop]
            dataset = Captions(self.model.tokenizer, captions, self.model.max_length)
            collate = dataset.collate
        size = self.config.micro_batch_size or self.config.batch_size
        description = f"{split} {encoder}s" if self.rank == 0 else None
        self.model.eval()
        workers = 0 if self.stores[split].cache or encoder == "text" else self.config.num_workers
        found = run_encoder(function, dataset, self.device, self.dtype, min(size, 256), workers, description, collate)
        return gather(found, world())

    def build_loader(self):
        pairs, config = self.splits["train"], self.config
        tokens = TokenStore(self.model.tokenizer, pairs.captions, self.model.max_length)
        # Those of the training split wait in the computer's memory: there may be many.
        frozen = [self.features.pop((encoder, "train"), None) for encoder in ("image", "text")]
        frozen = [None if features is None else features.cpu() for features in frozen]
        dataset = TrainingPairs(pairs, self.stores["train"], tokens, self.model.tokenizer.pad_token_id, config, *frozen)
        sampler = PairSampler(pairs, config, self.rank, self.processes)
        if self.rank == 0 and sampler.total < 0.5 * sampler.batches * config.batch_size and sampler.batches > 1:
            most = np.diff(pairs.first)
            print(
                f"note: {pairs.names[most.argmax()]} has {most.max()} captions, which makes {sampler.batches} batches "
                f"of {sampler.total // sampler.batches} images out of an epoch: give a larger --captions_per_image",
                file=sys.stderr,
            )
        workers = 0 if all(features is not None for features in frozen) else config.num_workers
        pin = self.device.type == "cuda"
        return sampler, make_loader(dataset, workers, pin, batch_sampler=sampler, collate_fn=dataset.collate)

    # ---- training

    def fit(self):
        """Train the epochs that are left; Ctrl-C or SIGTERM end after the current step with a checkpoint: `Stopped`."""
        handlers = {number: signal.signal(number, self.request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.epoch < self.config.epochs:
                self.train_epoch()
                if self.stop_requested:
                    self.save_checkpoint()
                    raise Stopped
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def request_stop(self, number, frame):
        if self.stop_requested or world():  # asked twice; or several processes, which cannot agree on a step to stop at
            raise KeyboardInterrupt
        self.stop_requested = True
        if hasattr(signal, "SIGCHLD"):  # a whole process group is told to end: PyTorch would raise in mid-step that
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's processes are gone

    def train_epoch(self):
        """Train from the current position to the end of the epoch, evaluate, and save."""
        self.model.train()
        self.sampler.epoch, self.sampler.start = self.epoch, self.batch
        started = saved = time.perf_counter()
        images = waited = 0
        bar = progress_bar(
            total=self.sampler.batches,
            initial=self.batch,
            desc=f"epoch {self.epoch + 1}/{self.config.epochs}",
            unit="step",
            disable=self.rank > 0,
        )
        batches = self.batches()
        with bar:
            while self.batch < self.sampler.batches and not self.stop_requested:
                before = time.perf_counter()
                try:
                    micro_batches = next(batches)
                except RuntimeError:
                    if self.stop_requested:  # the loader's processes were told to end, too
                        break
                    raise
                waited += time.perf_counter() - before
                loss = self.train_step(micro_batches)
                self.loss_sum += loss
                images += self.processes * sum(int(batch["image_index"][-1]) + 1 for batch in micro_batches)
                self.batch, self.step = self.batch + 1, self.step + 1
                now = time.perf_counter()
                if bar.update():  # drawn about twice a second; only then does the host wait for the device
                    self.check_loss(loss)
                    bar.set_postfix_str(
                        f"loss {loss:.3f}, temperature {(-self.model.logit_scale).exp():.4f}, "
                        f"{images / (now - started):.0f} images/s, {100 * waited / (now - started):.0f}% waiting",
                        refresh=False,
                    )
                if now - saved > 60 * self.config.save_every_minutes:
                    self.save_checkpoint()
                    saved = now
        if not self.stop_requested:
            self.end_epoch(images, waited, time.perf_counter() - started)

    def batches(self):
        """The loader's micro-batches, gathered into the lists that make up a step."""
        loader = iter(self.loader)
        for count in self.sampler.micro_batch_counts():
            yield [next(loader) for _ in range(count)]

    def train_step(self, micro_batches):
        """One optimizer step; returns the batch's loss, on the device. All processes end it with the same weights."""
        # Dropout's masks depend on the step alone, as the crops do: no random state has to be saved for a resume.
        torch.manual_seed(int(np.random.SeedSequence((self.config.seed, self.step, self.rank)).generate_state(1)[0]))
        image_ids = torch.cat([batch["image_ids"] for batch in micro_batches])
        generated, progress = None, self.step / (self.config.epochs * self.sampler.batches)
        if self.generated is not None:
            generated = self.generated.micro_batches(len(image_ids), self.step, progress, self.rank)
        loss = contrastive_backward(self.model, micro_batches, self.device, self.dtype, self.scaler, generated)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        sum_over_processes([loss, *(p.grad for p in parameters)])
        self.average_batchnorm()
        self.scaler.unscale_(self.optimizer)
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.clamp_temperature()
        if self.config.scheduler == "cosine":
            self.scheduler.step()
        if self.average is not None:
            update_average(self.average, self.model, self.config.ema_decay, self.step)
        if self.config.gan == "joint":
            self.generated.learn(self.model, image_ids, self.step, progress)
        return loss

    def check_loss(self, loss):
        if not torch.isfinite(loss):
            raise InputError(
                f"the loss is {loss:.3f} at step {self.step}: lower the learning rates, or give --precision float32; "
                f"{self.folder / 'last.pt'} is from before"
            )

    def end_epoch(self, images, waited, seconds):
        """Evaluate, note the metrics, keep the best model, and save the position."""
        train_loss = self.loss_sum / self.batch
        self.check_loss(train_loss)
        metrics, validation_loss = self.evaluate("validation")
        if self.config.scheduler == "plateau":
            self.scheduler.step(validation_loss)
        self.epoch, self.batch = self.epoch + 1, 0
        self.loss_sum.zero_()
        line = {
            "epoch": self.epoch,
            "steps": self.step,
            "train_loss": train_loss.item(),
            "validation_loss": validation_loss,
            **metrics,
            "temperature": (-self.model.logit_scale).exp().item(),
            "learning_rates": {group["name"]: group["lr"] for group in self.optimizer.param_groups},
            "seconds": round(seconds, 2),
            "images_per_second": round(images / seconds, 1),
            "waiting_share": round(waited / seconds, 4),
            **(self.generated.end_epoch(self.folder) if self.generated is not None else {}),
        }
        self.history.append(line)
        if metrics["rsum"] > self.best_rsum:
            self.best_rsum = metrics["rsum"]
            if self.rank == 0:
                save_model(self.evaluated_model, self.folder / "best")
        self.save_checkpoint()
        if self.rank == 0:
            print(
                f"epoch {self.epoch}: loss {line['train_loss']:.3f} (validation {validation_loss:.3f}), validation "
                f"text-to-image R@1 {metrics['text_to_image_R@1']:.1f} R@5 {metrics['text_to_image_R@5']:.1f} "
                f"R@10 {metrics['text_to_image_R@10']:.1f}, rsum {metrics['rsum']:.1f}" + self.describe_generated(line),
                flush=True,
            )

    def describe_generated(self, line):
        if not line.get("generated"):
            return ""
        if line["dropped_by_gate"] == line["generated"]:
            return (
                f"; the gate dropped all {line['generated']} generated pictures: they do not show what their captions "
                "say; train the GAN longer (--gan_epochs), or raise --gan_gate"
            )
        return f"; {line['generated']} pictures generated, the gate dropped {line['dropped_by_gate']}"

    def average_batchnorm(self):
        """Each process saw its own images: make the running statistics of what is trained their mean."""
        if world():
            trained = [module for module in self.model.modules() if module.training]
            buffers = [item for module in trained for item in module.named_buffers(recurse=False)]
            statistics = [buffer for name, buffer in buffers if name.startswith("running_")]
            sum_over_processes(statistics)
            for buffer in statistics:
                buffer /= self.processes

    # ---- evaluation

    @torch.no_grad()
    def evaluate(self, split, model=None):
        """The retrieval metrics of a split and its loss in batches of the training's size."""
        model = model or self.evaluated_model
        pairs, embeddings = self.splits[split], {}
        for encoder, project, encode in (
            ("image", model.project_image, model.encode_image),
            ("text", model.project_text, model.encode_text),
        ):
            model.eval()
            frozen = self.features.get((encoder, split))
            embeddings[encoder] = project(frozen) if frozen is not None else self.encode_split(split, encoder, encode)
        metrics = retrieval_metrics(embeddings["image"], embeddings["text"], pairs.image_index)
        return metrics, self.validation_loss(embeddings["image"], embeddings["text"], pairs, model.logit_scale)

    def validation_loss(self, image_embeddings, text_embeddings, pairs, logit_scale):
        """The mean loss over batches of `batch_size` images, each with its first `captions_per_image` captions."""
        losses, k = 0.0, self.config.captions_per_image
        for start in range(0, len(pairs.files), self.config.batch_size):
            images = image_embeddings[start : start + self.config.batch_size]
            rows = range(start, start + len(images))
            captions = [(j, i - start) for i in rows for j in range(*pairs.first[i : i + 2])[:k]]
            columns, owners = torch.tensor(captions, device=images.device).T
            losses += len(images) * contrastive_loss(images, text_embeddings[columns], logit_scale, owners).item()
        return losses / len(pairs.files)

    # ---- checkpoints

    def save_checkpoint(self):
        """Write last.pt, whole or not at all: everything that decides how the run goes on.

        The first process alone does it, when its own clock says so: the processes need not agree on the moment.
        """
        if self.rank:
            return
        self.check_loss(self.loss_sum)  # a run that has diverged must not overwrite what came before
        checkpoint = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generated": self.generated.state_dict() if self.generated is not None else None,
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "best_rsum": self.best_rsum,
            "history": self.history,
        }
        temporary = self.folder / "last.pt.tmp"
        torch.save(checkpoint, temporary)
        temporary.replace(self.folder / "last.pt")
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        temporary = self.folder / "metrics.jsonl.tmp"
        temporary.write_text(lines, encoding="utf-8")
        temporary.replace(self.folder / "metrics.jsonl")

    def load_checkpoint(self):
        """Go to the position of last.pt, if there is one."""
        path = self.folder / "last.pt"
        if not path.exists():
            return
        try:
            self.restore(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            reason = (str(error).splitlines() or [repr(error)])[0][:100]
            raise InputError(f"{path} cannot be read as a checkpoint of this run ({reason})") from None
        if self.rank == 0 and self.epoch < self.config.epochs:
            print(f"resuming {self.folder} at epoch {self.epoch + 1}, batch {self.batch}", flush=True)

    def restore(self, checkpoint):
        self.model.load_state_dict(checkpoint["model"])
        if self.average is not None:
            self.average.load_state_dict(checkpoint["average"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        if self.generated is not None:
            self.generated.load_state_dict(checkpoint["generated"])
        self.epoch, self.batch, self.step = checkpoint["epoch"], checkpoint["batch"], checkpoint["step"]
        self.loss_sum.copy_(checkpoint["loss_sum"])
        self.best_rsum, self.history = checkpoint["best_rsum"], checkpoint["history"]

    # ---- the end of a run

    def report(self):
        """Evaluate the best model on the test split (else the validation split); write results.json and pictures."""
        split = "test" if self.splits["test"].files else "validation"
        best = first_process_first(lambda: load_model(self.folder / "best", self.device))  # who wrote it
        self.features = {}
        metrics, _ = self.evaluate(split, best)
        results = {"split": split, "images": len(self.splits[split].files), **metrics}
        if self.rank == 0:
            write_json(self.folder / "results.json", results)
            draw_curves(self.history, self.folder / "curves.png")
            draw_queries(best, self.splits[split], self.stores[split], self.folder / "matches.png")
            calibration_of([open_run(self.folder, self.device)])  # kept, so that a search needs no validation pictures
            print(f"\n{split} split, {results['images']} images:\n{format_metrics(metrics)}")
            print(f"model, curves.png and matches.png are in {self.folder}")
            print(f'to search: python inference.py "a sentence" --run {self.folder.as_posix()}', flush=True)
        return results


def draw_curves(history, path):
    """Loss, recalls and temperature over the epochs, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    epochs = [line["epoch"] for line in history]
    panels = {
        "contrastive loss": {"training": "train_loss", "validation": "validation_loss"},
        "validation recall, text to image (%)": {f"R@{k}": f"text_to_image_R@{k}" for k in (1, 5, 10)},
        "temperature": {"temperature": "temperature"},
    }
    for axis, (title, curves) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for label, key in curves.items():
            axis.plot(epochs, [line[key] for line in history], marker=".", label=label)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend()
    figure.savefig(path, dpi=100)
