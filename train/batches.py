"""Batches for the loop: what a batch is, and the two places batches come from.

`LatentCache` is a set of single-shot clips in memory, `PackedClips` puts several of them in one sequence;
`train.scenes.ShardDataset` reads prepared scene shards.
Every batch is a pure function of (seed, index): there is no state to save but the step, any number of workers sees the
same data, and a resumed run goes on with the very batch it would have seen.

Shapes: B batch, F latent frames, C channels, H W latent size, G text groups, L text tokens, D width of the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.layout import ClipLayout, shots_layout
from models.patches import padded_frames, take_frames
from models.text import TextContext, pack_text

LayoutFor = Callable[[list[int]], ClipLayout]


@dataclass(frozen=True)
class SceneBatch:
    """Scenes (or single shots) of one layout. `latents` [B,C,F,H,W] are normalised; text is one context per group."""

    latents: Tensor
    layout: ClipLayout
    text: TextContext
    keys: list[str]
    labels: Tensor | None = None  # long [B]: the class of each sample, where the source knows classes
    states: Tensor | None = None  # [B,S,L,D], predicted states in order of time; zeros are padding
    given_lost: Tensor | None = None  # bool [B]: samples that lose their given frames; None: none does
    given: Tensor | None = None  # [B,C,K,H,W]: first frames encoded alone, as they are given; None: as in `latents`
    embedding: Tensor | None = None  # [B,1,D] of each first frame, by an image encoder; None: the model reads none

    def to(self, device: torch.device) -> SceneBatch:
        names = ("latents", "labels", "states", "given_lost", "given", "embedding")
        moved = {n: t.to(device, non_blocking=True) for n in names if (t := getattr(self, n)) is not None}
        return replace(self, text=self.text.to(device, non_blocking=True), **moved)


class BatchSource(Protocol):
    """Random access to micro-batches of `batch_size` samples over all workers."""

    batch_size: int

    def batch(self, index: int, rows: slice = slice(None)) -> SceneBatch:
        """Rows of micro-batch `index` >= 0, a pure function of (seed, index)."""

    def identity(self) -> dict[str, Any]:
        """What fixes the data order; stored in checkpoints and compared on resume."""


def rows_of(source: BatchSource, rows: slice) -> range:
    """Row numbers of a micro-batch that `rows` selects."""
    return range(source.batch_size)[rows]


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed from a key such as (seed, "noise", step, row): equal on every machine, no overlap between keys."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator of its own for `key`."""
    return torch.Generator().manual_seed(keyed_seed(*key))


def stream(count: int, first: int, size: int, seed: int, name: str = "") -> list[int]:
    """Places first..first+size-1 of an endless stream: range(count) in a new seeded order every epoch."""
    found: list[int] = []
    while len(found) < size:
        epoch, position = divmod(first + len(found), count)
        found += _epoch_order(count, seed, epoch, name)[position : position + size - len(found)]
    return found


@lru_cache(maxsize=64)
def _epoch_order(count: int, seed: int, epoch: int, name: str) -> list[int]:
    return torch.randperm(count, generator=keyed_generator(seed, "order", name, epoch)).tolist()


class Turns:
    """Whose turn it is: bucket k gets a share `weights[k]` of the turns, never more than one away from it.

    Smooth weighted round robin; turn `index` is a pure function of the weights. Turns are computed once and kept.
    """

    def __init__(self, weights: np.ndarray):
        self.weights = weights / weights.sum()
        self.credit = np.zeros_like(self.weights)
        self.counts = np.zeros(len(weights), dtype=np.int64)
        self.order: list[tuple[int, int]] = []

    def at(self, index: int) -> tuple[int, int]:
        """(bucket, how many turns it has had before) at `index`."""
        while len(self.order) <= index:
            self.credit += self.weights
            chosen = int(self.credit.argmax())
            self.credit[chosen] -= 1.0
            self.order.append((chosen, int(self.counts[chosen])))
            self.counts[chosen] += 1
        return self.order[index]


