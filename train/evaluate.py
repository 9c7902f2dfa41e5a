"""Loss on held-out clips at fixed noise levels and fixed noise, with the right and with a wrong prompt.

It is the loss of training (`train.loop.clip_losses`), weights of frames and of levels included, so that the two can be
compared. Early in pretraining the losses with the right and a wrong text at high levels part as soon as the text
reaches the model. If they do not part, it does not reach it.

Shapes: B batch, F latent frames, C channels, H W latent size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from models.backbones.base import Backbone
from models.methods.base import Method
from train.batches import BatchSource, keyed_generator, rows_of, whole_tokens
from train.loop import all_conditions, clip_losses
from train.parallel import Parallel

LEVELS = (0.2, 0.5, 0.8, 0.95)


class HeldOutLoss:
    """`HeldOutLoss(...)(step, backbone)` -> {"loss/0.95": ..., "wrong_text/0.95": ...}, an `evaluate` of the loop.

    Args:
        source: held-out batches; build it so that no sample loses its text.
        batches: how many of them to read.
        levels: noise levels; at each the frames are at the levels that the method's plan gives them when the clock
            stands there, so that given frames stay given; those of another expert are left out.
        wrong_text_above: levels from which on the loss with a neighbour's text is measured, too; of a method that
            is told a class in place of text, never.
    """

    def __init__(
        self,
        source: BatchSource,
        method: Method,
        *,
        batches: int = 2,
        levels: Sequence[float] = LEVELS,
        wrong_text_above: float = 0.9,
        parallel: Parallel | None = None,
    ):
        if not all(0 < level <= 1 for level in levels):
            raise ValueError(f"levels of held-out loss are {list(levels)}, expected above 0 to 1")
        self.source, self.method, self.batches, self.levels = source, method, batches, levels
        self.wrong_text_above = wrong_text_above if method.classes is None and method.reads_text else math.inf
        self.parallel = parallel or Parallel()

    @torch.no_grad()
    def __call__(self, step: int, backbone: Backbone) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        rows = self.parallel.rows(self.source.batch_size)
        for index in range(self.batches):
            batch = whole_tokens(self.source.batch(index, rows), backbone.capabilities.frames_per_token)
            batch = batch.to(self.parallel.device)
            numbers = [index * self.source.batch_size + row for row in rows_of(self.source, rows)]
            noise = torch.stack(
                [torch.randn(batch.latents.shape[1:], generator=keyed_generator("held-out", n)) for n in numbers]
            ).to(self.parallel.device)
            conditions = all_conditions(self.method, batch)
            wrong = replace(batch, text=batch.text.samples(range(-1, len(batch.latents) - 1)))  # a neighbour's
            differs = (wrong.text.embeddings != batch.text.embeddings).flatten(1).any(dim=1)  # [B]
            for level in self.levels:
                clock = torch.tensor([level, 0.0])
                levels = self.method.plan(batch.layout, clock, self.method.tasks[0])[0].to(noise)
                levels = levels.expand(len(numbers), -1)  # [B,F]
                if not bool(backbone.learns_at(self.method.model_levels(levels)).all()):
                    continue
                losses, _, _ = clip_losses(backbone, self.method, batch, levels, noise, conditions)
                _add(sums, f"loss/{level:g}", losses)
                if level >= self.wrong_text_above:
                    losses, _, _ = clip_losses(backbone, self.method, wrong, levels, noise, conditions)
                    _add(sums, f"wrong_text/{level:g}", losses[differs])
        totals = {name: self.parallel.total(pair).tolist() for name, pair in sums.items()}
        return {name: total / count for name, (total, count) in totals.items() if count}


def _add(sums: dict[str, Tensor], name: str, losses: Tensor) -> None:
    pair = torch.stack([losses.double().sum(), torch.tensor(len(losses), dtype=torch.float64, device=losses.device)])
    sums[name] = sums.get(name, torch.zeros_like(pair)) + pair
