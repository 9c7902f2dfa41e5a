"""Where the model runs: one device, or FSDP2 over the ranks of a process group.

Applied from outside: models know nothing of sharding, activation checkpointing or compilation. State-dict keys stay
the model's own whatever is applied.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from models.backbones.base import Backbone

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Parallel:
    """One rank's view of the run. `rank` of `world` ranks; world 1 without sharding is the one-device path."""

    device: torch.device = torch.device("cpu")
    rank: int = 0
    world: int = 1
    sharded: bool = False

    def rows(self, size: int) -> slice:
        """The rows of a batch of `size` samples that belong to this rank; every rank has equally many."""
        if size % self.world:
            raise ValueError(f"batch of {size} samples cannot be split over {self.world} workers: make it a multiple")
        share = size // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over the ranks, for figures (a new tensor)."""
        return self.total(tensor) / self.world

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, for figures (a new tensor)."""
        tensor = tensor.clone()
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def autocast(self, precision: Precision) -> AbstractContextManager:
        """Run matrix products in bfloat16 over float32 master weights, or everything in float32."""
        return torch.autocast(self.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def this_rank(sharded: bool) -> Parallel:
    """The `Parallel` of this process, from its process group if one is up; uses its GPU if it has one."""
    on = dist.is_available() and dist.is_initialized()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return Parallel(device, dist.get_rank() if on else 0, dist.get_world_size() if on else 1, sharded)


def trainable(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by their plain name, whatever wrappers `prepare` has put around the blocks."""
    named = backbone.named_parameters()
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in named if p.requires_grad}


def block_names(backbone: nn.Module) -> list[str]:
    """Names of the repeated blocks, as the diffusers model class declares them in `_no_split_modules`."""
    declared = {name for m in backbone.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    return [name for name, module in backbone.named_modules() if type(module).__name__ in declared]


def prepare(
    backbone: Backbone,
    parallel: Parallel,
    *,
    precision: Precision = "fp32",
    activation_checkpointing: bool = False,
    compile_blocks: bool = False,
) -> Backbone:
    """Activation checkpointing, then compilation, then sharding, per block; returns the same module, on its device.

    In bf16 the blocks' weights are gathered in bfloat16 and their gradients reduced in float32; what is outside the
    blocks (time embedding, patch embedding, output) is gathered in float32.
    """
    if not parallel.sharded:  # sharding moves each rank's part alone, so the whole need not fit on one device
        backbone.to(parallel.device)
    if parallel.device.type == "cpu":  # here the backward pass of flash attention takes half of a small model's step
        backbone.set_attention_backend("_native_math")
    names = block_names(backbone)
    if activation_checkpointing:
        for name in names:
            backbone.set_submodule(name, checkpoint_wrapper(backbone.get_submodule(name)))
    if compile_blocks:
        for name in names:
            backbone.get_submodule(name).compile()
    if parallel.sharded:
        mesh = init_device_mesh(parallel.device.type, (parallel.world,))
        low = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bf16" else MixedPrecisionPolicy()
        for name in names:
            fully_shard(backbone.get_submodule(name), mesh=mesh, mp_policy=low)
        fully_shard(backbone, mesh=mesh)
        # else a method's module that is called before the backbone would take itself for the root
        backbone._get_fsdp_state()._lazy_init()  # type: ignore[operator]
    elif parallel.world > 1:
        raise ValueError(f"{parallel.world} workers need parallel=fsdp2; parallel=one_device is for a single one")
    return backbone


def sync_gradients(backbone: nn.Module, on: bool) -> None:
    """Whether the next backward pass reduces gradients over the ranks (only the last micro-batch of a step must)."""
    if hasattr(backbone, "set_requires_gradient_sync"):
        backbone.set_requires_gradient_sync(on)
