"""LCT: the levels at which given shots are seen, and the global prompt as a text-video group of its own.

The group against the models written out token by token, in which its dummy video is one token and no more.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.backbones.base import Capabilities
from models.layout import ClipLayout, Segment, shots_layout, with_story
from models.methods import get_method
from models.noise import base_levels
from models.positions import interleaved_positions, position_ids
from models.text import TextContext
from tests.models import cogvideox_cases, cogvideox_reference, hunyuan_inputs, hunyuan_reference
from tests.models.test_backbones import BACKBONES

GROUP = get_method("lct", position_mode="diagonal", global_prompt="group", shift=3.0)
STORY = with_story(shots_layout([3, 2]))  # [story][dummy][text 0][3 frames][text 1][2 frames]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the context level ---------------------------------------------------------------------------------------------


def near_context(method, draws: int = 100_000) -> float:
    """Share of the draws of a shot's level within 0.05 of the context level."""
    levels = replace(method, shift=3.0).sample_levels(shots_layout([1, 1, 1]), draws, seeded())[:, 0]
    return ((levels - method.context_level).abs() <= 0.05).float().mean().item()


def test_the_shifted_density_hardly_draws_the_context_level_so_it_is_trained_on_purpose():
    plain = get_method("lct", context_prob=0.0)
    assert near_context(plain) == pytest.approx(0.0023, abs=0.0006), "the logit-normal alone: 1 in 440"
    # a tenth of the samples, half of whose three shots stand at the level
    assert near_context(get_method("lct")) == pytest.approx(0.1 * 0.5 + 0.0023, abs=0.006)
    assert near_context(get_method("lct", density="uniform")) == pytest.approx(0.038, abs=0.004)


def test_the_share_follows_the_density_and_is_recorded():
    assert get_method("lct").config()["context_prob"] == 0.1
    assert get_method("lct", density="uniform").config()["context_prob"] == 0.0
    assert get_method("lct", density="uniform", context_prob=0.3).context_prob == 0.3
    with pytest.raises(ValueError, match="clean shots are never trained"):
        get_method("lct", context_level=0.0, density="uniform")
    assert (get_method("lct", context_level=0.0, shift=3.0).sample_levels(STORY, 500, seeded())[:, 1:] == 0).any()
    with pytest.raises(ValueError, match="context_prob is 1.5, expected 0 to 1"):
        get_method("lct", context_prob=1.5)


def test_without_a_share_the_draws_are_those_they_always_were():
    """What the demo and the claims are trained with (pipelines.demo_stages.LCT_PARAMS): uniform, half shared."""
    layout, generator = shots_layout([2, 1]), seeded(3)
    method = get_method("lct", shift=3.0, density="uniform", position_gap=24, shared_prob=0.5, clean_prob=0.5)
    found = method.sample_levels(layout, 64, seeded(3))
    shared, own = torch.rand((64, 1), generator=generator), torch.rand((64, 2), generator=generator)
    shared, own = (3 * u / (1 + 2 * u) for u in (shared, own))
    expected = torch.where(torch.rand((64, 1), generator=generator) < 0.5, own, shared)
    cleaned = torch.rand((64, 1), generator=generator) < 0.5
    count = torch.randint(1, 2, (64, 1), generator=generator)
    rank = torch.rand((64, 2), generator=generator).argsort(dim=1).argsort(dim=1)
    expected = torch.where(cleaned & (rank < count), 0.0, expected)
    assert torch.equal(found, expected[:, [0, 0, 1]])
    learnt = method.learns(found)
    assert torch.equal(learnt, found > 0)


@pytest.mark.parametrize("rule", ["full", "group_causal"])
def test_shots_at_the_context_level_stand_for_given_ones(rule):
    method = get_method("lct", shift=3.0, context_prob=1.0, context_level=0.3, attention_rule=rule)
    layout = shots_layout([2, 1, 3])
    levels = method.sample_levels(layout, 600, seeded())
    given = levels == 0.3
    patterns = {tuple(row) for row in given[:, [0, 2, 3]].tolist()}
    if rule == "group_causal":  # history is what comes first
        assert patterns == {(True, False, False), (True, True, False)}
    else:
        assert len(patterns) == 6, "one or two of the three, whichever"
    assert torch.equal(given[:, 0], given[:, 1]) and torch.equal(given[:, 3], given[:, 5])
    assert torch.equal(method.learns(levels), ~given), "no gradient from given shots"
    assert (levels[~given] != 0.3).all()


