"""The processes that tests run over, and an oracle for any of them."""

from __future__ import annotations

import torch
from torch import Tensor

from models.process import EDM, FlowMatching, Process, VPDiffusion
from models.schedules import alpha_bars

LATTE = alpha_bars(0.0001, 0.02)
COGVIDEOX = alpha_bars(0.00085, 0.012, "scaled_linear", snr_shift_scale=3.0, zero_terminal_snr=True)
PROCESSES: dict[str, Process] = {
    "flow": FlowMatching(),
    "vp epsilon": VPDiffusion(LATTE, "epsilon"),
    "vp x0": VPDiffusion(LATTE, "x0"),
    "vp v, no signal at 1": VPDiffusion(COGVIDEOX, "v"),
    "edm": EDM(),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def pixels(values: Tensor) -> Tensor:
    """Per frame, [F] or [B,F], to broadcast over [B,C,F,H,W]."""
    return values.view(-1, 1, values.shape[-1], 1, 1)


def oracle(process: Process, x: Tensor, clean: Tensor, level: Tensor) -> Tensor:
    """The right prediction at x for frames that are noisy, 7 for those that are not."""
    alpha, sigma = (pixels(value) for value in process.signal_and_noise(level))
    eps = (x.double() - alpha * clean) / sigma
    return torch.where(sigma > 0, process.target(clean.double(), eps, level), 7.0).to(x.dtype)
