"""What the numbers of a video's pixels mean, and how wide or high dynamic range becomes plain SDR BT.709.

Matrix and range (YUV to RGB) are swscale's work; it is told the matrix where the file states none. PQ, HLG and wide
primaries are mapped here, on RGB of 16 bits at training size: light in nits, one tone curve on the brightest channel
(so that hues stay), a matrix to BT.709, and the display curve of SDR. Everything is a table or a product of matrices.

Sources: ITU-R BT.2100-2 (PQ, HLG), BT.2390-10 section 5.4.1 (tone curve), BT.2408-5 (reference white of 203 nits),
BT.1886 (SDR display), ITU-T H.273 (code points).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

Matrix = Literal["bt601", "bt709", "bt2020", "rgb", "other"]
Primaries = Literal["bt709", "bt2020", "p3"]
Transfer = Literal["sdr", "pq", "hlg"]

WHITE_NITS = 203.0  # of diffuse white in HDR; becomes white of SDR
HLG_PEAK_NITS = 1000.0
_UNKNOWN_PEAK_NITS = 1000.0  # PQ without metadata: what most of it is graded for
_HD = (1280, 720)  # longer, shorter side: from either on, a file that states no matrix is taken for BT.709

# H.273 code points
_MATRICES: dict[int, Matrix] = {
    0: "rgb",
    1: "bt709",
    4: "bt601",
    5: "bt601",
    6: "bt601",
    9: "bt2020",
    10: "bt2020",
}
_UNSTATED = (2, 3)
_PRIMARIES: dict[int, Primaries] = {9: "bt2020", 12: "p3"}  # the rest differs from BT.709 by less than anyone sees
_TRANSFERS: dict[int, Transfer] = {16: "pq", 18: "hlg"}

# xy of red, green, blue; white is D65 in all
_CHROMATICITIES: dict[Primaries, tuple[tuple[float, float], ...]] = {
    "bt709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    "bt2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    "p3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_D65 = (0.3127, 0.3290)
_LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)


@dataclass
class Colour:
    """How one video codes colour; `assumed`: the matrix is not stated and was taken from the picture's size."""

    matrix: Matrix = "bt601"
    assumed: bool = False
    full_range: bool = False
    primaries: Primaries = "bt709"
    transfer: Transfer = "sdr"
    peak_nits: float = 0.0  # of the grading display; 0 for SDR

    def __str__(self) -> str:
        words = [f"{self.matrix}{' assumed' if self.assumed else ''}", "full" if self.full_range else "limited"]
        words += [f"{self.primaries} primaries"] * (self.primaries != "bt709")
        words += [f"{self.transfer} of {self.peak_nits:g} nits"] * (self.transfer != "sdr")
        return ", ".join(words)

    @property
    def plain(self) -> bool:
        """SDR with BT.709 or older primaries: nothing to map."""
        return self.transfer == "sdr" and self.primaries == "bt709"

    @property
    def swscale_matrix(self) -> str | None:
        """What swscale must be told, because the frames do not say it and it would take BT.601."""
        return "ITU709" if self.assumed and self.matrix == "bt709" else None


def read_colour(frame: Any) -> Colour:
    """Of a decoded frame, whose tags are the bitstream's where that and the container differ."""
    stated = frame.colorspace not in _UNSTATED
    rgb = frame.format.is_rgb
    if rgb:
        matrix: Matrix = "rgb"
    elif stated:
        matrix = _MATRICES.get(frame.colorspace, "other")
    else:
        longer, shorter = max(frame.width, frame.height), min(frame.width, frame.height)
        matrix = "bt709" if longer >= _HD[0] or shorter >= _HD[1] else "bt601"
    transfer = _TRANSFERS.get(frame.color_trc, "sdr")
    # VP9 states one thing only, the matrix
    wide = frame.color_primaries in _UNSTATED and (matrix == "bt2020" or transfer != "sdr")
    return Colour(
        matrix=matrix,
        assumed=not stated and not rgb,
        full_range=frame.color_range == 2 or rgb,
        primaries="bt2020" if wide else _PRIMARIES.get(frame.color_primaries, "bt709"),
        transfer=transfer,
        peak_nits={"sdr": 0.0, "hlg": HLG_PEAK_NITS}.get(transfer) or (_pq_peak(frame) if transfer == "pq" else 0.0),
    )


def side_data(frame: Any, name: str) -> bytes | None:
    """One kind of a frame's side data; None where there is none, or PyAV does not know all kinds in the frame."""
    try:
        return bytes(frame.side_data[name])
    except (KeyError, ValueError):
        return None


