"""Loss on held-out clips at fixed noise levels and fixed noise, with the right and with a wrong prompt.

Early in pretraining the two losses at high levels part as soon as the text reaches the model. If they do not part, it
does not reach it.

Shapes: B batch, F latent frames, C channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.backbones.base import Backbone
from models.methods.base import Method
from models.text import TextContext
from train.batches import BatchSource, keyed_generator
from train.parallel import Parallel


class HeldOutLoss:
    """`HeldOutLoss(...)(step, backbone)` -> {"loss/0.95": ..., "wrong_text/0.95": ...}, an `evaluate` of the loop.

    All frames are noised alike, so it is for clips without conditions.

    Args:
        source: held-out batches; build it with text_drop_prob=0.
        batches: how many of them to read.
        levels: noise levels, each for all frames at once; those of another expert are left out.
        wrong_text_above: levels from which on the loss with a neighbour's text is measured, too.
    """

    def __init__(
        self,
        source: BatchSource,
        method: Method,
        *,
        batches: int = 2,
        levels: Sequence[float] = (0.2, 0.5, 0.8, 0.95),
        wrong_text_above: float = 0.9,
        parallel: Parallel | None = None,
    ):
        self.source, self.method, self.batches, self.levels = source, method, batches, levels
        self.wrong_text_above = wrong_text_above
        self.parallel = parallel or Parallel()

    @torch.no_grad()
    def __call__(self, step: int, backbone: Backbone) -> dict[str, float]:
        process = backbone.process
        sums: dict[str, Tensor] = {}
        rows = self.parallel.rows(self.source.batch_size)
        for index in range(self.batches):
            batch = self.source.batch(index, rows).to(self.parallel.device)
            generator = keyed_generator("held-out", index, rows.start)
            noise = torch.randn(batch.latents.shape, generator=generator).to(self.parallel.device)
            wrong = batch.text.samples(range(-1, len(batch.latents) - 1))  # each reads its neighbour's
            differs = (wrong.embeddings != batch.text.embeddings).flatten(1).any(dim=1)  # [B]

            for level in self.levels:
                levels = torch.full((len(batch.latents), batch.latents.shape[2]), level, device=self.parallel.device)
                if not bool(backbone.learns_at(levels).all()):
                    continue
                noisy = process.precondition(process.add_noise(batch.latents, noise, levels), levels)
                target = process.target(batch.latents, noise, levels)

                def error(text: TextContext) -> Tensor:  # [B]
                    told = self.method.model_levels(levels)  # noqa: B023
                    conditions = self.method.conditions(batch.latents, batch.layout, batch.labels)  # noqa: B023
                    seen = {"text": text} | self.method.prepare(backbone, batch.layout, text, conditions)  # noqa: B023
                    prediction = backbone(noisy, told, **seen, **self.method.backbone_kwargs(batch.layout))  # noqa: B023
                    return (prediction.float() - target).square().mean(dim=(1, 2, 3, 4))  # noqa: B023

                _add(sums, f"loss/{level:g}", error(batch.text))
                if level >= self.wrong_text_above:
                    _add(sums, f"wrong_text/{level:g}", error(wrong)[differs])
        totals = {name: self.parallel.total(pair).tolist() for name, pair in sums.items()}
        return {name: total / count for name, (total, count) in totals.items() if count}


def _add(sums: dict[str, Tensor], name: str, errors: Tensor) -> None:
    pair = torch.stack([errors.double().sum(), torch.tensor(len(errors), dtype=torch.float64, device=errors.device)])
    sums[name] = sums.get(name, torch.zeros_like(pair)) + pair
