"""`describe`: captions without a model. Says only what was measured: colours, light, motion, camera, length."""

from __future__ import annotations

from models.scene import Scene, Shot

TEMPLATES = {
    "prompt": "[SHOT CUT] {seconds} shot, {light}{colours}, {motion}, {camera}.",
    "sentence": "A {seconds} shot, {light}{colours}, {motion}, {camera}.",
    "story": "[Character] Not named. [Environment] {light}{colours}. [Story] In {shots}.",
    "version": "1",
}
_MOTION = ((4.0, "no motion"), (40.0, "slow motion"), (150.0, "motion"))  # grey levels per second
_FAST = "fast motion"
_PAN = 0.06  # picture widths or heights over the shot
_ZOOM = 0.2


def describe_shot(shot: Shot) -> None:
    """Set prompt, sentence and camera of a shot from its scores, in place."""
    shot.camera = camera(shot.scores)
    words = {
        "seconds": f"{shot.duration_s:.1f} s",
        "light": _light(shot.scores),
        "colours": _colours([shot.scores]),
        "motion": next((word for most, word in _MOTION if shot.scores.get("motion", 0.0) < most), _FAST),
        "camera": shot.camera,
    }
    shot.prompt, shot.sentence = TEMPLATES["prompt"].format(**words), TEMPLATES["sentence"].format(**words)


def describe_scene(scene: Scene) -> None:
    """Set the story of a scene from the scores of its shots, in place."""
    scores = [shot.scores for shot in scene.shots if shot.scores.get("seconds")] or [{}]
    brightness = sum(s.get("brightness", 0.5) for s in scores) / len(scores)
    count = len(scene.shots)
    text = TEMPLATES["story"].format(
        light=_light({"brightness": brightness}),
        colours=_colours(scores),
        shots="1 shot" if count == 1 else f"{count} shots",
    )
    head, _, tail = text.partition("[Environment] ")
    scene.story = f"{head}[Environment] {tail[0].upper()}{tail[1:]}"


def camera(scores: dict[str, float]) -> str:
    """ "camera pans left", "camera zooms in", "static camera": the largest measured move."""
    moves = [
        (abs(scores.get("pan_x", 0.0)) / _PAN, "pans right" if scores.get("pan_x", 0.0) > 0 else "pans left"),
        (abs(scores.get("pan_y", 0.0)) / _PAN, "tilts down" if scores.get("pan_y", 0.0) > 0 else "tilts up"),
        (abs(scores.get("zoom", 0.0)) / _ZOOM, "zooms in" if scores.get("zoom", 0.0) > 0 else "zooms out"),
    ]
    size, words = max(moves)
    return f"camera {words}" if size >= 1.0 else "static camera"


def _light(scores: dict[str, float]) -> str:
    brightness = scores.get("brightness", 0.5)
    return "dark " if brightness < 0.25 else "bright " if brightness > 0.75 else ""


def _colours(scores: list[dict[str, float]]) -> str:
    """The two commonest colours, "grey and green"."""
    totals: dict[str, float] = {}
    for one in scores:
        for name, share in one.items():
            if name.startswith("colour_"):
                totals[name[7:]] = totals.get(name[7:], 0.0) + share
    top = sorted(totals, key=lambda name: (-totals[name], name))[:2]
    return " and ".join(top) or "no colour measured"
