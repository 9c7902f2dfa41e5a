"""The work on one video, stage by stage, and the record that travels between the stages.

    probe -> decode (shots, encoded spans) -> captions -> encode (part on disk)

A stage that finds the video unfit ends it: from there on the unit carries status, stage and reason, later stages pass
it through, and its part holds no samples. `prepare_video` runs all stages in this process; the Ray pipeline runs the
same functions with units as rows.
"""

from __future__ import annotations

import json
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import Tensor

from models.records import decode as from_json
from models.scene import Reference, Scene, reference_tensor_key, shot_tensor_key
from preprocess.aesthetic import AestheticScorer
from preprocess.asked import Asker, Questions, Unasked
from preprocess.captions import caption_scenes, finish_asked, look_beside
from preprocess.decode import DecodeCount
from preprocess.encode import Encoder, scene_texts
from preprocess.filters import AESTHETIC, check_shots, check_video, judge, thresholds
from preprocess.known_cuts import caption_cuts
from preprocess.letterbox import NO_BARS, find_bars
from preprocess.outcome import Failed, SetAside, short
from preprocess.parts import Part, Row, join_parts, part_path, read_part, shot_rows, write_part
from preprocess.pieces import SideBySide, in_turn, make_jobs, plan_pieces, read_pieces
from preprocess.probe import VideoInfo, probe
from preprocess.recall import recall_latents, recall_shots, recalled_count
from preprocess.references import SeenReference, read_reference, see_references
from preprocess.remote import sha256_at
from preprocess.room import OutputError
from preprocess.scenes import make_scenes
from preprocess.settings import ASKED, PrepareSettings
from preprocess.sizes import Size
from preprocess.source_rows import source_row
from preprocess.sources import SourceFile
from preprocess.spans import RawShot, read_shots, scored_frames
from preprocess.stills import probe_images
from preprocess.workplace import Workplace, writes


@dataclass
class Unit:
    """One video on its way. JSON between stages; its frames wait in the scratch file, never in here."""

    file: SourceFile
    sha256: str = ""
    captions_sha256: str = ""
    untold: bool = False  # the JSON file beside it holds fields and no captions
    fields: dict[str, Any] = field(default_factory=dict)  # of that file, besides those of its list
    references: list[SeenReference] = field(default_factory=list)  # of all its scenes
    recall: dict[str, str] = field(default_factory=dict)  # key -> tar of earlier samples with the same pictures
    earlier: Row = field(default_factory=dict)  # the row of that result
    info: VideoInfo | None = None
    count: DecodeCount | None = None
    picture: Size | None = None  # displayed, without black bars; None: unknown
    size: Size | None = None  # of the encoded frames; None: not yet known
    shots: list[RawShot] = field(default_factory=list)
    scenes: list[Scene] = field(default_factory=list)
    aside: dict[str, str] = field(default_factory=dict)  # scenes that are not written -> "stage: reason"
    lost: list[str] = field(default_factory=list)  # stretches of a long video that could not be decoded, and why
    group: list[int] = field(default_factory=list)  # [number, of how many]: some scenes of a long video; else empty
    status: str = ""  # "" while under way, then written, filtered or failed
    stage: str = ""
    reason: str = ""
    attempts: int = 1
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def scenes_and_shots(self) -> Iterator[tuple[Scene, list[RawShot]]]:
        """Each scene with its shots as found."""
        first = 0
        for scene in self.scenes:
            yield scene, self.shots[first : first + len(scene.shots)]
            first += len(scene.shots)

    @staticmethod
    def from_json(text: str) -> Unit:
        return from_json(Unit, json.loads(text), "unit")


def run_stage(name: str, stage: Callable[[Unit], None], unit: Unit) -> Unit:
    """Run one stage on a unit that is still under way; what goes wrong ends this unit and no other.

    Raises OutputError where the run cannot write: that is no fault of this video, and nothing is recorded of it.
    """
    if unit.status:
        return unit
    began = time.perf_counter()
    try:
        stage(unit)
    except SetAside as end:
        unit.status, unit.stage, unit.reason = end.status, end.stage, end.reason
    except OutputError:
        raise
    except Exception as error:  # a bug or an odd file must not take the run with it; it is reported by name
        unit.status, unit.stage, unit.reason = "failed", name, f"unexpected {short(error)}"
    unit.seconds[name] = unit.seconds.get(name, 0.0) + time.perf_counter() - began
    return unit


