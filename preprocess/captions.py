"""Captions of a scene: `sidecar` reads a JSON file beside the video, `describe` says what was measured.

Those of `endpoint` and `transformers` come from a model (`preprocess.asked`); here its unseen shots get words, too.

A sidecar `X.json` beside `X.mp4` holds story, label, entities [{id, name, description}], references [{role, path}] and
shots [{start_frame, end_frame, prompt, sentence, camera, label, entities [id], states [{text, frame}]}]; frames are
source frames, a state's frame counts from the start of its shot, paths start at the sidecar's folder. Its shots are
matched to the detected ones by overlap with the encoded frames. Label and references are read whoever captions. A file
that has none of these keys holds fields of the video.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.records import RecordError, decode
from models.scene import CaptionSource, Entity, Reference, Scene, Shot, State
from preprocess.describe import TEMPLATES, describe_scene, describe_shot
from preprocess.lists import CLASSES, plain_fields
from preprocess.outcome import Failed
from preprocess.scene_question import question_hash
from preprocess.settings import ASKED, SIDECARS, CaptionBackend, PrepareSettings

_MIN_OVERLAP = 0.5  # share of a shot's encoded frames that a caption must cover
_LARGEST = 16 * 2**20  # bytes of a sidecar file


@dataclass
class SidecarShot:
    start_frame: int
    end_frame: int
    prompt: str
    sentence: str = ""
    camera: str = ""
    label: int | None = None  # of this shot; None: the file's
    entities: list[str] = field(default_factory=list)  # ids
    states: list[State] = field(default_factory=list)


@dataclass
class Sidecar:
    shots: list[SidecarShot] = field(default_factory=list)
    story: str = ""
    label: int | None = None  # the class of all shots, those that no caption covers among them
    entities: list[Entity] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)


def template_hash(backend: CaptionBackend = "describe") -> str:
    """Changes when `describe` would say other words of the same measurements, or a model would be asked otherwise."""
    asked = question_hash() if backend in ASKED else ""
    return hashlib.sha256((json.dumps(TEMPLATES, sort_keys=True) + asked).encode()).hexdigest()[:16]


def caption_scenes(
    scenes: list[Scene],
    span_frames: list[list[int]],
    path: str | None,
    backend: CaptionBackend,
    label: int | None = None,
) -> None:
    """Fill story, entities, prompts, sentences, camera, states and labels of all scenes of one source, in place.

    Where a model is asked, labels alone: its words come later.

    Args:
        span_frames: per shot of the source, the source frame number of each encoded frame.
        path: the sidecar file, None where there is none.
        label: the class that the list of the source gives, None where it gives none.
    Raises:
        Failed: the sidecar is missing (backend `sidecar`), cannot be read, covers none of a scene's shots, or has
            another label.
    """
    words = backend in SIDECARS
    sidecar = read_sidecar(path, words) if path is not None else None
    if sidecar is None and backend == "sidecar":
        raise Failed("captions", "no caption file beside the video; write X.json beside X.mp4, or use describe")
    if sidecar is not None and None not in (sidecar.label, label) and sidecar.label != label:
        where = f"{sidecar.label} in {Path(str(path)).name} and {label} in the list"
        raise Failed("captions", f"label is {where}; give it in one of them")
    first = 0
    for scene in scenes:
        frames = span_frames[first : first + len(scene.shots)]
        first += len(scene.shots)
        for shot in scene.shots:
            shot.label = label
        said = _from_sidecar(scene, sidecar, frames, words) if sidecar is not None else 0
        if backend in ASKED:
            continue
        if said < len(scene.shots):
            if backend == "sidecar":
                missing = [shot.index for shot in scene.shots if not shot.prompt]
                if any(scene.shots[i].encoded for i in missing):
                    raise Failed("captions", f"{path} has no caption for shots {missing} of {scene.scene_id}")
            for shot in scene.shots:
                if not shot.prompt:
                    describe_shot(shot)
        used = "sidecar" if said == len(scene.shots) else "sidecar+describe" if said or scene.story else "describe"
        if not scene.story:
            describe_scene(scene)
        scene.captions = CaptionSource(used, "", "" if used == "sidecar" else template_hash())


def finish_asked(scene: Scene, settings: PrepareSettings) -> None:
    """Say what a model was not shown, the shots without encoded frames, and who made the captions, in place."""
    unseen = [shot for shot in scene.shots if not shot.prompt]
    for shot in unseen:
        describe_shot(shot)
    if not scene.story:
        describe_scene(scene)
    used = "describe" if len(unseen) == len(scene.shots) else settings.captions + "+describe" * bool(unseen)
    model = "" if used == "describe" else settings.caption_model
    scene.captions = CaptionSource(used, model, template_hash(settings.captions))


def look_beside(path: str) -> tuple[bool, dict[str, Any]]:
    """Of the JSON file beside a video: whether it holds captions, and the fields of the video that it holds.

    A file without `shots` is somebody else's, and its keys are fields, but for those that captions have. One that
    cannot be read holds captions: they will be refused by name.
    """
    try:
        value = _load(path)
    except Failed:
        return True, {}
    if not isinstance(value, dict) or "shots" in value:
        return True, {}
    known = {name for name in value if name in Sidecar.__dataclass_fields__}
    if type(value.get("label")) is not int:  # a word: no class
        known -= {"label"}
    return bool(known), plain_fields({name: one for name, one in value.items() if name not in known})


def read_sidecar(path: str, words: bool = True) -> Sidecar:
    """A checked caption file, or, without `words`, the references and labels of it; the rest may be of any form then.

    Raises Failed naming the file, the field and the value.
    """
    value = _load(path)
    try:
        sidecar = decode(Sidecar, _known(value) if words else _given(value), Path(path).name)
    except RecordError as error:
        raise Failed("captions", str(error)) from error
    name = Path(path).name
    for at, label in ((name, sidecar.label), *((f"{name}.shots[{i}]", s.label) for i, s in enumerate(sidecar.shots))):
        if label is not None and not 0 <= label < CLASSES:
            raise Failed("captions", f"{at}.label is {label}; give a class, counted from 0, or leave it out")
    for i, shot in enumerate(sidecar.shots):
        if not 0 <= shot.start_frame < shot.end_frame:
            span = f"{shot.start_frame}..{shot.end_frame}"
            raise Failed("captions", f"{name}.shots[{i}] is empty: frames {span}")
        for k, state in enumerate(shot.states):
            if state.frame < 0:
                at = f"{name}.shots[{i}].states[{k}].frame"
                raise Failed("captions", f"{at} is {state.frame}; frames count from the start of the shot, from 0")
        known = [entity.id for entity in sidecar.entities]
        if unknown := [one for one in shot.entities if one not in known]:
            raise Failed("captions", f"{name}.shots[{i}].entities: {unknown} are not among the entities {known}")
    return sidecar


def _known(value: Any) -> Any:
    """The fields we read; others are the writer's own and are left alone."""
    if not isinstance(value, dict):
        return value
    kept = {k: v for k, v in value.items() if k in Sidecar.__dataclass_fields__}
    if isinstance(kept.get("shots"), list):
        names = SidecarShot.__dataclass_fields__
        kept["shots"] = [
            {k: v for k, v in shot.items() if k in names} if isinstance(shot, dict) else shot for shot in kept["shots"]
        ]
    return kept


