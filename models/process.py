"""Diffusion processes with a noise level per latent frame: flow matching, variance preserving, EDM.

A level u lies in [0, 1]: 0 is exactly clean, 1 the noisiest of the process. A process says what a level means,

    x_u = alpha x_0 + sigma eps,    and what the model predicts of it,    y = a x_0 + b eps;

everything else follows from these four numbers per frame. Solving for x_0 and eps gives the predicted clean clip and
the predicted noise, and x_0 and eps put together at the next level give the one-step solver (Euler for a flow and for
EDM, DDIM for a variance-preserving process), which is exact for a right prediction and holds a frame whose level stays.

B batch, F latent frames, C channels, H W latent size, T steps a discrete model was trained with. `x`, `eps` and `pred`
are [B,C,F,H,W]; a level is [B,F], one row [F] for the whole batch, [B,1] or a single number. Coefficients are worked
out in float64 and applied in the dtype of x, at least float32.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

Prediction = Literal["epsilon", "x0", "v"]


class Process(Protocol):
    """What noise levels mean. A process defines the first three methods; it holds no state of a run."""

    def signal_and_noise(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of x = alpha x_0 + sigma eps, float64 in the level's shape; exactly (1, 0) at level 0."""
        ...

    def target_mix(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of the model's target a x_0 + b eps, float64 in the level's shape."""
        ...

    def to_model_time(self, level: Tensor) -> Tensor:
        """The number the model is told for a level, in the level's shape; float32 whatever comes in."""
        ...

    def precondition(self, x: Tensor, level: Tensor) -> Tensor:
        """x as the model reads it."""
        return x

    def loss_weight(self, level: Tensor) -> Tensor:
        """Weight of the squared error of a prediction at a level, in the level's shape."""
        return torch.ones_like(level)

    def add_noise(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        signal, noise = self.signal_and_noise(level)
        return per_pixel(signal, x0) * x0 + per_pixel(noise, x0) * eps

    def pure_noise(self, eps: Tensor) -> Tensor:
        """Where sampling starts from nothing: x at level 1 with noise in place of the clip, too.

        Clips of unit variance then have the variance they have in training; it is diffusers' `init_noise_sigma`.
        """
        signal, noise = self.signal_and_noise(torch.ones((), device=eps.device))
        return eps * torch.hypot(signal, noise).to(eps.dtype)

    def target(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """What the model learns to predict."""
        of_clean, of_noise = self.target_mix(level)
        return per_pixel(of_clean, x0) * x0 + per_pixel(of_noise, x0) * eps

    def recombine(self, x: Tensor, pred: Tensor, level: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """signal * x_0 + noise * eps, with the x_0 and eps that the prediction at `level` amounts to.

        `signal` and `noise` have the level's shape. Not finite where level and prediction do not determine both, as
        for the noise in an x0 prediction at level 0; frames that are held never need it.
        """
        alpha, sigma = self.signal_and_noise(level)
        of_clean, of_noise = self.target_mix(level)
        determinant = alpha * of_noise - sigma * of_clean
        from_x = (signal * of_noise - noise * of_clean) / determinant
        from_pred = (noise * alpha - signal * sigma) / determinant
        return per_pixel(from_x, x) * x + per_pixel(from_pred, x) * pred

    def predict_clean(self, x: Tensor, pred: Tensor, level: Tensor) -> Tensor:
        """x_0 as the prediction has it; x itself at level 0."""
        clean = self.recombine(x, pred, level, torch.ones_like(level), torch.zeros_like(level))
        return torch.where(per_pixel(level == 0, x), x, clean)

    def predict_noise(self, x: Tensor, pred: Tensor, level: Tensor) -> Tensor:
        """eps as the prediction has it."""
        return self.recombine(x, pred, level, torch.zeros_like(level), torch.ones_like(level))

    def step(self, x: Tensor, pred: Tensor, level: Tensor, next_level: Tensor) -> Tensor:
        """One deterministic step per frame; a frame whose level stays is handed through bit for bit."""
        moved = self.recombine(x, pred, level, *self.signal_and_noise(next_level))
        return torch.where(per_pixel(next_level == level, x), x, moved)


class FlowMatching(Process):
    """Rectified flow (Liu et al., 2209.03003): x_u = (1 - u) x_0 + u eps, velocity v = eps - x_0, model time 1000 u."""

    def signal_and_noise(self, level: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - level.double(), level.double()

    def target_mix(self, level: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(level, dtype=torch.float64)
        return -one, one

    def to_model_time(self, level: Tensor) -> Tensor:
        """float32, because bfloat16 cannot tell 999 from 1000."""
        return 1000.0 * level.float()


class VPDiffusion(Process):
    """DDPM (Ho et al., 2006.11239) between and at its T discrete steps: alpha^2 + sigma^2 = 1.

    Level t/T is the paper's step t = 1..T, which diffusers calls timestep t - 1, and level 0 is the clean clip, which
    has no timestep (timestep 0 still has noise: alpha_bar is 0.9999 for Latte). So levels 1 - k/K are diffusers' K
    "trailing" timesteps, and a frame held at 0 is exactly clean. Between two steps the angle atan2(sigma, alpha) is
    interpolated linearly: finite at both ends, where log-SNR is not. Model time is t - 1, fractional between steps;
    below step 1 it stays 0.

    Args:
        alpha_bar: [T], falling; see `models.schedules.alpha_bars`.
        prediction: "epsilon"; "x0"; or "v" = alpha eps - sigma x_0 (Salimans & Ho, 2202.00512).
    Raises ValueError for a schedule that does not fall, and for epsilon prediction where the last step holds no signal
    (zero terminal SNR): there x_0 cannot be told from x and eps.
    """

    def __init__(self, alpha_bar: Tensor, prediction: Prediction) -> None:
        alpha_bar = alpha_bar.double()
        if alpha_bar.ndim != 1 or not len(alpha_bar) or alpha_bar[0] >= 1 or alpha_bar[-1] < 0:
            raise ValueError(f"alpha_bar must be [T] in [0, 1), has shape {tuple(alpha_bar.shape)}: {alpha_bar}")
        if (alpha_bar.diff() >= 0).any():
            raise ValueError(f"alpha_bar must fall from step to step, does not at {int(alpha_bar.diff().argmax()) + 1}")
        if prediction not in get_args(Prediction):
            raise ValueError(f"unknown prediction {prediction!r}; choose one of {', '.join(get_args(Prediction))}")
        if prediction == "epsilon" and alpha_bar[-1] == 0:
            raise ValueError(
                "alpha_bar ends at 0 (zero terminal SNR), where epsilon says nothing of x0: predict v or x0"
            )
        self.prediction = prediction
        self.steps = len(alpha_bar)
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        clean = torch.tensor([math.pi / 2], dtype=torch.float64)
        # [T+1] angles from pure noise and from clean; both, so that alpha and sigma are exact at either end
        self._from_noise = torch.cat([clean, torch.atan2(signal, noise)])
        self._from_clean = torch.cat([torch.zeros_like(clean), torch.atan2(noise, signal)])

    def signal_and_noise(self, level: Tensor) -> tuple[Tensor, Tensor]:
        step = self._step(level)
        before = step.floor().clamp_max(self.steps - 1).long()

        def sine(angles: Tensor) -> Tensor:
            angles = angles.to(level.device)
            return torch.lerp(angles[before], angles[before + 1], step - before).sin()

        return sine(self._from_noise), sine(self._from_clean)

    def target_mix(self, level: Tensor) -> tuple[Tensor, Tensor]:
        if self.prediction == "v":
            alpha, sigma = self.signal_and_noise(level)
            return -sigma, alpha
        one = torch.ones_like(level, dtype=torch.float64)
        return (torch.zeros_like(one), one) if self.prediction == "epsilon" else (one, torch.zeros_like(one))

    def to_model_time(self, level: Tensor) -> Tensor:
        return (self._step(level) - 1).clamp_min(0).float()

    def loss_weight(self, level: Tensor) -> Tensor:
        """1 for epsilon and v. For x0 1/sigma^2, as if it were v (2202.00512, "SNR+1"), no more than at step 1."""
        if self.prediction != "x0":
            return torch.ones_like(level)
        _, sigma = self.signal_and_noise(level)
        return sigma.clamp_min(float(self._from_clean[1].sin())).pow(-2).to(level.dtype)

    def _step(self, level: Tensor) -> Tensor:
        """t in [0, T], float64; a float32 level cannot be t/T exactly, so what is nearly a whole step is one."""
        step = level.double() * self.steps
        return torch.where((step - step.round()).abs() < 1e-3, step.round(), step)


class EDM(Process):
    """EDM (Karras et al., 2206.00364) with the preconditioning of Stable Video Diffusion: x = x_0 + sigma eps.

    The model reads c_in x, c_in = 1/sqrt(sigma^2 + 1), at model time c_noise = ln(sigma)/4, and predicts F with
    x_0 = c_skip x + c_out F, c_skip = 1/(sigma^2 + 1), c_out = -sigma/sqrt(sigma^2 + 1): F is the v prediction
    (eps - sigma x_0)/sqrt(sigma^2 + 1). EDM's weight (sigma^2 + 1)/sigma^2 of the error of x_0 is 1/c_out^2, so the
    error of F has weight 1 at every level.

    Level 1 is sigma_max and level 1/1000 sigma_min, with rho = 7 spacing between (eq. 5); below, sigma goes straight
    to 0, and model time stays that of sigma_min, so that a held clean frame is never ln 0.
    """

    rho = 7.0
    level_of_sigma_min = 1e-3

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 700.0) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"sigma_min is {sigma_min}, sigma_max {sigma_max}: expected 0 < sigma_min < sigma_max")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def signal_and_noise(self, level: Tensor) -> tuple[Tensor, Tensor]:
        level = level.double()
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        spaced = low + (level - self.level_of_sigma_min) / (1 - self.level_of_sigma_min) * (high - low)
        straight = level / self.level_of_sigma_min * self.sigma_min
        sigma = torch.where(level > self.level_of_sigma_min, spaced.clamp_min(low) ** self.rho, straight)
        return torch.ones_like(sigma), sigma

    def to_level(self, sigma: Tensor) -> Tensor:
        """The level of a sigma, float32 in its shape: for a given list of sigmas, or training draws of sigma.

        A sigma above sigma_max, as SVD's ln(sigma) ~ N(0.7, 1.6^2) never draws, is level 1.
        """
        sigma = sigma.double()
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        spaced = self.level_of_sigma_min + (1 - self.level_of_sigma_min) * (sigma ** (1 / self.rho) - low) / (
            high - low
        )
        straight = sigma / self.sigma_min * self.level_of_sigma_min
        return torch.where(sigma > self.sigma_min, spaced, straight).clamp_max(1).float()

    def target_mix(self, level: Tensor) -> tuple[Tensor, Tensor]:
        _, sigma = self.signal_and_noise(level)
        scale = (sigma**2 + 1).rsqrt()
        return -sigma * scale, scale

    def to_model_time(self, level: Tensor) -> Tensor:
        _, sigma = self.signal_and_noise(level)
        return (0.25 * sigma.clamp_min(self.sigma_min).log()).float()

    def precondition(self, x: Tensor, level: Tensor) -> Tensor:
        _, sigma = self.signal_and_noise(level)
        return per_pixel((sigma**2 + 1).rsqrt(), x) * x


def per_pixel(values: Tensor, x: Tensor) -> Tensor:
    """Values per frame ([B,F], [F], [B,1] or one) as [B or 1,1,F or 1,1,1], to broadcast over x [B,C,F,H,W].

    Floating values come in the dtype of x, at least float32. Raises ValueError where the shapes do not fit.
    """
    batch, _, frames, _, _ = x.shape
    rows = values.reshape(1, -1) if values.ndim < 2 else values
    if rows.ndim > 2 or rows.shape[0] not in (1, batch) or rows.shape[1] not in (1, frames):
        raise ValueError(
            f"noise level has shape {tuple(values.shape)}, x {tuple(x.shape)}: expected [{batch},{frames}], "
            f"[{frames}] (one row for all samples) or [{batch},1] (one level per sample)"
        )
    if rows.is_floating_point():
        rows = rows.to(torch.promote_types(x.dtype, torch.float32))
    return rows[:, None, :, None, None]