@writes
def probe_stage(unit: Unit, place: Workplace) -> None:
    """Container index and content hash; rules that need nothing else."""
    if unit.file.error:
        raise Failed("sources", unit.file.error)
    path = Path(place.video(unit))
    if not path.is_file() and not (unit.file.fps and path.is_dir()):
        raise Failed("probe", "no such file")
    try:
        unit.sha256 = sha256_at(str(path))
    except OSError as error:
        raise Failed("probe", f"cannot be read: {error.strerror}") from error
    if path.stat().st_size == 0:
        raise Failed("probe", "the file is empty (0 bytes)")
    captions = place.captions(unit)
    if captions and Path(captions).is_file():
        unit.captions_sha256 = sha256_at(captions)
        told, unit.fields = look_beside(captions)
        unit.untold = not told
    else:
        captions = None
    unit.references = see_references(unit.file, None if unit.untold else captions)
    unit.info = probe_images(path, unit.file.fps) if unit.file.fps else probe(str(path))
    check_video(unit.info, place.settings)


@writes
def decode_stage(unit: Unit, place: Workplace, side_by_side: SideBySide = in_turn) -> None:
    """The one decode: shots, and their encoded spans in the scratch file; an earlier result is recalled.

    `side_by_side` runs the pieces of a long video.
    """
    assert unit.info is not None
    shots, scenes, earlier = None, [], unit.earlier
    told = bool(unit.file.captions) and not unit.untold
    if unit.recall and place.settings.cuts != "captions":  # other captions may have other cuts
        _take_size(unit, place, (earlier.get("picture_height") or 0, earlier.get("picture_width") or 0))
        shots = recall_shots(unit.recall, unit.info)
    if shots is not None:
        scenes = make_scenes(unit.file, unit.sha256, unit.info, shots, place.settings_of(unit), told)
        if [shot.recalled for shot in shots] != [(one.scene_id, shot.index) for one in scenes for shot in one.shots]:
            shots = None  # a caption file came or went: shots of other scenes are encoded in other batches
    if shots is not None and _answered(replace(unit, scenes=scenes, shots=shots), place):
        unit.scenes, unit.shots = scenes, shots
        place.forget_video(unit)
        unit.count = recalled_count(earlier, unit.info)
        unit.lost = json.loads(earlier.get("lost") or "[]")
        return
    unit.recall = {}
    cuts = caption_cuts(place.captions(unit)) if place.settings.cuts == "captions" else None
    deadline = time.monotonic() + place.settings.seconds_per_video
    bars = NO_BARS
    if place.settings.crop_bars:
        bars, looked_at = find_bars(place.video(unit), unit.info, place.settings.max_seconds)
        unit.info.probe_frames += looked_at
    _take_size(unit, place, bars.picture(unit.info))
    settings = place.settings_of(unit)
    place.scratch.mkdir(parents=True, exist_ok=True)
    video, pieces = place.video(unit), plan_pieces(unit.info, settings)
    if len(pieces) > 1:
        folder, attempts = place.film(unit), place.parts / "attempts"
        jobs = make_jobs(video, unit.info, settings, pieces, folder, attempts, cuts, bars)
        unit.shots, unit.count, unit.lost = read_pieces(jobs, side_by_side)
    else:
        with place.scratch_file(unit).open("wb") as file:
            unit.shots, unit.count = read_shots(video, unit.info, settings, file, deadline, cuts, bars)
    place.forget_video(unit)
    unit.scenes = make_scenes(unit.file, unit.sha256, unit.info, unit.shots, settings, told)
    check_shots(unit.shots, settings)


def _take_size(unit: Unit, place: Workplace, picture: Size) -> None:
    """Note what a video shows, (0, 0) if an earlier version did not say, and the training size that follows."""
    unit.picture = picture if all(picture) else None
    unit.size = place.settings.size_of(picture)


@writes
def caption_stage(unit: Unit, place: Workplace, asker: Asker | None = None) -> None:
    """Captions and predicted states of all scenes; what goes wrong with a scene sets that scene aside.

    `asker`: whom to ask what is not recorded; None where the settings ask nobody, or all has been answered.
    """
    settings = place.settings_of(unit)
    spans = [shot.span_frames for shot in unit.shots]
    caption_scenes(unit.scenes, spans, place.captions(unit), settings.captions, unit.file.label)
    questions = Questions(settings, place.answers(), asker)
    if questions.any:
        asked, frames = [], []
        for scene, shots in unit.scenes_and_shots():
            if any(shot.encoded for shot in scene.shots):
                asked.append(scene)
                frames.append(partial(_read_spans, place, unit, shots))
        unit.aside = questions.fill(asked, frames)
    for scene in unit.scenes:
        if settings.captions in ASKED:
            finish_asked(scene, settings)
        assert scene.captions is not None
        scene.captions.states_key = settings.states_key
        scene.references = [Reference(one.role, one.path) for one in unit.references]
        scene.extra.pop("fields", None)
        fields = unit.fields | unit.file.fields
        scene.extra |= {"fields": fields} if fields else {}
    _written(unit)