def test_a_clip_that_is_all_at_the_context_level_is_learnt_from():
    method = get_method("lct", context_prob=0.1, context_level=0.2, shift=3.0)
    levels = torch.tensor([[0.2, 0.2, 0.2], [0.0, 0.2, 0.2], [0.0, 0.2, 0.7]])
    expected = [[True, True, True], [False, True, True], [False, False, True]]
    assert method.learns(levels).tolist() == expected
    alone = method.sample_levels(shots_layout([4]), 500, seeded())
    assert not (alone == 0.2).any(), "an only shot is never given"


# --- the group -----------------------------------------------------------------------------------------------------


def test_where_the_group_stands_and_what_counts():
    assert STORY.roles == ["dummy"] + ["target"] * 5
    assert STORY.shot_ids.tolist() == STORY.text_ids.tolist() == [2, 0, 0, 0, 1, 1]
    assert GROUP.loss_weights(STORY).tolist() == pytest.approx([0, 1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4])
    levels = GROUP.sample_levels(STORY, 64, seeded())
    assert (levels[:, 0] == 0).all() and (levels[:, 1:] > 0).all()
    assert torch.equal(levels[:, 1:], GROUP.sample_levels(shots_layout([3, 2]), 64, seeded())), "it draws nothing"
    clean = get_method("lct", clean_prob=1.0, shift=3.0).sample_levels(STORY, 200, seeded())
    assert ((clean[:, 1:] == 0).any(dim=1) & (clean[:, 1:] > 0).any(dim=1)).all(), "and is none of the clean shots"
    plan = GROUP.plan(STORY, base_levels(4), "joint")
    assert (plan[:, 0] == 0).all() and torch.equal(plan[:, 1], base_levels(4))


def test_the_group_takes_one_step_on_the_diagonal():
    """Story tokens at (i,i,i), i < L_0; the dummy at L_0; the next group starts right behind it."""
    lengths, grid = [4, 2, 3], (2, 3)
    ids = position_ids(STORY, grid, "diagonal", text_lengths=lengths).unflatten(0, (6, 6))
    assert (ids[0] == 4).all(), "all of the dummy frame is its one token"
    origin = 4 + 1 + 2
    assert ids[1, 0].tolist() == [origin] * 3 and ids[3, -1].tolist() == [origin + 2, origin + 1, origin + 2]
    origin += max(3, *grid) + 3
    assert ids[4, 0].tolist() == [origin] * 3
    joint = interleaved_positions(STORY, grid, [(0, 2), (1, 0), (2, 1)], lengths, 4)
    text, video = joint.split([12, 36])
    assert [text[i].tolist() for i in (0, 3, 4, 8)] == [[0] * 3, [3] * 3, [5] * 3, [5 + 2 + 3] * 3]
    assert torch.equal(video.unflatten(0, (6, 6)), ids)
    valid = [*text[:4].tolist(), *text[4:6].tolist(), *text[8:11].tolist(), *video[:1].tolist(), *video[6:].tolist()]
    assert len({tuple(row) for row in valid}) == len(valid), "no two tokens share a place"


def story_inputs(lengths: bool):
    """Six frames [story | 3 | 2], the dummy clean and zero, in float64."""
    cases = hunyuan_inputs if lengths else cogvideox_cases
    x, levels, text = cases.inputs()
    levels[:, 0], levels[:, 1:4], levels[:, 4:] = 0.0, levels[:, 1:2], levels[:, 4:5]
    x[:, :, 0] = 0.0
    if lengths:
        return x, levels, hunyuan_inputs.replace(text, frame_text=STORY.text_ids)
    return x, levels, TextContext(text, STORY.text_ids)


def one_token_mask(text_shots: list[int], per_frame: int, rule: str) -> torch.Tensor:
    """Who sees whom, token by token: groups 0 (story), 1, 2 in order, and of the dummy frame one token alone."""
    shots = text_shots + [s for s in (0, 1, 1, 1, 2, 2) for _ in range(per_frame)]
    extra = range(len(text_shots) + 1, len(text_shots) + per_frame)
    return torch.tensor(
        [[k not in extra and (rule == "full" or s <= own) for k, s in enumerate(shots)] for own in shots]
    )


