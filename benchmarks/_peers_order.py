"""Video preparation in the order of work of other tools, with our own measures, so that only the order differs.

    detect (decode) -> split into clips (decode, encode) -> motion (decode) -> quality (decode) -> frames (decode)

Five decodes and one encode per video, as NeMo Curator 1.3.0 and Open-Sora's scripts have them. Where there is a choice,
the cheaper one is taken: one process and no copies of files between the steps, all clips of a video cut in one decode
by libx264 with PySceneDetect's own settings for ffmpeg, our decoder in the later stages, and a stage stops reading a
clip behind the last frame that it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from preprocess.decode import DecodeCount, Frame, frames
from preprocess.measure import measure_shot
from preprocess.probe import probe
from preprocess.quality import measure_quality
from preprocess.settings import PrepareSettings
from preprocess.signature import make_signature

_SPLIT = {"preset": "veryfast", "crf": "22", "x264-params": "log-level=none"}  # scenedetect.split_video_ffmpeg's


def peers_order(path: str, settings: PrepareSettings, folder: Path) -> int:
    """Prepare one video up to the encoded frames, in files in `folder`; how many clips came of it."""
    clips = split(path, detect(path), folder)
    for clip in clips:
        motion(clip, settings)
        quality(clip, settings)
        keep_frames(clip, settings, clip.with_suffix(".frames"))
    return len(clips)


def detect(path: str) -> list[float]:
    """Seconds at which PySceneDetect's AdaptiveDetector begins a shot, other than the first."""
    import scenedetect

    manager = scenedetect.SceneManager()
    manager.add_detector(scenedetect.AdaptiveDetector())
    manager.detect_scenes(scenedetect.open_video(path, backend="pyav", suppress_output=True))
    return [first.seconds for first, _ in manager.get_scene_list()[1:]]


def split(path: str, cuts: list[float], folder: Path) -> list[Path]:
    """The video as one H.264 file per shot, at its own size."""
    clips: list[Path] = []
    left = list(cuts)
    output = stream = None
    with av.open(path) as source:
        video = source.streams.video[0]
        video.thread_type = "NONE"
        for frame in source.decode(video):
            if frame.pts is None:
                continue
            if output is None or (left and frame.time >= left[0] - 1e-6):
                _close(output, stream)
                left = left[len(clips) > 0 :]
                clips.append(folder / f"{len(clips):04d}.mp4")
                output = av.open(str(clips[-1]), "w")
                stream = output.add_stream("libx264", rate=video.average_rate)
                stream.width, stream.height = frame.width // 2 * 2, frame.height // 2 * 2
                stream.pix_fmt, stream.options, stream.thread_count = "yuv420p", _SPLIT, 1
                stream.time_base = stream.codec_context.time_base = video.time_base
                first = frame.pts
            if (frame.width, frame.height, frame.format.name) != (stream.width, stream.height, "yuv420p"):
                pts = frame.pts
                frame = frame.reformat(stream.width, stream.height, "yuv420p", threads=1)
                frame.pts, frame.time_base = pts, video.time_base
            frame.pts -= first
            frame.pict_type = av.video.frame.PictureType.NONE
            output.mux(stream.encode(frame))
    _close(output, stream)
    return clips


def _close(output: object, stream: object) -> None:
    if output is not None:
        output.mux(stream.encode())  # type: ignore[attr-defined]
        output.close()  # type: ignore[attr-defined]


def motion(clip: Path, settings: PrepareSettings) -> dict[str, float]:
    return measure_shot([frame.small() for frame in _sampled(clip, settings)], settings.fps)


def quality(clip: Path, settings: PrepareSettings) -> dict[str, float]:
    chosen = list(_sampled(clip, settings))
    small = [frame.small() for frame in chosen]
    make_signature(small)
    images = [frame.cropped(settings.height, settings.width) for frame in chosen]
    return measure_quality(images, small, [frame.index for frame in chosen], settings.fps)


def keep_frames(clip: Path, settings: PrepareSettings, to: Path) -> None:
    with to.open("wb") as file:
        for frame in _sampled(clip, settings):
            file.write(np.ascontiguousarray(frame.cropped(settings.height, settings.width)).tobytes())


def _sampled(clip: Path, settings: PrepareSettings) -> Iterator[Frame]:
    """At most `shot_frames` frames of a clip at the training rate."""
    info = probe(str(clip))
    wanted = 0
    for frame in frames(str(clip), info, settings.height, settings.width, count=DecodeCount()):
        seconds = (frame.pts - info.pts[0]) * info.seconds_per_tick
        while wanted < settings.shot_frames and seconds + 0.5 / info.fps >= wanted / settings.fps:
            wanted += 1
            yield frame
        if wanted == settings.shot_frames:
            return
