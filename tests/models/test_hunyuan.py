"""The HunyuanVideo backbone against the unmodified diffusers model and against the model written out token by token.

n = 4 tokens per latent frame: latents are 4 x 4, patches 2 x 2. What is compared to rounding runs in float64; the
model's own float32 parts (time sinusoids, rotation) leave 1e-6 of difference.
"""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed
from torch import nn

from models.backbones.base import require
from models.backbones.hunyuan import HunyuanVideoBackbone, TextContext
from models.layout import ClipLayout, Segment, shots_layout
from models.positions import interleaved_positions, position_ids, rope_tables
from models.tiny import TEXT_DIM
from models.tiny_hunyuan import tiny_hunyuan
from tests.draw import randn
from tests.models.hunyuan_inputs import (
    AXES,
    LENGTHS,
    MODES,
    N_PER_FRAME,
    RULES,
    SCENE,
    B,
    F,
    L,
    inputs,
    make,
    one_text,
    replace,
)
from tests.models.hunyuan_reference import Reference, Text

# --- the plain model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "padded"])
@pytest.mark.parametrize("guided", [True, False])
def test_equal_levels_are_the_plain_model_bit_for_bit(dtype, lengths, guided):
    backbone, plain = make(dtype, guidance_embeds=guided)
    x, _, text = inputs(dtype, lengths)
    text = one_text(text)
    level = torch.rand(B, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(L) < (torch.full((B, 1), L) if lengths is None else lengths[:, :1])).to(dtype)
    guidance = torch.full((B,), 6000.0) if guided else None
    expected = plain(x, 1000 * level, text.embeddings[:, 0], mask, text.pooled[:, 0], guidance).sample
    expected.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in plain.named_parameters()}
    one_shot = dict(layout=shots_layout([F]), position_mode="time_gap", attention_rule="group_causal")
    for levels, options in ((level, {}), (level[:, None].expand(B, F), {}), (level, one_shot)):
        out = backbone(x, levels, text, **options)
        assert torch.equal(out, expected)
        backbone.zero_grad()
        out.square().sum().backward()
        for name, parameter in backbone.transformer.named_parameters():
            assert torch.equal(parameter.grad, grads[name]), name


@torch.no_grad()
def test_one_shot_in_the_diagonal_mode_is_not_the_plain_model():
    backbone, _ = make()
    x, levels, text = inputs()
    out, diagonal = (
        backbone(x, levels[:, 0], one_text(text), position_mode=mode) for mode in ("contiguous", "diagonal")
    )
    assert (out - diagonal).abs().max() > 1e-3, "its text has positions"


@torch.no_grad()
def test_embedded_guidance_is_an_input_of_distilled_weights_only():
    for guided in (True, False):
        _, plain = make(guidance_embeds=guided)
        x, levels, text = inputs()
        outs = [HunyuanVideoBackbone(copy.deepcopy(plain), scale)(x, levels, text) for scale in (1.0, 6.0)]
        assert torch.equal(*outs) == (not guided)