def prefetch(source: BatchSource, rows: slice, first: int, last: int, ahead: int = 2) -> Iterator[SceneBatch]:
    """Batches first..last-1 in order, read by a thread that stays `ahead` batches in front."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        waiting = [pool.submit(source.batch, index, rows) for index in range(first, min(first + ahead, last))]
        for index in range(first, last):
            batch = waiting.pop(0).result()
            if index + ahead < last:
                waiting.append(pool.submit(source.batch, index + ahead, rows))
            yield batch


def whole_tokens(batch: SceneBatch, patch: int) -> SceneBatch:
    """The batch for a backbone whose tokens hold `patch` latent frames: each shot fills whole ones."""
    places = padded_frames(batch.layout, patch)
    if len(places) == batch.layout.num_frames:
        return batch
    text = replace(batch.text, frame_text=batch.text.frame_text[places])
    given = batch.given
    if given is not None:  # the first frame fills its token, as it does in the clip
        given = given[:, :, [place for place in places if place < given.shape[2]]]
    latents, layout = batch.latents[:, :, places], take_frames(batch.layout, places)
    return replace(batch, latents=latents, layout=layout, text=text, given=given)


class LatentCache:
    """Single-shot clips of one shape with a bank of texts, held in memory. A clip's text is its class, too.

    Args:
        paths: files written by `write_cache`, in the order that fixes the sample numbers.
        batch_size: samples per micro-batch, over all workers.
        text_length: tokens to pad each text to.
        null_text: [text_length,D] context of a dropped text (`models.text.null_text`).
        layout_for: the method's layout for a list of shot lengths in latent frames.
        text_drop_prob: share of samples trained without text, for classifier-free guidance.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        batch_size: int,
        text_length: int,
        null_text: Tensor,
        layout_for: LayoutFor,
        text_drop_prob: float = 0.1,
        seed: int = 0,
    ):
        parts = [read_cache(Path(path)) for path in paths]
        if not parts:
            raise ValueError("LatentCache: no cache files given")
        self.latents = torch.cat([latents for latents, _, _ in parts])  # [n,C,F,H,W]
        self.texts = [text for _, bank, _ in parts for text in bank]  # [L_i,D] each
        firsts = torch.tensor([0] + [len(bank) for _, bank, _ in parts]).cumsum(0)
        self.text_ids = torch.cat([ids + first for (_, _, ids), first in zip(parts, firsts, strict=False)])  # [n]
        self.text_length, self.null_text = text_length, null_text.float()
        pack_text([max(self.texts, key=len)], text_length)  # raises now if the longest does not fit
        if null_text.shape != (text_length, self.texts[0].shape[1]):
            raise ValueError(
                f"null_text is {tuple(null_text.shape)}, texts are {(text_length, *self.texts[0].shape[1:])}"
            )
        self.batch_size, self.text_drop_prob, self.seed = batch_size, text_drop_prob, seed
        self.layout = layout_for([self.latents.shape[2]])

    def __len__(self) -> int:
        return self.latents.shape[0]

    def identity(self) -> dict[str, Any]:
        return {
            "clips": len(self),
            "batch_size": self.batch_size,
            "data_seed": self.seed,
            "text_drop_prob": self.text_drop_prob,
        }

    def samples(self, index: int) -> list[int]:
        """Sample numbers of micro-batch `index`."""
        return stream(len(self), index * self.batch_size, self.batch_size, self.seed)

    def batch(self, index: int, rows: slice = slice(None)) -> SceneBatch:
        numbers = torch.tensor(self.samples(index))[rows]
        texts = [self.texts[i] for i in self.text_ids[numbers].tolist()]
        text = torch.stack([pack_text([one.float()], self.text_length) for one in texts])  # [B,L,D]
        draws = [keyed_generator(self.seed, "drop", index * self.batch_size + row) for row in rows_of(self, rows)]
        drop = torch.stack([torch.rand((), generator=draw) for draw in draws]) < self.text_drop_prob
        text = torch.where(drop[:, None, None], self.null_text, text)
        context = TextContext(text[:, None], torch.zeros(self.layout.num_frames, dtype=torch.long))
        return SceneBatch(
            self.latents[numbers].float(), self.layout, context, [f"clip-{n:06d}" for n in numbers.tolist()],
            self.text_ids[numbers],
        )  # fmt: skip


class PackedClips:
    """Batches of `clips` with several of them in one sequence, each a shot with a text of its own.

    Micro-batch i has packs[i % len(packs)] clips in a sequence, in the order of `clips`: a model trained on them has
    met sequences longer than a shot, though no two shots that belong together.
    """

    def __init__(self, clips: LatentCache, packs: Sequence[int]):
        if not packs or any(pack < 1 or clips.batch_size % pack for pack in packs):
            raise ValueError(f"packs {list(packs)}: each must divide the batch of {clips.batch_size} clips")
        self.clips, self.packs, self.batch_size = clips, tuple(packs), clips.batch_size

    def identity(self) -> dict[str, Any]:
        return self.clips.identity() | {"packs": list(self.packs)}

    def batch(self, index: int, rows: slice = slice(None)) -> SceneBatch:
        """Micro-batch `index`; `rows` counts clips and must hold whole sequences."""
        pack = self.packs[index % len(self.packs)]
        if len(rows_of(self, rows)) % pack:
            raise ValueError(f"{len(rows_of(self, rows))} clips of a worker do not fill sequences of {pack}")
        batch = self.clips.batch(index, rows)
        if pack == 1:
            return batch
        frames = batch.latents.shape[2]
        layout = shots_layout([frames] * pack)
        latents = batch.latents.unflatten(0, (-1, pack)).transpose(1, 2).flatten(2, 3)  # [B/S,C,S*F,H,W]
        text = batch.text.embeddings[:, 0].unflatten(0, (-1, pack))  # [B/S,S,L,D]
        keys = ["+".join(batch.keys[i : i + pack]) for i in range(0, len(batch.keys), pack)]
        return SceneBatch(latents, layout, TextContext(text, layout.text_ids), keys)


def write_cache(path: Path, latents: Tensor, texts: Sequence[Tensor], text_ids: Tensor) -> None:
    """Write clips as one safetensors file.

    Args:
        latents: [n,C,F,H,W], normalised (`models.codecs`), any float dtype.
        texts: valid tokens [L_i,D] of every distinct text.
        text_ids: [n], the text of each clip.
    """
    if len(text_ids) != len(latents) or int(text_ids.max()) >= len(texts):
        raise ValueError(
            f"{path}: {len(latents)} clips, {len(text_ids)} text ids up to {int(text_ids.max())}, {len(texts)} texts"
        )
    lengths = torch.tensor([len(text) for text in texts])
    tensors = {
        "latents": latents.contiguous(),
        "texts": torch.cat(list(texts)),
        "text_lengths": lengths,
        "text_ids": text_ids.long(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata={"format": "shotloom-latent-cache", "latents": "normalised"})
    temporary.replace(path)


def read_cache(path: Path) -> tuple[Tensor, list[Tensor], Tensor]:
    """(latents [n,C,F,H,W], texts, text_ids [n]) of a file written by `write_cache`."""
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("format") != "shotloom-latent-cache":
            raise ValueError(f"{path}: not a latent cache (write it with train.batches.write_cache)")
        texts = list(file.get_tensor("texts").split(file.get_tensor("text_lengths").tolist()))
        return file.get_tensor("latents"), texts, file.get_tensor("text_ids")
