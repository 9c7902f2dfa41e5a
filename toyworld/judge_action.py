"""Judge: which script of the vocabulary do the tracks follow, and when does each of its states begin?

Every (action, actor, partner, camera) hypothesis predicts positions, sizes, visibility, stripes and angles of all
tracks; its free parameters (where the path lies, how far it goes) are fitted by least squares, and the hypothesis
with the smallest robust residual wins. "Everybody stays still" is a hypothesis too: when it wins there is no action.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from toyworld.render import poses, states
from toyworld.vocabulary import ACTIONS, CAMERAS, FPS, HORIZON, PAIR_ACTIONS, Action, Camera, Side
from toyworld.world import Character, Place, ToyScene, ToyShot

SIGMA_POSITION = 0.04  # share of the frame
SIGMA_SCALE = 0.12  # natural log
SIGMA_ANGLE = 14.0  # degrees
SIGMA_HORIZON = 0.010
CAP = 9.0  # robust: no residual counts more than 3 sigma
GAIN = (0.5, 1.5)  # a path may be this much shorter or longer than its script
EXPLAINED = 0.7  # a script must leave at most this share of the residual that standing still leaves
MARGIN = 0.25  # an action must fit better than standing still by this much
PAN_PRIOR = 0.6  # a pan needs this much better a fit, for a lone character's pan looks like a move;
PAN_PRIOR_TOGETHER = 0.1  # several characters that drift alike leave less doubt


@dataclass(frozen=True)
class Motion:
    """What is measured of one track: arrays [T]; NaN or False where not readable."""

    seen: np.ndarray
    x: np.ndarray
    y: np.ndarray
    log_scale: np.ndarray
    angle: np.ndarray  # degrees, modulo `angle_period`
    angle_period: float  # 0: this character's angle cannot be seen
    striped: np.ndarray  # bool


@dataclass(frozen=True)
class ActionReading:
    """`action` is None when no script clearly beats standing still. `margin`: how much better than the next best."""

    action: Action | None
    actor: int | None  # index of the track
    partner: int | None
    camera: Camera
    cost: float
    margin: float
    states: tuple[tuple[str, int], ...]  # state and first frame, as read


@dataclass(frozen=True)
class Script:
    """One role's path at (x, y) = 0 offset: arrays [T]. `partner` is None for actions of one."""

    x: np.ndarray
    y: np.ndarray
    log_scale: np.ndarray
    angle: np.ndarray
    visible: np.ndarray
    striped: np.ndarray


def _dummy(action: Action, frames: int, side: Side = "left") -> tuple[ToyScene, ToyShot]:
    """A scene in which the first of two characters does `action`, to take its script from."""
    who = Character("red", "square", "plain", 0.0, 0.13, 0.0)
    place = Place("meadow", "tree", side, 0.2 if side == "left" else 0.8, "day")
    partner = 1 if action in PAIR_ACTIONS else None
    shot = ToyShot(
        0, (0, 1), 0, partner, action, ((0.5, 0.5), (0.5, 0.5)), "wide", "static", "filled", frames, "start", 0
    )
    return ToyScene("full", "train", 0, 0, FPS, (who, who), (place,), (shot,)), shot


@cache
def script(action: Action, frames: int, side: Side = "left") -> tuple[Script, Script | None]:
    """(the actor's path, the partner's or None)."""
    scene, shot = _dummy(action, frames, side)
    path = [poses(scene, shot, f) for f in range(frames)]

    def role(k: int) -> Script:
        p = [frame[k] for frame in path]
        return Script(
            np.array([q.x for q in p]), np.array([q.y for q in p]), np.log([q.scale for q in p]),
            np.array([q.angle for q in p]), np.array([q.visible for q in p]), np.array([q.striped > 0.5 for q in p]),
        )  # fmt: skip

    return role(0), role(1) if action in PAIR_ACTIONS else None


def state_spans(action: Action, frames: int) -> list[tuple[str, int]]:
    """The named states of an action in a shot of `frames` frames, with the frame each begins."""
    return states(_dummy(action, frames)[1])


@cache
def _still(frames: int) -> Script:
    zero = np.zeros(frames)
    return Script(zero + 0.5, zero + 0.5, zero, zero, np.ones(frames, bool), np.zeros(frames, bool))


