"""Group the shots of one source into scenes and make their records, still without captions and latents."""

from __future__ import annotations

from math import ceil

from models.scene import EncodedSpan, Scene, Shot, Source, link_shots
from preprocess.probe import VideoInfo
from preprocess.settings import PrepareSettings
from preprocess.sources import SourceFile
from preprocess.spans import RawShot


def scene_sizes(count: int, most: int) -> list[int]:
    """`count` shots as the fewest groups of at most `most`, as even as possible: 10 shots make 5 + 5, not 9 + 1."""
    groups = ceil(count / most)
    return [count // groups + (i < count % groups) for i in range(groups)]


def make_scenes(
    file: SourceFile, sha256: str, info: VideoInfo, shots: list[RawShot], settings: PrepareSettings
) -> list[Scene]:
    """Records of consecutive shots; a scene in which no shot is long enough to encode keeps its record too."""
    scenes = []
    first = 0
    for number, size in enumerate(scene_sizes(len(shots), settings.max_shots)):
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
