"""The Wan backbone against the unmodified diffusers model and against naive references built on it.

n = 4 tokens per latent frame: latents are 4 x 4, patches 2 x 2. Float64 where equality is claimed to rounding.
"""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import nn

from models.attention import block_mask, group_ids, sdpa
from models.backbones.wan import TextContext, WanBackbone, text_attention
from models.layout import shots_layout
from models.positions import position_ids, rope_tables
from models.tiny import TEXT_DIM, tiny_transformer
from tests.draw import randn

B, F, N_PER_FRAME, L = 2, 6, 4, 7
SCENE = shots_layout([3, 1, 2])


def make(dtype: torch.dtype = torch.float64, **changes) -> tuple[WanBackbone, WanTransformer3DModel]:
    """A backbone, and an untouched diffusers model with the same weights."""
    plain = nn.Module.to(tiny_transformer(3, **changes), dtype).eval()
    return WanBackbone(copy.deepcopy(plain)).eval(), plain


def inputs(dtype: torch.dtype = torch.float64, groups: int = 3):
    levels = torch.rand(B, F, generator=torch.Generator().manual_seed(5))
    return randn(B, 4, F, 4, 4, seed=1, dtype=dtype), levels, randn(B, groups, L, TEXT_DIM, seed=2, dtype=dtype)


# --- the plain model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("width", [{}, {"num_attention_heads": 6, "attention_head_dim": 32}])
@torch.no_grad()
def test_equal_levels_are_the_plain_model_bit_for_bit(dtype, batch, width):
    backbone, plain = make(dtype, **width)
    x, text = randn(batch, 4, F, 8, 6, seed=1, dtype=dtype), randn(batch, L, TEXT_DIM, seed=2, dtype=dtype)
    level = torch.rand(batch, generator=torch.Generator().manual_seed(0))
    expected = plain(x, 1000 * level, text).sample
    assert torch.equal(backbone(x, level, text), expected)
    assert torch.equal(backbone(x, level[:, None].expand(batch, F), text), expected)
    one_shot = dict(layout=shots_layout([F]), position_mode="time_gap", attention_rule="group_causal")
    context = TextContext(text[:, None], torch.zeros(F, dtype=torch.long))
    assert torch.equal(backbone(x, level, context, **one_shot), expected), "one shot is the base model"