def _camera_path(camera: Camera, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """(zoom, shift) per frame, as the renderer moves its camera."""
    t = np.linspace(0.0, 1.0, frames)
    zoom = {"zoom_in": 1.0 + 0.30 * t, "zoom_out": 1.30 - 0.30 * t}.get(camera, np.ones(frames))
    shift = 0.12 * (2 * t - 1) if camera == "pan" else np.zeros(frames)
    return zoom, shift


def _fit(motion: Motion, path: Script, camera: Camera, moving: bool) -> float:
    """Robust mean residual of one track under one role (the smaller, the better the fit)."""
    frames = len(motion.seen)
    zoom, shift = _camera_path(camera, frames)
    seen = motion.seen
    hidden = ~path.visible
    if seen.sum() < 3:
        return CAP
    # unknowns: where the path lies (x, y), how large the character is, how far the path goes
    zero, one = np.zeros(frames), np.ones(frames)
    dx, dy, ds = path.x - path.x.mean(), path.y - path.y.mean(), path.log_scale - path.log_scale.mean()
    sx, ss = SIGMA_POSITION, SIGMA_SCALE
    design = np.concatenate([
        np.stack([zoom, zero, zero, zoom * dx], 1)[seen] / sx,
        np.stack([zero, zoom, zero, zoom * dy], 1)[seen] / sx,
        np.stack([zero, zero, one, ds], 1)[seen] / ss,
    ])  # fmt: skip
    goal = np.concatenate([
        (motion.x - 0.5 + (0.5 + shift) * zoom)[seen] / sx,
        (motion.y - 0.5 + 0.5 * zoom)[seen] / sx,
        (motion.log_scale - np.log(zoom))[seen] / ss,
    ])  # fmt: skip
    gain = 1.0
    scripted = float((dx**2).sum() + (dy**2).sum() + (ds**2).sum())
    if moving and scripted > 1e-3:
        normal = design.T @ design + 1e-9 * np.eye(4)
        gain = float(np.clip(np.linalg.solve(normal, design.T @ goal)[3], *GAIN))
    rest = goal - gain * design[:, 3]
    # medians, not means: a few bad frames must not move the path
    n = int(seen.sum())
    residual = np.concatenate([part / scale - np.median(part / scale) for part, scale in (
        (rest[:n], design[:n, 0]), (rest[n : 2 * n], design[n : 2 * n, 1]), (rest[2 * n :], design[2 * n :, 2]),
    )]) * np.concatenate([design[:n, 0], design[n : 2 * n, 1], design[2 * n :, 2]])  # fmt: skip
    per_frame = np.minimum((residual.reshape(3, n) ** 2).sum(0), CAP)
    cost = np.full(frames, 0.35 * CAP)  # a frame that cannot be read speaks for no script, but against being there
    cost[seen] = per_frame
    cost[hidden & ~seen] = 0.0
    cost[hidden & seen] = CAP
    total = float(cost.mean()) + 0.2 * (gain - 1.0) ** 2
    striped = motion.striped if path.striped.any() else motion.striped ^ (np.mean(motion.striped[seen]) > 0.5)
    wrong = striped != path.striped
    total += CAP * float(wrong[seen].mean())
    if motion.angle_period:
        turn = motion.angle[seen] - path.angle[seen]
        p = motion.angle_period
        phase = np.exp(2j * np.pi * turn / p)
        mean = phase.mean()
        off = np.angle(phase * np.conj(mean / max(abs(mean), 1e-9))) * p / (2 * np.pi)
        total += 0.5 * float(np.minimum((off / SIGMA_ANGLE) ** 2, CAP).mean())
    return total


def _far_from_script(motion: Motion, path: Script) -> float:
    """Roles of pair actions differ by where they start, not by how they move."""
    seen = motion.seen
    if not seen.any():
        return 0.0
    off = np.median(motion.x[seen] - path.x[seen])
    return float(min((off / 0.25) ** 2, 1.0))


@dataclass(frozen=True)
class _Hypothesis:
    """One way to explain all tracks: `doers` (track indices) act, everybody else stays still."""

    cost: float
    action: Action | None
    doers: tuple[int, ...]
    camera: Camera


def _explanations(motions: list[Motion], camera: Camera, camera_cost: float, frames: int) -> Iterator[_Hypothesis]:
    """Stillness, and every script that leaves little enough of the residual that standing still leaves its doers."""
    still = [_fit(m, _still(frames), camera, moving=False) for m in motions]
    yield _Hypothesis(camera_cost + sum(still), None, (), camera)

    def acted(action: Action, doers: tuple[int, ...], fit: float) -> Iterator[_Hypothesis]:
        stiff = sum(still[k] for k in doers)
        if fit <= EXPLAINED * stiff:
            yield _Hypothesis(camera_cost + sum(still) - stiff + fit, action, doers, camera)

    for action in ACTIONS:
        sides: tuple[Side, ...] = ("left", "right") if action == "hide" else ("left",)
        for side in sides:
            lead, second = script(action, frames, side)
            for k, motion in enumerate(motions):
                fit = _fit(motion, lead, camera, moving=True)
                if second is None:
                    yield from acted(action, (k,), fit)
                    continue
                for j, other in enumerate(motions):
                    if j != k:
                        apart = _far_from_script(motion, lead) + _far_from_script(other, second)
                        yield from acted(action, (k, j), fit + _fit(other, second, camera, moving=True) + apart)


def _camera_costs(horizon: np.ndarray, num_tracks: int) -> dict[Camera, float]:
    """How badly each camera move explains the horizon [T]; a pan cannot be seen in it, only zooms."""
    costs: dict[Camera, float] = {}
    for camera in CAMERAS:
        zoom, _ = _camera_path(camera, len(horizon))
        expected = (HORIZON - 0.5) * zoom
        off = horizon - np.median(horizon) - (expected - np.median(expected))
        costs[camera] = float(np.minimum((off / SIGMA_HORIZON) ** 2, CAP).mean())
    costs["pan"] += PAN_PRIOR if num_tracks < 2 else PAN_PRIOR_TOGETHER
    return costs


def read_action(motions: list[Motion], horizon: np.ndarray) -> ActionReading:
    """Best script over all tracks. `horizon` [T] is the background's, as a share of the height; it shows zooms."""
    frames = len(horizon)
    costs = _camera_costs(horizon, len(motions))
    best: dict[Action | None, _Hypothesis] = {}
    for camera, camera_cost in costs.items():
        if camera_cost <= min(costs.values()) + 2.0:  # the others cannot win
            for guess in _explanations(motions, camera, camera_cost, frames):
                if guess.action not in best or guess.cost < best[guess.action].cost:
                    best[guess.action] = guess
    none = best.pop(None)
    ranked = sorted(best.values(), key=lambda guess: guess.cost)
    if not ranked or ranked[0].cost > none.cost - MARGIN:
        return ActionReading(None, None, None, none.camera, none.cost, 0.0, ())
    winner = ranked[0]
    next_best = min([none.cost, *(guess.cost for guess in ranked[1:])])
    actor, partner = winner.doers[0], winner.doers[1] if len(winner.doers) > 1 else None
    steady = [without_camera(m, winner.camera) for m in motions]
    assert winner.action is not None  # `best` has lost its None
    labels = label_states(steady[actor], winner.action, None if partner is None else steady[partner])
    names = state_spans(winner.action, frames)
    begun = [(frame, names[k][0]) for k, frame in enumerate(onsets(labels, len(names))) if frame is not None]
    read_states = tuple((name, frame) for frame, name in sorted(begun))
    return ActionReading(
        winner.action, actor, partner, winner.camera, winner.cost, next_best - winner.cost, read_states
    )


def without_camera(motion: Motion, camera: Camera) -> Motion:
    """The motion as a static camera would have shown it."""
    zoom, shift = _camera_path(camera, len(motion.seen))
    x = (motion.x - 0.5) / zoom + 0.5 + shift
    return replace(motion, x=x, y=(motion.y - 0.5) / zoom + 0.5, log_scale=motion.log_scale - np.log(zoom))


@cache
def expected_labels(action: Action, frames: int) -> np.ndarray:
    """Per frame the state of an action as the judge reads it from the script itself [T].

    Not always the state the script names: at the very frame a jump begins, the jumper is still on the ground.
    """
    lead, second = script(action, frames)

    def motion(path: Script) -> Motion:
        return Motion(path.visible, path.x, path.y, path.log_scale, path.angle, 360.0, path.striped)

    return label_states(motion(lead), action, motion(second) if second else None)


def onsets(labels: np.ndarray, count: int) -> tuple[int | None, ...]:
    """First frame of each of `count` states in per-frame labels; None where a state never shows."""
    where = [np.flatnonzero(labels == k) for k in range(count)]
    return tuple(int(w[0]) if len(w) else None for w in where)


def label_states(motion: Motion, action: Action, partner: Motion | None = None) -> np.ndarray:
    """Per frame the index of the state of `action` that the track is in, from its pose alone; -1 where unreadable.

    A frame is in the state of the script's nearest pose. Two states that look alike (on the ground before and after
    a jump) are told apart by the middle of the states between them.
    """
    frames = len(motion.seen)
    labels = np.full(frames, -1)
    names = state_spans(action, frames)
    if action == "spin":
        return _spin_states(motion, names)
    lead, second = script(action, frames)
    if action == "hide":
        labels[:] = np.where(motion.seen, 0, 1)
    elif action == "change":
        labels[:] = np.where(motion.seen, np.where(motion.striped, 1, 0), -1)
    else:
        apart = second is not None and action != "chase"  # these are told by the distance between the two
        wanted, got = (
            _progress_axis(lead, second if apart else None),
            _progress_axis(motion, partner if apart else None),
        )
        if action in ("grow", "shrink"):
            wanted, got = lead.log_scale, motion.log_scale
        elif action in ("move_up", "move_down", "jump", "rise_and_drop"):
            wanted, got = lead.y, motion.y
        use = motion.seen & (partner.seen if partner is not None and apart else True)
        if use.sum() < 3:
            return labels
        got = _onto(wanted, got, use)
        owner = np.zeros(frames, dtype=int)
        for k, (_, start) in enumerate(names):
            owner[start:] = k
        if action in ("jump", "rise_and_drop"):
            return _hop_states(action, got, wanted, use, names)
        labels[use] = owner[np.argmin(np.abs(got[use, None] - wanted[None, :]), axis=1)]
        return labels
    return _split_repeats(labels, names)


def _progress_axis(one: Motion | Script, two: Motion | Script | None) -> np.ndarray:
    return one.x if two is None else two.x - one.x


def _onto(wanted: np.ndarray, got: np.ndarray, use: np.ndarray) -> np.ndarray:
    """Shift `got` and stretch it within GAIN so that its range over `use` lies on that of `wanted`."""
    low, high = np.percentile(got[use], [2, 98])
    span = float(wanted.max() - wanted.min())
    gain = float(np.clip(span / max(high - low, 1e-6), 1 / GAIN[1], 1 / GAIN[0]))
    return (got - (low + high) / 2) * gain + float(wanted.max() + wanted.min()) / 2


def _hop_states(
    action: Action, y: np.ndarray, wanted: np.ndarray, use: np.ndarray, names: list[tuple[str, int]]
) -> np.ndarray:
    """Jump: off the ground or not. Rise and drop: on the ground, then before or after the highest point."""
    frames = len(y)
    labels = np.full(frames, -1)
    ground = float(wanted.max())
    if action == "jump":
        labels[use] = (y[use] < ground - 0.03).astype(int)
        return _split_repeats(labels, names)
    peak = int(np.flatnonzero(use)[np.argmin(y[use])])
    # the script has risen this far when its state "rising" begins
    off_ground = ground - 0.5 * float(wanted[names[1][1]] + wanted[max(names[1][1] - 1, 0)])
    after = np.arange(frames) > peak
    labels[use] = np.where(after, 2, np.where(y < ground - off_ground, 1, 0))[use]
    return labels


def _spin_states(motion: Motion, names: list[tuple[str, int]]) -> np.ndarray:
    """Angle summed from frame to frame, because a symmetric shape shows it only modulo its period."""
    labels = np.full(len(motion.seen), -1)
    if not motion.angle_period or motion.seen.sum() < 3:
        return labels
    index = np.flatnonzero(motion.seen)
    p = motion.angle_period
    step = (np.diff(motion.angle[index]) + p / 2) % p - p / 2
    total = np.concatenate([[0.0], np.cumsum(step)])
    share = np.abs(total) / 360.0
    for k, begin in enumerate((0.0, 0.375, 0.75)[: len(names)]):
        labels[index[share > begin - 0.02]] = k
    return labels


def _split_repeats(labels: np.ndarray, names: list[tuple[str, int]]) -> np.ndarray:
    """Where the last state looks like the first, frames after the middle of the other state belong to the last."""
    if len(names) == 3 and names[0][0] == names[2][0]:
        between = np.flatnonzero(labels == 1)
        if len(between):
            late = np.arange(len(labels)) > np.median(between)
            labels = np.where((labels == 0) & late, 2, labels)
    return labels
