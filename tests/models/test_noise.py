"""Layouts, plans, training levels and loss weights: the invariants that every method rests on.

Numbers in brackets are those of the shared invariants: [3] plans, [4] support, [5] weights, [7] seeds,
[10] shift.
"""

from __future__ import annotations

import math

import pytest
import torch

from models.layout import ClipLayout, Segment, shots_layout
from models.noise import (
    base_levels,
    diffusion_loss,
    loss_weights,
    noise_plan,
    sample_levels,
    shift_levels,
)

LAYOUT = ClipLayout(
    (
        Segment("history", 2, shot_id=3, text_id=0),
        Segment("condition", 1, shot_id=5, text_id=1),
        Segment("target", 3, shot_id=5, text_id=1),
        Segment("dummy", 1, shot_id=6, text_id=2),
        Segment("target", 1, shot_id=7, text_id=1),
    )
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def test_layout_says_what_each_frame_is():
    assert LAYOUT.num_frames == 8 and LAYOUT.num_shots == 4
    assert LAYOUT.roles == ["history"] * 2 + ["condition"] + ["target"] * 3 + ["dummy"] + ["target"]
    assert LAYOUT.shot_ids.tolist() == [3, 3, 5, 5, 5, 5, 6, 7]
    assert LAYOUT.text_ids.tolist() == [0, 0, 1, 1, 1, 1, 2, 1]
    assert LAYOUT.frame_slices == [slice(0, 2), slice(2, 3), slice(3, 6), slice(6, 7), slice(7, 8)]
    assert LAYOUT.shot_slices == [slice(0, 2), slice(2, 6), slice(6, 7), slice(7, 8)]
    assert LAYOUT.is_given.tolist() == [True, True, True, False, False, False, False, False]
    assert LAYOUT.is_target.tolist() == [False] * 3 + [True] * 3 + [False, True]


def test_layout_refuses_broken_shots():
    with pytest.raises(ValueError, match=r"\[0, 1, 0\].*unbroken"):
        ClipLayout((Segment("target", 1, 0), Segment("target", 1, 1), Segment("target", 1, 0)))
    with pytest.raises(ValueError, match="at least one segment"):
        ClipLayout(())
    with pytest.raises(ValueError, match="num_frames is 0"):
        Segment("target", 0)
    with pytest.raises(ValueError, match="'given'"):
        Segment("given", 1)  # type: ignore[arg-type]


# --- plans ---------------------------------------------------------------------------------------------------------

PLANS = {
    "uniform": dict(mode="uniform"),
    "hold": dict(mode="hold"),
    "hold at t_c": dict(mode="hold", context_level=0.3),
    "scale": dict(mode="scale", multipliers=[0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 0.0, 1.0]),
    "min": dict(mode="min", caps=[0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 0.0, 1.0]),
    "lag": dict(mode="lag", lag=2),
    "lag at t_c": dict(mode="lag", lag=1, context_level=0.2),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_plans_fall_and_end_at_zero_on_targets(name, shift):  # [3]
    plan = noise_plan(LAYOUT, base_levels(7, shift), **PLANS[name])
    assert plan.dtype == torch.float32 and plan.shape[1] == LAYOUT.num_frames
    assert (plan[1:] <= plan[:-1]).all()
    assert (plan[-1, LAYOUT.is_target] == 0).all()
    assert (plan >= 0).all() and (plan <= 1).all()
    assert (plan[:, 6] == 0).all(), "a dummy frame is clean throughout"


def test_each_mode_against_its_formula():
    s = base_levels(4)
    given = [True, True, True, False, False, False, False, False]
    moving = [3, 4, 5, 7]  # neither given nor dummy
    clock = noise_plan(LAYOUT, s, "uniform")
    hold = noise_plan(LAYOUT, s, "hold", context_level=0.3)
    caps = PLANS["min"]["caps"]
    low = noise_plan(LAYOUT, s, "min", caps=caps)
    ramp = noise_plan(LAYOUT, s, "scale", multipliers=PLANS["scale"]["multipliers"])
    for k in range(5):
        for f in moving:
            assert clock[k, f] == hold[k, f] == s[k]
            assert low[k, f] == min(s[k].item(), caps[f])
            assert ramp[k, f] == pytest.approx(PLANS["scale"]["multipliers"][f] * s[k].item())
        for f in range(3):
            assert given[f] and hold[k, f] == pytest.approx(0.3)


def test_lag_starts_each_frame_later():
    layout = shots_layout([4])
    s = base_levels(5)
    plan = noise_plan(layout, s, "lag", lag=2)
    assert plan.shape == (5 + 2 * 3 + 1, 4)
    for r in range(len(plan)):
        for f in range(4):
            assert plan[r, f] == s[min(max(r - 2 * f, 0), 5)]
    assert torch.equal(noise_plan(layout, s, "lag", lag=0), noise_plan(layout, s, "uniform"))


def test_shift_acts_once_and_on_base_levels_only():  # [10]
    plain, shifted = base_levels(10), base_levels(10, shift=3.0)
    assert plain[0] == shifted[0] == 1 and plain[-1] == shifted[-1] == 0
    for u, v in zip(plain.double(), shifted.double(), strict=True):
        assert v.item() == pytest.approx(3 * u.item() / (1 + 2 * u.item()), abs=1e-6)
    layout = ClipLayout((Segment("condition", 1), Segment("target", 1), Segment("target", 1)))
    held = noise_plan(layout, shifted, "hold", context_level=0.1)
    assert (held[:, 0] == torch.tensor(0.1)).all(), "t_c is in final units"
    capped = noise_plan(layout, shifted, "min", caps=[0.0, 0.5, 1.0])
    assert capped[0, 1] == 0.5, "caps are in final units"
    assert torch.equal(capped[:, 2], shifted)

    draw = dict(generator=None, density="uniform")
    for dist in ("shared", "per_frame", "mixed", "per_shot"):
        once = sample_levels(layout, 64, dist, **draw | {"generator": seeded()}, shift=3.0)
        none = sample_levels(layout, 64, dist, **draw | {"generator": seeded()}, shift=1.0)
        assert torch.equal(once, shift_levels(none, 3.0))
    capped_draws = sample_levels(layout, 512, "capped", generator=seeded(), shift=5.0, caps=[0.0, 0.5, 1.0])
    assert (capped_draws[:, 0] == 0).all() and capped_draws[:, 1].max() == 0.5 and capped_draws[:, 2].max() > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="min"), "needs caps"),
        (dict(mode="scale"), "needs multipliers"),
        (dict(mode="min", caps=[0.5]), "caps must be 8 numbers"),
        (dict(mode="scale", multipliers=[1.5] * 8), r"multipliers must be 8 numbers in \[0, 1\]"),
        (dict(mode="hold", context_level=2.0), "context_level is 2.0"),
        (dict(mode="lag", lag=-1), "lag is -1"),
        (dict(mode="ramp"), "unknown plan mode 'ramp'"),
    ],
)
def test_plans_refuse_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        noise_plan(LAYOUT, base_levels(4), **options)


