"""Measure what the filters judge: movement, shake, blur, exposure, black and frozen frames. No model.

Everything is measured on the encoded frames, so the scores speak of what would be trained on: n frames at the training
rate, at analysis size (27x48) where that is enough, and at training size [H,W] where detail counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from preprocess.measure import difference
from preprocess.overlay import text_share
from preprocess.pixels import LUMA

_BLOCK = 3  # pixels at 48x27: averages out the noise of sensor and codec
_TOP = 0.05  # share of blocks that move most; one moving mouth is movement
_STILL = 0.4  # grey levels of the block that changes most: below it two frames are the same
_BLACK_LUMA, _BLACK_SHARE = 28, 0.98  # a black frame has this share of its pixels under this luma
_CLIPPED = (5, 250)  # grey levels outside of which all three channels are without detail
_EXPLAINED = 0.8  # a shift counts if it leaves less than this share of the difference
_DETAIL = 3  # frames looked at in training size
_BLUR_WIDTH = 9  # pixels of the low-pass filter, as Crete et al.


def measure_quality(
    images: Sequence[np.ndarray], small: Sequence[np.ndarray], source: Sequence[int], fps: float
) -> dict[str, float]:
    """Scores of one shot from its encoded frames; those that cannot be measured are left out.

    Args:
        images: uint8 [H,W,3] each, at training size.
        small: the whole pictures, uint8 [27,48,3] each.
        source: number of the source frame that each is; a low-rate source repeats some.
        fps: of the encoded frames.
    Returns:
        movement (grey levels over half a second, where most moves), frozen and black (shares of the frames), shake
        (percent of the picture's width by which the path of the camera jumps per frame), blur (0 sharp to 1), clipped
        (share of pixels), text (share of the picture).
    """
    if not small:
        return {}
    luma = np.stack(small).astype(np.float32) @ LUMA  # [n,27,48]
    distinct = [k for k in range(len(source)) if k == 0 or source[k] != source[k - 1]]
    some = [images[k] for k in _spread(len(images), _DETAIL)]
    some_luma = [image.astype(np.float32) @ LUMA for image in some]
    scores = {
        "movement": _movement(luma, max(1, round(fps / 2))),
        "frozen": _frozen(luma[distinct]),
        "shake": _shake(luma[distinct]),
        "black": float(((luma < _BLACK_LUMA).mean((1, 2)) >= _BLACK_SHARE).mean()),
        "clipped": float(np.mean([_clipped(image) for image in some])),
        "blur": float(np.median([blur_effect(one) for one in some_luma])),
        "text": text_share(some_luma),
    }
    return {name: round(value, 4) for name, value in scores.items() if value is not None}


def _spread(count: int, most: int) -> list[int]:
    """At most `most` positions of `count`, evenly from first to last."""
    return sorted({round(k * (count - 1) / max(1, min(most, count) - 1)) for k in range(min(most, count))})


def _blocks(luma: np.ndarray) -> np.ndarray:
    """Means of 3x3 pixels: [n,27,48] -> [n,9,16]."""
    n, height, width = luma.shape
    return luma.reshape(n, height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK).mean((2, 4))


def _movement(luma: np.ndarray, lag: int) -> float | None:
    """Mean change, over `lag` frames, of the blocks that change most."""
    if len(luma) < 2:
        return None
    blocks = _blocks(luma)
    lag = min(lag, len(blocks) - 1)
    change = np.abs(blocks[lag:] - blocks[:-lag]).reshape(len(blocks) - lag, -1)
    count = max(1, round(_TOP * change.shape[1]))
    return float(np.partition(change, -count, axis=1)[:, -count:].mean())


def _frozen(luma: np.ndarray) -> float | None:
    """Longest run of frames that equal the one before, as a share of the shot."""
    if len(luma) < 2:
        return None
    blocks = _blocks(luma)
    same = np.abs(np.diff(blocks, axis=0)).max((1, 2)) < _STILL
    longest = run = 0
    for one in same:
        run = run + 1 if one else 0
        longest = max(longest, run)
    return longest / len(same)


def _shake(luma: np.ndarray) -> float | None:
    """Mean jump of the speed at which the picture moves from frame to frame, in percent of its width.

    A still camera, a pan and a ride at constant speed have none; a hand that trembles has. Frames that are not a
    shifted copy of the one before (something moves in the picture, a zoom) are left out.
    """
    if len(luma) < 3:
        return None
    spectra = [_spectrum(one) for one in luma]
    moves = [_shift(*pair) for pair in zip(luma, luma[1:], spectra, spectra[1:], strict=False)]
    jumps = [
        float(np.hypot(one[0] - other[0], one[1] - other[1]))
        for one, other in zip(moves, moves[1:], strict=False)
        if one is not None and other is not None
    ]
    return 100.0 * float(np.mean(jumps)) / luma.shape[2] if jumps else 0.0


def phase_shift(a: np.ndarray, b: np.ndarray) -> tuple[float, float] | None:
    """(rows, columns) by which `b` is shifted against `a`, float [h,w] each, to a tenth of a pixel; None if it is not.

    Phase correlation with a Hann window (Kuglin and Hines, 1975), its peak refined by the parabola through it.
    """
    return _shift(a, b, _spectrum(a), _spectrum(b))


@cache
def _window(height: int, width: int) -> np.ndarray:
    return np.hanning(height)[:, None] * np.hanning(width)[None]


def _spectrum(picture: np.ndarray) -> np.ndarray:
    return np.fft.rfft2((picture - picture.mean()) * _window(*picture.shape))


def _shift(a: np.ndarray, b: np.ndarray, fa: np.ndarray, fb: np.ndarray) -> tuple[float, float] | None:
    """`phase_shift` of two pictures whose spectra are known."""
    height, width = a.shape
    cross = fb * fa.conj()
    size = np.abs(cross)
    if size.max() < 1.0:
        return 0.0, 0.0  # nothing in the pictures
    # not whitened below a hundredth of the largest: there is only noise
    surface = np.fft.irfft2(cross / (size + 0.01 * size.max()), s=a.shape)
    y, x = np.unravel_index(int(surface.argmax()), surface.shape)
    rows = _refine(surface[(y - 1) % height, x], surface[y, x], surface[(y + 1) % height, x])
    columns = _refine(surface[y, (x - 1) % width], surface[y, x], surface[y, (x + 1) % width])
    dy, dx = y + rows, x + columns
    shift = float(dy - height if dy > height / 2 else dy), float(dx - width if dx > width / 2 else dx)
    whole = round(shift[0]), round(shift[1])
    if whole != (0, 0) and difference(a, b, *whole) > _EXPLAINED * difference(a, b, 0, 0):
        return None
    return shift


def _refine(before: float, peak: float, after: float) -> float:
    bend = before - 2 * peak + after
    return 0.5 * float(before - after) / float(bend) if bend < 0 else 0.0


def _clipped(image: np.ndarray) -> float:
    """Share of pixels in which all channels are at one end of the range."""
    low, high = _CLIPPED
    red, green, blue = (np.ascontiguousarray(image[..., k]) for k in range(3))
    dark = (red <= low) & (green <= low) & (blue <= low)
    bright = (red >= high) & (green >= high) & (blue >= high)
    return float((dark | bright).mean())


def blur_effect(luma: np.ndarray) -> float:
    """0 sharp to 1 blurred: how little a low-pass filter takes from the steps between neighbours, float [H,W].

    Crete et al., "The blur effect: perception and estimation with a new no-reference perceptual blur metric", 2007.
    It compares a picture with itself, so low contrast or few edges do not count as blur.
    """
    worst = 0.0
    for axis in (0, 1):
        steps = np.diff(luma, axis=axis)
        np.abs(steps, out=steps)
        total = float(steps.sum())
        if total > 0.05 * steps.size:  # else the picture is flat along this axis, and nothing can be said
            left = np.diff(_mean_filter(luma, _BLUR_WIDTH, axis), axis=axis)
            np.abs(left, out=left)
            np.subtract(steps, left, out=left)
            taken = float(np.maximum(0.0, left, out=left).sum())
            worst = max(worst, 1.0 - taken / total)
    return worst


def _mean_filter(picture: np.ndarray, width: int, axis: int) -> np.ndarray:
    """Mean over `width` pixels along an axis, edges repeated, float64."""
    pad = [(0, 0), (0, 0)]
    pad[axis] = (width // 2 + 1, width // 2)
    total = np.pad(picture.astype(np.float64), pad, mode="edge")
    total.cumsum(axis, out=total)
    size = picture.shape[axis]
    ends, starts = (total[width:], total[:size]) if axis == 0 else (total[:, width:], total[:, :size])
    mean = ends - starts
    mean /= width
    return mean
