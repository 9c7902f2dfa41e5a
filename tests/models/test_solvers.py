"""Solvers: right end points, held frames, the order they claim, histories that stay with their frames."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler
from torch import Tensor

from models.layout import ClipLayout, Segment, shots_layout
from models.noise import base_levels, noise_plan
from models.process import EDM, FlowMatching, Process
from models.schedules import process_of_scheduler
from models.solvers import Ancestral, SecondOrder, Solver, make_solver
from tests.models.processes import PROCESSES, clip, oracle, pixels, seeded

SOLVERS = ("euler", "second_order", "ancestral")
over_processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
over_solvers = pytest.mark.parametrize("solver", SOLVERS)

HISTORY = ClipLayout((Segment("history", 2), Segment("target", 3)))
PLANS: dict[str, tuple[ClipLayout, dict]] = {
    "uniform": (shots_layout([4]), {}),
    "hold": (HISTORY, {}),
    "hold at t_c": (HISTORY, {"context_level": 0.3}),
    "scale": (shots_layout([4]), {"multipliers": [0.1, 0.4, 0.7, 1.0]}),
    "min": (
        ClipLayout((Segment("condition", 1), Segment("buffer", 3), Segment("target", 2))),
        {"caps": [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]},
    ),
    "lag": (shots_layout([4]), {"lag": 3}),
    "lag behind history": (HISTORY, {"lag": 1, "context_level": 0.1}),
}
over_plans = pytest.mark.parametrize("name", PLANS)


def plan_of(name: str, steps: int = 9) -> tuple[ClipLayout, Tensor]:
    layout, options = PLANS[name]
    return layout, noise_plan(layout, base_levels(steps, shift=2.0), name.split()[0], **options)


def follow(
    plan: Tensor, solver: Solver, x: Tensor, predict: Callable[[Tensor, Tensor], Tensor], times: int | None = None
) -> Tensor:
    for level, after in list(zip(plan, plan[1:], strict=False))[:times]:
        x = solver.step(x, predict(x, level), level, after)
    return x


def solver_of(name: str, process: Process, like: Tensor, seed: int = 5) -> Solver:
    generator = seeded(seed)
    return make_solver(name, process, lambda: torch.randn(like.shape, generator=generator, dtype=like.dtype))


# --- every plan, process and solver --------------------------------------------------------------------------------


@over_plans
@over_processes
@over_solvers
def test_an_oracle_recovers_the_truth_and_held_frames_stay_bit_for_bit(
    name: str, process: Process, solver: str
) -> None:
    layout, plan = plan_of(name)
    truth, noise = clip(2, 3, layout.num_frames, 2, 2), clip(2, 3, layout.num_frames, 2, 2, seed=1)
    # what starts from pure noise must learn of the truth from the oracle alone
    start = torch.where(pixels(plan[0] == 1), process.pure_noise(noise), process.add_noise(truth, noise, plan[0]))
    held = (plan == plan[0]).all(dim=0)
    assert held.tolist() == layout.is_given.tolist()

    def predict(x: Tensor, level: Tensor) -> Tensor:  # whatever is predicted for held frames
        return torch.where(pixels(held), torch.nan, oracle(process, x, truth, level))

    x = follow(plan, solver_of(solver, process, start), start, predict)
    assert torch.equal(x[:, :, held], start[:, :, held])
    ends = plan[-1] == 0
    torch.testing.assert_close(x[:, :, ends], truth[:, :, ends], rtol=0, atol=1e-8)
    assert torch.equal(start[:, :, plan[0] == 0], truth[:, :, plan[0] == 0]), "level 0 is exactly what was given"


@over_processes
@over_solvers
def test_frames_at_rest_are_handed_through_whatever_their_level(process: Process, solver: str) -> None:
    x = clip(1, 2, 5, 2, 2, dtype=torch.float32)
    level = torch.tensor([0.0, 0.4, 1.0, 0.6, 1.0])
    after = torch.tensor([0.0, 0.4, 1.0, 0.5, 0.9])
    stepper = solver_of(solver, process, x)
    for wild in (torch.nan, torch.inf, 3.0):
        y = stepper.step(x, torch.full_like(x, wild), level, after)
        assert torch.equal(y[:, :, :3], x[:, :, :3])
    assert torch.isfinite(y).all() and (y[:, :, 3:] != x[:, :, 3:]).all(), "what was predicted at rest is forgotten"


@over_processes
@over_solvers
def test_a_frame_is_solved_as_if_it_were_alone(process: Process, solver: str) -> None:
    """One frame's history, level or prediction never reaches another: staggered frames equal solo runs bit for bit."""
    _, plan = plan_of("lag")
    start = process.pure_noise(clip(1, 2, 4, 2, 2))
    draws = clip(len(plan), 2, 4, 2, 2, seed=2)

    def predict(x: Tensor, level: Tensor) -> Tensor:
        return torch.tanh(1.3 * process.precondition(x, level) + pixels(level.float()))

    def made(frames: slice) -> Solver:
        rows = iter(draws[:, :, frames].unsqueeze(1))
        return make_solver(solver, process, lambda: next(rows))

    together = follow(plan, made(slice(None)), start, predict)
    for f in range(4):
        alone = follow(plan[:, f : f + 1], made(slice(f, f + 1)), start[:, :, f : f + 1], predict)
        assert torch.equal(together[:, :, f : f + 1], alone)
    # and samples of one batch may have levels of their own
    rows = torch.stack([plan, plan.flip(1)], dim=1)  # [K+1,B,F]
    draws = torch.stack([draws, draws.flip(2)], dim=1)
    batch = iter(draws)
    own = make_solver(solver, process, lambda: next(batch))
    x = torch.cat([start, start.flip(2)])
    for level, after in zip(rows, rows[1:], strict=False):
        x = own.step(x, predict(x, level), level, after)
    assert torch.equal(x[:1], together) and torch.equal(x[1:], together.flip(2))