@pytest.mark.parametrize("levels", [[1.0, 0.5, 0.1], [0.0, 0.5, 0.0], [1.5, 0.0], [1.0]])
def test_base_levels_must_fall_to_zero(levels):
    with pytest.raises(ValueError, match="must fall"):
        noise_plan(LAYOUT, torch.tensor(levels), "uniform")


# --- training levels -----------------------------------------------------------------------------------------------

TARGETS = shots_layout([2, 1, 3])


def varies(levels: torch.Tensor) -> torch.Tensor:
    return (levels != levels[:, :1]).any(dim=1)


@pytest.mark.parametrize("p", [0.0, 0.2, 1.0])
def test_ptss_varies_in_a_share_p_of_the_samples(p):
    levels = sample_levels(TARGETS, 4000, "mixed", generator=seeded(), p=p)
    assert varies(levels).float().mean().item() == pytest.approx(p, abs=0.02 if 0 < p < 1 else 0)
    assert levels.shape == (4000, 6) and levels.dtype == torch.float32 and levels.min() > 0 and levels.max() < 1


def test_each_distribution_shares_levels_as_it_says():
    draw = dict(batch=200)
    assert not varies(sample_levels(TARGETS, dist="shared", generator=seeded(), **draw)).any()
    per_frame = sample_levels(TARGETS, dist="per_frame", generator=seeded(), **draw)
    assert all(len(set(row)) == 6 for row in per_frame.tolist())
    per_shot = sample_levels(TARGETS, dist="per_shot", generator=seeded(), **draw)
    for row in per_shot.tolist():
        assert row[0] == row[1] and row[3] == row[4] == row[5] and len({row[0], row[2], row[3]}) == 3
    shared = sample_levels(TARGETS, 4000, "per_shot", generator=seeded(), shared_prob=0.25)
    assert (~varies(shared)).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_levels_are_independent_between_frames_and_samples():
    levels = sample_levels(shots_layout([3]), 20000, "per_frame", generator=seeded(), density="uniform")
    correlation = torch.corrcoef(levels.T)
    assert (correlation - torch.eye(3)).abs().max() < 0.03
    assert levels.mean().item() == pytest.approx(0.5, abs=0.01)
    shared = sample_levels(shots_layout([2]), 20000, "shared", generator=seeded(), density="uniform")[:, 0]
    assert torch.corrcoef(torch.stack([shared[1:], shared[:-1]]))[0, 1].abs() < 0.03


