"""One shot of a storyboard: its words, length and seed, what is given of it, and what of that contradicts itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from models.scene import MAX_HISTORY, Reference

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class StoryboardError(ValueError):
    """A storyboard that cannot be generated; the message names the storyboard, the shot, the field and the fix."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param  # dotted path of the field, such as "shots.1.frames"


@dataclass
class GivenFrames:
    """An image or video that is part of a shot: its frames are kept, the rest of the shot is made around them.

    Video frames stand for latent frames in groups, see `sample.given_frames`.
    """

    path: str
    at: int = 0  # the video frame of the shot where it begins; negative: counted from the end, -1 the last
    start: int = 0  # the first frame taken of a video; negative: counted from its end, -5 takes the last five
    frames: int | None = None  # how many of a video; None: as many as there are and fit


@dataclass
class StoryboardShot:
    """One shot. `prompt` is read together with the story, `sentence` stands alone; at least one is needed.

    A model of classes is told a `label` instead.
    """

    prompt: str = ""
    sentence: str = ""
    frames: int | None = None  # pixel frames, 4k+1; None: as many as the model was trained on
    seed: int | None = None  # None: derived from the storyboard's seed and the shot's index
    given: str = ""  # path of an image or video that is this shot: the model sees it, does not make it
    first_frame: str = ""  # path of an image (of a video, for models told so) that this shot starts from
    given_frames: list[GivenFrames] = field(default_factory=list)  # for fvdm: parts of this shot, at any place
    states: list[str] = field(default_factory=list)  # for aid: what it goes through, in order; empty = predicted
    references: list[Reference] = field(default_factory=list)  # seen before the shot, and no part of it
    history: list[int] | None = None  # the earlier shots that this one sees, counted from 0; None: the storyboard's
    label: int | None = None  # for fvdm with labels: the class, counted from 0; -1: none

    @property
    def takes_plan(self) -> bool:
        """Whether what is given of it, or before it, is held at a level that the storyboard's `plan` can say."""
        return bool(self.given or self.given_frames or self.references)

    def validate(self, where: str, index: int, frame_step: int) -> None:
        """Raise StoryboardError at the first thing wrong with this shot, number `index`, named `where`."""

        def wrong(name: str, what: str) -> StoryboardError:
            return StoryboardError(f"{where}: {what}", f"shots.{index}.{name}")

        words = bool(self.prompt.strip() or self.sentence.strip())
        if self.label is None and not words:
            raise wrong("prompt", "prompt and sentence are both empty; write one")
        if self.label is not None and words:
            raise wrong("label", "a label stands in the place of words; leave prompt and sentence out")
        if self.label is not None and self.label < -1:
            raise wrong("label", f"label={self.label}; give a class, counted from 0, or -1 for none")
        if self.frames is not None and (self.frames < 1 or (self.frames - 1) % frame_step):
            near = nearest_frames(self.frames, frame_step)
            raise wrong("frames", f"frames={self.frames}; a shot holds {frame_step}k+1 frames, the nearest is {near}")
        if self.given and self.first_frame:
            raise wrong("first_frame", "both given and first_frame are set; give the whole shot or its first frame")
        if self.references and (self.given or self.first_frame or self.given_frames):
            raise wrong(
                "references",
                "references stand before a shot that is made whole; leave given, first_frame and given_frames out",
            )
        if self.given_frames and (self.given or self.first_frame):
            other = "given" if self.given else "first_frame"
            raise wrong("given_frames", f"both {other} and given_frames are set; name all of it in given_frames")
        for number, one in enumerate(self.given_frames):
            if problem := _problem_of(one):
                raise wrong(f"given_frames.{number}", f"given_frames[{number}]: {problem}")
        self._validate_history(where, index)

    def _validate_history(self, where: str, index: int) -> None:
        chosen = self.history
        if chosen is None:
            return
        where = f"{where}: history={chosen}"
        if self.given:
            raise StoryboardError(f"{where}; a given shot is not made, so it sees none", f"shots.{index}.history")
        if not set(chosen) <= set(range(index)) or len(set(chosen)) != len(chosen):
            known = f"0 to {index - 1}, each once" if index else "none before the first"
            raise StoryboardError(f"{where}; give numbers of earlier shots: {known}", f"shots.{index}.history")
        if len(chosen) > MAX_HISTORY:
            raise StoryboardError(f"{where}; a shot sees at most {MAX_HISTORY}", f"shots.{index}.history")


def _problem_of(given: GivenFrames) -> str:
    """What is wrong with it, whatever the model; empty if nothing."""
    if not given.path:
        return "path is empty; name an image or a video"
    if given.frames is not None and given.frames < 1:
        return f"frames={given.frames}; give at least 1, or leave it out for as many as fit"
    if is_image(given.path) and (given.start or given.frames is not None):
        return "start and frames choose among the frames of a video; leave them out for an image"
    return ""


def is_image(path: str) -> bool:
    """By its name; what is no image is read as a video."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def nearest_frames(frames: float, frame_step: int = 4) -> int:
    """The nearest length of the form stride*k+1, at least 1."""
    return max(0, round((frames - 1) / frame_step)) * frame_step + 1
