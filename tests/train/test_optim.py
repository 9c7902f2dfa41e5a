"""Schedule, clipping, EMA."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from train.loop import LoopSettings, set_learning_rate
from train.optim import EMA, clip_gradients, learning_rate_at, make_optimizer


def rate(step: int, schedule: str = "cosine") -> float:
    return learning_rate_at(step, peak=1.0, warmup_steps=10, total_steps=110, schedule=schedule)


def test_learning_rate_rises_then_falls_to_a_tenth():
    assert [rate(0), rate(4), rate(9)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate(60) == pytest.approx(0.55)
    assert rate(110) == pytest.approx(0.1)
    assert all(rate(s) > rate(s + 1) for s in range(10, 109))
    assert {rate(s, "constant") for s in range(9, 110)} == {1.0}


def test_vectors_do_not_decay_and_low_precision_is_refused():
    layer = nn.Linear(3, 2)
    groups = make_optimizer(dict(layer.named_parameters()), 1e-3, 0.1).param_groups
    assert [(g["weight_decay"], [p.shape for p in g["params"]]) for g in groups] == [
        (0.1, [layer.weight.shape]),
        (0.0, [layer.bias.shape]),
    ]
    with pytest.raises(TypeError, match="weight: torch.bfloat16"):
        make_optimizer(dict(layer.bfloat16().named_parameters()), 1e-3, 0.1)


def test_parameters_learn_at_rates_of_their_own():
    layers = nn.ModuleDict({"slow": nn.Linear(3, 2), "fast": nn.Linear(3, 2)})
    scale = {"slow": 0.1, "fast": 1.0}
    optimizer = make_optimizer(dict(layers.named_parameters()), 1e-3, 0.1, lambda name: scale[name.split(".")[0]])
    settings = LoopSettings(steps=10, learning_rate=1e-2, warmup_steps=4)
    assert set_learning_rate(optimizer, settings, 1) == 5e-3
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in layers.named_parameters():
        assert rates[id(parameter)] == pytest.approx(5e-3 * scale[name.split(".")[0]])
    assert {(g["weight_decay"], p.ndim) for g in optimizer.param_groups for p in g["params"]} == {(0.1, 2), (0.0, 1)}


def test_clipping_scales_to_the_limit_and_zero_only_measures():
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 3.0)
    assert clip_gradients([parameter], 0.0).item() == pytest.approx(6.0)
    assert parameter.grad.tolist() == [3.0] * 4
    assert clip_gradients([parameter], 1.5).item() == pytest.approx(6.0)
    assert parameter.grad.norm().item() == pytest.approx(1.5, rel=1e-5)


def test_average_follows_the_recurrence_and_swaps_back():
    parameter = nn.Parameter(torch.zeros(2))
    ema, expected = EMA({"p": parameter}, decay=0.9), torch.zeros(2)
    for step in range(200):
        parameter.data.fill_(step)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(ema.average["p"], expected)
    with ema.swapped_in():
        torch.testing.assert_close(parameter.data, expected)
    assert parameter.tolist() == [199.0, 199.0]
    torch.testing.assert_close(ema.average["p"], expected)


def test_swap_survives_an_error():
    parameter = nn.Parameter(torch.ones(1))
    ema = EMA({"p": parameter}, decay=0.9)
    parameter.data.fill_(5.0)
    with pytest.raises(RuntimeError), ema.swapped_in():
        raise RuntimeError
    assert parameter.item() == 5.0 and ema.average["p"].item() == 1.0
