"""Scenes of ToyWorld: who appears where and does what, drawn from (level, split, seed, index) and nothing else."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np

from toyworld.vocabulary import (
    FPS,
    HUE_OFFSET_DEGREES,
    LEVELS,
    MAX_SHOTS,
    PAIR_ACTIONS,
    SHOT_FRAMES,
    SIZE_RANGE,
    Action,
    Camera,
    Colour,
    Landmark,
    LevelName,
    Light,
    Pattern,
    PlaceName,
    Shape,
    ShotSize,
    Side,
    Split,
    Style,
    Transition,
    identity_held_out,
    pair_held_out,
)  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True)
class Character:
    """One character of a scene; the last three fields are unsaid: constant in the scene, never in the text."""

    colour: Colour
    shape: Shape
    pattern: Pattern
    hue_offset: float  # degrees
    size: float  # radius as a share of the frame's width, in a wide shot
    stripe_angle: float  # degrees


@dataclass(frozen=True)
class Place:
    """Where a shot happens; `landmark_x` is unsaid (the side is said)."""

    name: PlaceName
    landmark: Landmark
    side: Side
    landmark_x: float  # centre, share of the width
    light: Light


@dataclass(frozen=True)
class ToyShot:
    """One shot: `actor` does `action`; every other character in `present` stays still (or is the partner)."""

    place: int  # index into ToyScene.places
    present: tuple[int, ...]  # indices into ToyScene.characters
    actor: int
    partner: int | None  # the second character of approach, part, chase and swap
    action: Action
    anchors: tuple[tuple[float, float], ...]  # (x, y) per present character: where its path is centred
    shot_size: ShotSize
    camera: Camera
    style: Style
    num_frames: int
    transition: Transition  # how the shot begins
    transition_frames: int  # 0 for start and cut


@dataclass(frozen=True)
class ToyScene:
    level: LevelName
    split: Split
    seed: int
    index: int
    fps: int
    characters: tuple[Character, ...]
    places: tuple[Place, ...]
    shots: tuple[ToyShot, ...]

    @property
    def scene_id(self) -> str:
        return f"toy-{self.level}-{self.split}-{self.seed}-{self.index:06d}"

    @property
    def num_frames(self) -> int:
        return sum(shot.num_frames for shot in self.shots)

    @property
    def cuts(self) -> list[int]:
        """First frame of every shot but the first."""
        starts = np.cumsum([shot.num_frames for shot in self.shots])[:-1]
        return [int(start) for start in starts]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(record: dict[str, Any]) -> ToyScene:
        shots = tuple(
            ToyShot(**{**s, "present": tuple(s["present"]), "anchors": tuple(map(tuple, s["anchors"]))})
            for s in record["shots"]
        )
        return ToyScene(
            **{
                **record,
                "characters": tuple(Character(**c) for c in record["characters"]),
                "places": tuple(Place(**p) for p in record["places"]),
                "shots": shots,
            }
        )


def _choice(rng: np.random.Generator, options: tuple[T, ...]) -> T:
    return options[int(rng.integers(len(options)))]


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return round(float(rng.uniform(low, high)), 4)  # rounded: the same bytes of truth on every platform


def _draw_character(rng: np.random.Generator, level_name: LevelName) -> Character:
    level = LEVELS[level_name]
    return Character(
        colour=_choice(rng, level.colours),
        shape=_choice(rng, level.shapes),
        pattern=_choice(rng, level.patterns),
        hue_offset=_uniform(rng, -HUE_OFFSET_DEGREES, HUE_OFFSET_DEGREES),
        size=_uniform(rng, *SIZE_RANGE),
        stripe_angle=_uniform(rng, 0.0, 180.0),
    )


def is_held_out(character: Character, action: Action | None = None) -> bool:
    """True if training never shows this identity, or (with `action`) this identity doing it."""
    who = (character.colour, character.shape, character.pattern)
    return identity_held_out(*who) or (action is not None and pair_held_out(*who, action))


def _allowed(action: Action, actor: Character, num_present: int, landmark: Landmark) -> bool:
    if action in PAIR_ACTIONS:
        return num_present >= 2
    if action == "hide":
        return landmark in ("tree", "house")
    if action == "spin":
        return actor.shape != "circle" or actor.pattern == "striped"
    if action == "change":
        return actor.pattern == "plain"
    return True


def _anchors(rng: np.random.Generator, action: Action, count: int) -> tuple[tuple[float, float], ...]:
    """Centres for the actor and its companions, in rows or columns that the actor's path does not cross."""
    jitter = [(_uniform(rng, -0.03, 0.03), _uniform(rng, -0.03, 0.03)) for _ in range(count)]
    flip = bool(rng.integers(2))
    near, far = (0.26, 0.75) if flip else (0.75, 0.26)
    if count == 1:
        spots = [(0.5, 0.5)]
    elif action in ("move_up", "move_down", "jump", "rise_and_drop"):
        spots = [(near, 0.5), (far, 0.5), (0.5, 0.16)]
    elif action == "hide":  # the hider's path has its own height (render.py): companions stay above it
        spots = [(0.5, near), (0.5, 0.24), (0.14, 0.20)]
    elif action in PAIR_ACTIONS:  # so have the paths of pairs, through the middle
        spots = [(0.5, near), (0.5, far), (0.14, 0.87 if far > 0.5 else 0.13)]
    elif action in ("move_left", "move_right"):
        spots = [(0.5, near), (0.5, far), (0.14, far)]
    else:
        spots = [(near, 0.5), (far, 0.5), (0.5, 0.16)]
    return tuple((round(x + dx, 4), round(y + dy, 4)) for (x, y), (dx, dy) in zip(spots[:count], jitter, strict=True))


