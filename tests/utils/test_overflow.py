"""float16: a step with an overflow leaves everything as it was."""

from types import SimpleNamespace

import pytest
import torch

import main
from config import DivergenceError
from utils.cli import StopRequest
from utils.ema import EMA
from utils.log import check_training

CPU = torch.device("cpu")


def train(config, batches, overflowing=None):
    """The `main.TrainState` after one step per batch, with a gradient scale; an activation of one step is infinite."""
    splits = main.load_data(config)
    model = main.build_model(config, splits["train"].captions, CPU)
    optimizer = main.build_optimizer(model, config)
    state = main.TrainState(
        model=model,
        ema=EMA(model, config.ema_decay),
        optimizer=optimizer,
        scheduler=main.build_scheduler(optimizer, config, 10),
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10),
        augmentation=None,
        loss_sum=torch.zeros((), dtype=torch.float64),
    )
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    calls = iter(range(1000))
    parts = config.batch_size // (config.micro_batch_size or config.batch_size)
    passes = parts * (1 if parts == 1 else 2)

    def overflow(layer, inputs, output):
        return output * torch.inf if next(calls) // passes == overflowing else output

    first.register_forward_hook(overflow)
    sampler = SimpleNamespace(num_batches=len(batches), micro_batch_counts=lambda: [parts] * len(batches))
    micro_batches = [batch for step in batches for batch in step]
    main.train_one_epoch(state, sampler, micro_batches, config, None, StopRequest())
    return state


@pytest.mark.parametrize("micro_batch_size", [0, 4])
@pytest.mark.parametrize("overflowing", [0, 1, 2])
def test_a_step_with_an_overflow_changes_nothing(tiny_config, micro_batch_size, overflowing):
    """Weights, optimizer, BatchNorm, EMA equal those of a run without that step; the mean loss is finite."""
    config = tiny_config(
        text_encoder_model="cbow", text_layers=0, dropout=0.0, ema_decay=0.01, micro_batch_size=micro_batch_size
    )
    splits = main.load_data(config)
    model = main.build_model(config, splits["train"].captions, CPU)
    main.open_images(splits, config)
    sampler, loader = main.build_loader(model, splits["train"], config)
    batches, parts = iter(loader), max(sampler.micro_batch_counts())
    steps = [[next(batches) for _ in range(parts)] for _ in range(4)]
    found = train(config, steps, overflowing)
    expected = train(config, [step for number, step in enumerate(steps) if number != overflowing])
    for part in ("model", "ema"):
        state, expected_state = (run.stateful_parts()[part].state_dict() for run in (found, expected))
        for name, tensor in expected_state.items():
            assert torch.equal(state[name], tensor), (part, name)
    for name, values in expected.optimizer.state_dict()["state"].items():
        for key, tensor in values.items():
            assert torch.equal(found.optimizer.state_dict()["state"][name][key], tensor), key
    assert found.scaler.get_scale() == 2**9 and expected.scaler.get_scale() == 2**10
    mean, others = found.loss_sum.item() / 4, expected.loss_sum.item() / 3
    assert 0 < mean < 1.5 * others


def test_a_run_in_which_every_step_overflows_ends():
    scaler, loss = torch.amp.GradScaler("cpu", init_scale=2.0**-21), torch.zeros(())
    scaler.scale(torch.ones(()))
    with pytest.raises(DivergenceError, match="float32"):
        check_training(SimpleNamespace(scaler=scaler, step=40), loss)
    check_training(SimpleNamespace(scaler=torch.amp.GradScaler("cpu", enabled=False), step=40), loss)
