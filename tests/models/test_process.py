"""Processes against their papers' formulas, frame by frame in float64, and against diffusers' schedulers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from models.noise import base_levels
from models.process import EDM, FlowMatching, Process, VPDiffusion
from models.schedules import alpha_bars, process_of_scheduler
from tests.models.processes import COGVIDEOX, LATTE, PROCESSES, clip, pixels, seeded

SVD = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    interpolation_type="linear",
    prediction_type="v_prediction",
    sigma_max=700.0,
    sigma_min=0.002,
    steps_offset=1,
    timestep_spacing="leading",
    timestep_type="continuous",
    use_karras_sigmas=True,
)
over_processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def process_of(scheduler) -> Process:
    """By way of what its `scheduler_config.json` holds."""
    return process_of_scheduler(json.loads(scheduler.to_json_string()))


def levels_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=seeded(seed))


# --- what holds for every process ----------------------------------------------------------------------------------


@over_processes
def test_level_0_is_exactly_clean_and_1_the_noisiest(process: Process) -> None:
    x0, eps = clip(2, 3, 4, 2, 2, dtype=torch.float32), clip(2, 3, 4, 2, 2, seed=1, dtype=torch.float32)
    assert torch.equal(process.add_noise(x0, eps, torch.tensor(0.0)), x0)
    assert torch.equal(process.predict_clean(x0, torch.full_like(x0, 7.0), torch.tensor(0.0)), x0)
    level = torch.linspace(0, 1, 4001)
    alpha, sigma = process.signal_and_noise(level)
    assert alpha.dtype == sigma.dtype == torch.float64 and alpha.shape == level.shape
    assert (alpha[0], sigma[0]) == (1.0, 0.0)
    assert (sigma.diff() > 0).all() and (alpha.diff() <= 0).all() and (alpha.log() - sigma.log()).diff().max() < 0
    time = process.to_model_time(level)
    assert time.dtype == torch.float32 and time.isfinite().all() and (time.diff() >= 0).all()


def test_the_noisiest_of_each_process() -> None:
    ends = {name: [float(value) for value in p.signal_and_noise(torch.tensor(1.0))] for name, p in PROCESSES.items()}
    assert ends["flow"] == ends["vp v, no signal at 1"] == [0.0, 1.0], "exactly"
    assert ends["edm"] == pytest.approx([1.0, 700.0], rel=1e-12)
    assert ends["vp epsilon"] == pytest.approx([math.sqrt(LATTE[-1]), math.sqrt(1 - LATTE[-1])], rel=1e-12)
    times = {name: p.to_model_time(torch.tensor([0.0, 1.0])).tolist() for name, p in PROCESSES.items()}
    assert times["flow"] == [0.0, 1000.0] and times["vp epsilon"] == [0.0, 999.0]
    assert times["edm"] == pytest.approx([0.25 * math.log(0.002), 0.25 * math.log(700)], rel=1e-6)


@over_processes
def test_noise_has_the_stated_variance(process: Process) -> None:
    x0, eps = 2.0 * clip(1, 4, 5, 64, 64, seed=1), clip(1, 4, 5, 64, 64, seed=2)
    level = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    noisy = process.add_noise(x0, eps, level)
    for f, (alpha, sigma) in enumerate(zip(*process.signal_and_noise(level), strict=True)):
        assert noisy[:, :, f].var().item() == pytest.approx(float(4 * alpha**2 + sigma**2), rel=0.05)


@over_processes
def test_the_right_prediction_tells_clip_and_noise(process: Process) -> None:
    x0, eps, level = clip(2, 3, 50, 2, 2), clip(2, 3, 50, 2, 2, seed=1), levels_of(2, 50)
    noisy, pred = process.add_noise(x0, eps, level), process.target(x0, eps, level)
    torch.testing.assert_close(process.predict_clean(noisy, pred, level), x0, rtol=0, atol=1e-8)
    torch.testing.assert_close(process.predict_noise(noisy, pred, level), eps, rtol=0, atol=1e-6)


@over_processes
def test_a_step_with_the_right_prediction_is_exact_and_each_frame_is_its_own(process: Process) -> None:
    x0, eps, level = clip(2, 3, 50, 2, 2), clip(2, 3, 50, 2, 2, seed=1), levels_of(2, 50)
    after = level * levels_of(2, 50, seed=1)
    after[0, 0] = 0.0
    noisy, pred = process.add_noise(x0, eps, level), process.target(x0, eps, level)
    stepped = process.step(noisy, pred, level, after)
    torch.testing.assert_close(stepped, process.add_noise(x0, eps, after), rtol=1e-9, atol=1e-7)
    clean = process.predict_clean(noisy, pred, level)
    assert torch.equal(stepped[0, :, 0], clean[0, :, 0]), "at level 0 it is the prediction itself"
    for b, f in ((0, 0), (1, 7), (1, 49)):  # alone, with its level as a number
        one = slice(b, b + 1), slice(None), slice(f, f + 1)
        assert torch.equal(process.step(noisy[one], pred[one], level[b, f], after[b, f]), stepped[one])


@over_processes
@pytest.mark.parametrize("wild", [torch.nan, torch.inf, 1e30])
def test_equal_levels_hold_a_frame_bit_for_bit(process: Process, wild: float) -> None:  # [2]
    x = clip(2, 3, 4, 2, 2, dtype=torch.float32)
    level = torch.tensor([0.0, 0.3, 1.0, 0.7])
    assert torch.equal(process.step(x, torch.full_like(x, wild), level, level), x), "whatever is predicted for it"
    moved = process.step(x, torch.ones_like(x), level, level - torch.tensor([0.0, 0.0, 0.1, 0.0]))
    assert torch.equal(moved[:, :, [0, 1, 3]], x[:, :, [0, 1, 3]]) and (moved[:, :, 2] != x[:, :, 2]).all()


@over_processes
def test_a_level_of_the_wrong_shape_is_refused(process: Process) -> None:
    x = torch.zeros(2, 1, 3, 1, 1)
    for level in (torch.zeros(2), torch.zeros(2, 2), torch.zeros(3, 3), torch.zeros(1, 1, 3)):
        with pytest.raises(ValueError, match=r"expected \[2,3\]"):
            process.add_noise(x, x, level)
    for level in (torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, 3), torch.tensor(0.5)):
        process.step(process.add_noise(x, x, level), x, level, level / 2)
        assert process.precondition(x, level).shape == x.shape


@over_processes
def test_low_precision_input_is_worked_on_in_float32(process: Process) -> None:
    x0, eps, level = clip(1, 2, 3, 2, 2), clip(1, 2, 3, 2, 2, seed=1), levels_of(1, 3)
    low = process.add_noise(x0.bfloat16(), eps.bfloat16(), level)
    assert low.dtype == torch.float32
    assert torch.equal(low, process.add_noise(x0.bfloat16().float(), eps.bfloat16().float(), level))


# --- flow ----------------------------------------------------------------------------------------------------------


def test_flow_against_a_loop() -> None:
    x0, eps, pred = (clip(2, 3, 4, 2, 2, seed=s) for s in range(3))
    level = levels_of(2, 4, seed=9)
    after = level * levels_of(2, 4, seed=10)
    flow = FlowMatching()
    noisy, stepped = flow.add_noise(x0, eps, level), flow.step(x0, pred, level, after)
    for b in range(2):
        for f in range(4):
            u, v = level[b, f].double(), after[b, f].double()
            assert torch.allclose(noisy[b, :, f], (1 - u) * x0[b, :, f] + u * eps[b, :, f], rtol=0, atol=1e-12)
            assert torch.allclose(stepped[b, :, f], x0[b, :, f] + (v - u) * pred[b, :, f], rtol=0, atol=1e-12)
    assert torch.equal(flow.target(x0, eps, level), eps - x0)


def test_flow_in_float32_is_the_plain_formula_bit_for_bit() -> None:
    x, pred = clip(1, 2, 400, 2, 2, dtype=torch.float32), clip(1, 2, 400, 2, 2, seed=1, dtype=torch.float32)
    level = levels_of(400)
    after = level * levels_of(400, seed=1)
    u, v = pixels(level), pixels(after)
    assert torch.equal(FlowMatching().step(x, pred, level, after), x + (v - u) * pred)
    assert torch.equal(FlowMatching().add_noise(x, pred, level), (1 - u) * x + u * pred)
    assert FlowMatching().precondition(x, level) is x


def test_model_time_is_float32() -> None:
    level = torch.tensor([0.999, 0.9995, 1.0], dtype=torch.bfloat16)
    assert FlowMatching().to_model_time(level).dtype == torch.float32
    assert FlowMatching().to_model_time(torch.tensor([0.9985])).item() == pytest.approx(998.5)


# --- variance preserving -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_vp_against_a_loop(prediction: str) -> None:
    process = VPDiffusion(LATTE, prediction)
    x, pred = clip(2, 3, 4, 2, 2), clip(2, 3, 4, 2, 2, seed=1)
    steps = torch.randint(2, 1001, (2, 4), generator=seeded())
    after = (steps * levels_of(2, 4)).long()
    stepped = process.step(x, pred, steps / 1000, after / 1000)
    for b in range(2):
        for f in range(4):
            abar = float(LATTE[steps[b, f] - 1])
            next_abar = float(LATTE[after[b, f] - 1]) if after[b, f] else 1.0
            xf, y = x[b, :, f], pred[b, :, f]
            if prediction == "epsilon":
                x0, eps = (xf - (1 - abar) ** 0.5 * y) / abar**0.5, y
            elif prediction == "x0":
                x0, eps = y, (xf - abar**0.5 * y) / (1 - abar) ** 0.5
            else:
                x0, eps = abar**0.5 * xf - (1 - abar) ** 0.5 * y, abar**0.5 * y + (1 - abar) ** 0.5 * xf
            expected = next_abar**0.5 * x0 + (1 - next_abar) ** 0.5 * eps
            torch.testing.assert_close(stepped[b, :, f], expected, rtol=1e-10, atol=1e-10)
    x0, eps = clip(1, 1, 4, 1, 1, seed=2), clip(1, 1, 4, 1, 1, seed=3)
    abar = pixels(LATTE[steps[:1] - 1])
    wanted = {"epsilon": eps, "x0": x0, "v": abar.sqrt() * eps - (1 - abar).sqrt() * x0}[prediction]
    torch.testing.assert_close(process.target(x0, eps, steps[:1] / 1000), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha_bar", [LATTE, COGVIDEOX], ids=["latte", "cogvideox"])
def test_vp_levels_are_the_steps_of_the_table_and_smooth_between(alpha_bar: Tensor) -> None:
    process = VPDiffusion(alpha_bar, "v")
    level = torch.arange(1001) / 1000  # float32, which holds few of these numbers exactly
    alpha, sigma = process.signal_and_noise(level)
    torch.testing.assert_close(alpha[1:] ** 2, alpha_bar, rtol=1e-12, atol=1e-15)
    assert process.to_model_time(level).tolist() == [0.0, *range(1000)]
    between = (torch.arange(1000, dtype=torch.float64) + 0.25) / 1000
    alpha_b, sigma_b = process.signal_and_noise(between)
    torch.testing.assert_close(alpha_b**2 + sigma_b**2, torch.ones(1000, dtype=torch.float64), rtol=0, atol=1e-14)
    angle, angle_b = torch.atan2(sigma, alpha), torch.atan2(sigma_b, alpha_b)
    torch.testing.assert_close(angle_b, 0.75 * angle[:-1] + 0.25 * angle[1:], rtol=0, atol=1e-14)
    torch.testing.assert_close(
        process.to_model_time(between), (torch.arange(1000) - 0.75).clamp_min(0), rtol=0, atol=1e-4
    )


def test_latte_index_0_is_not_the_clean_level() -> None:
    process = PROCESSES["vp epsilon"]
    alpha, sigma = process.signal_and_noise(torch.tensor([0.0, 0.001]))
    assert alpha[0] == 1 and alpha[1] ** 2 == pytest.approx(0.9999, abs=1e-12) and sigma[1] == pytest.approx(0.01)
    assert process.to_model_time(torch.tensor([0.0, 0.001])).tolist() == [0.0, 0.0]


def test_vp_refuses_schedules_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="zero terminal SNR.*predict v or x0"):
        VPDiffusion(COGVIDEOX, "epsilon")
    with pytest.raises(ValueError, match="must fall"):
        VPDiffusion(torch.tensor([0.9, 0.95, 0.5]), "v")
    with pytest.raises(ValueError, match=r"must be \[T\]"):
        VPDiffusion(torch.tensor([1.0, 0.5]), "v")
    with pytest.raises(ValueError, match="unknown prediction 'noise'; choose one of epsilon, x0, v"):
        VPDiffusion(LATTE, "noise")
    with pytest.raises(ValueError, match="unknown beta schedule 'cosine'"):
        alpha_bars(0.1, 0.2, "cosine")


# --- EDM -----------------------------------------------------------------------------------------------------------


def test_edm_is_svds_preconditioning() -> None:
    process = EDM()
    sigma = torch.exp(0.7 + 1.6 * clip(2, 5)).clamp_max(600)
    level = process.to_level(sigma)
    assert level.dtype == torch.float32
    torch.testing.assert_close(process.signal_and_noise(level)[1], sigma, rtol=1e-5, atol=0)
    sigma = process.signal_and_noise(level)[1]  # what the float32 level means exactly
    z, eps, net = (clip(2, 3, 5, 2, 2, seed=s) for s in range(3))
    x = process.add_noise(z, eps, level)
    s = pixels(sigma)
    torch.testing.assert_close(x, z + s * eps, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(process.precondition(x, level), x / (s**2 + 1).sqrt(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(process.to_model_time(level).double(), 0.25 * sigma.log(), rtol=1e-6, atol=1e-6)
    denoised = x / (s**2 + 1) - s / (s**2 + 1).sqrt() * net
    torch.testing.assert_close(process.predict_clean(x, net, level), denoised, rtol=1e-10, atol=1e-10)
    # EDM's weighted error of the clean clip is the plain error of the network's output
    weighted = ((s**2 + 1) / s**2) * (denoised - z) ** 2
    error = pixels(process.loss_weight(level)) * (net - process.target(z, eps, level)) ** 2
    torch.testing.assert_close(error, weighted, rtol=1e-8, atol=1e-10)


def test_edm_levels_follow_karras_between_the_ends_and_run_to_0_below() -> None:
    process = EDM(0.002, 700.0)
    ends = torch.tensor([0.0, 0.0005, 0.001, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        process.signal_and_noise(ends)[1], torch.tensor([0.0, 0.001, 0.002, 700.0], dtype=torch.float64)
    )
    assert torch.equal(process.to_model_time(ends)[:3], torch.full((3,), 0.25 * math.log(0.002)))
    torch.testing.assert_close(process.to_level(process.signal_and_noise(ends)[1]), ends.float())
    reference = EDMEulerScheduler(sigma_min=0.002, sigma_max=700.0, num_train_timesteps=100)
    reference.set_timesteps(100)
    even = torch.linspace(1, 0.001, 100, dtype=torch.float64)
    torch.testing.assert_close(process.signal_and_noise(even)[1].float(), reference.sigmas[:-1], rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="expected 0 < sigma_min < sigma_max"):
        EDM(0.0, 80.0)


def test_x0_errors_are_weighted_as_those_of_v() -> None:
    by_x0, by_v = VPDiffusion(LATTE, "x0"), VPDiffusion(LATTE, "v")
    x0, eps, guess, level = clip(1, 2, 6, 2, 2), clip(1, 2, 6, 2, 2, seed=1), clip(1, 2, 6, 2, 2, seed=2), levels_of(6)
    alpha, sigma = (pixels(value) for value in by_v.signal_and_noise(level))
    x = alpha * x0 + sigma * eps
    v = (alpha * x - guess) / sigma  # the v that says `guess`
    torch.testing.assert_close(
        pixels(by_x0.loss_weight(level)) * (guess - x0) ** 2, (v - by_v.target(x0, eps, level)) ** 2, rtol=1e-5, atol=0
    )
    assert by_x0.loss_weight(torch.tensor([0.0, 0.001])).tolist() == pytest.approx([1e4, 1e4], rel=1e-5)
    for process in (by_v, PROCESSES["flow"], PROCESSES["vp epsilon"], PROCESSES["edm"]):
        assert torch.equal(process.loss_weight(level), torch.ones(6))


# --- against diffusers ---------------------------------------------------------------------------------------------

VP_CONFIGS = {
    "latte": (DDIMScheduler, dict(beta_schedule="linear", prediction_type="epsilon")),
    "v": (DDIMScheduler, dict(beta_schedule="scaled_linear", prediction_type="v_prediction")),
    "x0": (DDIMScheduler, dict(prediction_type="sample")),
    "zero terminal snr": (DDIMScheduler, dict(prediction_type="v_prediction", rescale_betas_zero_snr=True)),
    "cogvideox 2b": (CogVideoXDDIMScheduler, dict(prediction_type="v_prediction", rescale_betas_zero_snr=True)),
    "cogvideox 5b": (
        CogVideoXDDIMScheduler,
        dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0),
    ),
}
CASES = [pytest.param(*case, id=name) for name, case in VP_CONFIGS.items()]


def made(kind: type, options: dict, **more: object):
    """A scheduler that does not clip, where it could."""
    return kind(**options, **({} if kind is CogVideoXDDIMScheduler else {"clip_sample": False}), **more)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_vp_schedules_are_those_of_diffusers(kind: type, options: dict) -> None:
    scheduler = made(kind, options)
    process = process_of(scheduler)
    alpha, _ = process.signal_and_noise(torch.arange(1, 1001) / 1000)
    # diffusers works out its table in float32
    torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-7)
    x0, eps = clip(3, 2, 1, 2, 2), clip(3, 2, 1, 2, 2, seed=1)
    times = torch.tensor([0, 400, 999])
    torch.testing.assert_close(
        process.add_noise(x0, eps, (times[:, None] + 1) / 1000),
        scheduler.add_noise(x0, eps, times),
        rtol=1e-5,
        atol=1e-5,
    )
    if options["prediction_type"] == "v_prediction" and kind is DDIMScheduler:
        velocity = scheduler.get_velocity(x0, eps, times)
        torch.testing.assert_close(process.target(x0, eps, (times[:, None] + 1) / 1000), velocity, rtol=1e-5, atol=1e-5)


def network(x: Tensor, level: float) -> Tensor:
    """Some function of the noisy clip and its level."""
    return torch.tanh(1.3 * x.roll(1, -1) - 0.4 * x + level)


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("num_steps", [10, 50])
def test_ddim_is_diffusers_with_trailing_timesteps(kind: type, options: dict, num_steps: int) -> None:
    scheduler = made(kind, options, timestep_spacing="trailing")
    process = process_of(scheduler)
    scheduler.set_timesteps(num_steps)
    levels = base_levels(num_steps)
    assert process.to_model_time(levels[:-1]).tolist() == scheduler.timesteps.tolist(), "exactly its timesteps"
    x = expected = process.pure_noise(clip(1, 2, 3, 2, 4))
    for t, level, after in zip(scheduler.timesteps, levels, levels[1:], strict=False):
        expected = scheduler.step(network(expected, float(level)), t, expected).prev_sample
        x = process.step(x, network(x, float(level)), level, after)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_ddim_with_leading_timesteps_is_another_list_of_levels() -> None:
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(20)
    process = process_of(scheduler)
    levels = torch.cat([(scheduler.timesteps + 1) / 1000, torch.zeros(1)])
    assert process.to_model_time(levels[:-1]).tolist() == scheduler.timesteps.tolist()
    x = expected = clip(1, 2, 3, 2, 4)
    for t, level, after in zip(scheduler.timesteps, levels, levels[1:], strict=False):
        expected = scheduler.step(network(expected, float(level)), t, expected).prev_sample
        x = process.step(x, network(x, float(level)), level, after)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_edm_is_the_euler_scheduler_of_svd() -> None:
    scheduler = EulerDiscreteScheduler(**SVD)
    scheduler.set_timesteps(25)
    process = process_of(scheduler)
    levels = process.to_level(scheduler.sigmas)
    assert levels[0] == 1 and levels[-1] == 0 and levels[-2] == pytest.approx(0.001, rel=1e-3)
    torch.testing.assert_close(process.to_model_time(levels[:-1]), scheduler.timesteps, rtol=1e-5, atol=1e-5)
    noise = clip(1, 2, 3, 2, 4, dtype=torch.float32)
    x = expected = process.pure_noise(noise)
    torch.testing.assert_close(x, noise * scheduler.init_noise_sigma)
    for t, level, after in zip(scheduler.timesteps, levels, levels[1:], strict=False):
        scaled = scheduler.scale_model_input(expected, t)
        torch.testing.assert_close(process.precondition(x, level), scaled, rtol=1e-3, atol=1e-3)
        expected = scheduler.step(network(scaled, float(level)), t, expected).prev_sample
        x = process.step(x, network(process.precondition(x, level), float(level)), level, after)
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)


def test_flow_is_the_euler_scheduler_of_wan() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 21)[:-1])
    process, levels = process_of(scheduler), base_levels(20, shift=3.0)
    torch.testing.assert_close(levels, scheduler.sigmas)
    torch.testing.assert_close(process.to_model_time(levels[:-1]), scheduler.timesteps)
    x = expected = process.pure_noise(clip(1, 2, 3, 2, 4, dtype=torch.float32))
    for t, level, after in zip(scheduler.timesteps, levels, levels[1:], strict=False):
        expected = scheduler.step(network(expected, float(level)), t, expected).prev_sample
        x = process.step(x, network(x, float(level)), level, after)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_the_start_is_the_one_of_diffusers_pipelines() -> None:
    noise = clip(1, 2, 3, 2, 2, dtype=torch.float32)
    for name in ("flow", "vp epsilon", "vp v, no signal at 1"):
        assert torch.equal(PROCESSES[name].pure_noise(noise), noise)
    assert DDIMScheduler().init_noise_sigma == CogVideoXDDIMScheduler().init_noise_sigma == 1.0


def test_schedulers_of_published_models_name_their_process() -> None:
    wan = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    assert type(process_of_scheduler(wan)) is FlowMatching
    edm = process_of(EulerDiscreteScheduler(**SVD))
    assert isinstance(edm, EDM) and (edm.sigma_min, edm.sigma_max) == (0.002, 700.0)
    bare = process_of_scheduler({"_class_name": "CogVideoXDPMScheduler", "prediction_type": "v_prediction"})
    torch.testing.assert_close(
        bare.signal_and_noise(torch.tensor(0.5))[0] ** 2, CogVideoXDDIMScheduler().alphas_cumprod[499].double()
    )
    ddpm = process_of(DDPMScheduler())
    assert isinstance(ddpm, VPDiffusion) and ddpm.prediction == "epsilon"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "LCMScheduler"}, "'LCMScheduler' is of no known process; supported are FlowMatch"),
        ({"_class_name": "EulerDiscreteScheduler"}, "supported is Stable Video Diffusion's"),
        ({"_class_name": "EulerDiscreteScheduler", **SVD, "sigma_max": None}, "both sigmas"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [0.1]}, "trained_betas are not supported"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "score"}, "unknown prediction_type 'score'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500}, "ends at 1000"),
    ],
)
def test_other_schedulers_are_refused(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process_of_scheduler(config)
