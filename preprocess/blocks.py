"""What motion does not explain between neighbouring pictures, by matching 3x3 blocks of pixels in the small stream.

Pictures are int16 [3,27,48]: luma and two colour axes. Values are grey levels, mean over the three channels.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.lib.stride_tricks import as_strided

REACH = 3  # pixels at 48x27 that motion may carry a block between two frames
_STRONGEST = 18  # pixels: the fiftieth of the picture that is explained worst
_REACHES = [(dy, min(REACH, REACH + 1 - abs(dy))) for dy in range(-REACH, REACH + 1)]  # shifts: dy, dx up to this
_SHIFTS = sum(2 * reach + 1 for _, reach in _REACHES)


def unexplained(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """(mean, mean of the worst fiftieth) of what no shift explains; each the worse of both directions of time."""
    before, after = _padded(before, 1), _padded(after, 1)
    maps = [_map([(before, 1)], after), _map([(after, 1)], before)]
    return (
        max(float(one.mean()) for one in maps),
        max(float(np.partition(one, -_STRONGEST)[-_STRONGEST:].mean()) for one in maps),
    )


def uneven(first: np.ndarray, second: np.ndarray, third: np.ndarray) -> float:
    """Mean of what no steady motion through three pictures explains; the worse of both directions of time."""
    first, second, third = (_padded(one, 2) for one in (first, second, third))
    return max(
        float(_map([(second, 1), (first, 2)], third).mean()), float(_map([(second, 1), (third, 2)], first).mean())
    )


def _edge(times: int) -> int:
    """Pixels that a block moves out of the picture when it goes `times` the farthest way."""
    return times * REACH - (REACH - 1)


def _padded(picture: np.ndarray, times: int) -> np.ndarray:
    """The picture as far as blocks reach that move `times` one shift: its edges repeated."""
    edge = _edge(times)
    _, height, width = picture.shape
    wide = np.empty((3, height + 2 * edge, width + 2 * edge), np.int16)
    wide[:, edge:-edge, edge:-edge] = picture
    wide[:, :edge, edge:-edge] = picture[:, :1]
    wide[:, -edge:, edge:-edge] = picture[:, -1:]
    wide[:, :, :edge] = wide[:, :, edge : edge + 1]
    wide[:, :, -edge:] = wide[:, :, -edge - 1 : -edge]
    return wide


class _Scratch(threading.local):
    """Arrays for the work on all shifts, kept, as memory fresh from the system costs more than what is done in it."""

    def __init__(self) -> None:
        self.sets: dict[tuple[int, int], tuple[np.ndarray, ...]] = {}

    def take(self, size: int, stride: int) -> tuple[np.ndarray, ...]:
        """Differences [shifts,3,size], their sums over channels, over three rows, and over 3x3 pixels of two others."""
        if (size, stride) not in self.sets:
            shapes = (3, size), (size,), (size - 2 * stride,), (size - 2 * stride - 2,), (size - 2 * stride - 2,)
            self.sets[size, stride] = tuple(np.empty((_SHIFTS, *shape), np.int16) for shape in shapes)
        return self.sets[size, stride]


_scratch = _Scratch()


def _map(others: list[tuple[np.ndarray, int]], picture: np.ndarray) -> np.ndarray:
    """Difference of each block of `picture` to the best one in the others, all moved by `times` one shift; [pixels].

    All are padded for the largest of `times`. What enters over the edge of the picture is left out: blocks stand
    REACH pixels inside of it. Every shift at once, on rows laid end to end.
    """
    _, height, stride = picture.shape
    edge = _edge(max(times for _, times in others))
    rows, columns = height - 2 * edge - 2 * REACH, stride - 2 * edge - 2 * REACH  # of blocks
    begin = (edge + REACH - 1) * (stride + 1)  # upper left pixel of the first block
    size = (rows + 1) * stride + columns + 2  # pixels from there to the lower right one of the last block
    block = picture.reshape(3, -1)[:, begin : begin + size]
    difference, pixels, bands, *sums = _scratch.take(size, stride)
    for (other, times), blocks in zip(others, sums, strict=False):
        flat = other.reshape(3, -1)
        channel, pixel = flat.strides
        first = 0
        for dy, reach in _REACHES:
            start = flat[:, begin + times * (dy * stride - reach) :]
            count = 2 * reach + 1
            there = as_strided(start, (count, 3, size), (times * pixel, channel, pixel), writeable=False)
            np.subtract(there, block, out=difference[first : first + count])
            first += count
        np.abs(difference, out=difference)
        np.add(difference[:, 0], difference[:, 1], out=pixels)
        pixels += difference[:, 2]
        np.add(pixels[:, : -2 * stride], pixels[:, stride:-stride], out=bands)
        bands += pixels[:, 2 * stride :]
        np.add(bands[:, :-2], bands[:, 1:-1], out=blocks)
        blocks += bands[:, 2:]
    if len(others) == 2:
        np.maximum(sums[0], sums[1], out=sums[0])
    best = np.zeros(rows * stride, np.int16)
    sums[0].min(0, out=best[: sums[0].shape[1]])
    # the last columns of each row run over the edge, and are dropped
    return best.reshape(rows, stride)[:, :columns].ravel() / 27.0  # 3 channels, 3x3 pixels
