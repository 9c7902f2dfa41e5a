"""Find text laid over the picture (titles, subtitles, tickers, logos of letters) with a classical detector, no model.

Letters are many strokes of one colour side by side: along a row, steps up and steps down of high contrast alternate
densely, the strokes between them all have the same grey level, and an overlay stays where it is while the picture
moves. The detector counts both kinds of steps that stand still over the given frames, in windows about two letters
wide, on several scales, and asks that their strokes have one grey level. Handwriting, text under about 8 pixels high
and text that moves are not found; railings and keyboards filmed by a still camera may be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_STEP = 40.0  # grey levels between a stroke and what is beside it
_WINDOW = (8, 24)  # rows, columns in which steps are counted
_DENSITY = 0.1  # share of a window's pixels that step up, and as many down
_ONE_COLOUR = 14.0  # grey levels by which strokes of one text may differ (standard deviation)
_LENGTH = 2  # windows: shorter runs are no text
_SMALLEST = 48  # pixels: a picture smaller than that holds no letters
_LARGEST = 360  # pixels: where there are more, the finest scale is left out, and text under a fortieth of the side
_CELL = 8  # pixels of the finest scale: the grid on which scales are joined


def text_share(luma: Sequence[np.ndarray]) -> float:
    """Share of the picture that is covered by overlaid text, from a few frames of one shot, float [H,W] each."""
    frames = np.stack(luma)  # [n,H,W]
    found = np.zeros([-(-size // _CELL) for size in frames.shape[1:]], bool)
    scale = 1
    while min(frames.shape[1:]) > _LARGEST:
        frames, scale = _half(frames), scale * 2
    while min(frames.shape[1:]) >= _SMALLEST:
        ys, xs = np.nonzero(_text_windows(frames))
        for y, x in zip(ys, xs, strict=True):
            found[_cells(y, _CELL, scale), _cells(x, _CELL, scale)] = True
        frames, scale = _half(frames), scale * 2
    return float(found.mean())


def _cells(index: int, step: int, scale: int) -> slice:
    """Cells of the common grid under one step of the windows at a coarser scale."""
    return slice(index * step * scale // _CELL, -(-(index + 1) * step * scale // _CELL))


def _half(frames: np.ndarray) -> np.ndarray:
    height, width = (size // 2 * 2 for size in frames.shape[1:])
    cut = frames[:, :height, :width]
    return (cut[:, ::2, ::2] + cut[:, 1::2, ::2] + cut[:, ::2, 1::2] + cut[:, 1::2, 1::2]) / 4


def _text_windows(frames: np.ndarray) -> np.ndarray:
    """Which cells of 8x8 pixels lie in text, bool [H//8,W//8], at one scale."""
    step = np.zeros_like(frames)
    step[:, :, 1:-1] = frames[:, :, 2:] - frames[:, :, :-2]
    up, down = (step > _STEP).all(0), (step < -_STEP).all(0)
    middle = frames[len(frames) // 2]
    size = _WINDOW[0] * _WINDOW[1]
    ups, downs = _cell_sums(up), _cell_sums(down)
    dense = np.minimum(ups, downs) > _DENSITY * size
    if not dense.any():
        return dense
    steps = up | down
    # the strokes beside the steps are bright or dark; their middle, where it is not mixed with what is around
    bright, dark = (_spread_of(steps, sign * _nearby_max(sign * middle), ups + downs) for sign in (1, -1))
    cells = dense & (np.minimum(bright, dark) < _ONE_COLOUR)
    return _long_runs(cells, _LENGTH * _WINDOW[1] // _CELL)


def _cell_sums(values: np.ndarray) -> np.ndarray:
    """Sums over windows centred on each cell: [H,W] -> [H//8,W//8]."""
    rows, columns = values.shape[0] // _CELL, values.shape[1] // _CELL
    cells = values[: rows * _CELL, : columns * _CELL].astype(np.float64)
    cells = cells.reshape(rows, _CELL, columns, _CELL).sum((1, 3))
    wide = np.pad(cells, ((0, 0), (1, 1)))
    return wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]


def _spread_of(where: np.ndarray, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Standard deviation of `values` over the pixels `where`, per window."""
    counts = np.maximum(counts, 1)
    mean = _cell_sums(where * values) / counts
    square = _cell_sums(where * values**2) / counts
    return np.sqrt(np.maximum(0.0, square - mean**2))


def _nearby_max(values: np.ndarray) -> np.ndarray:
    """Largest value within two pixels, [H,W]."""
    for axis in (0, 1):
        wide = np.pad(values, [(2, 2) if axis == k else (0, 0) for k in (0, 1)], mode="edge")
        size = values.shape[axis]
        shifted = [wide[k : k + size] if axis == 0 else wide[:, k : k + size] for k in range(5)]
        values = np.maximum(shifted[0], shifted[1])
        for one in shifted[2:]:
            np.maximum(values, one, out=values)
    return values


def _long_runs(cells: np.ndarray, least: int) -> np.ndarray:
    """Keep horizontal runs of at least `least` cells."""
    kept = np.zeros_like(cells)
    for row, line in enumerate(cells):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(np.int8), [0]])))
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            if end - begin >= least:
                kept[row, begin:end] = True
    return kept
