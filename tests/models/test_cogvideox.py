"""The CogVideoX backbone against the unmodified diffusers model and against a slow reference that is written apart.

Float64 where equality is claimed to rounding, but diffusers rotates in float32.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_sincos_pos_embed

from models.backbones.cogvideox import CogVideoXBackbone, TextContext
from models.backbones.cogvideox_positions import TextPlaces, rotary_tables, sine_table
from models.layout import shots_layout
from models.tiny import TEXT_DIM
from models.tiny_cogvideox import VERSIONS, tiny_cogvideox
from tests.draw import randn
from tests.models import cogvideox_reference as reference
from tests.models.cogvideox_cases import (
    CPU,
    GRID,
    N_PER_FRAME,
    SCENE,
    B,
    F,
    L,
    Process,
    inputs,
    make,
    pipeline_rotary,
    run_plain,
)  # fmt: skip

# --- the plain model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(F, 4, 6), (2, 4, 4)], ids=["own size", "smaller"])
@pytest.mark.parametrize("version", VERSIONS)
def test_equal_levels_are_the_plain_model_bit_for_bit_with_its_gradients(version, size, dtype):
    backbone, plain = make(version, dtype)
    frames = size[0]
    for batch in (1, 2):
        x, text = randn(batch, 4, *size, seed=1, dtype=dtype), randn(batch, L, TEXT_DIM, seed=2, dtype=dtype)
        level = torch.rand(batch, generator=torch.Generator().manual_seed(0))
        expected = run_plain(plain, x, 999 * level, text)
        assert expected.shape == x.shape
        assert torch.equal(backbone(x, level[:, None].expand(batch, frames), text), expected)
        one_shot = dict(layout=shots_layout([frames]), position_mode="time_gap", attention_rule="group_causal")
        context = TextContext(text[:, None], torch.zeros(frames, dtype=torch.long))
        assert torch.equal(backbone(x, level, context, **one_shot), expected), "one shot is the base model"
        out = backbone(x, level, text)
        assert torch.equal(out, expected)
        grads = torch.autograd.grad(out.square().sum(), list(backbone.parameters()))
        plain_grads = torch.autograd.grad(expected.square().sum(), list(plain.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(grads, plain_grads, strict=True))


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_the_two_ways_through_the_blocks_agree(version):
    backbone, plain = make(version)
    x, levels, text = inputs(pairs=True)
    levels[0] = 0.4
    both = backbone(x, levels, text[:, 0])
    assert torch.allclose(both[:1], run_plain(plain, x[:1], 999 * levels[:1, 0], text[:1, 0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("version", VERSIONS)
def test_state_dict_is_that_of_the_plain_model(version, tmp_path):
    backbone, plain = make(version, torch.float32)
    assert list(backbone.transformer.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(backbone.transformer.state_dict())
    backbone.transformer.save_pretrained(tmp_path)
    again = CogVideoXTransformer3DModel.from_pretrained(tmp_path, local_files_only=True).eval()
    assert type(again.transformer_blocks[0]).__name__ == "CogVideoXBlock"
    x, levels, text = inputs(torch.float32)
    with torch.no_grad():
        assert torch.equal(run_plain(again, x, 999 * levels[:, 0], text[:, 0]), backbone(x, levels[:, 0], text[:, 0]))
        assert torch.equal(
            CogVideoXBackbone(again, Process())(x, levels[:, 0], text[:, 0]), backbone(x, levels[:, 0], text[:, 0])
        )


# --- levels, rules, positions and texts, all against the slow reference --------------------------------------------

CASES = {
    "one shot": ([6], [0] * 6),
    "a text per shot": ([2, 4], [0, 0, 1, 1, 1, 1]),
    "one text": ([2, 4], [0] * 6),
    "unread text, two texts in a shot": ([4, 2], [2, 2, 0, 0, 2, 2]),
}
COMBINATIONS = [
    ("2b", mode, rule) for mode in ("contiguous", "time_gap") for rule in ("full", "group_causal", "same_frame")
]
COMBINATIONS += [
    ("5b", mode, rule)
    for mode in ("contiguous", "time_gap", "diagonal")
    for rule in ("full", "group_causal", "same_frame")
]
COMBINATIONS += [("1.5", "time_gap", "full"), ("1.5", "diagonal", "group_causal"), ("1.5", "contiguous", "same_frame")]


def naive_places(shots, copies, mode, gap):
    """Place of every text copy's token and of every video token, by the formulas of LCT, in loops."""
    texts: dict[tuple[int, int], list] = {}
    video, origin = [], 0
    shot_of = [s for s, size in enumerate(shots) for _ in range(size)]
    for s, size in enumerate(shots):
        if mode == "diagonal":
            for group, read_by in copies:
                if shot_of[min(read_by)] == s and (s, group) not in texts:
                    texts[s, group] = [(origin + i,) * 3 for i in range(L)]
                    origin += L
        for f in range(size):
            for y in range(GRID[0]):
                for x in range(GRID[1]):
                    video.append((origin + f, origin + y, origin + x) if mode == "diagonal" else (origin + f, y, x))
        origin += max(size, *GRID) if mode == "diagonal" else size + (gap if mode == "time_gap" else 0)
    of_copies = [texts[shot_of[min(read_by)], group] if mode == "diagonal" else [None] * L for group, read_by in copies]
    return [p for places in of_copies for p in places], video