@torch.no_grad()
def test_levels_per_frame_are_the_token_levels_of_diffusers():
    backbone, plain = make()
    x, levels, text = inputs()
    tokens = (1000 * levels).repeat_interleave(N_PER_FRAME, dim=1)
    expected = plain(x, tokens, text[:, 0]).sample
    assert torch.allclose(backbone(x, levels, text[:, 0]), expected, rtol=0, atol=1e-12)
    single, plain = make(torch.float32)
    expected = plain(x.float(), tokens, text[:, 0].float()).sample
    assert torch.allclose(single(x.float(), levels, text[:, 0].float()), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_equal_levels_beside_a_sample_with_unequal_ones():
    backbone, _ = make()
    x, levels, text = inputs()
    levels[0] = 0.4
    both = backbone(x, levels, text[:, 0])
    alone = backbone(x[:1], levels[:1], text[:1, 0])
    assert torch.allclose(both[:1], alone, rtol=0, atol=1e-12), "the two ways through the model agree"


def test_state_dict_is_that_of_the_plain_model():
    backbone, plain = make()
    assert list(backbone.transformer.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(backbone.transformer.state_dict())


@torch.no_grad()
def test_modulation_stays_per_frame_and_time_stays_float32():
    backbone, _ = make(torch.bfloat16)
    seen = {}
    blocks, embedder = backbone.transformer.blocks, backbone.transformer.condition_embedder
    blocks[1].register_forward_pre_hook(lambda m, args: seen.update(modulation=args[2], hidden=args[0]))
    embedder.register_forward_pre_hook(lambda m, args: seen.update(time=args[0]))
    x, levels, text = inputs(torch.bfloat16)
    levels[0, 0] = 0.9987
    backbone(x, levels, text[:, 0])
    assert seen["modulation"].shape == (B * F, 6, 48) and seen["hidden"].shape == (B * F, N_PER_FRAME, 48)
    assert seen["time"].dtype == torch.float32 and seen["time"][0].item() == pytest.approx(998.7, abs=1e-3)


@torch.no_grad()
def test_samples_do_not_mix_and_each_frame_feels_its_own_level():
    backbone, _ = make()
    x, levels, text = inputs()
    out = backbone(x, levels, text[:, 0])
    swapped = backbone(x.flip(0), levels.flip(0), text[:, 0].flip(0))
    assert torch.allclose(swapped.flip(0), out, rtol=0, atol=1e-12)
    for f in range(F):
        other = levels.clone()
        other[:, f] = 0.5 * other[:, f]
        change = (backbone(x, other, text[:, 0]) - out).abs().mean(dim=(0, 1, 3, 4))
        assert change.argmax() == f


# --- positions and rules -------------------------------------------------------------------------------------------


class FixedRope(nn.Module):
    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        super().__init__()
        self.tables = cos[None, :, None], sin[None, :, None]

    def forward(self, hidden_states):
        return self.tables


class MaskedProcessor(WanAttnProcessor):
    """diffusers' own processor, with a dense boolean mask [N,N]."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


@pytest.mark.parametrize("mode", ["contiguous", "time_gap", "diagonal"])
@pytest.mark.parametrize("rule", ["full", "group_causal", "same_frame"])
@torch.no_grad()
def test_rules_and_positions_against_the_masked_plain_model(mode, rule):
    backbone, plain = make()
    x, levels, text = inputs()
    plain.rope = FixedRope(*rope_tables(position_ids(SCENE, (2, 2), mode, gap=3), (4, 4, 4)))
    ids = torch.arange(F) if rule == "same_frame" else group_ids(SCENE)
    for block in plain.blocks:
        block.attn1.set_processor(MaskedProcessor(block_mask(ids.repeat_interleave(N_PER_FRAME), rule)))
    expected = plain(x, (1000 * levels).repeat_interleave(N_PER_FRAME, dim=1), text[:, 0]).sample
    options = dict(layout=SCENE, position_mode=mode, position_gap=3, attention_rule=rule)
    assert torch.allclose(backbone(x, levels, text[:, 0], **options), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_group_causal_earlier_shots_never_feel_later_ones(dtype):
    backbone, _ = make(dtype)
    x, levels, text = inputs(dtype)
    context = TextContext(text, SCENE.text_ids)
    for first, rule in ((3, "group_causal"), (4, "group_causal"), (3, "full")):
        options = dict(layout=SCENE, position_mode="time_gap", attention_rule=rule)
        out = backbone(x, levels, context, **options)
        other_x, other_levels, other_text = x.clone(), levels.clone(), text.clone()
        other_x[:, :, first:] += 1.0
        other_levels[:, first:] *= 0.5
        other_text[:, SCENE.text_ids[first] :] += 1.0
        out2 = backbone(other_x, other_levels, TextContext(other_text, SCENE.text_ids), **options)
        assert torch.equal(out[:, :, :first], out2[:, :, :first]) == (rule == "group_causal")
        assert (out[:, :, first:] != out2[:, :, first:]).any(dim=(0, 1, 3, 4)).all()


@torch.no_grad()
def test_shots_are_told_apart_by_their_place():
    backbone, _ = make()
    x, levels, text = inputs()
    layout = shots_layout([2, 2, 2])
    context = TextContext(text[:, :1].expand(-1, 3, -1, -1), layout.text_ids)
    order = torch.tensor([4, 5, 2, 3, 0, 1])
    options = dict(layout=layout, position_mode="time_gap")
    out = backbone(x, levels, context, **options)
    permuted = backbone(x[:, :, order], levels[:, order], context, **options)
    assert (permuted[:, :, order] - out).abs().max() > 1e-4


# --- text per shot -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_prompt_reaches_its_own_shot_first():
    backbone, _ = make(torch.float32)
    x, levels, text = inputs(torch.float32)
    seen: list[torch.Tensor] = []
    backbone.transformer.blocks[0].register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    other = text.clone()
    other[:, 1] += 1.0
    outs = [backbone(x, levels, TextContext(t, SCENE.text_ids), layout=SCENE) for t in (text, other)]
    first, second = (s.unflatten(0, (B, F)) for s in seen)
    elsewhere = SCENE.text_ids != 1
    assert torch.equal(first[:, elsewhere], second[:, elsewhere])
    assert (first[:, 3] != second[:, 3]).any()
    assert (outs[0][:, :, 0] != outs[1][:, :, 0]).any(), "the next block's self-attention carries it on"


@pytest.mark.parametrize(
    "frame_text",
    [[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 2, 2], [0, 1, 2, 0, 1, 2], [2, 0, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1]],
    ids=["equal", "unequal", "interleaved", "unread group", "one group"],
)
@torch.no_grad()
def test_text_per_frame_against_a_loop_over_frames(frame_text):
    backbone, plain = make()
    x, levels, text = inputs()
    seen: list[torch.Tensor] = []
    backbone.transformer.blocks[0].attn2.register_forward_hook(lambda m, args, out: seen.append(out))
    backbone.transformer.blocks[0].attn2.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    backbone(x, levels, TextContext(text, torch.tensor(frame_text)))
    hidden, out = (s.unflatten(0, (B, F)) for s in seen)
    cross, embed = plain.blocks[0].attn2, plain.condition_embedder.text_embedder
    for f, group in enumerate(frame_text):
        expected = cross(hidden[:, f], embed(text[:, group]))
        assert torch.allclose(out[:, f], expected, rtol=0, atol=1e-12)


def test_equal_shots_read_their_texts_in_one_call():
    calls = []

    def counted(q, k, v):
        calls.append(q.shape)
        return sdpa(q, k, v)

    query, key, value = randn(2, 6, 4, 3, 8, seed=1), randn(6, 5, 3, 8, seed=2), randn(6, 5, 3, 8, seed=3)
    out = text_attention(query, key, value, ((0, 1), (2, 3), (4, 5)), counted)
    assert calls == [(6, 8, 3, 8)] and out.shape == query.shape
    calls.clear()
    text_attention(query, key, value, ((0, 1, 2), (), (3, 4, 5)), counted)
    assert len(calls) == 2, "a text that nobody reads costs nothing"


@torch.no_grad()
def test_one_text_for_all_is_the_same_text_for_each():
    backbone, _ = make()
    x, levels, text = inputs()
    single = backbone(x, levels, text[:, 0], layout=SCENE)
    each = backbone(x, levels, TextContext(text[:, :1].expand(-1, 3, -1, -1), SCENE.text_ids), layout=SCENE)
    assert torch.allclose(single, each, rtol=0, atol=1e-12)


# --- training ------------------------------------------------------------------------------------------------------


def gradients(backbone: WanBackbone, *forwards) -> list[torch.Tensor]:
    backbone.zero_grad()
    torch.stack([backbone(*args, **options).square().sum() for args, options in forwards]).sum().backward()
    return [p.grad.clone() for p in backbone.parameters() if p.grad is not None]


def test_checkpointing_gives_the_same_gradients_over_two_different_clips():
    backbone, _ = make()
    backbone.train()
    x, levels, text = inputs()
    scene = (x, levels, TextContext(text, SCENE.text_ids)), dict(layout=SCENE, position_mode="time_gap")
    other = shots_layout([2, 4])
    clip = (
        (x, levels[:, 0], TextContext(text[:, :2], other.text_ids)),
        dict(layout=other, attention_rule="group_causal"),
    )
    plain = gradients(backbone, scene, clip)
    backbone.transformer.enable_gradient_checkpointing()
    again = gradients(backbone, scene, clip)
    assert len(plain) == len(again) == len(list(backbone.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(plain, again, strict=True))


def test_sampling_first_does_not_stop_training():
    backbone, _ = make()
    x, levels, text = inputs()
    layout = shots_layout([1, 5])  # no other test's, so that its tables are not there yet
    with torch.inference_mode():
        expected = backbone(x, levels, text[:, 0], layout=layout)
    out = backbone(x, levels, text[:, 0], layout=layout)
    out.sum().backward()
    assert torch.equal(out.detach(), expected)


@torch.no_grad()
def test_a_copy_stands_on_its_own():
    backbone, _ = make()
    x, levels, text = inputs()
    context = TextContext(text, SCENE.text_ids)
    expected = backbone(x, levels, context, layout=SCENE)
    copied = copy.deepcopy(backbone)
    backbone(x, levels, text[:, 0])  # the original's clip changes
    for parameter in backbone.parameters():
        parameter.zero_()
    assert torch.equal(copied(x, levels, context, layout=SCENE), expected)
    for block in copied.transformer.blocks:
        assert block.attn1.processor.text_attention is block.attn2.processor


def test_bfloat16_autocast_follows_float32():
    backbone, _ = make(torch.float32)
    x, levels, text = inputs(torch.float32)
    context = TextContext(text, SCENE.text_ids)
    with torch.autocast("cpu", torch.bfloat16):
        out = backbone(x, levels, context, layout=SCENE)
    out.float().square().mean().backward()
    exact = backbone(x, levels, context, layout=SCENE)
    assert (out - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["full", "group_causal"])
@torch.no_grad()
def test_blocks_compile_as_one_graph(rule):
    backbone, _ = make(torch.float32)
    x, levels, text = inputs(torch.float32)
    context = TextContext(text, SCENE.text_ids)
    expected = backbone(x, levels, context, layout=SCENE, attention_rule=rule)
    for block in backbone.transformer.blocks:
        block.compile(backend="eager", fullgraph=True)
    assert torch.allclose(backbone(x, levels, context, layout=SCENE, attention_rule=rule), expected, atol=1e-6)


def test_sharded_blocks_compute_the_same(tmp_path):
    """FSDP2 gathers a block's weights in hooks around its call, and the root's around the transformer's."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    backbone, _ = make(torch.float32)
    x, levels, text = inputs(torch.float32)
    args = (x, levels, TextContext(text, SCENE.text_ids)), dict(layout=SCENE, position_mode="time_gap")
    expected = backbone(*args[0], **args[1])
    grads = gradients(backbone, args)
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in backbone.transformer.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(backbone.transformer, mesh=mesh)
        assert torch.equal(backbone(*args[0], **args[1]), expected)
        sharded = [g.full_tensor() for g in gradients(backbone, args)]
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(grads, sharded, strict=True))
    finally:
        destroy_process_group()


def test_sharded_in_bfloat16_rotary_tables_stay_float32(tmp_path):
    """FSDP2 casts what it finds in tuples and in dataclasses, but not in a plain class."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    backbone, _ = make(torch.float32)
    x, levels, text = inputs(torch.float32)
    context = TextContext(text, SCENE.text_ids)
    expected = backbone(x, levels, context, layout=SCENE)
    tables = []
    backbone.transformer.blocks[1].attn1.register_forward_pre_hook(lambda module, args: tables.append(args[3].rotary))
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in backbone.transformer.blocks:
            fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        fully_shard(backbone, mesh=mesh)
        with torch.autocast("cpu", torch.bfloat16):
            out = backbone(x, levels, context, layout=SCENE)
        out.float().square().sum().backward()
    finally:
        destroy_process_group()
    assert 0 < (out - expected).abs().max() < 0.05 * expected.abs().max()
    assert [table.dtype for table in tables[0]] == [torch.float32] * 2


# --- errors --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_does_not_fit_is_named():
    backbone, _ = make()
    x, levels, text = inputs()
    context = TextContext(text, SCENE.text_ids)
    for args, message in (
        ((x, levels[:, :4], context, None), r"levels have shape \(2, 4\), expected \[2\] or \[2,6\]"),
        ((x, levels, context, shots_layout([3, 2])), "layout has 5 latent frames, x has 6"),
        ((x[..., :3], levels, context, SCENE), "4x3 is not a multiple of the model's patch or stride, 2"),
        ((x, levels, TextContext(text, SCENE.text_ids[:4]), SCENE), "text is for 2 samples of 4 frames"),
        ((x, levels, TextContext(text[:, :2], SCENE.text_ids), SCENE), r"groups 0\.\.1"),
    ):
        with pytest.raises(ValueError, match=message):
            backbone(*args[:3], layout=args[3])
    with pytest.raises(ValueError, match=r"expected \[B,G,L,D\] and \[F\]"):
        TextContext(text[:, 0], SCENE.text_ids)
    with pytest.raises(ValueError, match="image-to-video Wan"):
        WanBackbone(tiny_transformer(image_dim=8, added_kv_proj_dim=48))
    with pytest.raises(ValueError, match="temporal patch of 1"):
        WanBackbone(tiny_transformer(patch_size=(2, 2, 2)))
    with pytest.raises(ValueError, match="patches must be square"):
        WanBackbone(tiny_transformer(patch_size=(1, 2, 1)))
