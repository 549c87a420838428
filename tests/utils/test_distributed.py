"""Training in several processes."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT, flags, save_text_folder, start_python
from naive import loss_and_gradients, naive_loss, random_embeddings

import main
from clip import contrastive_loss
from config import InputError
from utils import distributed
from utils.distributed import (
    GradientReducer,
    all_gather_rows,
    first_process_first,
    global_sum,
    is_first_process,
    process_group,
    rank_and_world_size,
    row_counts,
    rows_before,
)
from utils.files import read_json, write_json

pytestmark = pytest.mark.usefixtures("no_plots")


def torchrun(*words, output):
    """Start two processes with torchrun. The `--` keeps torchrun from parsing --run as its own flag."""
    return start_python("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--", *words,
                        output=output)  # fmt: skip


def test_two_processes_train_as_one(tiny_config, tmp_path):
    """Five steps of four or five images, so that the processes have different numbers of them."""
    text_folder = save_text_folder(tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    settings = {
        "model_name": "test_vit",  # no BatchNorm, whose statistics come from one process's images
        "text_encoder_model": str(text_folder),
        "text_layers": 0,
        "text_width": 0,
        "dropout": 0.0,
        "captions_per_image": 5,
        "batch_size": 5,
        "image_encoder_lr": 1e-4,
        "text_encoder_lr": 1e-4,
    }
    together = tiny_config(**settings, run=str(tmp_path / "together"))
    process = torchrun(ROOT / "main.py", *flags(together), output=tmp_path / "output.txt")
    alone = tiny_config(**settings, run=str(tmp_path / "alone"))
    main.train(alone)
    assert process.wait() == 0, (tmp_path / "output.txt").read_text(encoding="utf-8")

    found, expected = (torch.load(Path(config.run) / "last.pt", weights_only=True) for config in (together, alone))
    assert found["step"] == expected["step"] == 5
    (line,), (expected_line,) = found["history"], expected["history"]
    for name in ("train_loss", "validation_loss", "temperature"):
        assert line[name] == pytest.approx(expected_line[name], rel=1e-5), name
    for name, tensor in expected["model"].items():
        assert torch.allclose(found["model"][name], tensor, rtol=1e-5, atol=1e-5), name
    assert {name: line[name] for name in line if "R@" in name} == {n: expected_line[n] for n in line if "R@" in n}
    assert read_json(tmp_path / "together" / "results.json") == read_json(tmp_path / "alone" / "results.json")
    output = (tmp_path / "output.txt").read_text(encoding="utf-8")
    assert output.count("epoch 1: loss") == 1  # only the first process prints
    assert "device: cpu x 2 processes, float32" in output


def compute_share(rank, folder):
    """In a process of its own: the loss and its gradients with respect to the rows of this process."""
    store = f"file://{(folder / 'store').as_posix()}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    images, texts, t, index, ids, weights, text_ids = torch.load(folder / "inputs.pt")
    rows = slice(0, 4) if rank == 0 else slice(4, 11)
    own = (index >= rows.start) & (index < rows.stop)
    inputs = [images[rows].requires_grad_(), texts[own].requires_grad_(), t.requires_grad_()]
    group = process_group()
    loss = contrastive_loss(*inputs, index[own] - rows.start, ids[rows], weights[rows], group, text_ids[own])
    torch.save([loss.detach(), *torch.autograd.grad(loss, inputs)], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_contrastive_loss_of_two_processes_adds_up_to_that_of_the_batch(tmp_path):
    """Processes with 4 and 7 images, some repeated, with unequal caption counts and weights, some equal captions."""
    index = torch.arange(11).repeat_interleave(torch.tensor([1, 5, 2, 1, 3, 4, 1, 2, 7, 1, 1]))
    targets = {"image_ids": torch.tensor([7, 3, 7, 1, 9, 3, 7, 4, 5, 6, 8])}
    targets |= {"weights": torch.rand(11, dtype=torch.float64) + 0.1}
    targets |= {"text_ids": torch.randint(0, 40, (len(index),))}  # some captions are equal
    images, texts = (x.double() for x in random_embeddings(index))
    t = torch.tensor(2.0, dtype=torch.float64)
    torch.save([images, texts, t, index, *targets.values()], tmp_path / "inputs.pt")
    torch.multiprocessing.spawn(compute_share, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    expected = loss_and_gradients(naive_loss, images, texts, 2.0, torch.float64, image_index=index, **targets)
    loss, image_grad, text_grad, t_grad = expected
    assert torch.allclose(first[0] + second[0], loss, rtol=1e-8)
    assert torch.allclose(torch.cat([first[1], second[1]]), image_grad, rtol=1e-6, atol=1e-10)
    assert torch.allclose(torch.cat([first[2], second[2]]), text_grad, rtol=1e-6, atol=1e-10)
    assert torch.allclose(first[3] + second[3], t_grad, rtol=1e-8)


def reduce_share(rank, folder):
    """In a process of its own: the gradients of two backward passes, summed over the processes in small buckets."""
    store = f"file://{(folder / 'store').as_posix()}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    distributed.BUCKET_SIZE = 10
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    model.unused = torch.nn.Parameter(torch.zeros(3))
    loss = torch.tensor(1.0 + rank)
    with GradientReducer(model) as reducer:
        for step in range(2):  # of which the last one counts
            model.zero_grad()
            model(torch.full((2, 3), 1.0 + rank + step)).sum().backward()
            reducer.start()
            model(torch.full((2, 3), 2.0 + rank + step)).square().sum().backward()
            started = len(reducer.started)
            reducer.finish(loss if step else torch.zeros(()))
    gradients = [p.grad for p in model.parameters()]
    torch.save([started, len(reducer.buckets), loss, gradients], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_gradients_are_summed_in_buckets_during_the_last_backward_pass(tmp_path):
    torch.multiprocessing.spawn(reduce_share, (tmp_path,), nprocs=2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    for rank in (0, 1):
        model(torch.full((2, 3), 2.0 + rank)).sum().backward()
        model(torch.full((2, 3), 3.0 + rank)).square().sum().backward()
    for rank in (0, 1):
        started, buckets, loss, gradients = torch.load(tmp_path / f"{rank}.pt")
        assert (started, buckets) == (2, 3)  # before the end of the pass, but for the unused one
        assert loss == 3
        assert gradients[0] is None
        for found, parameter in zip(gradients[1:], model.parameters(), strict=True):
            assert torch.allclose(found, parameter.grad)


DIES = """
import os, signal, sys, threading, time
from pathlib import Path
import main

