"""Scenes and frames are pure functions of (level, split, seed, index); training never shows what is held out."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from toyworld.render import poses, render_scene, render_shot, states
from toyworld.text import parse_story, story, story_attributes
from toyworld.vocabulary import ACTIONS, COLOURS, LEVELS, PATTERNS, SHAPES, identity_held_out, pair_held_out
from toyworld.world import ToyScene, dressed, is_held_out, sample_scene, single_shot


@pytest.mark.parametrize("level", ["small", "medium", "full"])
def test_scene_and_frames_are_reproducible(level):
    one, two = (sample_scene(level, seed=4, index=9, num_shots=2) for _ in range(2))
    assert one == two
    frames, truth = render_scene(one, 64)
    again, truth_again = render_scene(two, 64)
    assert frames.dtype == np.uint8
    assert frames.shape == (one.num_frames, 64, 64, 3)
    np.testing.assert_array_equal(frames, again)
    assert truth == truth_again
    assert sample_scene(level, seed=4, index=10, num_shots=2) != one
    assert sample_scene(level, seed=5, index=9, num_shots=2) != one


def test_scene_survives_json():
    for index in range(20):
        scene = sample_scene("full", index=index)
        assert ToyScene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


@pytest.mark.parametrize("level", ["small", "medium", "full"])
def test_held_out_parts_never_train_and_always_test(level):
    for index in range(150):
        for shot, cast in ((s, c.characters) for c in [sample_scene(level, index=index)] for s in c.shots):
            assert not is_held_out(cast[shot.actor], shot.action)
            assert not any(is_held_out(cast[k]) for k in shot.present)
        test = sample_scene(level, split="test", index=index)
        assert all(is_held_out(test.characters[s.actor], s.action) for s in test.shots)


def test_a_fifth_is_held_out():
    who = [(c, s, p) for c in COLOURS for s in SHAPES for p in PATTERNS]
    assert 0.15 < np.mean([identity_held_out(*w) for w in who]) < 0.25
    assert 0.15 < np.mean([pair_held_out(*w, a) for w in who for a in ACTIONS]) < 0.25


def test_levels_use_only_their_words():
    for name, level in LEVELS.items():
        for index in range(60):
            scene = sample_scene(name, index=index)
            assert len(scene.characters) <= level.max_characters
            for shot in scene.shots:
                assert shot.action in level.actions
                assert shot.style in level.styles
                assert shot.camera in level.cameras
                assert scene.places[shot.place].landmark in level.landmarks


def test_everybody_due_is_in_the_picture():
    for name in LEVELS:
        for index in range(80):
            scene = sample_scene(name, index=index)
            for shot in scene.shots:
                for frame in range(shot.num_frames):
                    for pose in poses(scene, shot, frame).values():
                        assert -0.01 <= pose.x <= 1.01, (shot.action, frame)
                        assert -0.01 <= pose.y <= 1.01, (shot.action, frame)


def test_states_begin_in_order_inside_the_shot():
    for index in range(80):
        for shot in sample_scene("full", index=index).shots:
            frames = [frame for _, frame in states(shot)]
            assert frames[0] == 0
            assert frames == sorted(set(frames))
            assert frames[-1] < shot.num_frames


def test_single_shot_draws_the_same_picture():
    for index in range(10):
        scene = sample_scene("small", index=index, num_shots=3)
        np.testing.assert_array_equal(render_shot(scene, 2, 64), render_shot(single_shot(scene, 2), 0, 64))


def test_size_changes_sharpness_not_content():
    scene = sample_scene("small", index=1)
    large = render_shot(scene, 0, 256).reshape(-1, 64, 4, 64, 4, 3).mean((2, 4))
    assert np.abs(large - render_shot(scene, 0, 64)).mean() < 1.0


def test_wrong_counts_are_refused():
    with pytest.raises(ValueError, match="num_shots"):
        sample_scene("small", num_shots=10)
    with pytest.raises(ValueError, match="num_characters"):
        sample_scene("small", num_characters=3)


def test_dressed_scenes_show_only_what_training_may_and_every_colour_in_every_shape() -> None:
    plain = [sample_scene("small", seed=5, index=index, num_shots=(3, 6)) for index in range(400)]
    scenes = [dressed(scene) for scene in plain]
    shown = {(c.colour, c.shape) for scene in scenes for c in scene.characters}
    assert shown == {(colour, shape) for colour in LEVELS["small"].colours for shape in LEVELS["small"].shapes}
    assert any(identity_held_out(colour, shape, "plain") for colour, shape in shown), "in other patterns only"
    changed, both = 0, 0
    for before, after in zip(plain, scenes, strict=True):
        assert after == dressed(before) and replace(after, characters=before.characters) == before
        different = [k for k, c in enumerate(after.characters) if c != before.characters[k]]
        changed += bool(different)
        both += len(different) == 2
        for k in different:
            one, other = before.characters[k], after.characters[k]
            assert other.pattern != "plain" and replace(other, shape=one.shape, pattern=one.pattern) == one
        looks = [(c.shape, c.pattern) for c in after.characters]
        assert len(set(looks)) == len(looks) and not any(is_held_out(c) for c in after.characters)
        assert not any(is_held_out(after.characters[shot.actor], shot.action) for shot in after.shots)
        said = story_attributes(after)
        assert parse_story(story(after)) == said
    assert changed > 250 and both > 20
    with pytest.raises(ValueError, match="only scenes of split 'train' are dressed"):
        dressed(sample_scene("small", split="test"))


def test_half_of_the_rendered_scenes_are_dressed_where_asked(tmp_path: Path) -> None:
    from pipelines.toyworld_render import RenderConfig, run_render

    report = run_render(RenderConfig(out=tmp_path, count=4, dressed=0.5, shots=1, size=32))
    truths = [json.loads(video.with_suffix(".truth.json").read_text()) for video in report.videos]
    patterns = [{c["pattern"] for c in truth["scene"]["characters"]} for truth in truths]
    plain = [sample_scene("small", seed=0, index=index, num_shots=(1, 1)) for index in range(4)]
    expected = [dressed(scene) if index % 2 else scene for index, scene in enumerate(plain)]
    assert patterns == [{c.pattern for c in scene.characters} for scene in expected]
    assert patterns[1] != {"plain"} or patterns[3] != {"plain"}
    with pytest.raises(ValueError, match="dressed=0.5 is a share"):
        RenderConfig(out=tmp_path, dressed=0.5, split="test")
