"""The scene record: stable bytes, lossless round trip, and errors that name the field."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from models.scene import (
    CaptionSource,
    EncodedSpan,
    Entity,
    LatentSource,
    Reference,
    Scene,
    SceneError,
    Shot,
    Source,
    State,
    link_shots,
    shot_tensor_key,
)


def make_shot(start: int, end: int) -> Shot:
    span = EncodedSpan(start, 5, 8.0, [100 * (start + i) for i in range(5)], 64, 64)
    return Shot(
        "", 0, 100 * start, 100 * end, start, end, [1, 800], encoded=span, scores={"motion": 0.5},
        prompt="[SHOT CUT] Wide shot.", states=[State("on the left", 0), State("on the right", 4)],
    )  # fmt: skip


def make_scene() -> Scene:
    shots = link_shots([make_shot(0, 17), make_shot(17, 30), make_shot(30, 60)], "v/0")
    return Scene(
        "v/0", "v", Source("v.mp4", "ab" * 32, 123), 8.0, 256, 256, 7.5, shots, story="[Story] é",
        entities=[Entity("c1", "Character 1", "a red circle")], references=[Reference("portrait", "p.png")],
        captions=CaptionSource("sidecar", "toyworld", "ff"), latents=LatentSource("aa", "bb", "float32"),
        extra={"level": "small"},
    )  # fmt: skip


def test_round_trip_is_lossless_and_stable():
    scene = make_scene()
    text = scene.to_json()
    again = Scene.from_json(text)
    assert again == scene
    assert again.to_json() == text
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert scene.shots[1].start_s == 17 * 100 / 800


def change(record: dict, path: str, value: object) -> dict:
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    node = record
    for p in parents:
        node = node[p]
    node[last] = value
    return record


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("shots.1.start_frame", 18, r"shots\[1\]: start_frame is 18, expected 17"),
        ("shots.1.start_pts", 1699, r"shots\[1\]: start_pts is 1699, expected 1700"),
        ("shots.1.prev_id", None, r"shots\[1\]: prev_id is None, expected 'v/0/s000'"),
        ("shots.2.next_id", "v/0/s003", r"shots\[2\]: next_id"),
        ("shots.0.encoded.num_frames", 0, "num_frames is 0, expected at least 1"),
        ("shots.0.encoded.pts", [0, 1, 2, 3, 9999], "outside the shot's"),
        ("shots.0.encoded.pts", [0, 100, 50, 300, 400], "go back in time"),
        ("shots.0.transition", "wipe", "expected one of 'start', 'cut'"),
        ("shots.0.states.1.frame", 5, "outside 0..4"),
        ("shots.0.scores.motion", "high", r"scores.motion is 'high' \(str\), expected float"),
        ("shots.0.index", True, r"index is True \(bool\), expected int"),
        ("fps", None, r"fps is None \(NoneType\), expected float"),
        ("storey", "x", "unknown field 'storey'; did you mean 'story'"),
        ("version", 99, "version is 99"),
        ("shots", [], "at least one shot"),
    ],
)
def test_a_wrong_field_is_named(path, value, message):
    record = change(json.loads(make_scene().to_json()), path, value)
    with pytest.raises(SceneError, match=message):
        Scene.from_json(json.dumps(record))


def test_a_missing_field_is_named():
    record = json.loads(make_scene().to_json())
    del record["source"]["sha256"]
    with pytest.raises(SceneError, match="'v/0'.source.*sha256"):
        Scene.from_json(json.dumps(record))


def test_not_finite_numbers_are_refused():
    scene = make_scene()
    scene.shots[0].scores["motion"] = float("nan")
    with pytest.raises(SceneError, match="scores.motion is nan"):
        scene.to_json()
    with pytest.raises(SceneError, match="not JSON"):
        Scene.from_json("{")


def test_an_invalid_scene_is_not_written():
    scene = make_scene()
    scene.shots[1] = replace(scene.shots[1], end_frame=17)
    with pytest.raises(SceneError, match="the shot is empty"):
        scene.to_json()


def test_a_record_can_be_read_without_torch():
    code = "import sys, models.scene; assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tensor_names():
    assert shot_tensor_key(2, "latent_mean") == "s002.latent_mean"
    with pytest.raises(KeyError, match="latent_mean"):
        shot_tensor_key(0, "latents")
