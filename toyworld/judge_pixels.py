"""Judge, first half of seeing: background, foreground pixels and the share of each pixel that a character covers.

Works on RGB frames alone. Mixtures of two colours are straight lines in RGB, so a pixel on the edge of a character
lies between the background and the character's colour: its place on that line is the share covered (alpha), and the
nearest line tells whose edge it is. Arrays: T frames, H W pixels, n foreground pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toyworld.vocabulary import COLOURS, DIM_FACTOR, LANDMARK_RGB, PLACE_RGB, Colour, Light, PlaceName, colour_rgb

SIDE = 64  # every clip is read at this size
LIGHT_MIX = 0.62  # the light marks of stripes and dots: colour + LIGHT_MIX * (white - colour)
HUE_STEPS = (-8.0, 0.0, 8.0)
MIN_COVER = 0.30  # a place is read if this share of the frame has its colours
PLACE_TOLERANCE = 20.0  # RGB distance at which a pixel counts 0.6 towards a place


def area_resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frames [T,H,W,3] -> float32 [T,height,width,3], each new pixel the exact mean of the area it covers."""

    def weights(old: int, new: int) -> np.ndarray:
        edges = np.linspace(0, old, new + 1)
        low, high = edges[:-1, None], edges[1:, None]
        cell = np.arange(old)[None, :]
        overlap = np.clip(np.minimum(high, cell + 1) - np.maximum(low, cell), 0, None)
        return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)

    frames = np.asarray(frames, dtype=np.float32)
    if frames.shape[1:3] == (height, width):
        return frames
    rows = np.tensordot(frames, weights(frames.shape[1], height), axes=([1], [1]))  # [T,W,3,height]
    both = np.tensordot(rows, weights(frames.shape[2], width), axes=([1], [1]))  # [T,3,height,width]
    return np.ascontiguousarray(both.transpose(0, 2, 3, 1))


def rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB 0..255 [...,3] -> CIELAB (D65) [...,3]."""
    c = np.asarray(rgb, dtype=np.float64) / 255.0
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = linear @ matrix.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def rgb_to_hue(rgb: np.ndarray) -> np.ndarray:
    """HSV hue in degrees of RGB [...,3]; 0 for greys."""
    rgb = np.asarray(rgb, dtype=np.float64)
    high, low = rgb.max(-1), rgb.min(-1)
    span = np.where(high > low, high - low, 1.0)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.where(high == r, (g - b) / span % 6.0, np.where(high == g, (b - r) / span + 2.0, (r - g) / span + 4.0))
    return np.where(high > low, hue * 60.0, 0.0)


@dataclass(frozen=True)
class Background:
    """The place of a clip. `cover` is the share of its pixels that have the place's colours; below MIN_COVER the
    name is None. `image` is the estimated empty place per frame, `horizon` its horizon as a share of the height."""

    name: PlaceName | None
    light: Light | None
    duotone: bool
    cover: float
    image: np.ndarray  # float32 [T,H,1,3]: it changes down the rows only
    horizon: np.ndarray  # [T]
    noise: float  # RGB distance of typical background pixels from `image`


_CANDIDATES: list[tuple[PlaceName, Light, bool, np.ndarray, np.ndarray]] = []
for _name, (_sky, _ground) in PLACE_RGB.items():
    for _light, _factor in (("day", 1.0), ("dim", DIM_FACTOR)):
        for _duotone in (False, True):
            _pair = np.array([_sky, _ground], dtype=np.float64)
            _pair = _pair.mean(1, keepdims=True).repeat(3, 1) if _duotone else _pair
            _CANDIDATES.append((_name, _light, _duotone, _pair[0] * _factor, _pair[1] * _factor))  # type: ignore[arg-type]


def read_background(frames: np.ndarray) -> Background:
    """Estimate the empty place behind float frames [T,H,W,3]."""
    count, height = frames.shape[:2]
    some = frames[np.unique(np.linspace(0, count - 1, 5).astype(int))]
    upper = some[:, : int(0.52 * height)].reshape(-1, 3)
    lower = some[:, int(0.72 * height) :].reshape(-1, 3)

    def support(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
        return np.exp(-0.5 * ((pixels - colour) ** 2).sum(-1) / PLACE_TOLERANCE**2)

    upper_thin, lower_thin = upper[::3], lower[::3]
    scores = [
        0.5 * (float(support(upper_thin, sky).mean()) + float(support(lower_thin, ground).mean()))
        for *_, sky, ground in _CANDIDATES
    ]
    best = int(np.argmax(scores))
    name, light, duotone, sky, ground = _CANDIDATES[best]
    readable = scores[best] >= MIN_COVER

    def typical(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
        near = pixels[support(pixels, colour) > 0.1] if readable else pixels
        return np.median(near if len(near) else pixels, axis=0)

    named_gap = float(np.linalg.norm(sky - ground))
    sky, ground = typical(upper, sky), typical(lower, ground)
    readable &= float(np.linalg.norm(sky - ground)) > 0.4 * named_gap  # one even colour is no place
    image, horizon = _empty_place(frames, sky, ground)
    distance = np.sqrt(((frames - image) ** 2).sum(-1))
    noise = float(np.median(np.sort(distance, axis=None)[: distance.size // 2]))
    return Background(
        name if readable else None,
        light if readable else None,
        readable and duotone,
        scores[best],
        image,
        horizon,
        noise,
    )


def _empty_place(frames: np.ndarray, sky: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sky over ground with the horizon of each frame -> (image [T,H,1,3], horizon [T] as a share of the height)."""
    count, height = frames.shape[:2]
    cap = 0.5 * max(float(np.linalg.norm(sky - ground)), 20.0)
    to_sky = np.minimum(np.sqrt(((frames - sky) ** 2).sum(-1)), cap).sum(-1)  # [T,H]
    to_ground = np.minimum(np.sqrt(((frames - ground) ** 2).sum(-1)), cap).sum(-1)
    zero = np.zeros((count, 1))
    above = np.concatenate([zero, np.cumsum(to_sky, 1)], 1)
    below = np.concatenate([zero, np.cumsum(to_ground[:, ::-1], 1)], 1)[:, ::-1]
    low, high = int(0.5 * height), int(0.8 * height)
    split = low + np.argmin((above + below)[:, low:high], axis=1)  # first ground row
    is_ground = np.arange(height)[None, :] >= split[:, None]
    image = np.where(is_ground[..., None], ground, sky).astype(np.float32)  # [T,H,3]
    # rows beside the horizon mix both: where on the line between sky and ground does most of the row lie?
    axis = (ground - sky) / max(float(((ground - sky) ** 2).sum()), 1e-6)
    horizon = split.astype(np.float64)
    for offset in (-2, -1, 0, 1):
        rows = np.clip(split + offset, 0, height - 1)
        line = frames[np.arange(count), rows]  # [T,W,3]
        share = np.clip((line - sky) @ axis, 0.0, 1.0)
        off_line = np.abs(line - (sky + share[..., None] * (ground - sky))).sum(-1)
        share = np.where(off_line < 24.0, share, np.nan)
        blank = np.isnan(share).all(1)
        share[blank] = float(offset >= 0)
        middle = np.nanmedian(share, axis=1)
        image[np.arange(count), rows] = sky + middle[:, None] * (ground - sky)
        horizon += (1.0 - middle) if offset >= 0 else -middle
    return image[:, :, None, :], horizon / height


# ------------------------------------------------------------------------------------------ foreground

Class = int  # 0..7 a colour of COLOURS, then the landmarks; -1 not decided
LANDMARK_CLASSES = {name: len(COLOURS) + k for k, name in enumerate(LANDMARK_RGB)}


def _light_of(rgb: np.ndarray) -> np.ndarray:
    return rgb + LIGHT_MIX * (255.0 - rgb)


