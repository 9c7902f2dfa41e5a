"""Group the shots of one source into scenes and make their records, still without captions and latents."""

from __future__ import annotations

from itertools import pairwise
from math import ceil

import numpy as np

from models.scene import EncodedSpan, Scene, Shot, Source, link_shots
from preprocess.probe import VideoInfo
from preprocess.settings import PrepareSettings
from preprocess.signature import read_signatures
from preprocess.sources import SourceFile
from preprocess.spans import RawShot

SAME_PLACE = 0.5  # cosine of two signatures from which on two shots are taken to belong together
REACH = 4  # shots back and forth over which a scene may leave a picture and return to it


def scene_sizes(count: int, most: int) -> list[int]:
    """`count` shots as the fewest groups of at most `most`, as even as possible: 10 shots make 5 + 5, not 9 + 1."""
    groups = ceil(count / most)
    return [count // groups + (i < count % groups) for i in range(groups)]


def group_shots(signatures: list[str], most: int) -> list[int]:
    """Sizes of scenes of consecutive shots: a scene goes on while some shot returns to what an earlier one showed.

    Shots up to `REACH` apart whose signatures agree tie all between them together (overlapping links: Hanjalic et al.,
    "Automated high-level movie segmentation", 1999). A shot without a signature, which has no frames to encode, stays
    with the one before. Groups of more than `most` shots are split evenly.
    """
    if not (count := len(signatures)):
        return []
    known = [i for i, one in enumerate(signatures) if one]
    # whether shot i belongs to the scene of shot i-1; before the first signature nothing tells shots apart
    tied = [not one or not any(signatures[:i]) for i, one in enumerate(signatures)]
    if known:
        vectors = read_signatures([signatures[i] for i in known])
        for reach in range(1, min(REACH + 1, len(known))):
            alike = (vectors[:-reach] * vectors[reach:]).sum(1) >= SAME_PLACE
            for a in np.flatnonzero(alike):
                tied[known[a] + 1 : known[a + reach] + 1] = [True] * (known[a + reach] - known[a])
    starts = [i for i in range(count) if i == 0 or not tied[i]]
    sizes = [end - start for start, end in zip(starts, [*starts[1:], count], strict=True)]
    return [part for size in sizes for part in scene_sizes(size, most)]


def make_scenes(
    file: SourceFile, sha256: str, info: VideoInfo, shots: list[RawShot], settings: PrepareSettings, told: bool
) -> list[Scene]:
    """Records of consecutive shots; a scene in which no shot is long enough to encode keeps its record too.

    A caption file (`told`) tells one story, so its shots stay together, up to `max_shots`; without one pictures decide.
    Where a stretch of the video is lost, a scene ends.
    """
    gaps = [i for i in range(1, len(shots)) if shots[i].start_frame != shots[i - 1].end_frame]
    sizes = []
    for begin, end in pairwise([0, *gaps, len(shots)]):
        if told:
            sizes += scene_sizes(end - begin, settings.max_shots)
        else:
            sizes += group_shots([shot.signature for shot in shots[begin:end]], settings.max_shots)
    scenes = []
    first = 0
    for number, size in enumerate(sizes):
        scene_id = f"{file.video_id}-{number:04d}"
        group = [_shot(shot, info, settings) for shot in shots[first : first + size]]
        group[0].transition = "start" if number == 0 else group[0].transition
        link_shots(group, scene_id)
        scenes.append(
            Scene(
                scene_id=scene_id,
                video_id=file.video_id,
                source=Source(file.name, sha256, file.bytes),
                fps=round(info.fps, 6),
                width=info.width,
                height=info.height,
                duration_s=round((group[-1].end_pts - group[0].start_pts) * info.seconds_per_tick, 6),
                shots=group,
                extra={
                    "scene": number,
                    "video": {
                        "codec": info.codec,
                        "variable_rate": info.variable_rate,
                        "rotation": info.rotation,
                        "hdr": info.hdr,
                        "interlaced": info.interlaced,
                    },
                },
            )
        )
        first += size
    return scenes


def _shot(raw: RawShot, info: VideoInfo, settings: PrepareSettings) -> Shot:
    span = None
    if raw.span_pts:
        span = EncodedSpan(
            raw.span_frames[0], len(raw.span_pts), settings.fps, list(raw.span_pts), settings.height, settings.width
        )
    return Shot(
        shot_id="",
        index=0,
        start_pts=raw.start_pts,
        end_pts=raw.end_pts,
        start_frame=raw.start_frame,
        end_frame=raw.end_frame,
        time_base=list(info.time_base),
        transition=raw.transition,
        confidence=raw.confidence,
        blend_frames=list(raw.blend_frames),
        blend_pts=list(raw.blend_pts),
        encoded=span,
        scores=dict(raw.scores),
        filtered=raw.filtered,
        signature=raw.signature,
    )
