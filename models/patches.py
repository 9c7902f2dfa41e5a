"""Clips for a backbone whose tokens hold several latent frames, which cannot be told apart (CogVideoX 1.5: two).

A shot fills whole tokens: in front of it stand as many more of its first frame as it takes. So CogVideoX 1.5 was
trained, and so diffusers' CogVideoXPipeline and CogVideoXImageToVideoPipeline sample it: the frames in front are made
like all others, or given with a given first frame, and dropped at the end. The first frame of a shot of 2k+1 latent
frames so has a token of its own. A token has one noise level, so frames that share a token must share it, too.

F latent frames, P latent frames of a token.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from models.layout import ClipLayout, Segment


def padded_frames(layout: ClipLayout, patch: int) -> list[int]:
    """Of the clip that fills whole tokens of P frames: which frame of `layout` each of its frames is, in order."""
    places: list[int] = []
    for frames in layout.shot_slices:
        places += [frames.start] * (-(frames.stop - frames.start) % patch) + list(range(frames.start, frames.stop))
    return places


def own_places(places: list[int]) -> list[int]:
    """The inverse of `padded_frames`: where in the padded clip each frame of the clip itself stands."""
    return [i for i, (place, after) in enumerate(pairwise([*places, -1])) if place != after]


def take_frames(layout: ClipLayout, places: list[int]) -> ClipLayout:
    """The layout of a clip whose frames are those at `places` of this one, which never fall and leave none out."""
    counts = [sum(frames.start <= place < frames.stop for place in places) for frames in layout.frame_slices]
    return ClipLayout(
        tuple(replace(segment, num_frames=count) for segment, count in zip(layout.segments, counts, strict=True))
    )


def token_layout(layout: ClipLayout, patch: int) -> ClipLayout:
    """The layout of a padded clip in tokens of P frames. ValueError where what shares a token has different roles."""
    if patch == 1:
        return layout
    roles, texts, shots = layout.roles, layout.text_ids.tolist(), layout.shot_ids.tolist()
    segments: list[Segment] = []
    for first in range(0, layout.num_frames, patch):
        own = list(range(first, min(first + patch, layout.num_frames)))
        if len(own) < patch or len({(roles[f], shots[f], texts[f]) for f in own}) > 1:
            raise ValueError(
                f"latent frames {own[0]} to {own[-1]} of the clip are {', '.join(roles[f] for f in own)}: this model "
                f"joins {patch} latent frames into one token, which is one thing at one noise level"
            )
        token = Segment(roles[first], 1, shots[first], texts[first])
        if segments and replace(segments[-1], num_frames=1) == token:
            segments[-1] = replace(token, num_frames=segments[-1].num_frames + 1)
        else:
            segments.append(token)
    return ClipLayout(tuple(segments))


def split_token(plan: Tensor, patch: int) -> tuple[int, int] | None:
    """The first two neighbours in a token of P frames whose levels differ somewhere in plan [..., F]; None if none."""
    for frame in range(plan.shape[-1] - 1):
        if (frame + 1) % patch and bool((plan[..., frame] != plan[..., frame + 1]).any()):
            return frame, frame + 1
    return None
