"""Wan 2.2 A14B: two models that share the noise levels, one above a boundary and one below it.

Which of them runs a sample is decided by the clip's global clock, the highest level of its frames: with one level for
the whole clip that is diffusers' own rule (WanPipeline: `transformer` at timesteps >= boundary_ratio * 1000). A clip
whose frames differ in level never changes hands inside a step, and held frames do not decide.

B batch, F latent frames, C channels, H W latent size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.attention import AttentionRule
from models.backbones.base import Backbone
from models.backbones.inputs import as_context
from models.backbones.wan import WanBackbone
from models.experts import Expert
from models.kv_cache import KVCache
from models.layout import ClipLayout
from models.positions import PositionMode
from models.text import TextContext

__all__ = ["ExpertCaches", "WanExperts"]


class ExpertCaches:
    """A KV cache per expert: the current shot may change hands while its history stays what it is."""

    def __init__(self) -> None:
        self.high, self.low = KVCache(), KVCache()
        self.reset()

    def reset(self) -> None:
        """Forget all shots."""
        self.high.reset()
        self.low.reset()
        self.clock: Tensor | None = None  # [B], the highest level of the shots that are kept


class WanExperts(Backbone):
    """Both experts of a Wan 2.2, to sample with. To train, load one: `load_model(path, expert="high")`.

    `high` and `low` are backbones with the same boundary. Raises ValueError where they are not a pair.
    """

    lora_targets = WanBackbone.lora_targets

    def __init__(self, high: WanBackbone, low: WanBackbone) -> None:
        super().__init__()
        if high.expert is None or low.expert is None or high.expert.boundary != low.expert.boundary:
            raise ValueError(f"two experts need one boundary, got {high.expert} and {low.expert}")
        if (high.expert.name, low.expert.name) != ("high", "low"):
            raise ValueError(f"expected the experts high and low, got {high.expert.name} and {low.expert.name}")
        for field in ("patch_size", "in_channels", "out_channels", "text_dim"):
            if (one := getattr(high.config, field)) != (other := getattr(low.config, field)):
                raise ValueError(f"{field} is {one} in transformer/ and {other} in transformer_2/: no pair of experts")
        self.high, self.low = high, low
        self.boundary = high.expert.boundary
        self.capabilities = high.capabilities
        self.process, self.pixels_per_token = high.process, high.pixels_per_token

    @property
    def config(self) -> Any:
        return self.high.config

    @property
    def models_by_folder(self) -> dict[str, Any]:
        return self.high.models_by_folder | self.low.models_by_folder

    def new_cache(self) -> ExpertCaches:
        return ExpertCaches()

    def forward(
        self,
        x: Tensor,  # [B,C,F,H,W]
        levels: Tensor,  # [B] or [B,F], in [0, 1]
        text: TextContext | Tensor,  # or [B,L,D], one context for the whole clip
        *,
        layout: ClipLayout | None = None,  # None: one shot
        position_mode: PositionMode = "contiguous",
        position_gap: int = 4,
        attention_rule: AttentionRule = "full",
        cache: ExpertCaches | None = None,  # shots that come before those of x
        append: bool = False,  # keep the shots of x in the cache, as either expert sees them
    ) -> Tensor:
        """The predicted velocity, [B,C,F,H,W], of every sample by its expert; see `WanBackbone.forward`.

        The clock of a sample with a cache counts the shots that the cache holds, as one forward over all would.
        """
        clock = levels if levels.ndim == 1 else levels.amax(dim=1)  # [B]
        if cache is not None and cache.clock is not None and len(clock) % len(cache.clock) == 0:
            clock = torch.maximum(clock, cache.clock.to(clock).repeat(len(clock) // len(cache.clock)))
        high = Expert("high", self.boundary).covers(self.process.to_model_time(clock))  # [B]
        options: dict[str, Any] = {
            "layout": layout, "position_mode": position_mode, "position_gap": position_gap,
            "attention_rule": attention_rule,
        }  # fmt: skip
        if append and cache is not None:
            by_high = self.high(x, levels, text, cache=cache.high, append=True, **options)
            by_low = self.low(x, levels, text, cache=cache.low, append=True, **options)
            cache.clock = clock
            return torch.where(high.view(-1, 1, 1, 1, 1), by_high, by_low)
        if bool(high.all()) or not bool(high.any()):
            expert = self.high if bool(high[0]) else self.low
            own = None if cache is None else cache.high if bool(high[0]) else cache.low
            return expert(x, levels, text, cache=own, append=append, **options)
        if cache is not None:
            raise ValueError("samples of both experts in one batch with a cache: run them one after another")
        out = torch.empty_like(x)
        text = as_context(text, x.shape[2])
        for expert, rows in ((self.high, high), (self.low, ~high)):
            order = rows.nonzero().flatten()
            part = expert(x[order], levels[order], text.samples(order.tolist()), **options)
            out = out.to(part.dtype).index_copy(0, order, part)
        return out
