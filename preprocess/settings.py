"""What the stages need to know, and the keys that say which results a change of settings makes invalid."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from preprocess.filters import FilterSettings
from preprocess.sizes import Size, choose_size, in_words

CaptionBackend = Literal["sidecar", "describe", "sidecar_or_describe", "endpoint", "transformers"]
ASKED: tuple[CaptionBackend, ...] = ("endpoint", "transformers")  # a model is shown pictures
Ids = Literal["path", "content"]  # what a source's id is made of
Cuts = Literal["detect", "transnet", "captions"]
StoreType = Literal["float32", "float16", "bfloat16"]

# raise when a stage gives other results for the same settings, so that earlier work is done again
STAGES_VERSION = 4
# thresholds of shots are not in the key: what they would change is seen in the recorded scores (`preprocess.dataset`)
_NOT_VISION = (
    "captions", "caption_model", "caption_frames", "caption_words", "seconds_per_video", "states_key", "states_frames",
    "texts_apart", "filters", "unit_seconds", "sizes", "tile_over",
)  # fmt: skip


@dataclass(frozen=True)
class PrepareSettings:
    height: int = 64
    width: int = 64
    sizes: tuple[Size, ...] = ()  # of which each video takes the one that fits it, see `at`; (): height x width
    fps: float = 8.0  # of the encoded frames
    frame_step: int = 4  # the VAE takes frame_step * k + 1 frames: 4 Wan, 8 CogVideoX, 1 an image VAE
    shot_frames: int = 17  # encoded frames per shot at most
    min_shot_frames: int = 5  # a shorter shot stays in the record, without latents
    max_shots: int = 9  # shots per scene
    max_seconds: float | None = None  # of each video
    min_side: int = 32  # pixels of the shorter side
    min_rate: float = 0.5  # source frames per encoded frame; below it most encoded frames would be repeats
    crop_bars: bool = True  # leave black bars around the picture out
    filters: FilterSettings = field(default_factory=FilterSettings)  # of shots
    aesthetic_key: str = ""  # of the aesthetic scorer; "" = not scored
    cuts: Cuts = "detect"
    captions: CaptionBackend = "sidecar_or_describe"
    caption_model: str = ""  # backends endpoint and transformers: what the model is called
    caption_frames: int = 3  # encoded frames per shot that it is shown
    caption_words: int = 130  # of story and one prompt together
    dtype: StoreType = "float16"  # of latents and text embeddings
    tile_over: int | None = None  # frames higher or wider than this are encoded in tiles of it; None: whole
    seconds_per_video: float = 600.0  # time limit for the work on one video, or on one unit of a long one
    unit_seconds: float = 300.0  # longer videos are cut into units of about this; it changes no result
    states_key: str = ""  # of the state predictor (`models.states`); "" = states are not predicted
    states_frames: int = 1  # encoded frames of a shot that the predictor is shown, from the first
    texts_apart: bool = False  # where story and prompt are encoded as one text, encode each alone, too

    def __post_init__(self) -> None:
        for name in ("shot_frames", "states_frames"):
            if (getattr(self, name) - 1) % self.frame_step:
                lengths = ", ".join(str(self.frame_step * k + 1) for k in range(4))
                raise ValueError(
                    f"{name}={getattr(self, name)}: the VAE takes {self.frame_step}k+1 frames ({lengths}, ...)"
                )
        if self.min_shot_frames > self.shot_frames:
            raise ValueError(f"min_shot_frames={self.min_shot_frames} is more than shot_frames={self.shot_frames}")
        for name, size in (("", (self.height, self.width)), *(("sizes: ", size) for size in self.sizes)):
            if size[0] % 8 or size[1] % 8 or min(size) < 8:
                raise ValueError(f"{name}{in_words(size)}: height and width must be multiples of 8")
        if twice := [size for i, size in enumerate(self.sizes) if size in self.sizes[:i]]:
            raise ValueError(f"sizes: {in_words(twice[0])} is listed twice")
        if self.fps <= 0 or self.max_shots < 1 or self.seconds_per_video <= 0:
            raise ValueError("fps, max_shots and seconds_per_video must be positive")
        if (self.captions in ASKED) != bool(self.caption_model):
            raise ValueError(
                f"captions={self.captions}, caption_model={self.caption_model!r}: a model goes with {ASKED}"
            )
        if self.caption_frames < 1 or self.caption_words < 1:
            raise ValueError("caption_frames and caption_words must be at least 1")
        if self.unit_seconds <= 0:
            raise ValueError(f"unit_seconds={self.unit_seconds} must be positive")
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise ValueError(f"max_seconds={self.max_seconds} must be positive; null takes whole videos")

    def size_of(self, picture: Size) -> Size:
        """The training size of a video whose picture, without black bars, is displayed at (height, width)."""
        return choose_size(picture, self.sizes) if self.sizes else (self.height, self.width)

    def at(self, size: Size) -> PrepareSettings:
        """The settings of the videos that take this size: no other size changes what becomes of them."""
        return replace(self, height=size[0], width=size[1], sizes=())

    @property
    def tile(self) -> int | None:
        """Side of the tiles in which frames of height x width are encoded; None: whole."""
        return self.tile_over if self.tile_over and max(self.height, self.width) > self.tile_over else None

    def vision_key(self) -> str:
        """Changes when shots, encoded frames or what is kept would change; of a video of size height x width."""
        return _key({k: v for k, v in asdict(self).items() if k not in _NOT_VISION})

    def caption_key(self, template_hash: str) -> str:
        states = [self.states_key, self.states_frames] if self.states_key else []
        asked = [self.caption_model, self.caption_frames, self.caption_words] if self.captions in ASKED else []
        return _key([self.captions, template_hash, *states, *["texts_apart"] * self.texts_apart, *asked])


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps([STAGES_VERSION, value], sort_keys=True).encode()).hexdigest()[:16]