def _answered(unit: Unit, place: Workplace) -> bool:
    """Whether captions and states of recalled scenes can be had without their frames, which an earlier result lacks."""
    if not Questions(place.settings, place.answers()).any:
        return True
    try:
        caption_stage(Unit.from_json(unit.to_json()), place)
    except Unasked:
        return False
    except SetAside:
        pass  # it will end so again, and needs no frame for that
    return True


def _written(unit: Unit) -> list[Scene]:
    """The scenes that are written. Raises Failed where none is, because all were set aside."""
    scenes = [s for s in unit.scenes if s.scene_id not in unit.aside and any(shot.encoded for shot in s.shots)]
    if not scenes and unit.aside:
        stage, _, reason = next(iter(unit.aside.values())).partition(": ")
        raise Failed(stage, reason if len(unit.aside) == 1 else f"all {len(unit.aside)} scenes; the first: {reason}")
    return scenes


@writes
def encode_stage(unit: Unit, place: Workplace, encoder: Encoder) -> None:
    """Latents and text embeddings, scene by scene, straight into the part."""
    settings = place.settings_of(unit)
    place.scratch.mkdir(parents=True, exist_ok=True)
    if encoder.aesthetic is not None:
        _score_aesthetics(unit, place, encoder.aesthetic)
        check_shots(unit.shots, place.settings)
    for scene in _written(unit):
        try:
            encoder.check_texts(scene)
        except Failed as error:
            unit.aside[scene.scene_id] = str(error)
    written = _written(unit)
    for scene in written:
        scene.latents = encoder.source(settings.dtype)
    texts = encoder.encode_texts(written, settings.dtype, settings.texts_apart)

    @cache
    def references() -> list[Tensor]:
        clips = []
        for one in unit.references:
            with tempfile.TemporaryDirectory(dir=place.scratch) as folder:
                clips.append(read_reference(one, Path(folder), settings))
        return encoder.encode_references(clips, settings.dtype, settings.tile)

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for scene, shots in unit.scenes_and_shots():
            if scene in written:
                named = scene_texts(scene, settings.texts_apart)
                tensors = {name: texts[text].clone() for name, text in named.items()}
                tensors |= encoder.encode_states(scene, settings.dtype)
                if shots[0].recalled:
                    tensors |= recall_latents(unit.recall, shots)
                else:
                    spans = _read_spans(place, unit, shots)
                    for i, latents in enumerate(encoder.encode_shots(spans, settings.dtype, settings.tile)):
                        tensors |= {shot_tensor_key(i, name): value for name, value in latents.items()}
                tensors |= {reference_tensor_key(i): mean for i, mean in enumerate(references())}
                yield scene.scene_id, {"json": scene.to_json().encode(), "safetensors": save(tensors)}

    unit.status = "written"
    try:
        write_part(place.part_folder(unit), _part(unit, place, written), samples())
    except BaseException:
        unit.status = ""
        raise


def _part(unit: Unit, place: Workplace, written: Sequence[Scene] = ()) -> Part:
    """The rows of a unit; what was measured of scenes that are not written is kept, to try other thresholds on."""
    ids = {scene.scene_id for scene in written}
    rows = [shot_rows(one, one.scene_id in ids, unit.aside.get(one.scene_id, "")) for one in unit.scenes]
    return Part(source_row(unit, place), [row for of_scene in rows for row in of_scene])


def _score_aesthetics(unit: Unit, place: Workplace, scorer: AestheticScorer) -> None:
    """Score all shots that have a frame, and leave out those under the threshold that no other filter took."""
    limits = thresholds(place.settings)
    shots = [shot for scene in unit.scenes for shot in scene.shots]
    for raw, shot in zip(unit.shots, shots, strict=True):
        count = len(raw.span_pts) or raw.samples
        if not count or AESTHETIC.score in raw.scores:  # a recalled shot has its score
            continue
        frames = _read_frames(place, unit, raw, count)
        raw.scores[AESTHETIC.score] = shot.scores[AESTHETIC.score] = scorer([frames[k] for k in scored_frames(count)])
        if not raw.filtered and (reason := judge(raw.scores, limits, [AESTHETIC])):
            raw.filtered = shot.filtered = reason
            raw.span_frames, raw.span_pts, shot.encoded = [], [], None
            shot.states, shot.predicted_states = [], []


