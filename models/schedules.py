"""The noise schedules that published models were trained with, as their diffusers folders describe them.

T steps a discrete model was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.process import EDM, FlowMatching, Prediction, Process, VPDiffusion


def alpha_bars(
    beta_start: float,
    beta_end: float,
    schedule: str = "linear",
    *,
    steps: int = 1000,
    snr_shift_scale: float = 1.0,
    zero_terminal_snr: bool = False,
) -> Tensor:
    """alpha_bar [T] in float64 of the schedules of diffusers: Latte is linear(0.0001, 0.02).

    schedule: betas even ("linear") or their roots even ("scaled_linear"). snr_shift_scale s divides the SNR by s
    (CogVideoX 2408.06072, after SD3); zero_terminal_snr then moves the last sqrt(alpha_bar) to 0 and keeps the first
    (Lin et al. 2305.08891, algorithm 1). CogVideoX is scaled_linear(0.00085, 0.012) with both, s = 3 for 2B, 1 for 5B.
    """
    if schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    else:
        raise ValueError(f"unknown beta schedule {schedule!r}; choose linear or scaled_linear")
    alpha_bar = (1 - betas).cumprod(0)
    alpha_bar = alpha_bar / (snr_shift_scale + (1 - snr_shift_scale) * alpha_bar)
    if zero_terminal_snr:
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alpha_bar


def process_of_scheduler(config: Mapping[str, Any]) -> Process:
    """The process that a model was trained with, from the `scheduler_config.json` of its diffusers folder.

    Only the process is read, not how that scheduler would sample (timestep spacing, shift, clipping); a missing key
    has the default of the scheduler's class. Raises ValueError for a configuration that is none of the three.
    """
    name = config.get("_class_name")
    prediction = config.get("prediction_type", "epsilon")
    if name == "FlowMatchEulerDiscreteScheduler" or prediction == "flow_prediction":
        if config.get("num_train_timesteps", 1000) != 1000:
            raise ValueError(
                f"num_train_timesteps is {config['num_train_timesteps']}: a flow's model time ends at 1000"
            )
        return FlowMatching()
    if name == "EulerDiscreteScheduler":
        time, low, high = (config.get(key) for key in ("timestep_type", "sigma_min", "sigma_max"))
        if prediction != "v_prediction" or time != "continuous" or low is None or high is None:
            raise ValueError(
                f"{name}: prediction_type {prediction!r}, timestep_type {time!r}, sigma_min {low}, sigma_max {high}; "
                "supported is Stable Video Diffusion's, with v_prediction, continuous and both sigmas"
            )
        return EDM(low, high)
    cog = name in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
    if not cog and name not in ("DDIMScheduler", "DDPMScheduler"):
        raise ValueError(
            f"scheduler {name!r} is of no known process; supported are FlowMatchEulerDiscreteScheduler (and any with "
            "flow_prediction), DDIMScheduler, DDPMScheduler, CogVideoXDDIMScheduler, CogVideoXDPMScheduler and "
            "EulerDiscreteScheduler"
        )
    if config.get("trained_betas") is not None:
        raise ValueError("trained_betas are not supported; use beta_start, beta_end and beta_schedule")
    predictions: dict[str, Prediction] = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
    if prediction not in predictions:
        raise ValueError(f"unknown prediction_type {prediction!r}; choose one of {', '.join(predictions)}")
    alpha_bar = alpha_bars(
        config.get("beta_start", 0.00085 if cog else 0.0001),
        config.get("beta_end", 0.012 if cog else 0.02),
        config.get("beta_schedule", "scaled_linear" if cog else "linear"),
        steps=config.get("num_train_timesteps", 1000),
        snr_shift_scale=config.get("snr_shift_scale", 3.0 if cog else 1.0),
        zero_terminal_snr=config.get("rescale_betas_zero_snr", False),
    )
    return VPDiffusion(alpha_bar, predictions[prediction])
