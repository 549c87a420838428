"""Training in several processes (torchrun): process group, all-gather of rows, all-reduce of sums and gradients."""

import datetime
import os

import torch
import torch.distributed as dist

from config import InputError

BUCKET_SIZE = 12_500_000  # gradients reduced at once; 50 MB


def process_group():
    """The group of all processes, or None in a single-process run."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None


def rank_and_world_size():
    return (dist.get_rank(), dist.get_world_size()) if process_group() else (0, 1)


def is_first_process():
    return int(os.environ.get("RANK", 0)) == 0


def init_processes(config):
    """Join the process group if torchrun started this process, with one GPU per process where there are GPUs.

    Returns the config of the first process: a default run folder is named after the time and could differ.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return config
    if config.batch_size < 2 * count:
        raise InputError(f"batch_size is {config.batch_size}, with {count} processes: use at least {2 * count}")
    if config.gan == "joint" or (config.gan == "pairs" and not config.gan_run):
        raise InputError(
            f"gan is {config.gan} in several processes, but a GAN is trained in one: train it with "
            "python gan.py --run ..., then pass --gan pairs --gan_run ..."
        )
    if config.device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device is {config.device}, but there are {count} processes: use auto, cuda or cpu")
    use_cuda = config.device in ("auto", "cuda") and torch.cuda.is_available()
    if use_cuda:
        number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= gpus:
            raise InputError(f"process {number} of this machine has no GPU: start at most {gpus} processes")
        torch.cuda.set_device(number)
    # The other processes wait while the first one decodes images or downloads weights.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if use_cuda else "gloo",  # row counts are exchanged by the hosts
        timeout=datetime.timedelta(hours=12),
        device_id=torch.device("cuda", number) if use_cuda else None,
    )
    shared = [config]
    dist.broadcast_object_list(shared)
    return shared[0]


def first_process_first(function):
    """The result of `function()`, called by the first process before the others: it may download or build files."""
    if not process_group():
        return function()
    if not is_first_process():
        dist.barrier()
    result = function()
    if is_first_process():
        dist.barrier()
    return result


def row_counts(count, group):
    """The number of rows of each process, a list; the hosts exchange it, so that none waits for its GPU."""
    if group is None:
        return [count]
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([count]), group)
    return torch.cat(counts).tolist()


def rows_before(counts, group):
    """The total number of rows on processes of lower rank."""
    return 0 if group is None else sum(counts[: dist.get_rank(group)])


def all_gather_rows(x, group, counts=None):
    """The rows of all processes in the order of their ranks, without gradient; counts: `row_counts`, if known."""
    if group is None:
        return x
    counts = counts or row_counts(len(x), group)
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x
    gathered = x.new_empty((len(counts), *padded.shape))
    dist.all_gather_into_tensor(gathered.flatten(0, 1), padded, group)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


def global_sum(value, group):
    """The sum of a scalar tensor over all processes."""
    if group is not None:
        dist.all_reduce(value, group=group)
    return value


def all_reduce_sum(tensors):
    """Sum tensors over all processes in place, in a single all-reduce."""
    if process_group() and tensors:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


class GradientReducer:
    """Sums the gradients of a model over all processes, in buckets, while the backward pass computes the next ones.

    DistributedDataParallel does not fit: it averages, and gradients of the temperature and of the micro-batches before
    the last one come from outside its forward pass.
    """

    def __init__(self, model):
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.buckets, self.bucket_of, size = [], {}, BUCKET_SIZE
        for parameter in reversed(parameters):  # about the order in which a backward pass yields gradients
            if size >= BUCKET_SIZE:
                self.buckets.append([])
                size = 0
            self.bucket_of[parameter] = len(self.buckets) - 1
            self.buckets[-1].append(parameter)
            size += parameter.numel()
        self.missing, self.started, self.active = [], [], False

    def __enter__(self):
        self.handles = [p.register_post_accumulate_grad_hook(self.accumulated) for p in self.bucket_of]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def start(self):
        """Called before the last backward pass of a step: from now on, complete gradients are summed."""
        self.missing, self.started, self.active = [len(bucket) for bucket in self.buckets], [], True

    def accumulated(self, parameter):
        if self.active:
            self.missing[self.bucket_of[parameter]] -= 1
            # In the same order in all processes, whatever the order of their gradients.
            while len(self.started) < len(self.buckets) and self.missing[len(self.started)] == 0:
                self.reduce(self.buckets[len(self.started)])

    @torch.no_grad()
    def reduce(self, parameters):
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients]) if gradients else torch.zeros(0)
        self.started.append((gradients, flat, dist.all_reduce(flat, async_op=True) if gradients else None))

    @torch.no_grad()
    def finish(self, loss):
        """Sum the remaining gradients and the loss, and wait until all gradients are in place."""
        self.active = False
        for bucket in self.buckets[len(self.started) :]:
            self.reduce(bucket)
        dist.all_reduce(loss)
        for gradients, flat, work in self.started:
            if work is not None:
                work.wait()
                parts = flat.split([gradient.numel() for gradient in gradients])
                views = [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
                torch._foreach_copy_(gradients, views)


def average_batchnorm_stats(model):
    """Average the running statistics of the trained BatchNorm layers: each process saw its own images."""
    trained = [module for module in model.modules() if module.training]
    buffers = [item for module in trained for item in module.named_buffers(recurse=False)]
    statistics = [buffer for name, buffer in buffers if name.startswith("running_")]
    all_reduce_sum(statistics)
    for buffer in statistics:
        buffer /= dist.get_world_size()
