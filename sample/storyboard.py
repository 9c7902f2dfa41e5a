"""What to generate: a storyboard is a story and its shots, each with its own words, length, seed and given media."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from models.scene import CUT_MARKER, MAX_HISTORY, Reference
from sample.shot import GivenFrames, StoryboardError, StoryboardShot

# auto: all shots at once, as their media ask. autoregressive: one after another, each seeing earlier ones (LCT).
# extension: likewise, as one shot that goes on.
Task = Literal["auto", "autoregressive", "extension"]
# of a shot by itself (FVDM): a clip noised part of the way and made anew, given frames likewise, a clip that grows out
# of an image, frames that follow one another, a shot longer than the model's clips
FrameTask = Literal["edit", "noisy_frames", "progressive", "progressive_min", "diagonal", "long_video"]
FRAME_TASKS: tuple[str, ...] = get_args(FrameTask)
IN_TURN = ("autoregressive", "extension")  # tasks whose shots are made one after another
FROM_IMAGE = ("progressive", "progressive_min")  # all frames start from one image
FROM_NOTHING = ("diagonal", "long_video")  # nothing need be given

PATHS = ("given", "first_frame")  # fields of a shot that are the path of an image or video
LISTS_OF_PATHS = ("given_frames", "references")  # fields of a shot whose entries have such a `path`

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass
class Storyboard:
    """A scene to make. `name` becomes the file name; `story` is the global prompt all shots share."""

    name: str = "scene"
    story: str = ""
    shots: list[StoryboardShot] = field(default_factory=list)
    negative: str = ""  # what the null branch of guidance reads instead of an empty text
    seed: int | None = None  # None: derived from the run's seed and the name
    task: Literal[Task, FrameTask] | None = None  # None: the run's
    # of a `FrameTask`, or of what is given or made before, such as {edit_level: 0.6} or {context_level: 0.3}
    plan: dict[str, Any] = field(default_factory=dict)
    history: int | None = None  # how many earlier shots a shot sees, the nearest ones; None: the run's

    def validate(self, *, frame_step: int = 4, max_shots: int | None = None) -> None:
        """Raise StoryboardError at the first thing wrong."""
        if not NAME.fullmatch(self.name):
            raise StoryboardError(
                f"storyboard name {self.name!r}: use 1 to 100 letters, digits, '.', '_' or '-', starting with a "
                "letter or digit (it becomes a file name)",
                "name",
            )
        if not self.shots:
            raise StoryboardError(f"storyboard {self.name!r} has no shots; add at least one with a prompt", "shots")
        if max_shots is not None and len(self.shots) > max_shots:
            raise StoryboardError(
                f"storyboard {self.name!r} has {len(self.shots)} shots; at most {max_shots} are made at once", "shots"
            )
        for index, shot in enumerate(self.shots):
            shot.validate(self.where(index), index, frame_step)
        seeds = [("seed", self.seed), *((f"shots.{index}.seed", shot.seed) for index, shot in enumerate(self.shots))]
        for name, seed in seeds:
            if seed is not None and not 0 <= seed < 2**63:
                raise StoryboardError(f"storyboard {self.name!r}: {name}={seed}; give 0 to 2**63 - 1", name)
        if self.history is not None and not 1 <= self.history <= MAX_HISTORY:
            raise StoryboardError(
                f"storyboard {self.name!r}: history={self.history}; a shot sees 1 to {MAX_HISTORY} earlier shots",
                "history",
            )
        if all(shot.given for shot in self.shots):
            raise StoryboardError(
                f"storyboard {self.name!r}: every shot is given, so there is nothing to make", "shots"
            )

    def where(self, index: int) -> str:
        """How errors name a shot."""
        return f"storyboard {self.name!r}, shot {index}"

    def check_sequence(self, task: str) -> None:
        """Raise StoryboardError where the storyboard does not fit how its shots are made: see `Task`, `FrameTask`."""
        if task in FRAME_TASKS:
            self._check_frame_task(task)
        elif self.plan and not self.takes_plan(task):
            tasks = ", ".join((*FRAME_TASKS, *IN_TURN))
            raise StoryboardError(
                f"storyboard {self.name!r}: plan={self.plan} is for a task of {tasks} and for given shots, "
                "given_frames and references; leave it out",
                "plan",
            )
        if task == "auto" or task in FRAME_TASKS:
            fields = [("history", self.history)]
            fields += [(f"shots.{index}.history", shot.history) for index, shot in enumerate(self.shots)]
            for name, value in fields:
                if value is not None:
                    raise StoryboardError(
                        f"storyboard {self.name!r}: {name}={value} is for shots made one after another; set task to "
                        "autoregressive or extension, or leave it out",
                        name,
                    )
            return
        for index, shot in enumerate(self.shots):
            where = self.where(index)
            for name in ("references", "first_frame", "given_frames"):
                if getattr(shot, name):
                    raise StoryboardError(
                        f"{where}: {name} does not go with task {task}; give an image or a video as a shot of its own "
                        "(`given`)",
                        f"shots.{index}.{name}",
                    )
            if task == "extension" and index and CUT_MARKER in shot.prompt:
                raise StoryboardError(
                    f"{where}: prompt has {CUT_MARKER!r}, but task extension goes on without a cut; say what happens "
                    "next, or use task autoregressive",
                    f"shots.{index}.prompt",
                )

    def _check_frame_task(self, task: str) -> None:
        where = f"storyboard {self.name!r}, task {task}"
        if len(self.shots) != 1:
            raise StoryboardError(f"{where}: it makes one shot, got {len(self.shots)}", "shots")
        (shot,) = self.shots
        for name in ("given", "references"):
            if getattr(shot, name):
                raise StoryboardError(
                    f"{where}: {name} does not go with it; give first_frame or given_frames", f"shots.0.{name}"
                )
        if task in FROM_IMAGE and shot.given_frames:
            raise StoryboardError(
                f"{where}: given_frames does not go with it; give first_frame, the image that all frames start from",
                "shots.0.given_frames",
            )
        if not (shot.first_frame or shot.given_frames or task in FROM_NOTHING):
            what = "the video to edit" if task == "edit" else "the image to start from"
            more = "" if task in FROM_IMAGE else "; or name parts of the shot in given_frames"
            raise StoryboardError(f"{where}: first_frame is empty; it names {what}{more}", "shots.0.first_frame")

    def takes_plan(self, task: str) -> bool:
        """Whether there is something of which `plan` can say the level, if the shots are made as `task` says."""
        return task in FRAME_TASKS or task in IN_TURN or any(shot.takes_plan for shot in self.shots)

    def histories(self, nearest: int) -> list[tuple[int, ...]]:
        """The earlier shots that each shot sees, in the order of the scene unless the shot says another.

        `nearest` is how many of those before it a shot sees where neither it nor the storyboard says.
        """
        count = nearest if self.history is None else self.history
        return [
            tuple(range(max(0, index - count), index)) if shot.history is None else tuple(shot.history)
            for index, shot in enumerate(self.shots)
        ]

    def media(self) -> list[str]:
        """Paths of all images and videos that the shots name."""
        paths: list[str] = []

        def note(field: str, path: str) -> str:
            paths.append(path)
            return path

        self.with_media(note)
        return paths

    def with_media(self, find: Callable[[str, str], str]) -> Storyboard:
        """A copy that names `find(field, path)` for each path; the field is dotted, such as "shots.1.given"."""
        shots = []
        for index, shot in enumerate(self.shots):
            at = f"shots.{index}"
            changed: dict[str, Any] = {}
            for name in PATHS:
                if path := getattr(shot, name):
                    changed[name] = find(f"{at}.{name}", path)
            for name in LISTS_OF_PATHS:
                changed[name] = [
                    replace(one, path=find(f"{at}.{name}.{number}.path", one.path))
                    for number, one in enumerate(getattr(shot, name))
                ]
            shots.append(replace(shot, **changed))
        return replace(self, shots=shots)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(record: dict[str, Any]) -> Storyboard:
        """Inverse of `to_dict`; the record is trusted (files and requests are checked where they come in)."""
        shots = []
        for shot in record["shots"]:
            lists = {
                "references": [Reference(**one) for one in shot.get("references", [])],
                "given_frames": [GivenFrames(**one) for one in shot.get("given_frames", [])],
            }
            shots.append(StoryboardShot(**{**shot, **lists}))
        return Storyboard(**{**record, "shots": shots})

    def fingerprint(self, **settings: Any) -> str:
        """Hash over the storyboard and whatever else decides its pixels; equal hashes mean the same video."""
        text = json.dumps({"storyboard": self.to_dict(), **settings}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any parts, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
