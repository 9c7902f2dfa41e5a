"""Pairs for tasks with references: what is given, and the shot that should come of it.

    i2v_in_context    portrait of a character on white -> it acts in a place
    multi_image       portrait, picture of an empty place -> the character acts in that place
    keyframes         first, middle and last frame -> the shot
    v2v_style         a filled shot -> the same shot in another style
    action_transfer   a shot of another character, and the first frame of a new one -> the same action there

A pair is a pure function of (task, level, split, seed, index). In split "train" nothing held out appears on either
side; in split "test" every target's actor is held out, by identity or by (identity, action), and the character that
shows an action to transfer is one of training.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from toyworld.render import render_place, render_portrait, render_shot
from toyworld.text import place_phrase, sentence, shot_attributes
from toyworld.video import VideoFiles, write_video
from toyworld.vocabulary import LEVELS, LevelName, Split
from toyworld.words import ACTION_WORDS, STYLE_WORDS
from toyworld.world import ToyScene, sample_scene

PairTask = Literal["i2v_in_context", "multi_image", "keyframes", "v2v_style", "action_transfer"]
PairRole = Literal["portrait", "place", "keyframe", "source", "action", "first_frame"]
PAIR_TASKS: tuple[PairTask, ...] = get_args(PairTask)
CLIP_ROLES: tuple[PairRole, ...] = ("source", "action")  # the others are pictures
SEARCH = 2000  # scenes looked through for another character with the same action


@dataclass(frozen=True)
class PairReference:
    """Something given: a view of the single shot of `scene`; `frame` is set for keyframe and first_frame."""

    role: PairRole
    scene: ToyScene
    frame: int | None = None


@dataclass(frozen=True)
class ToyPair:
    """References in the order in which they are shown, and the target, a scene of one shot."""

    task: PairTask
    target: ToyScene
    references: tuple[PairReference, ...]

    @property
    def pair_id(self) -> str:
        return f"{self.task}-{self.target.scene_id}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(record: dict[str, Any]) -> ToyPair:
        references = tuple(
            PairReference(one["role"], ToyScene.from_dict(one["scene"]), one["frame"]) for one in record["references"]
        )
        return ToyPair(record["task"], ToyScene.from_dict(record["target"]), references)


@dataclass(frozen=True)
class PairFiles:
    target: VideoFiles
    references: tuple[Path, ...]  # in order


def sample_pair(
    task: PairTask, level: LevelName = "small", *, seed: int = 0, index: int = 0, split: Split = "train"
) -> ToyPair:
    """Draw pair `index` of a task. Raises ValueError for a task there is not."""
    if task not in PAIR_TASKS:
        raise ValueError(f"unknown pair task {task!r}; choose one of {', '.join(PAIR_TASKS)}")
    target = sample_scene(level, seed=seed, index=index, split=split, num_shots=1, num_characters=1)
    if task == "v2v_style":
        others = [style for style in LEVELS[level].styles if style != "filled"]
        target = _in_style(target, others[index % len(others)])
        return ToyPair(task, target, (PairReference("source", _in_style(target, "filled")),))
    if task == "keyframes":
        last = target.shots[0].num_frames - 1
        return ToyPair(task, target, tuple(PairReference("keyframe", target, f) for f in (0, last // 2, last)))
    if task == "action_transfer":
        actor = PairReference("action", _other_with_action(target))
        return ToyPair(task, target, (actor, PairReference("first_frame", target, 0)))
    portrait = PairReference("portrait", target)
    return ToyPair(task, target, (portrait, PairReference("place", target)) if task == "multi_image" else (portrait,))


def pair_of_id(pair_id: str) -> ToyPair:
    """Inverse of `ToyPair.pair_id`. Raises ValueError where no pair has this id."""
    task, level, split = "|".join(PAIR_TASKS), "|".join(LEVELS), "|".join(get_args(Split))
    match = re.fullmatch(rf"({task})-toy-({level})-({split})-(\d+)-(\d+)", pair_id)
    if match is None:
        raise ValueError(
            f"{pair_id!r} is no pair of `shotloom toyworld pairs`, such as i2v_in_context-toy-small-test-0-3"
        )
    pair = sample_pair(match[1], match[2], seed=int(match[4]), index=int(match[5]), split=match[3])  # type: ignore[arg-type]
    if pair.pair_id != pair_id:
        raise ValueError(f"{pair_id!r} is no pair's id; the pair it comes nearest to is {pair.pair_id!r}")
    return pair


def _in_style(scene: ToyScene, style: Any) -> ToyScene:
    return replace(scene, shots=(replace(scene.shots[0], style=style),))


def _other_with_action(target: ToyScene) -> ToyScene:
    """The first training scene, counted from the target's own index, in which a different character does the same."""
    who, action = target.characters[0], target.shots[0].action
    for k in range(SEARCH):
        other = sample_scene(
            target.level, seed=target.seed, index=target.index * SEARCH + k, num_shots=1, num_characters=1
        )
        differs = other.characters[0].colour != who.colour and other.characters[0].shape != who.shape
        if differs and other.shots[0].action == action:
            return other
    raise RuntimeError(f"{target.scene_id}: none of {SEARCH} training scenes shows {action!r} by another character")


