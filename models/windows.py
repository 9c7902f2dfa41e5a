"""A video longer than a clip, as windows over its latent frames: each goes on from the last frames of the one before.

FVDM 2410.03160 (long video): with M of the F frames of a clip taken over, J clips make F + (J-1)(F-M) frames; M = F-1
is next-frame prediction, sliding by one. For another length the last clip takes over more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.layout import ClipLayout, mark_given, shots_layout
from models.noise import noise_plan


def clip_windows(known: Sequence[bool], clip: int, overlap: int) -> list[range]:
    """The frames of each clip, in the order in which they are made, for a video whose frames are `known` or not.

    clip (F): latent frames of a clip, at most those of the video. overlap (M): how many of the frames before those
    that it makes a clip takes over, at least. Known frames are taken over as well, clips that have nothing to make are
    left out, and a clip ends a frame early if the one after it is known: the next one then sees both sides of what it
    makes (where M = F-1 none can). Raises ValueError for a clip or an overlap that does not fit.
    """
    frames, done = len(known), list(known)
    if not 1 <= clip <= frames:
        raise ValueError(f"clip is {clip}, expected 1 to the video's {frames} latent frames")
    if clip < frames and not 1 <= overlap < clip:
        raise ValueError(f"overlap is {overlap}, expected 1 to {clip - 1} of the clip's {clip} latent frames")
    windows = []
    while not all(done):
        first = done.index(False)
        start = min(max(0, first - overlap), frames - clip)
        end = start + clip
        if end < frames and done[end] and not done[end - 1] and clip - overlap > 1:
            end -= 1
        windows.append(range(start, end))
        done[start:end] = [True] * (end - start)
    return windows


def default_overlap(clip: int) -> int:
    """Half a clip, as in FVDM's demonstration (8 of 16 frames)."""
    return max(1, clip // 2)


def plan_of_clips(
    layout: ClipLayout,
    levels: Tensor,  # [K+1] base levels
    clip: int,
    overlap: int,
    context_level: float = 0.0,  # at which frames are seen that are given or made before
) -> Tensor:
    """[J K + 1,F]: the levels before each of the K steps of J clips in turn, and those at the end.

    In a clip's rows its own frames follow the plan "hold"; outside, finished ones are at 0, the others wait at the
    first level. With a `context_level` above 0, frames go from 0 up to it where the next clip takes them over.
    """
    known = layout.is_given.clone()
    parts = []
    for frames in clip_windows(known.tolist(), clip, overlap):
        window = slice(frames.start, frames.stop)
        own = mark_given(shots_layout([len(frames)]), known[window].nonzero().flatten().tolist())
        rows = torch.where(known.to(levels.device), 0.0, levels[0]).repeat(len(levels), 1)
        rows[:, window] = noise_plan(own, levels, "hold", context_level=context_level)
        parts.append(rows[:-1])
        known[window] = True
    end = torch.where(layout.is_given.to(levels.device), rows[-1], 0.0)
    return torch.cat([*parts, end[None]])