def _load(path: str) -> Any:
    try:
        if Path(path).stat().st_size > _LARGEST:
            raise Failed("captions", f"{path} is larger than {_LARGEST} bytes; is it a caption file?")
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Failed("captions", f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise Failed("captions", f"{path} is not JSON: {error}") from error


def _given(value: Any) -> dict[str, Any]:
    """References and labels alone, with the frames that the labels are of."""
    if not isinstance(value, dict):
        return {}
    given = {name: value[name] for name in ("label", "references") if name in value}
    shots = value.get("shots")
    labelled = [one for one in shots if isinstance(one, dict) and "label" in one] if isinstance(shots, list) else []
    names = ("start_frame", "end_frame", "label")
    return given | {"shots": [{n: one[n] for n in names if n in one} | {"prompt": ""} for one in labelled]}


def _from_sidecar(scene: Scene, sidecar: Sidecar, frames: list[list[int]], words: bool) -> int:
    """Fill what the sidecar says, without `words` labels alone; returns for how many shots it had a caption."""
    said = 0
    for shot, encoded in zip(scene.shots, frames, strict=True):
        shot.label = shot.label if sidecar.label is None else sidecar.label
        best, share = _best_match(shot, encoded, sidecar.shots)
        if best is None or share < _MIN_OVERLAP:
            continue
        shot.label = shot.label if best.label is None else best.label
        if not words:
            continue
        said += 1
        shot.prompt, shot.sentence, shot.camera = best.prompt, best.sentence, best.camera
        shot.entities = list(best.entities)
        shot.scores["caption_overlap"] = round(share, 4)
        shot.states = _states(best, encoded)
    if said or (words and not sidecar.shots):  # a file without shots tells of all that is there
        scene.story, scene.entities = sidecar.story, list(sidecar.entities)
    return said


def _best_match(shot: Shot, encoded: list[int], candidates: list[SidecarShot]) -> tuple[SidecarShot | None, float]:
    """The caption that covers most of the shot's encoded frames (of all its frames, where none is encoded)."""
    shown = encoded or list(range(shot.start_frame, shot.end_frame))
    best, share = None, 0.0
    for candidate in candidates:
        covered = sum(candidate.start_frame <= frame < candidate.end_frame for frame in shown) / len(shown)
        if covered > share:
            best, share = candidate, covered
    return best, share


def _states(caption: SidecarShot, encoded: list[int]) -> list[State]:
    """States with the encoded frame they hold from, in order; those that hold in no encoded frame are left out.

    Of those that begin before the first encoded frame, or between two, the last holds, with what begins with it.
    """
    held: dict[int, tuple[int, list[State]]] = {}  # encoded frame -> source frame of the states that hold from there
    for state in sorted(caption.states, key=lambda one: one.frame):
        frame = bisect_left(encoded, caption.start_frame + state.frame)
        if frame < len(encoded):
            since, states = held.get(frame, (state.frame, []))
            held[frame] = state.frame, [*states * (since == state.frame), State(state.text, frame)]
    return [state for _, states in held.values() for state in states]
