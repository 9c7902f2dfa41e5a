"""Random numbers for tests: the same for the same seed, whatever was drawn before."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def open_zeros(module: nn.Module, scale: float = 1.0, seed: int = 100) -> None:
    """Draw every parameter that is all zeros, as those are that let a new module start as no change."""
    for i, parameter in enumerate(module.parameters()):
        if not parameter.any():
            parameter.copy_(scale * randn(*parameter.shape, seed=seed + i, dtype=parameter.dtype))