def test_logit_normal_has_its_mean_and_deviation():
    levels = sample_levels(shots_layout([1]), 50000, "shared", generator=seeded(), mean=0.7, std=0.5)
    logit = torch.log(levels / (1 - levels))
    assert logit.mean().item() == pytest.approx(0.7, abs=0.02) and logit.std().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("dist", ["shared", "mixed", "per_frame"])
def test_clean_frames_appear_in_every_pattern_but_all(dist):  # [4]
    levels = sample_levels(shots_layout([3]), 6000, dist, generator=seeded(), p=0.5, clean_prob=0.3)
    clean = levels == 0
    assert clean.any(dim=1).float().mean().item() == pytest.approx(0.3, abs=0.03)
    patterns = {tuple(row) for row in clean.tolist()}
    assert len(patterns) == 2**3 - 1 and (True, True, True) not in patterns


def test_clean_shots_are_whole_shots():
    clean = sample_levels(TARGETS, 3000, "per_shot", generator=seeded(), clean_prob=0.5) == 0
    patterns = {tuple(row) for row in clean.tolist()}
    assert len(patterns) == 2**3 - 1
    assert all(p[0] == p[1] and p[3] == p[4] == p[5] for p in patterns)
    alone = sample_levels(shots_layout([4]), 500, "per_shot", generator=seeded(), clean_prob=1.0)
    assert alone.min() > 0, "the only shot of a clip is never clean"


def test_a_seed_fixes_the_levels_and_nothing_else_does():  # [7]
    options = dict(dist="mixed", p=0.5, clean_prob=0.2)
    first = sample_levels(TARGETS, 32, generator=seeded(1), **options)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(first, sample_levels(TARGETS, 32, generator=seeded(1), **options))
    assert torch.equal(state, torch.get_rng_state()), "the global generator is not touched"
    assert not torch.equal(first, sample_levels(TARGETS, 32, generator=seeded(2), **options))


def test_dummy_frames_are_clean_in_training():
    assert (sample_levels(LAYOUT, 16, "per_shot", generator=seeded())[:, 6] == 0).all()


# --- loss weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["frame", "shot"])
def test_weights_sum_to_one_and_gradients_vanish_elsewhere(reduce):  # [5]
    weights = loss_weights(LAYOUT, reduce)
    assert weights.sum().item() == pytest.approx(1.0)
    assert ((weights > 0) == LAYOUT.is_target).all()
    pred = clip(2, 3, 8, 2, 2, seed=1).requires_grad_()
    diffusion_loss(pred, clip(2, 3, 8, 2, 2, seed=2), weights).backward()
    per_frame = pred.grad.abs().sum(dim=(0, 1, 3, 4))
    assert (per_frame[weights == 0] == 0).all() and (per_frame[weights > 0] > 0).all()


def test_loss_against_a_loop():
    pred, target = clip(2, 3, 6, 2, 2, seed=1), clip(2, 3, 6, 2, 2, seed=2)
    weights = loss_weights(TARGETS, "shot")
    total = 0.0
    for b in range(2):
        for frames in ([0, 1], [2], [3, 4, 5]):
            shot = sum(((pred[b, :, f] - target[b, :, f]) ** 2).mean().item() for f in frames) / len(frames)
            total += shot / 3 / 2
    assert diffusion_loss(pred, target, weights).item() == pytest.approx(total, rel=1e-6)
    per_sample = torch.stack([weights, torch.zeros(6)])
    assert diffusion_loss(pred[:1], target[:1], weights).item() / 2 == pytest.approx(
        diffusion_loss(pred, target, per_sample).item(), rel=1e-6
    )


def test_shot_reduction_does_not_see_how_long_a_shot_is():
    for lengths in ([1, 4], [7, 4]):
        layout = shots_layout(lengths)
        error = torch.zeros(1, 1, layout.num_frames, 1, 1, dtype=torch.float64)
        error[:, :, layout.shot_slices[0]] = 3.0  # the same error in every frame of the first shot
        loss = diffusion_loss(error, torch.zeros_like(error), loss_weights(layout, "shot"))
        assert loss.item() == pytest.approx(9.0 / 2)
    by_frame = diffusion_loss(error, torch.zeros_like(error), loss_weights(layout, "frame"))
    assert by_frame.item() == pytest.approx(9.0 * 7 / 11), "which the frame reduction does"


def test_a_layout_without_targets_is_refused():
    with pytest.raises(ValueError, match="no frame to learn from"):
        loss_weights(ClipLayout((Segment("condition", 2),)))


def test_shift_is_checked():
    with pytest.raises(ValueError, match="shift is 0"):
        base_levels(3, shift=0)
    assert math.isclose(shift_levels(torch.tensor(0.5), 3.0).item(), 0.75)
