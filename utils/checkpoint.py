"""Checkpoints (last.pt) from which a run resumes exactly."""

import json
from pathlib import Path

import torch

from config import InputError
from utils.distributed import is_first_process, process_group, rank_and_world_size
from utils.files import TEMPORARY, atomic_write, check_regular, remove_stale, write_json
from utils.log import check_training
from utils.splits import save_split

POSITION = ("epoch", "batch", "step", "best_rsum", "history")
OLD_NAMES = {"ema": "average", "augmentation": "generated"}  # of parts in checkpoints of earlier versions


def create_run_folder(folder, config, history=(), splits=None):
    """Create the run folder with config.json and split.json, and check that all processes see it.

    What a killed process left incomplete is completed.
    """
    if is_first_process():
        for parent in {temporary.parent for temporary in folder.rglob(f".*{TEMPORARY}")}:
            remove_stale(parent)
        write_json(folder / "config.json", {**vars(config), "resume": False})
        if splits:
            save_split(folder, splits)
        if history:
            write_history(history, folder)  # it may lack the last line of the checkpoint
    if process_group():
        torch.distributed.barrier()
        if not (folder / "config.json").exists():
            raise InputError(
                f"run is {folder}, which process {rank_and_world_size()[0]} cannot see: several machines need a "
                "shared working folder"
            )


def save_checkpoint(state, folder):
    """Write last.pt, everything needed to resume the run exactly, and metrics.jsonl; state: a `main.TrainState`.

    Only the first process writes, so no synchronisation is needed. Raises DivergenceError: a diverged
    state does not replace the last good one.
    """
    if not is_first_process():
        return
    check_training(state, state.loss_sum)
    checkpoint = {name: part.state_dict() for name, part in state.stateful_parts().items()}
    checkpoint |= {name: getattr(state, name) for name in (*POSITION, "loss_sum")}
    with atomic_write(Path(folder) / "last.pt") as temporary:
        torch.save(checkpoint, temporary)
    write_history(state.history, folder)


def load_checkpoint(state, folder):
    """Restore the state from last.pt; False if there is none. Raises InputError if it does not fit the run."""
    path = Path(folder) / "last.pt"
    if not path.exists():
        return False
    checkpoint = read_checkpoint(path, "a checkpoint of this run")
    try:
        for name, part in state.stateful_parts().items():
            part.load_state_dict(checkpoint[name if name in checkpoint else OLD_NAMES.get(name, name)])
        for name in POSITION:
            setattr(state, name, checkpoint[name])
        state.loss_sum.copy_(checkpoint["loss_sum"])
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        reason = (str(error).splitlines() or [repr(error)])[0][:100]
        message = f"{path} cannot be read as a checkpoint of this run and version ({reason}): start a new run"
        raise InputError(message) from error
    return True


def read_checkpoint(path, description):
    """The dict in a checkpoint file, tensors on the CPU; pickled code is refused. Raises InputError."""
    check_regular(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the classes that damaged bytes lead to are many
        reason = (str(error).splitlines() or [repr(error)])[0][:100]
        raise InputError(f"{path} cannot be read as {description} ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path} cannot be read as {description} (it is not a dict)")
    return checkpoint


def write_history(history, folder):
    """Write metrics.jsonl, one line per epoch."""
    with atomic_write(Path(folder) / "metrics.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in history), encoding="utf-8")
