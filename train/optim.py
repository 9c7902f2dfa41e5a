"""AdamW, learning-rate schedule, gradient clipping and the exponential moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SCHEDULES = ("constant", "cosine")


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    rate_scale: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, vectors (biases, norms, modulation tables' rows) do not.

    Args:
        parameters: trainable parameters by name; float32 master weights, sharded or not.
        rate_scale: learning rate of a parameter, times `learning_rate`; each group keeps its own as "rate_scale".
    """
    low = [f"{name}: {p.dtype}" for name, p in parameters.items() if p.dtype != torch.float32]
    if low:
        raise TypeError(f"master weights must be float32, so that small updates are not rounded away; got {low[:3]}")
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, p in parameters.items():
        groups.setdefault((rate_scale(name), p.ndim < 2), []).append(p)
    settings = [
        {"params": members, "weight_decay": 0.0 if vectors else weight_decay, "lr": learning_rate * scale,
         "rate_scale": scale}
        for (scale, vectors), members in sorted(groups.items(), key=lambda group: group[0])
    ]  # fmt: skip
    return torch.optim.AdamW(settings, lr=learning_rate, betas=(0.9, 0.99), fused=True)


def learning_rate_at(step: int, *, peak: float, warmup_steps: int, total_steps: int, schedule: str) -> float:
    """Learning rate of 0-based `step`: linear warm-up, then constant, or cosine down to a tenth of the peak."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    share = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0))))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the global gradient norm in place (0 = measure only); returns the norm before clipping, a scalar tensor."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor (shares its memory), or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class EMA:
    """Exponential moving average of the trainable weights, in float32, sharded like them.

    Early steps use the smaller decay (1 + step) / (10 + step), so that the random start is forgotten quickly.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.decay = decay
        self.parameters = dict(parameters)
        self.average = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after 0-based `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [local(a) for a in self.average.values()]
        torch._foreach_lerp_(averages, [local(p.detach()) for p in self.parameters.values()], 1.0 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model holds the averaged weights inside the block, its own again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            weight, average = local(parameter.detach()), local(self.average[name])
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