def one_token_places(lengths: list[int], grid: tuple[int, int]) -> tuple[list, list]:
    """Places of the tokens of story, text 0, text 1, and of all video tokens, by the formula, in loops."""
    texts, video, origin = [], [], 0
    for length, frames in zip(lengths, (0, 3, 2), strict=True):
        texts += [[origin + i] * 3 for i in range(length)]
        origin += length
        if not frames:
            video += [[origin] * 3] * (grid[0] * grid[1])
        for f in range(frames):
            video += [[origin + f, origin + y, origin + x] for y in range(grid[0]) for x in range(grid[1])]
        origin += max(frames, *grid) if frames else 1
    return texts, video


@pytest.mark.parametrize("rule", ["full", "group_causal"])
@torch.no_grad()
def test_hunyuan_against_a_group_of_one_token(rule):
    backbone, plain = hunyuan_inputs.make()
    x, levels, text = story_inputs(lengths=True)
    out = backbone(x, levels, text, layout=STORY, position_mode="diagonal", attention_rule=rule)
    reference = hunyuan_reference.Reference(plain.state_dict(), 2, hunyuan_inputs.AXES, 6.0)
    order, clocks = (2, 0, 1), ([0], [1, 2, 3], [4, 5])  # the story is text 2
    for b in range(len(x)):
        lengths = [int(text.lengths[b, g]) for g in order]
        texts = [
            hunyuan_reference.Text(text.embeddings[b, g, :length], text.pooled[b, g], float(levels[b, frames].max()))
            for g, length, frames in zip(order, lengths, clocks, strict=True)
        ]
        of_texts, of_video = one_token_places(lengths, (2, 2))
        mask = one_token_mask([s for s, length in enumerate(lengths) for _ in range(length)], 4, rule)
        pooled = text.pooled[b, text.frame_text]
        expected = reference(x[b], levels[b], pooled, texts, torch.tensor(of_texts + of_video), mask)
        assert torch.allclose(out[b, :, 1:], expected[:, 1:], rtol=0, atol=3e-6)


