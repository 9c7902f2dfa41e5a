"""Clips in tokens of several latent frames: first frames repeated in front, one role and one level per token."""

from __future__ import annotations

import pytest
import torch

from models.backbones.cogvideox import CogVideoXBackbone
from models.layout import ClipLayout, Segment, mark_given, shots_layout, with_story
from models.methods import get_method
from models.patches import own_places, padded_frames, split_token, take_frames, token_layout
from models.tiny_cogvideox import tiny_cogvideox
from tests.models.cogvideox_cases import Process

CAPABILITIES = CogVideoXBackbone(tiny_cogvideox(version="1.5"), Process()).capabilities


@pytest.mark.parametrize(("patch", "shots"), [(1, [3, 1]), (2, [3, 1, 4]), (3, [1, 2, 3, 4, 5])])
def test_first_frames_stand_in_front_as_often_as_it_takes(patch, shots):
    layout, expected = shots_layout(shots), []
    for frames in layout.shot_slices:
        count = frames.stop - frames.start
        while (count + len([one for one in expected if one == frames.start])) % patch:
            expected.append(frames.start)
        expected += range(frames.start, frames.stop)
    places = padded_frames(layout, patch)
    assert places == expected
    filled = take_frames(layout, places)
    assert filled.shot_ids.tolist() == layout.shot_ids[places].tolist()
    assert filled.roles == [layout.roles[place] for place in places]
    assert all((frames.stop - frames.start) % patch == 0 for frames in filled.shot_slices)
    kept = own_places(places)
    assert [places[i] for i in kept] == list(range(layout.num_frames)), "each frame once"
    assert all(i + 1 == len(places) or places[i + 1] != places[i] for i in kept), "the copies in front are dropped"


def test_tokens_keep_roles_shots_and_texts():
    layout = with_story(mark_given(shots_layout([5, 1]), [0, 3, 4]))
    filled = take_frames(layout, padded_frames(layout, 2))
    assert filled.roles == ["dummy"] * 2 + ["condition"] * 2 + ["target"] * 2 + ["condition"] * 2 + ["target"] * 2
    tokens = token_layout(filled, 2)
    assert tokens == with_story(ClipLayout((
        Segment("condition", 1), Segment("target", 1), Segment("condition", 1), Segment("target", 1, 1, 1),
    )))  # fmt: skip
    assert token_layout(layout, 1) is layout


def test_what_shares_a_token_is_one_thing():
    for given in ([0, 1], [4], [1]):
        layout = mark_given(shots_layout([5]), given)
        filled = take_frames(layout, padded_frames(layout, 2))
        with pytest.raises(ValueError, match="joins 2 latent frames into one token, which is one thing at one noise"):
            token_layout(filled, 2)
    with pytest.raises(ValueError, match="latent frames 2 to 2 of the clip"):
        token_layout(shots_layout([3]), 2)


def test_levels_that_differ_in_a_token_are_found():
    plan = torch.tensor([[1.0, 1.0, 0.5, 0.5], [0.2, 0.2, 0.1, 0.1]])
    assert split_token(plan, 2) is None and split_token(plan, 1) is None
    plan[1, 3] = 0.0
    assert split_token(plan, 2) == (2, 3) and split_token(plan, 1) is None
    assert split_token(plan, 4) == (1, 2)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("fvdm", {}), ("fvdm", {"p": 1.0}), ("lct", {}), ("lct", {"position_mode": "diagonal"}),
        ("lct", {"position_mode": "diagonal", "global_prompt": "group"}), ("lct", {"position_gap": 6}),
        ("fca", {"adapter": "none"}), ("fca", {"adapter": "none", "given_frames": 3}),
    ],
)  # fmt: skip
def test_what_keeps_a_token_at_one_level_is_let_through(name, params):
    get_method(name, **params).check_backbone(CAPABILITIES)


@pytest.mark.parametrize(
    ("name", "params", "reason"),
    [
        ("tic_ft", {}, "joins 2 latent frames into one token.*frame by frame.*use a model of one latent frame"),
        ("tic_ft", {"buffer_frames": 0, "model_time": "per_frame"}, "begins inside a token"),
        ("lct", {"position_gap": 3}, "position_gap is 3 latent frames.*give a multiple of 2"),
        ("lct", {"attention_rule": "group_causal"}, "no kv_cache"),
        ("fca", {"adapter": "none", "given_frames": 2}, "given_frames is 2, but this model.*give 1, 3, 5"),
        ("fca", {}, "no layer_branch.*these modules know single frames"),
        ("aid", {}, "no layer_branch.*these modules know single frames"),
        ("svd", {}, "no image_beside"),
    ],
)
def test_what_splits_a_token_is_refused_with_reason_and_remedy(name, params, reason):
    with pytest.raises(ValueError, match=reason):
        get_method(name, **params).check_backbone(CAPABILITIES)