def _draw_action(rng: np.random.Generator, scene_level: LevelName, actor: Character, count: int, landmark: Landmark,
                 split: Split, want_held_pair: bool) -> Action | None:  # fmt: skip
    options = [a for a in LEVELS[scene_level].actions if _allowed(a, actor, count, landmark)]
    if split == "train":
        options = [a for a in options if not is_held_out(actor, a)]
    elif want_held_pair:
        options = [a for a in options if is_held_out(actor, a)]
    return _choice(rng, tuple(options)) if options else None


def sample_scene(
    level: LevelName = "small",
    *,
    seed: int = 0,
    index: int = 0,
    split: Split = "train",
    num_shots: int | tuple[int, int] = (1, MAX_SHOTS),
    num_characters: int | None = None,
) -> ToyScene:
    """Draw scene `index` of the world (level, split, seed): a pure function of its arguments.

    `num_shots` is a count or an inclusive range. In split "train" no held-out identity appears and no held-out
    (identity, action) pair is acted; in split "test" every shot's actor is held out, by identity or by pair.
    Raises ValueError for a count outside 1..MAX_SHOTS or more characters than the level has.
    """
    spec = LEVELS[level]
    low, high = (num_shots, num_shots) if isinstance(num_shots, int) else num_shots
    if not 1 <= low <= high <= MAX_SHOTS:
        raise ValueError(f"num_shots={num_shots!r}: give a count or a range within 1..{MAX_SHOTS}")
    if num_characters is not None and not 1 <= num_characters <= spec.max_characters:
        raise ValueError(f"num_characters={num_characters}: level {level!r} has 1..{spec.max_characters}")
    rng = np.random.Generator(
        np.random.PCG64(np.random.SeedSequence([seed, index, zlib.crc32(f"{level}/{split}".encode())]))
    )
    count = int(rng.integers(low, high + 1))
    cast_size = num_characters or (1 if rng.random() < 0.7 else int(rng.integers(2, spec.max_characters + 1)))
    characters = _draw_cast(rng, level, split, cast_size)
    places = tuple(_draw_place(rng, level) for _ in range(1 if count < 4 or rng.random() < 0.7 else 2))
    style = _choice(rng, spec.styles)
    shots = []
    for i in range(count):
        place = i * len(places) // count
        shots.append(
            _draw_shot(rng, level, split, characters, places[place], place, style, first=i == 0, alone=count == 1)
        )
    return ToyScene(level, split, seed, index, FPS, characters, places, tuple(shots))


def _draw_cast(rng: np.random.Generator, level: LevelName, split: Split, size: int) -> tuple[Character, ...]:
    """Distinct identities; in training none held out, in test at least the first able to act a held-out part."""
    cast: list[Character] = []
    while len(cast) < size:
        character = _draw_character(rng, level)
        if split == "train" and is_held_out(character):
            continue
        # no two of one colour or of one shape-and-pattern, so that identity can be read from pixels
        if any(
            c.colour == character.colour or (c.shape, c.pattern) == (character.shape, character.pattern) for c in cast
        ):
            continue
        cast.append(character)
    return tuple(cast)


