"""Keys and values of the shots that came before, so that a later shot attends to them without running them again.

Exact under group-causal attention only: there, what a shot is at a level does not depend on what follows (LCT
2503.10589). A key is kept as it was rotated and a shot's features depend on what stands before it, so what is kept
holds for these shots, in this order, at these levels: for another history, `reset` and append anew.

B batch, N tokens, d width of a head. Memory: 2 layers N width numbers per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.positions import PositionMode

Placing = tuple[PositionMode, int, tuple[int, int]]  # position mode, gap, patch grid
KeysValues = tuple[Tensor, Tensor]  # [B,N,heads,d] each


class KVCache:
    """Filled by a backbone's forward with `append=True`, read by those without.

    Each sample's own; a forward of several guidance branches, one after another along the batch, reads the same shots
    in each branch.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all shots, for another history or another size."""
        self.sizes: tuple[int, ...] = ()  # latent frames of each shot
        self.dummies: tuple[bool, ...] = ()  # which of them stand for a single token (`models.layout.with_story`)
        self._layers: list[KeysValues] = []
        self._placing: Placing | None = None

    @property
    def layers(self) -> tuple[KeysValues, ...]:
        """Rotated keys, and values, of all shots in order; one pair per layer."""
        return tuple(self._layers)

    def check(self, batch: int, placing: Placing) -> None:
        """Raises ValueError where a forward of `batch` rows with these positions cannot attend to what is kept."""
        if not self._layers:
            return
        if placing != self._placing:
            raise ValueError(
                f"the cache holds shots at (position mode, gap, patch grid) {self._placing}, this pass has {placing}: "
                "keys are kept rotated; reset the cache"
            )
        if batch % (rows := self._layers[0][0].shape[0]):
            raise ValueError(f"the cache holds {rows} samples, a batch of {batch} is no multiple of it")

    def append(
        self, layers: list[KeysValues], sizes: tuple[int, ...], placing: Placing, dummies: tuple[bool, ...] = ()
    ) -> None:
        """Keep the shots of one forward: its own keys and values per layer, and the frames of each of its shots."""
        if not self._layers:
            self._layers = layers
        else:
            if (rows := layers[0][0].shape[0]) != (held := self._layers[0][0].shape[0]):
                raise ValueError(f"the cache holds {held} samples, the shots to append have {rows}")
            self._layers = [
                (torch.cat([k, own_k], dim=1), torch.cat([v, own_v], dim=1))
                for (k, v), (own_k, own_v) in zip(self._layers, layers, strict=True)
            ]
        self.sizes, self._placing = self.sizes + sizes, placing
        self.dummies += dummies or (False,) * len(sizes)

    def past(self, layer: int, batch: int) -> KeysValues | None:
        """Keys and values of all shots in one layer, [batch,N,heads,d]; the same shots in each guidance branch."""
        if not self._layers:
            return None
        key, value = self._layers[layer]
        if (branches := batch // key.shape[0]) == 1:
            return key, value
        return key.repeat(branches, 1, 1, 1), value.repeat(branches, 1, 1, 1)

    def prepend(self, layer: int, key: Tensor, value: Tensor) -> KeysValues:
        """Keys and values of all shots and then these, [branches*B,N,heads,d], of one layer."""
        if not self._layers:
            return key, value
        past_key, past_value = self._layers[layer]
        return _join(past_key, key), _join(past_value, value)


def _join(past: Tensor, own: Tensor) -> Tensor:
    rows = own.unflatten(0, (-1, past.shape[0]))  # [branches,B,N,heads,d]
    return torch.cat([past.expand(len(rows), *past.shape), rows], dim=2).flatten(0, 1)
