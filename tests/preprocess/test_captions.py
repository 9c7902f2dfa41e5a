"""Captions: sidecar shots find their detected shots; `describe` says what was measured; errors name the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from models.scene import EncodedSpan, Scene, Shot, Source, link_shots
from preprocess.captions import caption_scenes, look_beside, template_hash
from preprocess.describe import camera
from preprocess.measure import measure_shot
from preprocess.outcome import Failed
from preprocess.settings import CaptionBackend


def make_scene(cuts: list[int], number: int = 0, fps: int = 8) -> tuple[Scene, list[list[int]]]:
    """A scene of shots between `cuts`, at the training rate; and the source frames of their spans."""
    shots, frames = [], []
    for start, end in zip(cuts, cuts[1:], strict=False):
        count = min((end - start - 1) // 4 * 4 + 1, 17)
        span = list(range(start, start + count)) if count >= 5 else []
        encoded = EncodedSpan(start, count, fps, span, 64, 64) if span else None
        shots.append(Shot("", 0, start, end, start, end, [1, fps], encoded=encoded, scores={"motion": 10.0}))
        frames.append(span)
    scene_id = f"v-{number:04d}"
    link_shots(shots, scene_id)
    return Scene(scene_id, "v", Source("v.mp4", "", 1), fps, 64, 64, 1.0, shots), frames


def sidecar(path: Path, cuts: list[int], **changes) -> str:
    record = {
        "story": "[Character] A. [Environment] B. [Story] C.",
        "entities": [{"id": "c1", "name": "Character 1", "description": "a red circle"}],
        "shots": [
            {
                "start_frame": a,
                "end_frame": b,
                "prompt": f"[SHOT CUT] prompt {i}",
                "sentence": f"sentence {i}",
                "camera": "static",
                "states": [{"text": "left", "frame": 0}, {"text": "right", "frame": 12}],
            }
            for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False))
        ],
        "writer": "its own field",
    } | changes
    path.write_text(json.dumps(record))
    return str(path)


def test_sidecar_fills_every_layer(tmp_path: Path) -> None:
    scene, frames = make_scene([0, 17, 34])
    caption_scenes([scene], frames, sidecar(tmp_path / "v.json", [0, 17, 34]), "sidecar")
    assert [s.prompt for s in scene.shots] == ["[SHOT CUT] prompt 0", "[SHOT CUT] prompt 1"]
    assert [s.sentence for s in scene.shots] == ["sentence 0", "sentence 1"]
    assert scene.story.startswith("[Character] A.") and scene.entities[0].name == "Character 1"
    assert [(s.text, s.frame) for s in scene.shots[1].states] == [("left", 0), ("right", 12)]
    assert scene.captions is not None and scene.captions.backend == "sidecar"
    scene.validate()


def test_labels_are_the_files_or_the_shots_own(tmp_path: Path) -> None:
    shots = [{"start_frame": 0, "end_frame": 17, "prompt": "a"}, {"start_frame": 17, "end_frame": 34, "prompt": "b"}]
    scene, frames = make_scene([0, 17, 34])
    path = sidecar(tmp_path / "v.json", [], shots=[shots[0], shots[1] | {"label": 0}], label=4)
    caption_scenes([scene], frames, path, "sidecar")
    assert [shot.label for shot in scene.shots] == [4, 0]
    scene, frames = make_scene([0, 17, 34])
    caption_scenes([scene], frames, sidecar(tmp_path / "v.json", [], label=4, story=""), "sidecar_or_describe")
    assert [shot.label for shot in scene.shots] == [4, 4] and all(shot.prompt for shot in scene.shots)
    scene, frames = make_scene([0, 17])
    caption_scenes([scene], frames, sidecar(tmp_path / "v.json", [0, 17]), "sidecar")
    assert scene.shots[0].label is None


@pytest.mark.parametrize("backend", ["describe", "endpoint", "transformers"])
def test_classes_are_read_whoever_captions(tmp_path: Path, backend: CaptionBackend) -> None:
    scene, frames = make_scene([0, 17, 34])
    shots = [{"start_frame": 0, "end_frame": 17, "prompt": "a", "label": 1}, {"tool": "another's, without a class"}]
    caption_scenes([scene], frames, sidecar(tmp_path / "v.json", [], shots=shots, label=4), backend)
    assert [shot.label for shot in scene.shots] == [1, 4] and "prompt" not in scene.shots[0].prompt
    assert (scene.captions is None) == (backend != "describe") and scene.entities == []
    with pytest.raises(Failed, match=r"v.json.label is 'x'"):
        caption_scenes([scene], frames, sidecar(tmp_path / "v.json", [], label="x"), backend)
    (tmp_path / "list.json").write_text("[1, 2]")  # of another tool: nothing in it that could be lost
    caption_scenes([scene], frames, str(tmp_path / "list.json"), backend)


def test_a_class_of_the_list_goes_where_the_caption_file_has_none(tmp_path: Path) -> None:
    scene, frames = make_scene([0, 17, 34])
    caption_scenes([scene], frames, None, "describe", label=7)
    assert [shot.label for shot in scene.shots] == [7, 7]
    shots = [{"start_frame": 0, "end_frame": 17, "prompt": "a", "label": 2}]
    path = sidecar(tmp_path / "v.json", [], shots=shots)
    caption_scenes([scene], frames, path, "sidecar_or_describe", label=7)
    assert [shot.label for shot in scene.shots] == [2, 7]
    path = sidecar(tmp_path / "v.json", [], shots=[], label=6)
    with pytest.raises(Failed, match="label is 6 in v.json and 7 in the list; give it in one of them"):
        caption_scenes([scene], frames, path, "sidecar_or_describe", label=7)


def test_a_story_without_shots_is_told(tmp_path: Path) -> None:
    scene, frames = make_scene([0, 17, 34])
    (tmp_path / "v.json").write_text(json.dumps({"story": "All of it."}))
    caption_scenes([scene], frames, str(tmp_path / "v.json"), "sidecar_or_describe")
    assert scene.story == "All of it." and all("motion" in shot.prompt for shot in scene.shots)
    assert scene.captions is not None and scene.captions.backend == "sidecar+describe"


@pytest.mark.parametrize(
    ("value", "captions", "fields"),
    [
        ({"url": "x", "label": "cat"}, False, {"url": "x", "label": "cat"}),
        ({"label": 3, "url": "x"}, True, {"url": "x"}),
        ({"references": [], "n": 1}, True, {"n": 1}),
        ({"shots": [], "writer": "its own"}, True, {}),
        ({}, False, {}),
        (["no object"], True, {}),
    ],
)
def test_a_file_without_captions_holds_fields(tmp_path: Path, value: object, captions: bool, fields: dict) -> None:
    (tmp_path / "v.json").write_text(json.dumps(value))
    assert look_beside(str(tmp_path / "v.json")) == (captions, fields)
    (tmp_path / "v.json").write_text("{")
    assert look_beside(str(tmp_path / "v.json")) == (True, {}), "refused later, by name"


def test_states_are_counted_in_encoded_frames(tmp_path: Path) -> None:
    """Source at 24 frames/s, encoded at 8: state frame 12 of the source shot is encoded frame 4."""
    scene, _ = make_scene([0, 51])
    span = scene.shots[0].encoded
    assert span is not None
    frames = [[3 * i for i in range(span.num_frames)]]
    caption_scenes([scene], frames, sidecar(tmp_path / "v.json", [0, 51]), "sidecar")
    assert [s.frame for s in scene.shots[0].states] == [0, 4]


def test_of_states_before_the_first_encoded_frame_the_last_holds(tmp_path: Path) -> None:
    """And of those between two encoded frames; what begins with it holds, too."""
    scene, _ = make_scene([0, 34])
    said = [("c", 9), ("a", 0), ("b", 4), ("b too", 4), ("d", 12), ("e", 13), ("f", 15), ("gone", 400)]
    shot = {"start_frame": 0, "end_frame": 60, "prompt": "p", "states": [{"text": t, "frame": f} for t, f in said]}
    path = sidecar(tmp_path / "v.json", [], shots=[shot])

    def states(first: int) -> list[tuple[str, int]]:
        caption_scenes([scene], [[first + 3 * i for i in range(5)]], path, "sidecar")
        return [(state.text, state.frame) for state in scene.shots[0].states]

    assert states(6) == [("b", 0), ("b too", 0), ("c", 1), ("d", 2), ("f", 3)]
    assert states(9) == [("c", 0), ("d", 1), ("f", 2)]
    assert states(40) == [("f", 0)]
    assert states(0) == [("a", 0), ("b", 2), ("b too", 2), ("c", 3), ("d", 4)]


def test_a_cut_that_was_missed_takes_the_caption_of_what_is_encoded(tmp_path: Path) -> None:
    scene, frames = make_scene([0, 34])  # the caption file knows a cut at 17
    caption_scenes([scene], frames, sidecar(tmp_path / "v.json", [0, 17, 34]), "sidecar")
    assert scene.shots[0].prompt == "[SHOT CUT] prompt 0"
    assert scene.shots[0].scores["caption_overlap"] == 1.0


def test_a_cut_too_many_gives_both_halves_the_caption(tmp_path: Path) -> None:
    scene, frames = make_scene([0, 9, 17])
    caption_scenes([scene], frames, sidecar(tmp_path / "v.json", [0, 17]), "sidecar")
    assert [s.prompt for s in scene.shots] == ["[SHOT CUT] prompt 0"] * 2
    assert [(s.text, s.frame) for s in scene.shots[1].states] == [("left", 0), ("right", 3)]


def test_missing_captions_fall_to_describe_only_where_asked(tmp_path: Path) -> None:
    scene, frames = make_scene([0, 17, 34])
    caption_scenes([scene], frames, None, "sidecar_or_describe")
    assert scene.captions is not None and scene.captions.backend == "describe"
    assert scene.captions.template_hash == template_hash()
    assert all(s.prompt and s.sentence for s in scene.shots) and "[Story] In 2 shots." in scene.story
    scene, frames = make_scene([0, 17, 34])
    with pytest.raises(Failed, match="no caption file beside the video"):
        caption_scenes([scene], frames, None, "sidecar")


def test_a_sidecar_that_covers_one_shot_is_mixed_and_says_so(tmp_path: Path) -> None:
    path = sidecar(tmp_path / "v.json", [0, 17])
    scene, frames = make_scene([0, 17, 34])
    caption_scenes([scene], frames, path, "sidecar_or_describe")
    assert scene.captions is not None and scene.captions.backend == "sidecar+describe"
    assert scene.shots[0].prompt == "[SHOT CUT] prompt 0" and "motion" in scene.shots[1].prompt
    scene, frames = make_scene([0, 17, 34])
    with pytest.raises(Failed, match=r"no caption for shots \[1\]"):
        caption_scenes([scene], frames, path, "sidecar")


def test_second_scene_of_a_source_uses_its_own_frames(tmp_path: Path) -> None:
    path = sidecar(tmp_path / "v.json", [0, 17, 34])
    one, first = make_scene([0, 17])
    two, second = make_scene([17, 34], 1)
    caption_scenes([one, two], first + second, path, "sidecar")
    assert two.shots[0].prompt == "[SHOT CUT] prompt 1" and two.story == one.story


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": "none"}, r"v.json.shots is 'none'"),
        ({"shots": [{"start_frame": 0, "prompt": "x"}]}, r"v.json.shots\[0\]: missing field 'end_frame'"),
        ({"shots": [{"start_frame": 5, "end_frame": 5, "prompt": "x"}]}, r"shots\[0\] is empty: frames 5..5"),
        (
            {"shots": [{"start_frame": 0, "end_frame": 5, "prompt": "x", "states": [{"text": "t", "frame": -3}]}]},
            r"v.json.shots\[0\].states\[0\].frame is -3; frames count from the start of the shot, from 0",
        ),
        ({"label": -1}, r"v.json.label is -1; give a class, counted from 0, or leave it out"),
        ({"label": "cat"}, r"v.json.label is 'cat' \(str\), expected int"),
        ({"shots": [{"start_frame": 0, "end_frame": 5, "prompt": "x", "label": -2}]}, r"v.json.shots\[0\].label is -2"),
        ({"story": 3}, r"v.json.story is 3 \(int\), expected str"),
    ],
)
def test_bad_sidecars_are_refused_by_field(tmp_path: Path, changes: dict, message: str) -> None:
    scene, frames = make_scene([0, 17])
    with pytest.raises(Failed, match=message):
        caption_scenes([scene], frames, sidecar(tmp_path / "v.json", [0, 17], **changes), "sidecar_or_describe")


def test_a_sidecar_that_is_not_json_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text("{story: ")
    scene, frames = make_scene([0, 17])
    with pytest.raises(Failed, match="v.json is not JSON"):
        caption_scenes([scene], frames, str(tmp_path / "v.json"), "sidecar_or_describe")


def flat(colour: tuple[int, int, int], count: int = 9) -> list[np.ndarray]:
    return [np.full((27, 48, 3), colour, np.uint8)] * count


@pytest.mark.parametrize(
    ("colour", "name"),
    [
        ((200, 30, 35), "red"),
        ((20, 20, 20), "black"),
        ((60, 160, 70), "green"),
        ((128, 128, 128), "grey"),
        ((40, 90, 210), "blue"),
    ],
)
def test_colours_are_named(colour: tuple[int, int, int], name: str) -> None:
    scores = measure_shot(flat(colour), 8.0)
    assert {k: v for k, v in scores.items() if k.startswith("colour_")} == {f"colour_{name}": 1.0}


def panorama(shift: float, count: int = 17) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (9, 40, 3)).astype(np.uint8)
    wide = np.kron(coarse, np.ones((4, 4, 1), np.uint8))
    return [wide[4:31, 50 + round(shift * i) : 98 + round(shift * i)] for i in range(count)]


def test_camera_moves_are_measured() -> None:
    assert camera(measure_shot(panorama(1.0), 8.0)) == "camera pans right"
    assert camera(measure_shot(panorama(-2.0), 8.0)) == "camera pans left"
    assert camera(measure_shot(panorama(0.0), 8.0)) == "static camera"


def test_a_moving_object_is_no_camera_move() -> None:
    frames = []
    for i in range(17):
        frame = np.full((27, 48, 3), (110, 160, 200), np.uint8)
        frame[18:] = (60, 120, 60)
        frame[8:16, 4 + 2 * i : 12 + 2 * i] = (220, 40, 40)
        frames.append(frame)
    assert camera(measure_shot(frames, 8.0)) == "static camera"
