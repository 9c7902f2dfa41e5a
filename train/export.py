"""From trained weights to a model folder."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor


def full_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU from this rank's shards; a collective that every rank must join."""
    return {name: (w.full_tensor() if isinstance(w, DTensor) else w).detach().cpu() for name, w in weights.items()}
