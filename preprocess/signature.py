"""The default embedding of a shot, which needs no weights: for near-duplicates and for grouping shots into scenes.

Three moments of the encoded span (first, middle, last), each as the low frequencies of its luma and of two colour axes
(discrete cosine transform of the 48x27 picture), weighted so that all frequencies count alike: natural pictures fall
off as one over the frequency. The mean of the luma is left out and its scale divided out, so brightness and contrast do
not matter, as they do not after another encoding. Vectors have length 1; their product is the cosine similarity. The
signs of the luma are a perceptual hash ("pHash") of 189 bits. Stored as one signed byte per number, in base64.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import cache

import numpy as np

from preprocess.pixels import to_ycc

MOMENTS = 3
_LUMA, _COLOUR = (8, 8), (3, 4)  # frequencies kept: rows, columns
HASH_BITS = MOMENTS * (_LUMA[0] * _LUMA[1] - 1)
DIM = HASH_BITS + MOMENTS * 2 * _COLOUR[0] * _COLOUR[1]
_COLOUR_WEIGHT = 0.5  # of the length of the luma's part where the picture is as colourful as it is contrasted
_FLAT = 0.5  # grey levels: a weaker picture has no pattern of its own


def make_signature(small: Sequence[np.ndarray]) -> str:
    """Signature of a shot from its frames at analysis size, uint8 [27,48,3] each; "" for none."""
    if not small:
        return ""
    moments = [small[k] for k in (0, (len(small) - 1) // 2, len(small) - 1)]
    luma, colour = [], []
    for picture in moments:
        axes = to_ycc(picture)
        luma.append(_low_frequencies(axes[0], _LUMA).ravel()[1:])
        colour.append(np.stack([_low_frequencies(axis, _COLOUR) for axis in axes[1:]]).ravel())
    size = max(float(np.linalg.norm(np.concatenate(luma))), _FLAT)
    vector = np.concatenate([*luma, *(_COLOUR_WEIGHT * one for one in colour)]) / size
    vector /= max(float(np.linalg.norm(vector)), 1e-6)
    return base64.b64encode(np.rint(127 * vector / max(np.abs(vector).max(), 1e-6)).astype(np.int8).tobytes()).decode()


def read_signatures(signatures: Sequence[str]) -> np.ndarray:
    """float32 [S,DIM], each row of length 1."""
    rows = np.stack([np.frombuffer(base64.b64decode(one), np.int8) for one in signatures]).astype(np.float32)
    if rows.shape[1] != DIM:
        raise ValueError(f"a signature has {rows.shape[1]} numbers, this version reads {DIM}; prepare the videos again")
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def hash_signs(vectors: np.ndarray) -> np.ndarray:
    """The perceptual hash as +1 and -1, float32 [S,HASH_BITS]: bits that differ = (HASH_BITS - product) / 2."""
    return np.where(vectors[:, :HASH_BITS] >= 0, np.float32(1), np.float32(-1))


def _low_frequencies(axis: np.ndarray, keep: tuple[int, int]) -> np.ndarray:
    """Weighted DCT coefficients [keep] of one channel [h,w]."""
    rows, columns = _cosines(axis.shape[0], keep[0]), _cosines(axis.shape[1], keep[1])
    v, u = np.mgrid[: keep[0], : keep[1]]
    return (rows @ axis @ columns.T) * np.sqrt(1.0 + u**2 + v**2).astype(np.float32) / axis.size


@cache
def _cosines(size: int, keep: int) -> np.ndarray:
    """First `keep` rows of the orthogonal DCT-II, scaled by sqrt(size), float32 [keep,size]."""
    grid = np.cos(np.pi * np.arange(keep)[:, None] * (np.arange(size)[None] + 0.5) / size)
    grid[1:] *= np.sqrt(2.0)
    return grid.astype(np.float32)
