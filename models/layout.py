"""What each latent frame of a clip is: its role, its shot and its text.

F latent frames. A clip is an ordered tuple of segments; a shot is one unbroken run of frames, of one or more segments.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

Role = Literal["condition", "buffer", "target", "history", "dummy"]
GIVEN_ROLES = ("condition", "history")


@dataclass(frozen=True)
class Segment:
    """`num_frames` latent frames in a row that share a role, a shot and a text.

    Roles: "target" is generated; "condition" is given by the user; "history" was generated before; "buffer" is source
    noised part of the way (TIC-FT); "dummy" is a placeholder that is attended to but neither trained nor decoded. It is
    a zero latent at level 0, and where texts stand in the same attention (`models.joint_attention`) all see one token
    of it.
    """

    role: Role
    num_frames: int
    shot_id: int = 0
    text_id: int = 0

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"segment role is {self.role!r}, expected one of {', '.join(get_args(Role))}")
        if self.num_frames < 1:
            raise ValueError(f"segment num_frames is {self.num_frames}, expected at least 1")


@dataclass(frozen=True)
class ClipLayout:
    """Segments in order; hashable, so that position tables and plans can be kept per layout.

    Raises ValueError without segments, or when a shot's frames are not one unbroken run.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError("a clip layout needs at least one segment")
        runs = [s.shot_id for i, s in enumerate(self.segments) if i == 0 or s.shot_id != self.segments[i - 1].shot_id]
        if len(set(runs)) != len(runs):
            raise ValueError(
                f"the shots of a clip layout are {runs} in order: a shot's frames must be one unbroken run"
            )

    @property
    def num_frames(self) -> int:
        return sum(s.num_frames for s in self.segments)

    @property
    def num_shots(self) -> int:
        return len({s.shot_id for s in self.segments})

    @property
    def roles(self) -> list[Role]:
        """Role of each frame, F of them."""
        return [s.role for s in self.segments for _ in range(s.num_frames)]

    @property
    def shot_ids(self) -> Tensor:
        """Long [F]."""
        return self._per_frame([s.shot_id for s in self.segments])

    @property
    def text_ids(self) -> Tensor:
        """Long [F]: the text group each frame reads."""
        return self._per_frame([s.text_id for s in self.segments])

    @property
    def frame_slices(self) -> list[slice]:
        """The frames of each segment."""
        ends = torch.tensor([s.num_frames for s in self.segments]).cumsum(0).tolist()
        return [slice(end - s.num_frames, end) for s, end in zip(self.segments, ends, strict=True)]

    @property
    def shot_slices(self) -> list[slice]:
        """The frames of each shot, in order of appearance."""
        slices: list[slice] = []
        for i, (segment, frames) in enumerate(zip(self.segments, self.frame_slices, strict=True)):
            if i and segment.shot_id == self.segments[i - 1].shot_id:
                slices[-1] = slice(slices[-1].start, frames.stop)
            else:
                slices.append(frames)
        return slices

    @property
    def is_given(self) -> Tensor:
        """Bool [F]: frames whose content is known before sampling and kept."""
        return torch.tensor([role in GIVEN_ROLES for role in self.roles])

    @property
    def is_dummy(self) -> Tensor:
        """Bool [F]: placeholders, which are seen and neither trained nor decoded."""
        return torch.tensor([role == "dummy" for role in self.roles])

    @property
    def is_target(self) -> Tensor:
        """Bool [F]: frames that are generated and trained."""
        return torch.tensor([role == "target" for role in self.roles])

    def _per_frame(self, per_segment: list[int]) -> Tensor:
        repeats = torch.tensor([s.num_frames for s in self.segments])
        return torch.tensor(per_segment, dtype=torch.long).repeat_interleave(repeats)


def shots_layout(shot_frames: list[int]) -> ClipLayout:
    """Shots back to back, all to be generated, each reading its own text."""
    return ClipLayout(tuple(Segment("target", frames, i, i) for i, frames in enumerate(shot_frames)))


def mark_given(layout: ClipLayout, given: Collection[int], as_role: Role = "condition") -> ClipLayout:
    """The layout with the frames in `given` in another role; neighbours alike stay one segment."""
    segments: list[Segment] = []
    for segment, frames in zip(layout.segments, layout.frame_slices, strict=True):
        for frame in range(frames.start, frames.stop):
            role = as_role if frame in given else segment.role
            last = segments[-1] if segments and frame > frames.start else None
            if last is not None and last.role == role:
                segments[-1] = Segment(role, last.num_frames + 1, segment.shot_id, segment.text_id)
            else:
                segments.append(Segment(role, 1, segment.shot_id, segment.text_id))
    return ClipLayout(tuple(segments))


def with_story(layout: ClipLayout) -> ClipLayout:
    """The layout behind a group for the story: one dummy frame with a shot and a text of its own (LCT 2503.10589).

    Both are numbered after those of the layout, so that shots and their texts keep their numbers.
    """
    shot = 1 + max(segment.shot_id for segment in layout.segments)
    text = 1 + max(segment.text_id for segment in layout.segments)
    return ClipLayout((Segment("dummy", 1, shot, text), *layout.segments))


def drop_frames(layout: ClipLayout, count: int) -> ClipLayout:
    """The layout without its first `count` frames."""
    kept = [
        replace(segment, num_frames=min(segment.num_frames, frames.stop - count))
        for segment, frames in zip(layout.segments, layout.frame_slices, strict=True)
        if frames.stop > count
    ]
    return ClipLayout(tuple(kept))