def sines(places, width, scale):
    """2B: a quarter of the width for time, then 3/8 for the column and 3/8 for the row; sines, then cosines."""
    rows = []
    for t, y, x in places:
        row: list[torch.Tensor] = []
        for p, dim in ((t, width // 4), (x / scale, width * 3 // 8), (y / scale, width * 3 // 8)):
            angles = p / 10000 ** (torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
            row += [angles.sin(), angles.cos()]
        rows.append(torch.cat(row))
    return torch.stack(rows)


MEANS = [
    ("2b", "time_gap", "full"), ("5b", "contiguous", "full"), ("5b", "time_gap", "same_frame"),
    ("5b", "diagonal", "group_causal"), ("1.5", "time_gap", "full"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "version,mode,rule,text_time", [(*one, "max") for one in COMBINATIONS] + [(*one, "mean") for one in MEANS]
)
@torch.no_grad()
def test_against_a_time_a_place_and_a_mask_row_per_token(version, mode, rule, case, text_time):
    backbone, plain = make(version)
    pair = plain.config.patch_size_t or 1
    shots, reads = CASES[case]
    x, levels, text = inputs(pairs=pair > 1)
    levels[:, :2] = 0.0  # a given pair of frames
    options = dict(layout=shots_layout(shots), position_mode=mode, position_gap=4, attention_rule=rule)
    out = backbone(x, levels, TextContext(text, torch.tensor(reads)), text_time=text_time, **options)

    shots, reads, levels = [s // pair for s in shots], reads[::pair], levels[:, ::pair]
    copies = reference.text_copies(shots, reads, rule)
    text_places, video_places = naive_places(shots, copies, mode, 4 // pair)
    times = [levels[:, sorted(read_by)].max(dim=1).values for _, read_by in copies for _ in range(L)]
    times += [levels[:, f] for f in range(len(reads)) for _ in range(N_PER_FRAME)]
    mask = reference.token_mask(shots, reads, rule, mode == "diagonal", L, N_PER_FRAME)
    where = dict(added=sines(video_places, 32, 1.875)) if version == "2b" else dict(places=text_places + video_places)
    if text_time == "mean":
        where["mean_of"] = [read_by for _, read_by in copies]
    expected = reference.forward(
        plain, x, [text[:, g] for g, _ in copies], 999 * torch.stack(times, dim=1), mask, **where
    )
    atol = 2e-7 if version == "2b" else 2e-5  # positions in float32 and, where rotary, the rotation
    assert torch.allclose(out, expected, rtol=0, atol=atol), (out - expected).abs().max()


@torch.no_grad()
def test_the_reference_is_the_plain_model():
    for version in VERSIONS:
        _, plain = make(version)
        x, levels, text = inputs()
        pair = plain.config.patch_size_t or 1
        text_places, video_places = naive_places([F // pair], [(0, {0})], "contiguous", 0)
        where = dict(places=text_places + video_places)
        if version == "2b":
            where = dict(added=sines(video_places, 32, 1.875))
        tokens = L + F // pair * N_PER_FRAME
        times = 999 * levels[:, :1].expand(B, tokens)
        full = torch.ones(tokens, tokens, dtype=torch.bool)
        slow = reference.forward(plain, x, [text[:, 0]], times, full, **where)
        assert torch.allclose(slow, run_plain(plain, x, times[:, 0], text[:, 0]), rtol=0, atol=2e-6)


# --- levels --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_same_frame_is_the_plain_model_on_every_frame_alone():
    backbone, plain = make("5b")
    x, levels, text = inputs()
    out = backbone(x, levels, TextContext(text, SCENE.text_ids), layout=SCENE, attention_rule="same_frame")
    rotary = [table.unflatten(0, (F, -1)) for table in pipeline_rotary(plain, F, 4, 6)]
    for f in range(F):
        own = tuple(table[f] for table in rotary)
        alone = run_plain(plain, x[:, :, f : f + 1], 999 * levels[:, f], text[:, SCENE.text_ids[f]], own)
        assert torch.allclose(out[:, :, f : f + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("version", ["2b", "5b"])
@torch.no_grad()
def test_the_level_of_a_frame_touches_that_frame_alone(version):
    backbone, _ = make(version, torch.float32)
    x, levels, text = inputs(torch.float32)
    context = TextContext(text, SCENE.text_ids)
    options = dict(layout=SCENE, attention_rule="same_frame")
    out = backbone(x, levels, context, **options)
    for f in range(F):
        other = levels.clone()
        other[:, f] *= 0.5
        changed = (backbone(x, other, context, **options) != out).any(dim=(0, 1, 3, 4))
        assert changed.tolist() == [g == f for g in range(F)]


@pytest.mark.parametrize("version", ["2b", "5b"])
@torch.no_grad()
def test_the_texts_time_is_the_mean_of_embeddings_or_the_clocks(version):
    """FVDM: the mean over frames of embeddings (Pusa), which is no time's own embedding; or the highest level's."""
    backbone, plain = make(version)
    x, levels, text = inputs()
    levels[:] = 0.7
    levels[:, 0] = 0.0
    seen, outs = {}, {}
    activation = backbone.transformer.transformer_blocks[0].norm1.silu
    activation.register_forward_pre_hook(lambda m, args: seen.update(rows=args[0]))

    def embedded(level: float) -> torch.Tensor:
        return plain.time_embedding(plain.time_proj(torch.tensor([999.0 * level])).double())[0]

    expected = {"max": embedded(0.7), "mean": (embedded(0.0) + (F - 1) * embedded(0.7)) / F}
    for text_time, one in expected.items():
        outs[text_time] = backbone(x, levels, text[:, 0], text_time=text_time)
        rows = seen["rows"]  # [B,F+1,E]
        assert torch.allclose(rows[:, F], one.expand(B, -1), rtol=0, atol=1e-12)
        assert torch.allclose(rows[:, 0], embedded(0.0).expand(B, -1), rtol=0, atol=1e-12)
    assert not torch.allclose(expected["mean"], embedded(0.7 * (F - 1) / F), rtol=0, atol=1e-4)
    assert (outs["mean"] - outs["max"]).abs().max() > 1e-6
    assert torch.equal(outs["max"], backbone(x, levels, text[:, 0])), "unless told"


@torch.no_grad()
def test_where_the_frames_of_a_text_are_at_one_level_its_two_times_are_one():
    """LCT: a level per shot, so a text shares its shot's time whichever is asked for."""
    backbone, _ = make("5b")
    x, levels, text = inputs()
    levels = levels[:, SCENE.shot_ids]
    mean, highest = (
        backbone(x, levels, TextContext(text, SCENE.text_ids), layout=SCENE, text_time=one) for one in ("mean", "max")
    )
    assert torch.allclose(mean, highest, rtol=0, atol=1e-12)


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_with_equal_levels_the_mean_is_the_plain_model_bit_for_bit(version):
    backbone, plain = make(version, torch.float32)
    x, levels, text = inputs(torch.float32, pairs=True)
    equal = levels[:, :1].expand(B, F)
    backbone(x, levels, text[:, 0], text_time="mean")  # nothing of another clip stays
    expected = run_plain(plain, x, 999 * levels[:, 0], text[:, 0])
    assert torch.equal(backbone(x, equal, text[:, 0], text_time="mean"), expected)


@torch.no_grad()
def test_an_unknown_text_time_is_refused():
    backbone, _ = make("5b")
    x, levels, text = inputs()
    with pytest.raises(ValueError, match="text_time is 'median'; choose mean or max"):
        backbone(x, levels, text[:, 0], text_time="median")


@torch.no_grad()
def test_modulation_stays_per_frame_and_time_stays_float32():
    backbone, _ = make("5b", torch.bfloat16)
    seen = {}
    block, model = backbone.transformer.transformer_blocks[1], backbone.transformer
    block.norm2.linear.register_forward_hook(lambda m, args, out: seen.update(modulation=out))
    model.norm_out.linear.register_forward_hook(lambda m, args, out: seen.update(last=out))
    model.time_proj.register_forward_pre_hook(lambda m, args: seen.update(time=args[0]))
    x, levels, text = inputs(torch.bfloat16)
    levels[0, 0] = 0.9987
    backbone(x, levels, TextContext(text, SCENE.text_ids), layout=SCENE)
    assert seen["modulation"].shape == (B, F + 3, 6 * 32), "6 frames, 3 texts"
    assert seen["last"].shape == (B * F, 2 * 32)
    assert seen["time"].dtype == torch.float32 and seen["time"][0].item() == pytest.approx(997.7, abs=1e-2)


@torch.no_grad()
def test_samples_do_not_mix_and_each_frame_feels_its_own_level():
    for version in ("2b", "5b"):
        backbone, _ = make(version)
        x, levels, text = inputs()
        levels[:, 0] = 1.0  # the clock, and so the text's level, stays
        out = backbone(x, levels, text[:, 0])
        swapped = backbone(x.flip(0), levels.flip(0), text[:, 0].flip(0))
        assert torch.allclose(swapped.flip(0), out, rtol=0, atol=1e-12)
        for f in range(1, F):
            other = levels.clone()
            other[:, f] = 0.5 * other[:, f]
            change = (backbone(x, other, text[:, 0]) - out).abs().mean(dim=(0, 1, 3, 4))
            assert change.argmax() == f


# --- shots and their texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["time_gap", "diagonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_group_causal_earlier_shots_never_feel_later_ones(dtype, mode):
    backbone, _ = make("5b", dtype)
    x, levels, text = inputs(dtype)
    for first, rule in ((3, "group_causal"), (4, "group_causal"), (3, "full")):
        options = dict(layout=SCENE, position_mode=mode, attention_rule=rule)
        out = backbone(x, levels, TextContext(text, SCENE.text_ids), **options)
        other_x, other_levels, other_text = x.clone(), levels.clone(), text.clone()
        other_x[:, :, first:] += 1.0
        other_levels[:, first:] *= 0.5
        other_text[:, SCENE.text_ids[first] :] += 1.0
        out2 = backbone(other_x, other_levels, TextContext(other_text, SCENE.text_ids), **options)
        assert torch.equal(out[:, :, :first], out2[:, :, :first]) == (rule == "group_causal")
        assert (out[:, :, first:] != out2[:, :, first:]).any(dim=(0, 1, 3, 4)).all()


@pytest.mark.parametrize("mode,elsewhere", [("time_gap", False), ("diagonal", True)])
@torch.no_grad()
def test_a_prompt_reaches_its_own_shot_first(mode, elsewhere):
    backbone, _ = make("5b", torch.float32)
    x, levels, text = inputs(torch.float32)
    seen: list[torch.Tensor] = []
    backbone.transformer.transformer_blocks[0].register_forward_hook(lambda m, args, out: seen.append(out[0].clone()))
    other = text.clone()
    other[:, 1] += 1.0
    options = dict(layout=SCENE, position_mode=mode)
    outs = [backbone(x, levels, TextContext(t, SCENE.text_ids), **options) for t in (text, other)]
    changed = (seen[0] != seen[1]).flatten(2).any(dim=(0, 2))
    assert changed[3] and changed[[0, 1, 2, 4, 5]].all() == elsewhere == changed[[0, 1, 2, 4, 5]].any()
    assert (outs[0][:, :, 0] != outs[1][:, :, 0]).any(), "the next block's attention carries it on"


@pytest.mark.parametrize("version", ["2b", "5b"])
@torch.no_grad()
def test_the_same_text_for_every_shot_is_one_text(version):
    backbone, plain = make(version)
    x, levels, text = inputs()
    context = TextContext(text[:, :1].expand(-1, 3, -1, -1), SCENE.text_ids)
    out = backbone(x, levels[:, 0], context, layout=SCENE)
    assert torch.allclose(out, run_plain(plain, x, 999 * levels[:, 0], text[:, 0]), rtol=0, atol=1e-12)


# --- positions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("size", [(13, 60, 90), (5, 32, 48), (2, 48, 32)])
def test_contiguous_rotary_tables_are_those_of_the_pipeline_bit_for_bit(size, head_dim):
    for version, base in (("5b", (60, 90)), ("1.5", (300, 300))):
        config = dict(sample_height=base[0], sample_width=base[1], attention_head_dim=head_dim, num_layers=1)
        plain = tiny_cogvideox(0, version, **config)
        frames = size[0] // 2 * 2 if version == "1.5" else size[0]
        expected = pipeline_rotary(plain, frames, *size[1:])
        grid, stretch = (size[1] // 2, size[2] // 2), (base[0] // 2, base[1] // 2) if version == "5b" else None
        shots = (frames // (2 if version == "1.5" else 1),)
        ours = rotary_tables(shots_layout(list(shots)), grid, "contiguous", 4, TextPlaces(), head_dim, stretch, CPU)
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


@pytest.mark.parametrize("grid", [(30, 45), (4, 6)])
def test_contiguous_sine_table_is_that_of_diffusers_bit_for_bit(grid):
    expected = get_3d_sincos_pos_embed(64, (grid[1], grid[0]), 13, 1.875, 1.0, output_type="pt").flatten(0, 1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert torch.equal(
            sine_table(shots_layout([13]), grid, "contiguous", 4, 64, 1.875, 1.0, dtype, CPU), expected.to(dtype)
        )
    gap = sine_table(shots_layout([5, 8]), grid, "time_gap", 3, 64, 1.875, 1.0, torch.float64, CPU).unflatten(
        0, (13, -1)
    )
    long = get_3d_sincos_pos_embed(64, (grid[1], grid[0]), 16, 1.875, 1.0, output_type="pt")
    assert torch.equal(gap, long[[*range(5), *range(8, 16)]])


def test_a_stretched_diagonal_keeps_the_shape_of_a_shot_and_its_shots_apart():
    """5B at half its size: steps of two rows, and the next shot starts after the whole pretrained grid."""
    head_dim, shots, grid, base = 16, (2, 1), (2, 3), (4, 6)
    places = TextPlaces(3, (0, 1), (0, 1))
    cos, sin = rotary_tables(shots_layout(list(shots)), grid, "diagonal", 0, places, head_dim, base, CPU)
    text = [(i, i, i) for i in range(3)] + [(9 + i,) * 3 for i in range(3)]  # 3 tokens, then max(2, 4, 6)
    video = [(3 + f, 3 + 2 * y, 3 + 2 * x) for f in range(2) for y in range(2) for x in range(3)]
    video += [(12, 12 + 2 * y, 12 + 2 * x) for y in range(2) for x in range(3)]
    turned = reference.rotate(torch.ones(1, 1, len(cos), head_dim, dtype=torch.float64), text + video)[0, 0]
    assert torch.allclose(turned[:, 0::2], (cos - sin)[:, 0::2].double(), rtol=0, atol=1e-5)
    assert torch.allclose(turned[:, 1::2], (cos + sin)[:, 1::2].double(), rtol=0, atol=1e-5)
