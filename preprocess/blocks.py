"""What motion does not explain between neighbouring pictures, by matching 3x3 blocks of pixels in the small stream.

Pictures are int16 [3,27,48]: luma and two colour axes. Values are grey levels, mean over the three channels.
"""

from __future__ import annotations

import numpy as np

REACH = 3  # pixels at 48x27 that motion may carry a block between two frames
_STRONGEST = 18  # pixels: the fiftieth of the picture that is explained worst

_SHIFTS = [
    (dy, dx) for dy in range(-REACH, REACH + 1) for dx in range(-REACH, REACH + 1) if abs(dy) + abs(dx) <= REACH + 1
]


def unexplained(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """(mean, mean of the worst fiftieth) of what no shift explains; each the worse of both directions of time."""
    maps = [_map([(before, 1)], after), _map([(after, 1)], before)]
    return (
        max(float(one.mean()) for one in maps),
        max(float(np.partition(one, -_STRONGEST)[-_STRONGEST:].mean()) for one in maps),
    )


def uneven(first: np.ndarray, second: np.ndarray, third: np.ndarray) -> float:
    """Mean of what no steady motion through three pictures explains; the worse of both directions of time."""
    return max(
        float(_map([(second, 1), (first, 2)], third).mean()), float(_map([(second, 1), (third, 2)], first).mean())
    )


def _map(others: list[tuple[np.ndarray, int]], picture: np.ndarray) -> np.ndarray:
    """Difference of each block of `picture` to the best one in the others, all moved by `times` one shift; [pixels].

    What enters over the edge of the picture is left out.
    """
    height, width = picture.shape[1:]
    block = np.pad(picture, ((0, 0), (1, 1), (1, 1)), mode="edge")
    wide = [
        (np.pad(other, ((0, 0), *[(times * REACH + 1,) * 2] * 2), mode="edge"), times * REACH, times)
        for other, times in others
    ]
    best = np.full((height, width), np.iinfo(np.int16).max, np.int16)
    for dy, dx in _SHIFTS:
        worst = None
        for other, reach, times in wide:
            top, left = reach + times * dy, reach + times * dx
            there = other[:, top : top + height + 2, left : left + width + 2]
            difference = np.abs(there - block).sum(0, dtype=np.int16)
            rows = difference[:-2] + difference[1:-1] + difference[2:]
            sums = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
            worst = sums if worst is None else np.maximum(worst, sums)
        np.minimum(best, worst, out=best)
    return best[REACH:-REACH, REACH:-REACH].ravel() / 27.0  # 3 channels, 3x3 pixels