def _draw_place(rng: np.random.Generator, level: LevelName) -> Place:
    spec = LEVELS[level]
    side: Side = "left" if rng.integers(2) else "right"
    x = _uniform(rng, 0.12, 0.30) if side == "left" else _uniform(rng, 0.70, 0.88)
    return Place(_choice(rng, spec.places), _choice(rng, spec.landmarks), side, x, _choice(rng, spec.lights))


def _draw_shot(rng: np.random.Generator, level: LevelName, split: Split, cast: tuple[Character, ...], place: Place,
               place_index: int, style: Style, first: bool, alone: bool) -> ToyShot:  # fmt: skip
    spec = LEVELS[level]
    while True:
        present = tuple(range(len(cast)))
        if len(cast) > 1 and not alone and rng.random() < 0.4:  # a character may be absent for a shot, and return
            kept = rng.permutation(len(cast))[: int(rng.integers(1, len(cast)))]
            present = tuple(sorted(int(k) for k in kept))
        actor = present[int(rng.integers(len(present)))]
        held_identity = is_held_out(cast[actor])
        action = _draw_action(rng, level, cast[actor], len(present), place.landmark, split, not held_identity)
        if action is not None:
            break
    others = [k for k in present if k != actor]
    spots = _anchors(rng, action, len(present))
    by_character = dict(zip([actor, *others], spots, strict=True))
    transition: Transition = "start" if first else _choice(rng, spec.transitions)
    return ToyShot(
        place=place_index,
        present=present,
        actor=actor,
        partner=others[0] if action in PAIR_ACTIONS else None,
        action=action,
        anchors=tuple(by_character[k] for k in present),
        shot_size=_choice(rng, spec.shot_sizes) if len(present) == 1 else "wide",
        camera=_choice(rng, spec.cameras),
        style=style,
        num_frames=SHOT_FRAMES,
        transition=transition,
        transition_frames=int(rng.integers(4, 9)) if transition in ("dissolve", "fade") else 0,
    )


DRESSED_PROB = 2 / 3  # of each character of a scene that `dressed` is given


def dressed(scene: ToyScene) -> ToyScene:
    """The training scene with some of its characters striped or dotted and in any shape of the level, all through it.

    Level small has 14 identities to train on, too few to learn that a shape's name means its shape in every colour; so
    it has three times as many. A character stays as it is where training may show nothing that would come of it. A pure
    function of the scene. Raises ValueError for a scene of split "test", whose characters are what is asked for.
    """
    if scene.split != "train":
        raise ValueError(f"{scene.scene_id}: only scenes of split 'train' are dressed, this one is of {scene.split!r}")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([scene.seed, scene.index, 13])))
    for who in range(len(scene.characters)):
        if rng.random() < DRESSED_PROB and (options := _dresses(scene, who)):
            character = _choice(rng, tuple(options))
            scene = replace(scene, characters=(*scene.characters[:who], character, *scene.characters[who + 1 :]))
    return scene


def _dresses(scene: ToyScene, who: int) -> list[Character]:
    """What a character may look like instead: unlike all others, not held out, and able to act what it acts."""
    others = [(c.shape, c.pattern) for k, c in enumerate(scene.characters) if k != who]
    acted = [(shot, scene.places[shot.place].landmark) for shot in scene.shots if shot.actor == who]
    options = []
    for shape in LEVELS[scene.level].shapes:
        for pattern in ("striped", "dotted"):
            character = replace(scene.characters[who], shape=shape, pattern=pattern)
            if (shape, pattern) in others or is_held_out(character):
                continue
            if all(
                _allowed(shot.action, character, len(shot.present), landmark)
                and not is_held_out(character, shot.action)
                for shot, landmark in acted
            ):
                options.append(character)
    return options


def single_shot(scene: ToyScene, index: int) -> ToyScene:
    """Shot `index` as a scene of its own, with only the characters it shows and the place it is in."""
    shot = scene.shots[index]
    renumber = {old: new for new, old in enumerate(shot.present)}
    alone = replace(
        shot,
        place=0,
        present=tuple(range(len(shot.present))),
        actor=renumber[shot.actor],
        partner=None if shot.partner is None else renumber[shot.partner],
        transition="start",
        transition_frames=0,
    )
    return replace(
        scene,
        characters=tuple(scene.characters[k] for k in shot.present),
        places=(scene.places[shot.place],),
        shots=(alone,),
    )