# --- second order --------------------------------------------------------------------------------------------------


def gaussian(process: Process, mean: Tensor, std: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The best prediction for independent pixels of N(mean, std^2): its trajectories have a closed form."""

    def predict(x: Tensor, level: Tensor) -> Tensor:
        alpha, sigma = (pixels(value) for value in process.signal_and_noise(level))
        clean = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
        eps = (x - alpha * clean) / sigma
        return torch.where(sigma > 0, process.target(clean, eps, level), 0.0)

    return predict


def exact_flow(process: Process, x: Tensor, level: Tensor, end: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Where the probability flow of `gaussian` takes x from `level` to `end`: the same quantile of the marginal."""
    (alpha, sigma), (to_alpha, to_sigma) = (map(pixels, process.signal_and_noise(at)) for at in (level, end))
    spread = ((to_alpha**2 * std**2 + to_sigma**2) / (alpha**2 * std**2 + sigma**2)).sqrt()
    return to_alpha * mean + spread * (x - alpha * mean)


def inner_plan(steps: int, mode: str) -> Tensor:
    """Four frames between levels 0.95 and 0.05, where log-SNR is finite, which is what the order is claimed for."""
    clock = torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)
    if mode == "uniform":
        return clock[:, None].expand(-1, 4)
    if mode == "scale":
        return clock[:, None] * torch.tensor([0.4, 0.6, 0.8, 1.0])
    rows = torch.arange(steps + 3 * (steps // 4) + 1)[:, None] - steps // 4 * torch.arange(4)
    return clock[rows.clamp(0, steps)]


def slope(errors: dict[int, float]) -> float:
    """Order of convergence: of a straight line through log error over log steps."""
    k, e = torch.tensor(list(errors)).double().log(), torch.tensor(list(errors.values())).double().log()
    return -float(((k - k.mean()) * (e - e.mean())).sum() / (k - k.mean()).square().sum())


def gaussian_errors(process: Process, plans: dict[int, Tensor]) -> tuple[dict[int, float], dict[int, float]]:
    """Root mean square error of the one-step and the second-order solver, by number of steps."""
    mean, std = clip(1, 2, 4, 2, 2, seed=3), pixels(torch.tensor([0.3, 0.6, 1.5, 2.5], dtype=torch.float64))
    found: tuple[dict[int, float], dict[int, float]] = ({}, {})
    for steps, plan in plans.items():
        start = process.add_noise(mean + std * clip(1, 2, 4, 2, 2, seed=4), clip(1, 2, 4, 2, 2, seed=5), plan[0])
        truth = exact_flow(process, start, plan[0], plan[-1], mean, std)
        for solver, errors in zip(("euler", "second_order"), found, strict=True):
            made = follow(plan, solver_of(solver, process, start), start, gaussian(process, mean, std))
            errors[steps] = float((made - truth).square().mean().sqrt())
    return found


@pytest.mark.parametrize("mode", ["uniform", "scale", "lag"])
@over_processes
def test_second_order_converges_with_second_order(process: Process, mode: str) -> None:
    first, second = gaussian_errors(process, {k: inner_plan(k, mode) for k in (32, 64, 128)})
    print(f"slopes: {mode} {slope(first):.2f} {first} {slope(second):.2f} {second}")
    assert 0.85 < slope(first) < 1.2 and 1.8 < slope(second) < 2.4
    assert second[64] < first[64] / 4


@over_processes
def test_down_to_level_0_second_order_is_never_the_worse(process: Process) -> None:
    """The last step, of infinite log-SNR, is the one-step solver; its error is that of the last level's variance."""
    layout = shots_layout([4])
    plans = {k: noise_plan(layout, base_levels(k), "lag", lag=k // 4).double() for k in (16, 32, 64)}
    first, second = gaussian_errors(process, plans)
    print(f"to 0: {slope(first):.2f} {first} {slope(second):.2f} {second}")
    assert all(second[k] < first[k] for k in plans)
    if isinstance(process, FlowMatching | EDM):
        assert second[64] < first[64] / 4


@over_processes
def test_second_order_holds_where_frames_depend_on_one_another(process: Process) -> None:
    """Correlated frames at staggered levels, against a run with many steps."""
    covariance = torch.tensor([[1.0, 0.8, 0.6, 0.4], [0.8, 1.0, 0.8, 0.6], [0.6, 0.8, 1.0, 0.8], [0.4, 0.6, 0.8, 1.0]])
    covariance = covariance.double()

    def predict(x: Tensor, level: Tensor) -> Tensor:
        alpha, sigma = process.signal_and_noise(level)
        mixed = alpha[:, None] * covariance * alpha + torch.diag(sigma**2)
        clean = torch.einsum("fg,bcghw->bcfhw", covariance * alpha @ torch.linalg.inv(mixed), x)
        eps = (x - pixels(alpha) * clean) / pixels(sigma)
        return process.target(clean, eps, level)

    start = process.add_noise(clip(1, 1, 4, 2, 2), clip(1, 1, 4, 2, 2, seed=1), torch.tensor(0.95))

    def end(solver: str, steps: int) -> Tensor:
        return follow(inner_plan(steps, "lag"), solver_of(solver, process, start), start, predict)

    reference = end("second_order", 512)
    errors = {k: float((end("second_order", k) - reference).square().mean().sqrt()) for k in (16, 32, 64)}
    one_step = float((end("euler", 64) - reference).square().mean().sqrt())
    print(f"coupled: {slope(errors):.2f} {errors} {one_step}")
    assert slope(errors) > 1.7 and errors[64] < one_step / 4


def test_second_order_against_its_formula() -> None:
    """Algorithm 2 of the paper, written out for one frame of a flow; and where it must be the one-step solver."""
    process, levels = FlowMatching(), [torch.tensor(u, dtype=torch.float64) for u in (0.9, 0.8, 0.6, 0.0)]
    x, preds = clip(1, 1, 1, 2, 2), [clip(1, 1, 1, 2, 2, seed=s) for s in (1, 2, 3)]
    solver = SecondOrder(process)
    y0 = solver.step(x, preds[0], levels[0], levels[1])
    assert torch.equal(y0, process.step(x, preds[0], levels[0], levels[1]))
    y1 = solver.step(y0, preds[1], levels[1], levels[2])
    snr = [math.log((1 - u) / u) for u in (0.9, 0.8, 0.6)]
    h, r = snr[2] - snr[1], (snr[1] - snr[0]) / (snr[2] - snr[1])
    was, clean = x - 0.9 * preds[0], y0 - 0.8 * preds[1]
    d = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * was
    torch.testing.assert_close(y1, 0.6 / 0.8 * y0 - 0.4 * (math.exp(-h) - 1) * d, rtol=1e-12, atol=1e-12)
    y2 = solver.step(y1, preds[2], levels[2], levels[3])
    assert torch.equal(y2, process.predict_clean(y1, preds[2], levels[2]))


@over_processes
def test_a_frame_that_begins_to_move_is_stepped_by_the_one_step_solver(process: Process) -> None:
    """Frame 0 always moves, 1 waits, 2 pauses and goes on, 3 joins the clock by a tiny step."""
    plan = torch.tensor(
        [
            [0.9, 0.7, 0.9, 0.601],
            [0.8, 0.7, 0.8, 0.601],
            [0.7, 0.6, 0.8, 0.6],
            [0.6, 0.5, 0.7, 0.5],
            [0.5, 0.4, 0.6, 0.4],
        ]
    ).double()
    first_order = [[True] * 4, [False, True, True, True], [False, False, True, True], [False] * 4]
    solver, x = SecondOrder(process), clip(1, 2, 4, 2, 2)
    for k, expected in enumerate(first_order):
        pred = clip(1, 2, 4, 2, 2, seed=k + 1)
        y, one_step = solver.step(x, pred, plan[k], plan[k + 1]), process.step(x, pred, plan[k], plan[k + 1])
        assert [torch.equal(y[:, :, f], one_step[:, :, f]) for f in range(4)] == expected
        x = y


# --- against diffusers ---------------------------------------------------------------------------------------------


def process_of(scheduler) -> Process:
    return process_of_scheduler(json.loads(scheduler.to_json_string()) | {"_class_name": "DDIMScheduler"})


def network(x: Tensor, level: Tensor) -> Tensor:
    return torch.tanh(1.3 * x.roll(1, -1) - 0.4 * x + float(level))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_second_order_is_the_multistep_solver_of_diffusers_vp(prediction: str) -> None:
    scheduler = DPMSolverMultistepScheduler(prediction_type=prediction, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    process, levels = process_of(scheduler), base_levels(20)
    assert process.to_model_time(levels[:-1]).tolist() == scheduler.timesteps.tolist()
    solver = SecondOrder(process)
    x = expected = clip(1, 2, 3, 2, 4)
    for t, level, after in zip(scheduler.timesteps, levels, levels[1:], strict=False):
        expected = scheduler.step(network(expected, level), t, expected).prev_sample
        x = solver.step(x, network(x, level), level, after)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_second_order_is_the_multistep_solver_of_diffusers_flow() -> None:
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(20)
    solver, levels = SecondOrder(FlowMatching()), scheduler.sigmas
    x = expected = clip(1, 2, 3, 2, 4)
    for t, level, after in zip(scheduler.timesteps, levels, levels[1:], strict=False):
        expected = scheduler.step(network(expected, level), t, expected).prev_sample
        x = solver.step(x, network(x, level), level, after)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_second_order_is_the_multistep_solver_of_diffusers_edm() -> None:
    scheduler = EDMDPMSolverMultistepScheduler(
        sigma_min=0.002, sigma_max=700.0, sigma_data=1.0, prediction_type="v_prediction"
    )
    scheduler.set_timesteps(20)
    process = EDM(0.002, 700.0)
    solver, levels = SecondOrder(process), process.to_level(scheduler.sigmas)
    x = expected = process.pure_noise(clip(1, 2, 3, 2, 4))
    for t, level, after in zip(scheduler.timesteps, levels, levels[1:], strict=False):
        scaled = scheduler.scale_model_input(expected, t)
        expected = scheduler.step(network(scaled, level), t, expected).prev_sample
        x = solver.step(x, network(process.precondition(x, level), level), level, after)
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)


def drawing(process: Process, noise: Tensor) -> Ancestral:
    return Ancestral(process, lambda: noise)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ancestral_is_ddpm_with_the_small_variance(prediction: str) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(25)
    process, levels, generator = process_of(scheduler), base_levels(25), seeded(3)
    x = expected = clip(1, 2, 3, 2, 4)
    solver = Ancestral(process, lambda: torch.randn(x.shape, generator=generator, dtype=x.dtype))
    theirs = seeded(3)
    for k, (t, level, after) in enumerate(zip(scheduler.timesteps, levels, levels[1:], strict=False)):
        pred = network(x, level)
        zero, one = (drawing(process, z * torch.ones(1, 2, 3, 2, 4)).step(x, pred, level, after) for z in (0.0, 1.0))
        variance = float(scheduler._get_variance(t)) if k < 24 else 0.0
        torch.testing.assert_close((one - zero) ** 2, torch.full_like(x, variance), rtol=1e-3, atol=1e-8)
        expected = scheduler.step(network(expected, level), t, expected, generator=theirs).prev_sample
        x = solver.step(x, pred, level, after)
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)


@over_processes
def test_ancestral_is_the_posterior_of_the_process(process: Process) -> None:
    """Two steps forward, x_s = alpha_s x0 + sigma_s e and x_t from x_s; Bayes by hand from the two Gaussians."""
    level, after = torch.tensor([0.8, 0.5, 1.0, 0.3]), torch.tensor([0.7, 0.1, 0.6, 0.2])
    (at, st), (as_, ss) = process.signal_and_noise(level), process.signal_and_noise(after)
    x, truth = clip(1, 2, 4, 2, 2), clip(1, 2, 4, 2, 2, seed=1)
    scale = at / as_
    added = st**2 - scale**2 * ss**2  # variance of x_t given x_s
    precision = 1 / ss**2 + scale**2 / added
    mean = (pixels(as_ / ss**2) * truth + pixels(scale / added) * x) / pixels(precision)
    pred = oracle(process, x, truth, level)
    zero, one = (drawing(process, z * torch.ones_like(x)).step(x, pred, level, after) for z in (0.0, 1.0))
    torch.testing.assert_close(zero, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one - zero, pixels(precision**-0.5).expand_as(x), rtol=1e-6, atol=1e-8)


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown solver 'heun'; choose one of euler, second_order, ancestral"):
        make_solver("heun", FlowMatching(), lambda: torch.zeros(1))