def die():
    while not Path("run/last.pt").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        threading.Thread(target=die, daemon=True).start()
    main.main()
"""


def test_killed_process_ends_the_run_with_a_message(tiny_config, tmp_path):
    config = tiny_config(epochs=100_000, save_every_minutes=0.0, captions_per_image=5)
    (tmp_path / "dies.py").write_text(DIES, encoding="utf-8")
    process = torchrun(tmp_path / "dies.py", *flags(config), output=tmp_path / "output.txt")
    try:
        assert process.wait(timeout=120) != 0
    finally:
        process.kill()
    output = (tmp_path / "output.txt").read_text(encoding="utf-8")
    assert "ChildFailedError" in output
    assert "rank      : 1" in output
    last = torch.load(Path(config.run) / "last.pt", weights_only=True)  # complete, so that the run can be resumed
    assert last["step"] >= 1


def test_batch_size_too_small_for_the_processes_is_refused(tiny_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(InputError, match="batch_size is 8, with 8 processes: use at least 16"):
        main.init_processes(tiny_config())


def test_device_for_one_process_is_refused_in_several(tiny_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="device is cuda:1, but there are 2 processes: use auto, cuda or cpu"):
        main.init_processes(tiny_config(device="cuda:1"))


@pytest.mark.parametrize("argv", [["--gan", "joint", "--gan_run", "x"], ["--gan", "pairs"]])
def test_gan_training_in_several_processes_is_refused(refused, monkeypatch, argv):
    monkeypatch.setenv("WORLD_SIZE", "2")
    write_json("x/gan/config.json", {})
    line = refused(main.main, argv)
    assert f"gan is {argv[1]} in several processes" in line
    assert "python gan.py --run" in line


def test_functions_of_a_single_process_do_nothing():
    assert process_group() is None
    assert is_first_process()
    assert rank_and_world_size() == (0, 1)
    x = torch.arange(6).view(3, 2)
    assert all_gather_rows(x, None) is x
    assert (row_counts(3, None), rows_before([3], None)) == ([3], 0)
    assert global_sum(torch.tensor(2.0), None) == 2
    assert first_process_first(lambda: 7) == 7