def _class_points(dim: bool) -> tuple[np.ndarray, np.ndarray]:
    """End points [P,3] of the mixing lines and the class of each [P]."""
    points, classes = [], []
    for k, colour in enumerate(COLOURS):
        for offset in HUE_STEPS:
            base = np.array(colour_rgb(colour, offset), dtype=np.float64)
            points += [base, _light_of(base)]
            classes += [k, k]
    for name, colours in LANDMARK_RGB.items():
        for rgb in colours:
            points.append(np.array(rgb, dtype=np.float64) * (DIM_FACTOR if dim else 1.0))
            classes.append(LANDMARK_CLASSES[name])
    return np.stack(points).astype(np.float32), np.array(classes)


def classify_pixels(frames: np.ndarray, background: Background) -> tuple[np.ndarray, np.ndarray]:
    """Whose colour each pixel has -> (class int8 [T,H,W], -1 where undecided; covered share float32 [T,H,W])."""
    image = np.broadcast_to(background.image, frames.shape)
    distance = np.sqrt(((frames - image) ** 2).sum(-1))
    seen = distance > max(16.0, 5.0 * background.noise)
    points, classes = _class_points(background.light == "dim")
    behind = image[seen]  # [n,3]
    residual = frames[seen] - behind
    line = points[None] - behind[:, None]  # [n,P,3]
    length = (line**2).sum(-1)
    share = np.clip(np.einsum("npc,nc->np", line, residual) / np.maximum(length, 1.0), 0.0, 1.0)
    # |r - s d|^2 without forming it; tiny term: of two lines that explain a pixel equally, the one it covers more
    miss = (residual**2).sum(-1)[:, None] - 2 * share * np.einsum("npc,nc->np", line, residual) + share**2 * length
    best = np.argmin(miss + 60.0 * (1 - share), axis=1) if len(miss) else np.zeros(0, dtype=int)
    picked = np.arange(len(best))
    best_share, best_miss = share[picked, best], np.sqrt(np.maximum(miss[picked, best], 0.0))
    label = np.full(seen.shape, -1, dtype=np.int8)
    label[seen] = np.where((best_share > 0.3) & (best_miss < 45.0), classes[best], -1)
    cover = np.zeros(seen.shape, dtype=np.float32)
    cover[seen] = best_share
    return label, cover


def alpha_of(
    frames: np.ndarray, background: Background, rgb: np.ndarray, others: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Share of every pixel covered by a character of colour `rgb`: (plain, marked), each float32 [T,H,W] in 0..1.

    `plain` takes the character to have one colour, `marked` lets it also have the light marks of a pattern.
    `others` [T,H,W] marks pixels known to be something else; they get 0.
    """
    residual = frames - background.image
    both = []
    for colour in (rgb, _light_of(rgb)):
        line = colour.astype(np.float32) - background.image  # [T,H,1,3]
        along = (residual * line).sum(-1) / np.maximum((line**2).sum(-1), 1.0)
        miss = np.sqrt(((residual - along[..., None] * line) ** 2).sum(-1))
        share = np.clip(along, 0.0, 1.0) * np.clip(2.0 - miss / 40.0, 0.0, 1.0)
        both.append(np.where(others | (share < 0.08), 0.0, share).astype(np.float32))
    return both[0], np.maximum(both[0], both[1])


_LAB_NAMES = [c for c in COLOURS for _ in HUE_STEPS]
_LAB_POINTS = rgb_to_lab(np.array([colour_rgb(c, h) for c in COLOURS for h in HUE_STEPS]))
MAX_COLOUR_DISTANCE = 22.0  # CIELAB; further from every named colour, a colour is not read


def name_colour(rgb: np.ndarray) -> tuple[Colour | None, float]:
    """(nearest named colour in CIELAB or None, hue offset in degrees from that colour's hue)."""
    distance = np.linalg.norm(_LAB_POINTS - rgb_to_lab(rgb), axis=1)
    best = int(np.argmin(distance))
    if distance[best] > MAX_COLOUR_DISTANCE:
        return None, 0.0
    name = _LAB_NAMES[best]
    nominal = float(rgb_to_hue(np.array(colour_rgb(name))))
    return name, (float(rgb_to_hue(rgb)) - nominal + 180.0) % 360.0 - 180.0
