"""A class label as a context of one token, for a backbone that reads text: FVDM's class-conditional models.

FVDM (2410.03160) adds the label to the time embedding; read as a context it reaches the same blocks, per frame where
frames differ, and the backbone stays the diffusers model. B batch, D width of the text.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LabelEmbedding(nn.Module):
    """A table of `num_labels` labels and, last, the null that stands for none; unconditional: `num_labels` = 0."""

    _no_split_modules = ["Embedding"]  # read before the backbone runs, so sharding gathers it on its own

    def __init__(self, num_labels: int, dim: int) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.table = nn.Embedding(num_labels + 1, dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """Contexts [B,1,D] of labels, long [B]; where `drop` (bool [B]) is true, the null (FVDM drops one in ten).

        Raises ValueError for a label, not dropped, that is not in the table.
        """
        read = labels if drop is None else labels[~drop]
        if bool(((read < 0) | (read >= self.num_labels)).any()):
            raise ValueError(f"labels are {labels.tolist()}, this table has 0..{self.num_labels - 1}")
        if drop is not None:
            labels = torch.where(drop, self.num_labels, labels)
        return self.table(labels)[:, None]

    def null(self, batch: int) -> Tensor:
        """The context of no label, [B,1,D]."""
        none = torch.zeros(batch, dtype=torch.long, device=self.table.weight.device)
        return self(none, drop=torch.ones_like(none, dtype=torch.bool))
