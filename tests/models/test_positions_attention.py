"""Positions and grouped attention against naive references."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from models.attention import block_mask, group_ids, group_sizes, grouped_attention
from models.layout import ClipLayout, Segment, shots_layout, with_story
from models.methods import get_method
from models.positions import interleaved_positions, position_ids, rope_tables

SCENE = shots_layout([3, 1, 2])


def naive_positions(shot_frames, grid, mode, gap, text_lengths=None):
    found, origin = [], 0
    for g, frames in enumerate(shot_frames):
        shift = origin + (text_lengths[g] if text_lengths else 0)
        for f in range(frames):
            for y in range(grid[0]):
                for x in range(grid[1]):
                    found.append([shift + f] + ([shift + y, shift + x] if mode == "diagonal" else [y, x]))
        if mode == "diagonal":
            origin = shift + max(frames, *grid)
        else:
            origin += frames + (gap if mode == "time_gap" else 0)
    return found


@pytest.mark.parametrize("mode", ["contiguous", "time_gap", "diagonal"])
@pytest.mark.parametrize("grid", [(2, 3), (4, 1)])
def test_positions_against_a_loop(mode, grid):
    for gap in (0, 4):
        assert position_ids(SCENE, grid, mode, gap).tolist() == naive_positions([3, 1, 2], grid, mode, gap)
    lengths = [5, 0, 7]
    expected = naive_positions([3, 1, 2], grid, "diagonal", 0, lengths)
    assert position_ids(SCENE, grid, "diagonal", text_lengths=lengths).tolist() == expected


def test_segments_of_one_shot_stand_together():
    whole = position_ids(shots_layout([3, 2]), (2, 2), "time_gap")
    parted = ClipLayout((Segment("condition", 1), Segment("target", 2), Segment("target", 2, 1, 1)))
    assert torch.equal(whole, position_ids(parted, (2, 2), "time_gap"))


@pytest.mark.parametrize("mode", ["contiguous", "time_gap", "diagonal"])
def test_no_two_tokens_share_a_position(mode):
    ids = position_ids(shots_layout([2, 5, 1, 1, 3]), (3, 2), mode)
    assert len({tuple(row) for row in ids.tolist()}) == len(ids)


def test_positions_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="2 entries, the layout 3 shots"):
        position_ids(SCENE, (2, 2), "diagonal", text_lengths=[1, 2])
    with pytest.raises(ValueError, match="unknown position mode 'spiral'"):
        position_ids(SCENE, (2, 2), "spiral")  # type: ignore[arg-type]


@pytest.mark.parametrize("head_dim", [12, 32, 128])
@pytest.mark.parametrize("size", [(3, 4, 6), (21, 2, 2)])
def test_contiguous_tables_are_those_of_diffusers_bit_for_bit(head_dim, size):
    frames, height, width = size
    rope = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)
    cos, sin = rope(torch.zeros(1, 4, frames, height, width))
    ids = position_ids(shots_layout([frames]), (height // 2, width // 2))
    ours = rope_tables(ids, (rope.t_dim, rope.h_dim, rope.w_dim))
    assert torch.equal(ours[0], cos[0, :, 0]) and torch.equal(ours[1], sin[0, :, 0])


def rotate(x, cos, sin):
    """Rotation of neighbouring pairs, written with complex numbers."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turn = torch.complex(cos[..., 0::2].double(), sin[..., 0::2].double())
    return torch.view_as_real(pairs * turn).flatten(-2)