@pytest.mark.parametrize("version", ["5b", "1.5"])
@pytest.mark.parametrize("rule", ["full", "group_causal"])
@torch.no_grad()
def test_cogvideox_against_a_group_of_one_token(rule, version):
    backbone, plain = cogvideox_cases.make(version)
    x, levels, text = story_inputs(lengths=False)
    pair = 1 if version == "5b" else 2  # latent frames of a token, the dummy's among them
    x = torch.cat([x, 0.5 * x], dim=2)[:, :, [f + 6 * i for f in range(6) for i in range(pair)]]
    layout = ClipLayout(tuple(replace(one, num_frames=pair * one.num_frames) for one in STORY.segments))
    read = replace(text, frame_text=layout.text_ids)
    out = backbone(
        x, levels.repeat_interleave(pair, dim=1), read, layout=layout, position_mode="diagonal", attention_rule=rule
    )
    tokens, order, clocks = cogvideox_cases.L, (2, 0, 1), (0, 1, 4)
    of_texts, of_video = one_token_places([tokens] * 3, cogvideox_cases.GRID)
    times = [levels[:, f] for f in clocks for _ in range(tokens)]
    times += [levels[:, f] for f in range(6) for _ in range(cogvideox_cases.N_PER_FRAME)]
    mask = one_token_mask([s for s in range(3) for _ in range(tokens)], cogvideox_cases.N_PER_FRAME, rule)
    embeddings = [text.embeddings[:, g] for g in order]
    expected = cogvideox_reference.forward(
        plain, x, embeddings, 999 * torch.stack(times, dim=1), mask, places=of_texts + of_video
    )
    assert torch.allclose(out[:, :, pair:], expected[:, :, pair:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["hunyuan", "cogvideox"])
@torch.no_grad()
def test_the_story_reaches_every_shot_and_the_size_of_the_dummy_does_not_matter(name):
    """A dummy of many tokens, as a plain zero frame would be, draws attention that is not the story's."""
    backbone, _ = (hunyuan_inputs.make if name == "hunyuan" else cogvideox_cases.make)()
    x, levels, text = story_inputs(lengths=name == "hunyuan")
    options = dict(layout=STORY, position_mode="diagonal")
    out = backbone(x, levels, text, **options)
    other = text.embeddings.clone()
    other[:, 2] += 1.0
    changed = TextContext(other, text.frame_text, text.lengths, text.pooled)
    assert ((backbone(x, levels, changed, **options) - out).abs().amax(dim=(0, 1, 3, 4)) > 1e-4)[1:].all()
    plain_frame = ClipLayout((Segment("target", 1, 2, 2), *STORY.segments[1:]))
    assert not torch.allclose(backbone(x, levels, text, layout=plain_frame, position_mode="diagonal"), out, atol=1e-4)
    moved = x.clone()
    moved[:, :, 0, :, 2:] = 5.0  # all but the first token of the dummy
    assert torch.allclose(backbone(moved, levels, text, **options)[:, :, 1:], out[:, :, 1:], rtol=0, atol=1e-12)


def test_a_stretched_grid_does_not_move_the_dummy():
    """CogVideoX 5B at another size fits the patch grid of a shot into the pretrained one; one token has no grid."""
    from models.backbones.cogvideox_positions import TextPlaces, rotary_tables

    places = TextPlaces(3, (0, 1, 2), (2, 0, 1))
    cos, sin = rotary_tables(STORY, (2, 6), "diagonal", 0, places, 16, (6, 6), torch.device("cpu"))
    dummy = cogvideox_reference.rotate(torch.ones(1, 1, 1, 16, dtype=torch.float64), [(3, 3, 3)])[0, 0, 0]
    for token in range(9, 9 + 12):
        assert torch.allclose(dummy[0::2], (cos - sin)[token, 0::2].double(), rtol=0, atol=1e-5)
        assert torch.allclose(dummy[1::2], (cos + sin)[token, 1::2].double(), rtol=0, atol=1e-5)


# --- composition -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["full", "group_causal"])
@pytest.mark.parametrize("name", ["hunyuan", "cogvideox"])
@torch.no_grad()
def test_a_composition_is_a_scene_whose_first_shots_are_images(name, rule):
    """Its images have texts of their own, so that each group stands and sees as a group of training does. The buggy
    form let all read the shot's text, which then stood in the first image's group, far from its frames."""
    cases = hunyuan_inputs if name == "hunyuan" else cogvideox_cases
    backbone, _ = cases.make()
    x, levels, text = cases.inputs()
    levels[:, 2:] = levels[:, 2:3]
    contexts = text if name == "hunyuan" else TextContext(text, shots_layout([1, 1, 4]).text_ids)
    layout = GROUP.layout_for_task("composition", [4], condition_frames=[1, 1])
    options = dict(position_mode="diagonal", attention_rule=rule)

    def reading(of: ClipLayout, order: list[int]) -> TextContext:  # the texts in `order` as texts 0, 1, 2 of the layout
        lengths = None if contexts.lengths is None else contexts.lengths[:, order]
        pooled = None if contexts.pooled is None else contexts.pooled[:, order]
        return TextContext(contexts.embeddings[:, order], of.text_ids, lengths, pooled)

    out = backbone(x, levels, reading(layout, [2, 0, 1]), layout=layout, **options)
    scene = shots_layout([1, 1, 4])
    assert torch.equal(out, backbone(x, levels, reading(scene, [0, 1, 2]), layout=scene, **options))


# --- pairing -------------------------------------------------------------------------------------------------------


def test_latte_is_refused_because_its_tokens_do_not_all_meet():
    capabilities = BACKBONES["latte"]().capabilities
    for params in ({}, {"position_mode": "contiguous"}, {"density": "uniform"}):
        with pytest.raises(ValueError, match="no joint_space_time: Latte.*use Wan, CogVideoX or HunyuanVideo"):
            get_method("lct", **params).check_backbone(capabilities)
    get_method("fvdm").check_backbone(capabilities)


REASONS = {
    "wan": "no joint_text: its text is read by cross-attention.*global_prompt=prefix",
    "latte": "position_mode is 'diagonal'",
    "cogvideox-2b": "position_mode is 'diagonal': CogVideoX 2B adds a table",
}


def test_only_backbones_with_text_in_their_attention_carry_the_group():
    for name, make in BACKBONES.items():
        capabilities: Capabilities = make().capabilities
        if name in ("hunyuan", "cogvideox-5b", "cogvideox-1.5"):
            GROUP.check_backbone(capabilities)
            assert GROUP.places_text(capabilities) and not get_method("lct").places_text(capabilities)
        elif name != "svd":  # which takes no LCT at all
            with pytest.raises(ValueError, match=REASONS[name]):
                GROUP.check_backbone(capabilities)


def test_what_does_not_go_with_the_group_is_named():
    with pytest.raises(ValueError, match="global_prompt is 'group', position_mode 'time_gap'.*position_mode=diagonal"):
        get_method("lct", global_prompt="group")
    with pytest.raises(ValueError, match="global_prompt is 'both'; choose prefix or group"):
        get_method("lct", global_prompt="both")
    assert GROUP.config()["global_prompt"] == "group" and GROUP.story_group and not get_method("lct").story_group