@writes
def end_stage(unit: Unit, place: Workplace, scorer: AestheticScorer | None = None) -> Unit:
    """A part for a unit that was set aside. May be done again, and gives the same.

    Of a long video the last of its units to end makes the part; `status` is "" for those before. `scorer`: for a video
    of which filters left no shot, so that it never came to `encode_stage`.
    """
    if unit.status == "filtered" and scorer is not None:
        _score_aesthetics(unit, place, scorer)
    if unit.status != "written":
        write_part(place.part_folder(unit), _part(unit, place), iter(()))
    if unit.group:
        folders = [place.part_folder(replace(unit, group=[k, unit.group[1]])) for k in range(unit.group[1])]
        whole = join_parts([part_path(folder, unit.file.video_id) for folder in folders], place.parts)
        unit.status, unit.stage = (whole["status"], whole["stage"]) if whole else ("", "")
    return unit


def close_stage(unit: Unit, place: Workplace, scorer: AestheticScorer | None = None) -> Unit:
    """Last step of every unit: `end_stage`, and no scratch left."""
    end_stage(unit, place, scorer)
    if unit.status or not unit.group:  # else other units of a long video want it
        place.forget(unit)
    return unit


def spread(unit: Unit, place: Workplace) -> list[Unit]:
    """The scenes of a long video as units of their own, by the piece in which they begin; any other unit as it is."""
    begins = [piece.begin for piece in plan_pieces(unit.info, place.settings)] if unit.info else []
    if unit.status or unit.info is None or len(begins) < 2:
        return [unit]
    groups: dict[int, list[tuple[Scene, list[RawShot]]]] = {}
    for scene, shots in unit.scenes_and_shots():
        groups.setdefault(bisect_right(begins, scene.shots[0].start_frame), []).append((scene, shots))
    units = []
    for number, group in enumerate(groups.values()):
        scenes = [scene for scene, _ in group]
        one = replace(
            unit,
            scenes=scenes,
            shots=[shot for _, shots in group for shot in shots],
            aside={scene.scene_id: unit.aside[scene.scene_id] for scene in scenes if scene.scene_id in unit.aside},
            group=[number, len(groups)],
        )
        if number:  # what is said of the whole video is said once
            one.info = replace(unit.info, pts=[], key_pts=[], probe_frames=0)
            one.count, one.lost, one.seconds = DecodeCount(), [], dict.fromkeys(unit.seconds, 0.0)
        units.append(one)
    return units


def part_is_there(unit: Unit, place: Workplace) -> bool:
    """Whether some scenes of a long video were done by an earlier run or attempt."""
    return bool(unit.group) and read_part(part_path(place.part_folder(unit), unit.file.video_id)) is not None


def all_stages(unit: Unit, place: Workplace, encoder: Encoder, asker: Asker | None = None) -> None:
    """A video from its first stage to its part, in this process."""
    run_stage("probe", lambda u: probe_stage(u, place), unit)
    run_stage("decode", lambda u: decode_stage(u, place), unit)
    run_stage("captions", lambda u: caption_stage(u, place, asker), unit)
    for one in spread(unit, place):
        run_stage("encode", lambda u: encode_stage(u, place, encoder), one)
        close_stage(one, place, encoder.aesthetic)


def prepare_video(
    file: SourceFile,
    settings: PrepareSettings,
    encoder: Encoder,
    folder: Path,
    encoder_key: str = "",
    asker: Asker | None = None,
) -> Part:
    """All stages on one video, in this process, without Ray. Leaves the part in `folder` and returns its rows.

    Answers of models are recorded in `folder`/answers.
    """
    with tempfile.TemporaryDirectory() as scratch:
        all_stages(Unit(file), Workplace(settings, folder, Path(scratch), encoder_key), encoder, asker)
    part = read_part(folder / f"{file.video_id}.tar")
    assert part is not None
    return part


def _read_spans(place: Workplace, unit: Unit, shots: list[RawShot]) -> list[np.ndarray | None]:
    """Encoded spans, uint8 [n,H,W,3] each, of shots of one source from its scratch files."""
    return [_read_frames(place, unit, shot, len(shot.span_pts)) if shot.span_pts else None for shot in shots]


def _read_frames(place: Workplace, unit: Unit, shot: RawShot, count: int) -> np.ndarray:
    """The first `count` frames, uint8 [count,H,W,3], of those that wait for a shot in the scratch file."""
    assert unit.size is not None
    shape = (count, *unit.size, 3)
    size = int(np.prod(shape[1:]))
    with place.scratch_file(unit, shot.piece).open("rb") as file:
        file.seek(shot.offset * size)
        return np.frombuffer(file.read(count * size), np.uint8).reshape(shape)