@pytest.mark.parametrize("mode", ["time_gap", "diagonal"])
def test_logits_inside_a_shot_do_not_depend_on_its_place(mode):
    layout, grid, dims = shots_layout([2, 2, 2]), (2, 3), (8, 8, 8)
    cos, sin = rope_tables(position_ids(layout, grid, mode), dims)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(12, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    logits = []
    for g in range(3):
        own = slice(12 * g, 12 * (g + 1))
        logits.append(rotate(q, cos[own], sin[own]) @ rotate(k, cos[own], sin[own]).T)
    assert torch.allclose(logits[0], logits[1], rtol=0, atol=1e-5)
    assert torch.allclose(logits[0], logits[2], rtol=0, atol=1e-5)
    across = rotate(q, cos[:12], sin[:12]) @ rotate(k, cos[12:24], sin[12:24]).T
    assert (across - logits[0]).abs().max() > 0.1, "another shot stands elsewhere"


# two images and a shot (LCT); what each group holds besides does not change where its text and its frames stand
COMPOSITION = get_method("lct", position_mode="diagonal").layout_for_task("composition", [2], condition_frames=[1, 1])
TEXT = 4  # tokens of each text


def placed_groups(layout: ClipLayout, grid: tuple[int, int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Positions of text and of video of each group, where backbones put them under the rule "full": one copy of every
    text, with the first shot that reads it."""
    shots: dict[int, int] = {}
    for shot, text in zip(group_ids(layout).tolist(), layout.text_ids.tolist(), strict=True):
        shots.setdefault(text, shot)
    copies = [(shot, text) for text, shot in shots.items()]
    ids = interleaved_positions(layout, grid, copies, [TEXT] * len(copies), TEXT)
    texts, video = ids[: TEXT * len(copies)].split(TEXT), ids[TEXT * len(copies) :]
    of_text = {text: places for (_, text), places in zip(copies, texts, strict=True)}
    frames = video.unflatten(0, (layout.num_frames, -1))
    return [(of_text[int(layout.text_ids[f][0])], frames[f].flatten(0, 1)) for f in layout.shot_slices]


@pytest.mark.parametrize("grid", [(2, 3), (2, 2)])
@pytest.mark.parametrize("layout", [shots_layout([2, 2, 2]), COMPOSITION], ids=["scene", "composition"])
def test_logits_between_text_and_video_of_a_shot_do_not_depend_on_its_place(layout, grid):
    """LCT: "inside a group, relative text-video offsets are identical for all shots"; against the shot by itself."""
    dims, generator = (8, 8, 8), torch.Generator().manual_seed(0)
    for (text, video), frames in zip(placed_groups(layout, grid), layout.shot_slices, strict=True):
        ((alone_text, alone_video),) = placed_groups(shots_layout([frames.stop - frames.start]), grid)
        q, k = torch.randn(TEXT, 24, generator=generator), torch.randn(len(video), 24, generator=generator)
        logits = [
            rotate(q, *rope_tables(t, dims)) @ rotate(k, *rope_tables(v, dims)).T
            for t, v in ((text, video), (alone_text, alone_video))
        ]
        assert torch.allclose(*logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("story", [False, True])
@pytest.mark.parametrize("layout", [shots_layout([2, 1, 4]), COMPOSITION], ids=["scene", "composition"])
def test_no_two_tokens_share_a_position_texts_among_them(layout, story):
    groups = placed_groups(with_story(layout) if story else layout, (3, 2))
    if story:  # all of a dummy frame stands for one token
        groups[0] = groups[0][0], groups[0][1][:1]
    places = [tuple(row) for group in groups for part in group for row in part.tolist()]
    assert len(set(places)) == len(places)


# --- attention -----------------------------------------------------------------------------------------------------


def qkv(tokens: int, batch: int = 2, heads: int = 3, width: int = 4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, tokens, heads, width, generator=generator, dtype=torch.float64) for _ in range(3)]


def masked(q, k, v, mask):
    """Attention by the definition: soft-max over the allowed keys, one query at a time."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                logits = (k[b, :, h] @ q[b, i, h]) / q.shape[-1] ** 0.5
                out[b, i, h] = F.softmax(logits.masked_fill(~mask[i], -torch.inf), dim=0) @ v[b, :, h]
    return out


def test_groups_are_the_shots():
    layout = ClipLayout((Segment("history", 2, 9), Segment("condition", 1, 4), Segment("target", 1, 4)))
    assert group_ids(layout).tolist() == [0, 0, 1, 1] and group_sizes(layout) == (2, 2)


def test_masks_say_who_sees_whom():
    groups = torch.tensor([0, 0, 1, 2])
    assert block_mask(groups, "full").all() and block_mask(groups, "full").shape == (4, 4)
    for rule, allowed in (("group_causal", lambda q, k: k <= q), ("same_frame", lambda q, k: k == q)):
        mask = block_mask(groups, rule)
        for q in range(4):
            for k in range(4):
                assert mask[q, k] == allowed(groups[q], groups[k])


@pytest.mark.parametrize("rule", ["full", "group_causal", "same_frame"])
def test_grouped_attention_is_the_masked_one(rule):
    q, k, v = qkv(6 * 2)
    ids = torch.arange(6) if rule == "same_frame" else group_ids(SCENE)
    mask = block_mask(ids.repeat_interleave(2), rule)
    assert torch.allclose(
        grouped_attention(q, k, v, group_sizes(SCENE), rule), masked(q, k, v, mask), rtol=0, atol=1e-12
    )


def test_later_groups_never_reach_earlier_ones():
    q, k, v = qkv(6 * 2)
    groups = group_sizes(SCENE)
    before = grouped_attention(q, k, v, groups, "group_causal")
    for x in (q, k, v):
        x[:, 6:] = float("nan")
    assert torch.equal(grouped_attention(q, k, v, groups, "group_causal")[:, :6], before[:, :6])


def test_attention_refuses_what_does_not_fit():
    q, k, v = qkv(12)
    with pytest.raises(ValueError, match=r"12 tokens do not divide evenly over 5 frames"):
        grouped_attention(q, k, v, (2, 3), "full")
    with pytest.raises(ValueError, match="unknown attention rule 'causal'"):
        grouped_attention(q, k, v, (1, 1), "causal")  # type: ignore[arg-type]
