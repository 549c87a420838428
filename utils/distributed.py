"""Training in several processes (torchrun): process group, all-gather of rows, all-reduce of sums."""

import datetime
import os

import torch
import torch.distributed as dist

from config import InputError


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
    if config.device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device is {config.device}, but there are {count} processes: use auto, cuda or cpu")
    use_cuda = config.device in ("auto", "cuda") and torch.cuda.is_available()
    if use_cuda:
        number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= gpus:
            raise InputError(f"process {number} of this machine has no GPU: start at most {gpus} processes")
        torch.cuda.set_device(number)
    # The other processes wait while the first one decodes images or downloads weights.
    dist.init_process_group("nccl" if use_cuda else "gloo", timeout=datetime.timedelta(hours=12))
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


def row_counts(count, device, group):
    """The number of rows of each process, a list."""
    if group is None:
        return [count]
    own = torch.tensor([count], device=device)
    counts = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own, group)
    return torch.cat(counts).tolist()


def rows_before(count, device, group):
    """The total number of rows on processes of lower rank."""
    return 0 if group is None else sum(row_counts(count, device, group)[: dist.get_rank(group)])


def all_gather_rows(x, group):
    """The rows of all processes in the order of their ranks, without gradient; row counts may differ."""
    if group is None:
        return x
    counts = row_counts(len(x), x.device, group)
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


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


def average_batchnorm_stats(model):
    """Average the running statistics of the trained BatchNorm layers: each process saw its own images."""
    trained = [module for module in model.modules() if module.training]
    buffers = [item for module in trained for item in module.named_buffers(recurse=False)]
    statistics = [buffer for name, buffer in buffers if name.startswith("running_")]
    all_reduce_sum(statistics)
    for buffer in statistics:
        buffer /= dist.get_world_size()
