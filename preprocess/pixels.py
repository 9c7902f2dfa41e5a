"""How luma and colour are read from RGB in every measure (the matrix of ITU-R BT.601), and how pictures differ."""

from __future__ import annotations

import numpy as np

TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], np.float32)  # rows: Y Cb Cr
LUMA = TO_YCC[0]


def to_ycc(small: np.ndarray) -> np.ndarray:
    """Luma and two colour axes, float32 [3,h,w], of a frame uint8 [h,w,3]."""
    return np.moveaxis(small.astype(np.float32) @ TO_YCC.T, -1, 0)


def to_picture(small: np.ndarray) -> np.ndarray:
    """The same rounded, int16: what changes of shot are read from."""
    return np.rint(TO_YCC @ small.reshape(-1, 3).T.astype(np.float32)).astype(np.int16).reshape(3, *small.shape[:2])


def change_between(before: np.ndarray, after: np.ndarray) -> float:
    """Mean difference of two pictures (`to_picture`), in grey levels."""
    return int(np.abs(after - before).sum(dtype=np.int32)) / before.size