def _pq_peak(frame: Any) -> float:
    """Nits of the brightest pixel, or else of the display it was graded on, as far as the file tells."""
    light = side_data(frame, "CONTENT_LIGHT_LEVEL")
    peak = float(struct.unpack_from("<I", light)[0]) if light and len(light) >= 4 else 0.0
    display = side_data(frame, "MASTERING_DISPLAY_METADATA")
    if not peak and display and len(display) >= 88:  # 8 rationals of chromaticity, least and most light, two flags
        number, denominator, _, has_luminance = struct.unpack_from("<iiii", display, 72)
        peak = number / denominator if has_luminance and denominator else 0.0
    return min(10_000.0, max(WHITE_NITS, peak or _UNKNOWN_PEAK_NITS))


def to_sdr(image: np.ndarray, colour: Colour) -> np.ndarray:
    """uint16 RGB [h,w,3] as coded, full range, to uint8 RGB of SDR BT.709."""
    light = _eotf(colour.transfer).take(image)  # 1.0 is the white of SDR
    if colour.transfer == "hlg":  # scene light to display light: BT.2100 table 5, system gamma 1.2 at 1000 nits
        luma = light @ _LUMA_2020
        light *= (np.maximum(luma, 1e-9) ** np.float32(0.2))[..., None] * np.float32(HLG_PEAK_NITS / WHITE_NITS)
    if colour.transfer != "sdr":
        peak = np.float32(colour.peak_nits / WHITE_NITS)
        table = _tone_gains(colour.peak_nits)
        most = np.sqrt(np.minimum(light.max(axis=-1) / peak, 1))
        light *= table.take((most * (len(table) - 1) + 0.5).astype(np.int32))[..., None]
    if colour.primaries != "bt709":
        light = light @ _to_709(colour.primaries).T
    codes = _display_codes()
    return codes.take((np.sqrt(np.clip(light, 0, 1)) * (len(codes) - 1) + 0.5).astype(np.int32))


def pq_nits(signal: np.ndarray) -> np.ndarray:
    """BT.2100 table 4: PQ signal in [0, 1] to nits."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    root = np.maximum(np.asarray(signal, np.float64), 0) ** (1 / m2)
    return 10_000 * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)


def pq_signal(nits: np.ndarray | float) -> np.ndarray:
    """The inverse of `pq_nits`."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    root = (np.asarray(nits, np.float64) / 10_000) ** m1
    return ((c1 + c2 * root) / (1 + c3 * root)) ** m2


def hlg_scene_light(signal: np.ndarray) -> np.ndarray:
    """BT.2100 table 5: HLG signal in [0, 1] to scene light in [0, 1]."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    signal = np.asarray(signal, np.float64)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def tone_curve(nits: np.ndarray, peak_nits: float, target_nits: float = WHITE_NITS) -> np.ndarray:
    """BT.2390-10 section 5.4.1 (EETF), black at 0: unchanged below a knee, `peak_nits` lands on `target_nits`."""
    most = float(pq_signal(peak_nits))
    target = float(pq_signal(target_nits)) / most
    signal = np.clip(pq_signal(nits) / most, 0, 1)
    knee = 1.5 * target - 0.5
    if knee >= 1:
        return np.minimum(nits, target_nits)
    t = np.maximum((signal - knee) / (1 - knee), 0)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * target
    return pq_nits(np.where(signal < knee, signal, spline) * most)


@lru_cache(maxsize=3)
def _eotf(transfer: Transfer) -> np.ndarray:
    """float32 [65536]: code of 16 bits to light, 1.0 the white of SDR (HLG: scene light)."""
    signal = np.arange(65536) / 65535
    light = {"pq": lambda: pq_nits(signal) / WHITE_NITS, "hlg": lambda: hlg_scene_light(signal)}
    return light.get(transfer, lambda: signal**2.4)().astype(np.float32)


@lru_cache(maxsize=8)
def _tone_gains(peak_nits: float) -> np.ndarray:
    """float32 [8192]: what light is multiplied by, over the square root of light, as a share of the peak."""
    nits = np.linspace(0, 1, 8192) ** 2 * peak_nits
    nits[0] = nits[1]
    return (tone_curve(nits, peak_nits) / nits).astype(np.float32)


@lru_cache(maxsize=1)
def _display_codes() -> np.ndarray:
    """uint8 [8192]: code over the square root of light, the inverse of BT.1886."""
    return np.rint(255 * np.linspace(0, 1, 8192) ** (2 / 2.4)).astype(np.uint8)


@lru_cache(maxsize=2)
def _to_709(primaries: Primaries) -> np.ndarray:
    """float32 [3,3]: linear RGB of wide primaries to linear RGB of BT.709."""
    return np.linalg.solve(_to_xyz("bt709"), _to_xyz(primaries)).astype(np.float32)


def _to_xyz(primaries: Primaries) -> np.ndarray:
    corners = np.array([[x / y, 1, (1 - x - y) / y] for x, y in _CHROMATICITIES[primaries]]).T
    white = np.array([_D65[0] / _D65[1], 1, (1 - _D65[0] - _D65[1]) / _D65[1]])
    return corners * np.linalg.solve(corners, white)