def test_weights_keep_their_names_and_go_both_ways(tmp_path):
    backbone, plain = make(torch.float32)
    assert list(backbone.transformer.state_dict()) == list(plain.state_dict())
    backbone.transformer.save_pretrained(tmp_path)
    again = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path)
    assert list(again.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    x, levels, text = inputs(torch.float32)
    with torch.no_grad():
        assert torch.equal(HunyuanVideoBackbone(again).eval()(x, levels, text), backbone(x, levels, text))


# --- the model written out -----------------------------------------------------------------------------------------


def naive_copies(rule: str, mode: str) -> list[tuple[int, list[int]]]:
    """(text group, the frames it is for): a copy per shot, per frame where frames are alone."""
    shots = [[0, 1, 2], [3], [4, 5]]
    if rule == "same_frame":
        return [(g, [f]) for g, frames in enumerate(shots) for f in frames]
    return list(enumerate(shots))


def naive_positions(copies, lengths: list[int], mode: str) -> torch.Tensor:
    """Positions of one sample, M rows: LCT's interleaving written as a loop over the shots."""
    text = {g: [[-1, -1, -1]] * lengths[g] for g in range(3)}
    video: list[list[int]] = []
    origin = 0
    for g, frames in enumerate((3, 1, 2)):
        if mode == "diagonal":
            text[g] = [[origin + i] * 3 for i in range(lengths[g])]
            origin += lengths[g]
        for f in range(frames):
            space = origin if mode == "diagonal" else 0
            video += [[origin + f, space + y, space + x] for y in range(2) for x in range(2)]
        origin += {"contiguous": frames, "time_gap": frames + 3, "diagonal": max(frames, 2, 2)}[mode]
    return torch.tensor([row for g, _ in copies for row in text[g]] + video)


def naive_mask(copies, lengths: list[int], mode: str, rule: str) -> torch.Tensor:
    """Who sees whom, one pair of tokens at a time. A token: (kind, text copy or frame, shot)."""
    shot_of = [0, 0, 0, 1, 2, 2]
    tokens = [("text", i, g) for i, (g, _) in enumerate(copies) for _ in range(lengths[g])]
    tokens += [("video", f, shot_of[f]) for f in range(F) for _ in range(N_PER_FRAME)]
    copy_of = {f: i for i, (_, frames) in enumerate(copies) for f in frames}

    def sees(q, k) -> bool:
        own_copy = q[1] if q[0] == "text" else copy_of[q[1]]
        if rule == "same_frame":
            return (k[1] if k[0] == "text" else copy_of[k[1]]) == own_copy
        if k[0] == "text" and mode != "diagonal":
            return k[1] == own_copy
        return rule == "full" or k[2] <= q[2]

    return torch.tensor([[sees(q, k) for k in tokens] for q in tokens])


def written_out(plain, x, levels, text: TextContext, mode: str, rule: str, text_time: str = "max"):
    reference = Reference(plain.state_dict(), plain.config.num_attention_heads, AXES, 6.0)
    copies = naive_copies(rule, mode)
    outs = []
    for b in range(B):
        lengths = [L] * 3 if text.lengths is None else text.lengths[b].tolist()
        texts = [
            Text(
                text.embeddings[b, g, : lengths[g]], text.pooled[b, g], float(levels[b, frames].max()),
                frames if text_time == "mean" else None,
            )
            for g, frames in copies
        ]  # fmt: skip
        positions, mask = naive_positions(copies, lengths, mode), naive_mask(copies, lengths, mode, rule)
        outs.append(reference(x[b], levels[b], text.pooled[b, SCENE.text_ids], texts, positions, mask))
    return torch.stack(outs)


@pytest.mark.parametrize(
    ("lengths", "text_time"),
    [(None, "max"), (LENGTHS, "max"), (LENGTHS[:1].expand(B, 3), "max"), (LENGTHS, "mean")],
    ids=["whole", "ragged", "short", "mean"],
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_against_the_model_written_out_token_by_token(mode, rule, lengths, text_time):
    backbone, plain = make()
    x, levels, text = inputs(lengths=lengths)
    options = dict(layout=SCENE, position_mode=mode, position_gap=3, attention_rule=rule, text_time=text_time)
    expected = written_out(plain, x, levels, text, mode, rule, text_time)
    assert torch.allclose(backbone(x, levels, text, **options), expected, rtol=0, atol=3e-6)
    equal = levels[:, :1].expand(B, F)
    expected = written_out(plain, x, equal, text, mode, rule, text_time)
    assert torch.allclose(backbone(x, equal, text, **options), expected, rtol=0, atol=3e-6), "one level, many texts"


@torch.no_grad()
def test_the_texts_time_is_the_mean_of_vectors_or_the_clocks_and_the_refiners_is_the_clock():
    backbone, plain = make(torch.float32)
    x, levels, text = inputs(torch.float32)
    levels[:], text = 0.7, one_text(text)
    levels[:, 0] = 0.0
    seen, outs, model = {}, {}, backbone.transformer
    model.transformer_blocks[0].norm1_context.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(text=kwargs["emb"]), with_kwargs=True
    )
    model.context_embedder.time_text_embed.register_forward_pre_hook(lambda m, args: seen.update(refiner=args[0]))

    def embedded(level: float) -> torch.Tensor:
        times = torch.full((B,), 1000 * level)
        return plain.time_text_embed(times, text.pooled[:, 0], torch.full((B,), 6000.0))[0]

    expected = {"max": embedded(0.7), "mean": (embedded(0.0) + (F - 1) * embedded(0.7)) / F}
    for text_time, one in expected.items():
        outs[text_time] = backbone(x, levels, text, text_time=text_time)
        assert torch.allclose(seen["text"], one, rtol=0, atol=1e-6)
        assert torch.equal(seen["refiner"], torch.full((B,), 1000 * torch.tensor(0.7)))
    assert (outs["mean"] - outs["max"]).abs().max() > 1e-6
    assert torch.equal(outs["max"], backbone(x, levels, text)), "unless told"
    equal = levels[:, -1:].expand(B, F)
    assert torch.equal(backbone(x, equal, text, text_time="mean"), backbone(x, equal, text)), "the plain model"
    with pytest.raises(ValueError, match="text_time is 'median'; choose mean or max"):
        backbone(x, levels, text, text_time="median")


@torch.no_grad()
def test_equal_levels_beside_a_sample_with_unequal_ones():
    backbone, _ = make()
    x, levels, text = inputs()
    levels[0], text = 0.4, one_text(text)
    both = backbone(x, levels, text)
    alone = backbone(
        x[:1], levels[:1], replace(text, **{k: getattr(text, k)[:1] for k in ("embeddings", "pooled", "lengths")})
    )
    assert torch.allclose(both[:1], alone, rtol=0, atol=1e-6), "the two ways through the model agree"


@torch.no_grad()
def test_modulation_stays_per_row_and_time_stays_float32():
    backbone, _ = make(torch.bfloat16)
    seen = {}
    model = backbone.transformer
    model.transformer_blocks[1].register_forward_pre_hook(lambda m, args: seen.update(double=args))
    model.single_transformer_blocks[1].register_forward_pre_hook(lambda m, args: seen.update(single=args))
    model.time_text_embed.register_forward_pre_hook(lambda m, args: seen.update(time=args[0]))
    model.context_embedder.time_text_embed.register_forward_pre_hook(lambda m, args: seen.update(refiner=args[0]))
    x, levels, text = inputs(torch.bfloat16)
    levels[0, 0] = 0.9987
    backbone(x, levels, text, layout=SCENE)
    for hidden, words, times, *_ in (seen["double"], seen["single"]):
        assert hidden.shape == (B * F, N_PER_FRAME, 24) and words.shape == (B * 3, L, 24)
        assert times.shape == (B * (F + 3), 24)
    for name in ("time", "refiner"):
        assert seen[name].dtype == torch.float32 and seen[name][0].item() == pytest.approx(998.7, abs=1e-3)
    text_levels = torch.stack([levels[:, :3].amax(1), levels[:, 3], levels[:, 4:].amax(1)], dim=1)
    assert torch.equal(seen["refiner"], 1000 * text_levels.flatten()), "a text takes its shot's highest level"


@pytest.mark.parametrize("size", [(3, 4, 6), (21, 2, 2)])
def test_contiguous_tables_are_those_of_diffusers_bit_for_bit(size):
    frames, height, width = size
    expected = HunyuanVideoRotaryPosEmbed(2, 1, [16, 56, 56], 256.0)(torch.zeros(1, 4, frames, height, width))
    ids = position_ids(shots_layout([frames]), (height // 2, width // 2))
    ours = rope_tables(ids, (16, 56, 56), 256.0, torch.float32)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


def test_interleaved_positions_by_hand():
    layout = shots_layout([2, 1])
    ids = interleaved_positions(layout, (1, 2), [(0, 0), (1, 1)], [2, 3], 3).tolist()
    diagonal = [[i, i, i] for i in range(9)]
    assert ids[:3] == diagonal[:3] and ids[3:6] == diagonal[4:7], "texts at 0..1 and 4..6; the first has one padding"
    assert ids[6:10] == [[2, 2, 2], [2, 2, 3], [3, 2, 2], [3, 2, 3]] and ids[10:] == [[7, 7, 7], [7, 7, 8]]
    # two texts in one shot stand one after the other; a second copy of one text stands where the first does
    ids = interleaved_positions(shots_layout([2]), (1, 1), [(0, 5), (0, 3), (0, 5)], [2, 1, 2], 2).tolist()
    assert [row[0] for row in ids] == [0, 1, 2, 3, 0, 1, 3, 4]
    cos, sin = rope_tables(torch.tensor([[5, 5, 5]]), AXES, 256.0, torch.float32)
    angles = torch.tensor([5.0, 5.0, 5.0 / 16, 5.0 / 16] * 3)  # frequencies 1 and 256 ** (-2 / 4) on every axis
    assert torch.allclose(cos[0], angles.cos()) and torch.allclose(sin[0], angles.sin())


# --- who depends on whom -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_alone_frames_are_independent_of_each_others_level(mode):
    backbone, _ = make(torch.float32)
    x, levels, text = inputs(torch.float32)
    for rule in ("same_frame", "full"):
        options = dict(layout=SCENE, position_mode=mode, attention_rule=rule)
        out = backbone(x, levels, text, **options)
        for f in range(F):
            other_levels, other_x = levels.clone(), x.clone()
            other_levels[:, f] = 0.5 * levels[:, f]
            other_x[:, :, f] += 1.0
            out2 = backbone(other_x, other_levels, text, **options)
            others = [i for i in range(F) if i != f]
            assert torch.equal(out2[:, :, others], out[:, :, others]) == (rule == "same_frame")
            assert (out2[:, :, f] != out[:, :, f]).any()


@torch.no_grad()
def test_alone_frames_are_clips_of_one_frame_of_the_plain_model():
    backbone, plain = make()
    x, levels, text = inputs()
    out = backbone(x, levels, text, layout=SCENE, attention_rule="same_frame")
    for f, g in enumerate(SCENE.text_ids.tolist()):
        plain.rope = FixedRope(position_ids(shots_layout([F]), (2, 2))[f * N_PER_FRAME : (f + 1) * N_PER_FRAME])
        mask = torch.arange(L) < text.lengths[:, g, None]
        expected = plain(
            x[:, :, f : f + 1], 1000 * levels[:, f], text.embeddings[:, g], mask, text.pooled[:, g],
            torch.full((B,), 6000.0),
        ).sample  # fmt: skip
        assert torch.allclose(out[:, :, f : f + 1], expected, rtol=0, atol=1e-6)


class FixedRope(nn.Module):
    def __init__(self, positions: torch.Tensor) -> None:
        super().__init__()
        self.tables = rope_tables(positions, AXES, 256.0, torch.float32)

    def forward(self, hidden_states):
        return self.tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_history_never_feels_later_shots(mode, dtype):
    backbone, _ = make(dtype)
    x, levels, text = inputs(dtype)
    for first, rule in ((3, "group_causal"), (4, "group_causal"), (3, "full")):
        options = dict(layout=SCENE, position_mode=mode, attention_rule=rule)
        later = SCENE.text_ids[first]
        other_x, other_levels = x.clone(), levels.clone()
        embeddings, pooled = text.embeddings.clone(), text.pooled.clone()
        other_x[:, :, first:] += 1.0
        other_levels[:, first:] *= 0.5
        embeddings[:, later:] += 1.0
        pooled[:, later:] += 1.0
        out = backbone(x, levels, text, **options)
        out2 = backbone(other_x, other_levels, replace(text, embeddings=embeddings, pooled=pooled), **options)
        assert torch.equal(out[:, :, :first], out2[:, :, :first]) == (rule == "group_causal")
        assert (out[:, :, first:] != out2[:, :, first:]).any(dim=(0, 1, 3, 4)).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_padding_and_the_rest_of_the_batch_do_not_matter(mode, rule):
    backbone, _ = make()
    x, levels, text = inputs()
    options = dict(layout=SCENE, position_mode=mode, attention_rule=rule)
    out = backbone(x, levels, text, **options)
    longer = torch.cat([text.embeddings, randn(B, 3, 3, TEXT_DIM, seed=9)], dim=2)
    padding = torch.arange(L + 3) >= LENGTHS[:, :, None]
    longer[padding] = 100.0
    assert torch.allclose(backbone(x, levels, replace(text, embeddings=longer), **options), out, rtol=0, atol=1e-6)
    for b in range(B):
        rows = slice(b, b + 1)
        alone = TextContext(text.embeddings[rows], text.frame_text, LENGTHS[rows], text.pooled[rows])
        assert torch.allclose(backbone(x[rows], levels[rows], alone, **options), out[rows], rtol=0, atol=1e-6)


@torch.no_grad()
def test_texts_are_refined_one_by_one():
    backbone, plain = make()
    x, levels, text = inputs()
    seen = []
    backbone.transformer.context_embedder.register_forward_hook(lambda m, args, out: seen.append(out))
    backbone(x, levels, text, layout=SCENE)
    refined = seen[0].unflatten(0, (B, 3))
    for b in range(B):
        for g, frames in enumerate(SCENE.shot_slices):
            own = text.embeddings[b : b + 1, g, : LENGTHS[b, g]]
            expected = plain.context_embedder(own, 1000 * levels[b : b + 1, frames].amax(1))
            assert torch.allclose(refined[b, g, : LENGTHS[b, g]], expected[0], rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_dummy_segment_carries_the_global_prompt_to_all_shots():
    backbone, _ = make()
    x, levels, text = inputs()
    layout = ClipLayout((Segment("dummy", 1, 9, 0), Segment("target", 3, 0, 1), Segment("target", 2, 1, 2)))
    levels[:, 0], x[:, :, 0] = 0.0, 0.0
    text = replace(text, frame_text=layout.text_ids)
    other = text.embeddings.clone()
    other[:, 0] += 1.0
    for rule in ("full", "group_causal"):
        options = dict(layout=layout, position_mode="diagonal", attention_rule=rule)
        change = backbone(x, levels, replace(text, embeddings=other), **options) - backbone(x, levels, text, **options)
        assert (change.abs().amax(dim=(0, 1, 3, 4)) > 1e-3).all()


# --- errors --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_does_not_fit_is_named():
    backbone, _ = make()
    x, levels, text = inputs()
    for args, layout, message in (
        ((x, levels[:, :4], text), SCENE, r"levels have shape \(2, 4\), expected \[2\] or \[2,6\]"),
        ((x, levels, text), shots_layout([3, 2]), "layout has 5 latent frames, x has 6"),
        ((x[..., :3], levels, text), SCENE, "not a multiple"),
        ((x, levels, replace(text, pooled=None)), SCENE, "give TextContext\\(pooled="),
        ((x, levels, text.embeddings[:, 0]), SCENE, "give TextContext\\(pooled="),
    ):
        with pytest.raises(ValueError, match=message):
            backbone(*args, layout=layout)
    for changes, message in (
        ({"pooled": text.pooled[:, :2]}, r"pooled text has shape \(2, 2, 16\), expected \[2,3,P\]"),
        ({"lengths": LENGTHS[:1]}, r"lengths have shape \(1, 3\), expected \[2,3\]"),
        ({"lengths": LENGTHS * 0}, "expected 1 to 7 tokens each"),
        ({"lengths": LENGTHS + 1}, "expected 1 to 7 tokens each"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(text, **changes)
    for changes, message in (
        ({"patch_size_t": 2}, "temporal patch of 1"),
        ({"image_condition_type": "token_replace"}, "image-to-video HunyuanVideo"),
    ):
        with pytest.raises(ValueError, match=message):
            HunyuanVideoBackbone(tiny_hunyuan(**changes))


def test_capabilities_refuse_what_is_unknown():
    for mode in MODES:
        for rule in RULES:
            require(
                HunyuanVideoBackbone.capabilities, per_frame_levels=True, position_mode=mode, attention_rule=rule,
                text_per_shot=True,
            )  # fmt: skip
    with pytest.raises(ValueError, match="position_mode is 'spiral'"):
        require(HunyuanVideoBackbone.capabilities, position_mode="spiral")
