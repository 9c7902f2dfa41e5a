"""The data contract: a scene is an ordered, gap-free list of shots of one source, with captions and latents.

Plain dataclasses and JSON, no torch, so that every stage of the house can read a record. The tensors that belong to a
scene lie next to it under the names that `shot_tensor_key` and `STORY_TEXT` give:

    s000.latent_mean, s000.latent_logvar            [C,F,H,W]  posterior of the encoded span, raw VAE units
    s000.first_mean / .first_logvar, .last_*        [C,1,H,W]  first and last frame, each encoded alone
    s000.first_image                                [1,D]      image embedding of the first frame, if the model has any
    r000.latent_mean                                [C,F,H,W]  a reference, encoded alone; an image as a still clip
    text.story, s000.text, s000.sentence_text       [L,D]      text embeddings, valid tokens only
    s000.prompt_text                                [L,D]      the prompt alone, where s000.text has the story in it
    s000.states_text                                [S,L,D]    predicted states, each encoded alone; zeros are padding

C channels, F latent frames, H W latent size, S states, L text tokens, D text width. Times are integers: presentation
timestamps (PTS) in units of `time_base` seconds, and frame numbers of the source; ends are exclusive.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from models.records import RecordError, decode

Transition = Literal["start", "cut", "dissolve", "fade"]
ImageRole = Literal["image", "portrait", "place", "keyframe", "first_frame"]
ReferenceRole = Literal[ImageRole, "source", "action"]  # the last two are clips

VERSION = 1
IMAGE_ROLES: tuple[ImageRole, ...] = get_args(ImageRole)
STORY_TEXT = "text.story"
CUT_MARKER = "[SHOT CUT]"  # begins the prompt of a shot that a cut leads to (LCT); a shot that goes on has none
MAX_HISTORY = 8  # earlier shots that one shot is made to see (LCT, whose training scenes have up to nine shots)
LATENT_TENSORS = ("latent_mean", "latent_logvar", "first_mean", "first_logvar", "last_mean", "last_logvar")
IMAGE_TENSOR = "first_image"
PIXEL_TENSORS = (*LATENT_TENSORS, IMAGE_TENSOR)  # what is made of a shot's frames; the last only by some models
SHOT_TENSORS = (*PIXEL_TENSORS, "text", "sentence_text", "states_text", "prompt_text")


class SceneError(RecordError):
    """A scene record breaks the contract; the message names the scene, the field, the value and what it should be."""


@dataclass
class State:
    """Something that holds from `frame` on, in encoded frames of the shot, 0-based."""

    text: str
    frame: int


@dataclass
class EncodedSpan:
    """The frames of a shot that went through the VAE: `num_frames` at `fps`, sized `height` x `width`.

    A video VAE takes 4k+1 (Wan) or 8k+1 (CogVideoX) of them, an image VAE any number.
    `start_frame` is a source frame number; `pts` holds the source timestamp of each encoded frame.
    """

    start_frame: int
    num_frames: int
    fps: float
    pts: list[int]
    height: int
    width: int


@dataclass
class Shot:
    shot_id: str
    index: int
    start_pts: int
    end_pts: int
    start_frame: int
    end_frame: int
    time_base: list[int]  # [numerator, denominator] of a PTS tick in seconds
    prev_id: str | None = None
    next_id: str | None = None
    transition: Transition = "cut"  # how this shot begins
    confidence: float = 1.0
    blend_frames: list[int] = field(default_factory=list)  # [first, end) of that transition; empty for a hard cut
    blend_pts: list[int] = field(default_factory=list)
    encoded: EncodedSpan | None = None
    scores: dict[str, float] = field(default_factory=dict)
    filtered: str = ""  # why it is not encoded, "rule: value"; "" for a shot that is
    signature: str = ""  # what it looks like, to find others like it (`preprocess.signature`)
    prompt: str = ""
    sentence: str = ""  # the shot told alone, with no reference to the story; "" when there is none
    camera: str = ""
    label: int | None = None  # the class of what it shows, counted from 0, for models of classes; None: not said
    entities: list[str] = field(default_factory=list)  # ids of the scene's entities that are seen in it
    states: list[State] = field(default_factory=list)
    predicted_states: list[State] = field(default_factory=list)  # from the first frame and instruction only

    @property
    def start_s(self) -> float:
        return self.start_pts * self.time_base[0] / self.time_base[1]

    @property
    def duration_s(self) -> float:
        return (self.end_pts - self.start_pts) * self.time_base[0] / self.time_base[1]


@dataclass
class Source:
    path: str
    sha256: str
    bytes: int


@dataclass
class Entity:
    id: str
    name: str
    description: str


@dataclass
class Reference:
    """Other media the scene depends on, in the order in which a method shows them before the scene's shot.

    Roles: "image", "portrait" (a character), "place"; "keyframe", one the shot passes through; "first_frame", the one
    it begins with; "source", the clip it is a version of; "action", a clip of what happens in it.
    """

    role: ReferenceRole
    path: str


@dataclass
class CaptionSource:
    backend: str
    model: str
    template_hash: str
    states_key: str = ""  # of who predicted the states (`models.states`); "" = they are not predicted


@dataclass
class LatentSource:
    vae_hash: str
    text_hash: str
    dtype: str
    texts_joined: bool = False  # story and prompt are encoded as one text (`models.text.TextStyle.joined`)
    image_hash: str = ""  # of the image encoder that embedded the first frames; "" = none did


@dataclass
class Scene:
    scene_id: str
    video_id: str
    source: Source
    fps: float
    width: int
    height: int
    duration_s: float
    shots: list[Shot]
    story: str = ""  # "[Character] ... [Environment] ... [Story] ..."
    entities: list[Entity] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    captions: CaptionSource | None = None
    latents: LatentSource | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> str:
        """The record as JSON with sorted keys: equal scenes give equal bytes. Raises SceneError if it is not valid."""
        self.validate()
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    @staticmethod
    def from_json(text: str | bytes) -> Scene:
        """The scene of a record. Raises SceneError where a field is missing, unknown, of a wrong type or unfit."""
        try:
            value = json.loads(text)
        except ValueError as error:
            raise SceneError(f"scene record is not JSON: {error}") from error
        name = value.get("scene_id", "?") if isinstance(value, dict) else "?"
        try:
            scene = decode(Scene, value, f"scene {name!r}")
        except RecordError as error:
            raise SceneError(str(error)) from error
        scene.validate()
        return scene

    def validate(self) -> None:
        """Raise SceneError unless shots are ordered, gap-free, linked to their neighbours and their spans fit."""
        where = f"scene {self.scene_id!r}"
        if self.version != VERSION:
            raise SceneError(f"{where}: version is {self.version}, this code reads version {VERSION}; prepare it again")
        if not self.scene_id or not self.shots:
            raise SceneError(f"{where}: needs a scene_id and at least one shot, has {len(self.shots)} shots")
        _finite(where, asdict(self))
        ids = [shot.shot_id for shot in self.shots]
        for i, shot in enumerate(self.shots):
            at = f"{where}, shots[{i}]"
            _equal(at, "index", shot.index, i)
            _equal(at, "shot_id", shot.shot_id, shot_id(self.scene_id, i))
            _equal(at, "prev_id", shot.prev_id, ids[i - 1] if i else None)
            _equal(at, "next_id", shot.next_id, ids[i + 1] if i + 1 < len(ids) else None)
            if i:
                before = self.shots[i - 1]
                _equal(at, "time_base", shot.time_base, before.time_base)
                _equal(at, "start_frame", shot.start_frame, before.end_frame)  # gap-free
                _equal(at, "start_pts", shot.start_pts, before.end_pts)
            if shot.label is not None and shot.label < 0:
                raise SceneError(f"{at}: label is {shot.label}, expected a class, counted from 0")
            _validate_span(at, shot)


def shot_id(scene_id: str, index: int) -> str:
    return f"{scene_id}/s{index:03d}"


def shot_tensor_key(index: int, name: str) -> str:
    """Name of a shot's tensor in the scene's safetensors file, e.g. "s002.latent_mean"."""
    if name not in SHOT_TENSORS:
        raise KeyError(f"a shot has no tensor {name!r}; it has {', '.join(SHOT_TENSORS)}")
    return f"s{index:03d}.{name}"


def reference_tensor_key(index: int) -> str:
    """Name of a reference's latents in the scene's safetensors file, e.g. "r000.latent_mean"."""
    return f"r{index:03d}.latent_mean"


def link_shots(shots: list[Shot], scene_id: str) -> list[Shot]:
    """Number the shots of a scene in order and set their ids and neighbour links, in place."""
    for i, shot in enumerate(shots):
        shot.index, shot.shot_id = i, shot_id(scene_id, i)
        shot.prev_id = shot_id(scene_id, i - 1) if i else None
        shot.next_id = shot_id(scene_id, i + 1) if i + 1 < len(shots) else None
    return shots


def _validate_span(at: str, shot: Shot) -> None:
    if len(shot.time_base) != 2 or min(shot.time_base) <= 0:
        raise SceneError(f"{at}: time_base is {shot.time_base}, expected [numerator, denominator], both positive")
    if shot.end_frame <= shot.start_frame or shot.end_pts <= shot.start_pts:
        raise SceneError(
            f"{at}: the shot is empty: frames {shot.start_frame}..{shot.end_frame}, "
            f"PTS {shot.start_pts}..{shot.end_pts}"
        )
    if not 0.0 <= shot.confidence <= 1.0:
        raise SceneError(f"{at}: confidence is {shot.confidence}, expected 0 to 1")
    for name, (start, end) in {
        "frames": (shot.start_frame, shot.end_frame),
        "pts": (shot.start_pts, shot.end_pts),
    }.items():
        blend = getattr(shot, f"blend_{name}")
        if blend and not (len(blend) == 2 and blend[0] <= start <= blend[1] <= end and blend[0] < blend[1]):
            raise SceneError(f"{at}: blend_{name} is {blend}, expected [first, end) around the start, {start}..{end}")
    span = shot.encoded
    if span is None:
        return
    if span.num_frames < 1:
        raise SceneError(f"{at}.encoded: num_frames is {span.num_frames}, expected at least 1")
    _equal(f"{at}.encoded", "len(pts)", len(span.pts), span.num_frames)
    if span.fps <= 0 or span.height <= 0 or span.width <= 0:
        raise SceneError(
            f"{at}.encoded: fps, height and width must be positive, are {span.fps}, {span.height}x{span.width}"
        )
    # a low-rate source encoded at a higher rate repeats frames, so timestamps may stand still but never go back
    if any(b < a for a, b in zip(span.pts, span.pts[1:], strict=False)):
        raise SceneError(f"{at}.encoded: pts go back in time: {span.pts}")
    inside = shot.start_pts <= span.pts[0] and span.pts[-1] < shot.end_pts
    if not inside or not shot.start_frame <= span.start_frame < shot.end_frame:
        raise SceneError(
            f"{at}.encoded: starts at frame {span.start_frame}, PTS {span.pts[0]}..{span.pts[-1]}; outside the shot's "
            f"frames {shot.start_frame}..{shot.end_frame}, PTS {shot.start_pts}..{shot.end_pts}"
        )
    for state in shot.states + shot.predicted_states:
        if not 0 <= state.frame < span.num_frames:
            raise SceneError(f"{at}: state {state.text!r} at frame {state.frame}, outside 0..{span.num_frames - 1}")


def _equal(at: str, name: str, value: object, expected: object) -> None:
    if value != expected:
        raise SceneError(f"{at}: {name} is {value!r}, expected {expected!r}")


def _finite(at: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _finite(f"{at}.{key}", inner)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _finite(f"{at}[{i}]", inner)
    elif isinstance(value, float) and not math.isfinite(value):
        raise SceneError(f"{at} is {value}, expected a finite number")