def render_reference(reference: PairReference, size: int = 64) -> np.ndarray:
    """uint8 RGB [T,size,size,3], T = 1 for a picture."""
    scene = reference.scene
    if reference.role == "portrait":
        return render_portrait(scene.characters[0], size)[None]
    if reference.role == "place":
        return render_place(scene, 0, size)[None]
    frames = render_shot(scene, 0, size)
    return frames if reference.frame is None else frames[reference.frame : reference.frame + 1]


def pair_texts(pair: ToyPair) -> tuple[str, str]:
    """(story, prompt): what the references are, and of the target only what they do not show."""
    wanted = shot_attributes(pair.target, 0)
    does = ACTION_WORDS[wanted.action][0].format(who="", what=wanted.place.landmark)
    style = STYLE_WORDS[wanted.style][0]
    given, made = {
        "i2v_in_context": ("A character.", f"It {does} in {place_phrase(wanted.place)}, {style}."),
        "multi_image": ("A character. A place.", f"It {does} there, {style}."),
        "keyframes": ("Moments of a shot.", f"All of it, {style}."),
        "v2v_style": ("A shot.", f"The same, {style}."),
        "action_transfer": ("An action. A first frame.", f"The same action from there, {style}."),
    }[pair.task]
    return f"[CONDITION] {given}", f"[VIDEO] {made}"


def write_pair(pair: ToyPair, folder: Path | str, *, size: int = 256) -> PairFiles:
    """Write `folder`/videos/ID.mp4 with truth and captions, and its references to `folder`/references/.

    The captions (ID.json) list the references, by role and path from the captions' own folder. Their story and prompt
    are `pair_texts`, which lean on the references; their sentence says all. Prepare `videos`.
    """
    folder = Path(folder)
    files = write_video(pair.target, folder / "videos" / f"{pair.pair_id}.mp4", size=size)
    assert files.captions is not None
    paths, listed = [], []
    for number, reference in enumerate(pair.references):
        path = folder / "references" / f"{pair.pair_id}-{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if reference.role in CLIP_ROLES:
            path = path.with_suffix(".mp4")
            write_video(reference.scene, path, size=size, captions=False)
        else:
            Image.fromarray(render_reference(reference, size)[0]).save(path)
        paths.append(path)
        listed.append({"role": reference.role, "path": f"../references/{path.name}"})
    captions = json.loads(files.captions.read_text(encoding="ascii"))
    story, prompt = pair_texts(pair)
    captions |= {"story": story, "entities": [], "references": listed}
    captions["shots"][0] |= {"prompt": prompt, "sentence": sentence(pair.target, 0)}
    _write_json(files.captions, captions)
    truth = json.loads(files.truth.read_text(encoding="ascii"))
    _write_json(files.truth, truth | {"pair": pair.to_dict()})
    return PairFiles(files, tuple(paths))


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, sort_keys=True, separators=(",", ":")) + "\n", encoding="ascii")
