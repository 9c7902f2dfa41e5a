"""How luma and colour are read from RGB in every measure (the matrix of ITU-R BT.601)."""

from __future__ import annotations

import numpy as np

TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], np.float32)  # rows: Y Cb Cr
LUMA = TO_YCC[0]
