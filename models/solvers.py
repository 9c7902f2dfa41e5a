"""How a clip moves from one level to the next: solvers for any process, each frame on its own.

Every solver has `step(x, pred, level, next_level)` as the processes do, holds a frame whose level stays bit for bit,
and keeps what it remembers per frame, so that frames of different levels never share a history (a multistep scheduler
of one history for the clip does, and destroys held frames).

B batch, F latent frames, C channels, H W latent size; alpha and sigma as in models/process.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from models.process import Process, per_pixel

SolverName = Literal["euler", "second_order", "ancestral"]


class Solver(Protocol):
    """One per run of the denoising loop, which calls it for every row of the plan in turn."""

    def step(self, x: Tensor, pred: Tensor, level: Tensor, next_level: Tensor) -> Tensor: ...


def make_solver(name: SolverName, process: Process, draw_noise: Callable[[], Tensor]) -> Solver:
    """euler: the process's own step (DDIM for VP). second_order: `SecondOrder`. ancestral: `Ancestral` (DDPM for VP).

    `draw_noise` gives fresh noise [B,C,F,H,W] whenever a stochastic solver asks for it.
    """
    if name not in get_args(SolverName):
        raise ValueError(f"unknown solver {name!r}; choose one of {', '.join(get_args(SolverName))}")
    if name == "euler":
        return process
    return SecondOrder(process) if name == "second_order" else Ancestral(process, draw_noise)


class SecondOrder:
    """DPM-Solver++(2M) (Lu et al., 2211.01095, algorithm 2) with a history per frame: one prediction per step.

    With lambda = ln(alpha/sigma), and x_0 and x_0' the clean clips predicted here and at the frame's level one row ago,
    it is the one-step solver with x_0 + h/(2h') (x_0 - x_0') in place of x_0, where h and h' are the frame's steps in
    lambda now and then. A frame is stepped by the one-step solver, bit for bit, where it has no such history: when it
    begins to move, from noise without signal (h' is infinite), and to level 0 (h is); also where h is more than
    `longest` times h', as when a frame joins the clock by a tiny step, since that would magnify errors of the model.

    The order is 2 in steps of lambda. The last step errs by about the variance of the last level before 0, which falls
    as the square of the level for a flow, but only as the level where a VP schedule's first betas are large
    (CogVideoX).
    """

    longest = 5.0

    def __init__(self, process: Process) -> None:
        self.process = process
        self._last: tuple[Tensor, Tensor] | None = None  # clean clip predicted one row ago, and the levels it was at

    def step(self, x: Tensor, pred: Tensor, level: Tensor, next_level: Tensor) -> Tensor:
        one_step = self.process.step(x, pred, level, next_level)
        clean = self.process.predict_clean(x, pred, level)
        last, self._last = self._last, (clean, level)
        if last is None:
            return one_step
        last_clean, last_level = last
        alpha, sigma = self.process.signal_and_noise(level)
        next_alpha, next_sigma = self.process.signal_and_noise(next_level)
        before, here, there = (self._log_snr(at) for at in (last_level, level, next_level))
        ratio = (there - here) / (here - before)  # h / h'
        moving = (last_level > level) & (level > next_level)
        second = moving & (ratio > 0) & (ratio <= self.longest)
        of_clean = next_alpha - alpha * next_sigma / sigma  # what x_0 counts for in the one-step solver
        corrected = one_step + per_pixel(of_clean * ratio / 2, x) * (clean - last_clean)
        return torch.where(per_pixel(second, x), corrected, one_step)

    def _log_snr(self, level: Tensor) -> Tensor:
        """lambda = ln(alpha/sigma), infinite where either is 0."""
        alpha, sigma = self.process.signal_and_noise(level)
        return alpha.log() - sigma.log()


class Ancestral:
    """Draws the next x from its posterior given x and the predicted clean clip: DDPM (Ho et al., 2006.11239, eq. 7).

    With the small variance, and between any two levels, not neighbouring steps only; DDIM's eta = 1 (2010.02502,
    eq. 16). For EDM and flows it is the Euler-ancestral solver of the same posterior.
    """

    def __init__(self, process: Process, draw_noise: Callable[[], Tensor]) -> None:
        self.process, self.draw_noise = process, draw_noise

    def step(self, x: Tensor, pred: Tensor, level: Tensor, next_level: Tensor) -> Tensor:
        alpha, sigma = self.process.signal_and_noise(level)
        next_alpha, next_sigma = self.process.signal_and_noise(next_level)
        kept = alpha / next_alpha * next_sigma**2 / sigma  # of the next level's noise what is in x already; rest is new
        mean = self.process.recombine(x, pred, level, next_alpha.expand_as(kept), kept)
        new = (next_sigma**2 - kept**2).clamp_min(0).sqrt()
        moved = mean + per_pixel(new, x) * self.draw_noise().to(x)
        return torch.where(per_pixel(next_level == level, x), x, moved)
