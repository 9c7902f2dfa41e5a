"""FCA: the start is the base model, modules see what they should and nothing of the future, tvp trains and samples.

n = 4 tokens per latent frame: latents are 4 x 4, patches 2 x 2. Float64 where equality is claimed to rounding.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.cogvideox import CogVideoXBackbone
from models.backbones.svd import SVDBackbone
from models.backbones.wan import WanBackbone
from models.folder import load_model, save_model
from models.methods import get_method
from models.modules.fca import FCABlock, given_features
from models.modules.frame_text import FrameTextQFormer
from models.modules.lora import inject_lora
from models.process import EDM, FlowMatching
from models.text import TextContext
from models.tiny import TEXT_DIM, build_tiny_folder, tiny_transformer
from models.tiny_cogvideox import tiny_cogvideox
from models.tiny_svd import tiny_svd
from tests.draw import randn

B, FRAMES, N, L, D, Q = 2, 5, 4, 7, 48, 3
SMALL = {"frame_queries": Q, "text_width": 24, "text_heads": 3, "max_frames": 6}


def base(dtype: torch.dtype = torch.float64) -> WanBackbone:
    return WanBackbone(nn.Module.to(tiny_transformer(3), dtype)).eval()


def adapted(dtype: torch.dtype = torch.float64, open_gates: bool = True, **params):
    """A backbone with FCA modules, whose gates (zero at the start) are opened, and its method."""
    backbone, method = base(dtype), get_method("fca", **SMALL | params)
    method.attach(backbone, seed=1)
    assert backbone.conditioner is not None
    backbone.conditioner.to(dtype).eval()
    if open_gates:
        for i, block in enumerate(backbone.conditioner.blocks):
            block.modulation.weight.data = 0.1 * randn(3 * D, D, seed=50 + i, dtype=dtype)
            block.modulation.bias.data = 0.5 * randn(3 * D, seed=60 + i, dtype=dtype)
    return backbone, method


def context(seed: int = 2, dtype: torch.dtype = torch.float64, frames: int = FRAMES) -> TextContext:
    """Two texts of 7 and 4 tokens, zeros after them."""
    embeddings = randn(B, 1, L, TEXT_DIM, seed=seed, dtype=dtype)
    embeddings[1, :, 4:] = 0
    return TextContext(embeddings, torch.zeros(frames, dtype=torch.long))


def clip(seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return randn(B, 4, FRAMES, 4, 4, seed=seed, dtype=dtype)


def predict(backbone, method, x, text, given, levels=None) -> Tensor:
    layout = method.layout_for_training([FRAMES])
    prepared = method.prepare(backbone, layout, text, {"given": given})
    levels = torch.tensor([0.3, 0.8]) if levels is None else levels
    return backbone(x, levels, text, **prepared, **method.backbone_kwargs(layout))


# --- the start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "params", [{}, {"adapter": "no_frame_text"}, {"init_features": "patches"}, {"width": 24, "given_frames": 2}]
)
@torch.no_grad()
def test_the_start_is_the_base_model_bit_for_bit_whatever_is_given(dtype, params):
    backbone, method = adapted(dtype, open_gates=False, **params)
    plain, x, text = base(dtype), clip(dtype=dtype), context(dtype=dtype)
    for levels in (torch.tensor([0.3, 0.8]), torch.rand(B, FRAMES)):
        expected = plain(x, levels, text)
        for seed in (7, 8):
            given = clip(seed, dtype)[:, :, : method.given_frames]
            assert torch.equal(predict(backbone, method, x, text, given, levels), expected)
    opened, method = adapted(dtype, **params)
    assert not torch.equal(predict(opened, method, x, text, given, levels), expected), "and open gates change it"


def test_state_dict_of_the_transformer_is_unchanged_and_only_the_modules_train():
    backbone, method = adapted(open_gates=False)
    assert list(backbone.transformer.state_dict()) == list(tiny_transformer(3).state_dict())
    trained = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    assert trained and all(name.startswith("conditioner.") for name in trained)
    predict(backbone, method, clip(), context(), clip(7)[:, :, :1]).square().mean().backward()
    assert all(p.grad is None for p in backbone.transformer.parameters())
    gates = [block.modulation.weight.grad[2 * D :] for block in backbone.conditioner.blocks]
    assert all(gate.abs().max() > 0 for gate in gates), "the gates open from the first step"
    backbone, method = adapted()
    predict(backbone, method, clip(), context(), clip(7)[:, :, :1]).square().mean().backward()
    silent = [name for name, p in backbone.conditioner.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent, "every parameter learns once the gates are open"


def test_every_layer_has_modules_of_its_own_and_as_many_parameters_as_the_formula_says():
    backbone, _ = adapted()
    blocks, texts = backbone.conditioner.blocks, backbone.conditioner.texts
    assert len(blocks) == len(texts) == len({id(m) for m in [*blocks, *texts]}) - 2 == 2
    assert not torch.equal(texts[0].queries, texts[1].queries)
    count = sum(p.numel() for p in blocks[0].parameters())
    assert count == 4 * (D * D + D) + 2 * D + 3 * D * D + 3 * D
    layer = backbone.sites.attentions[0], backbone.sites.output(0), D
    narrow = FCABlock(*layer, width=12)
    assert sum(p.numel() for p in narrow.parameters()) == 3 * (12 * D + 12) + 12 * D + D + 2 * 12 + 3 * D * D + 3 * D
    assert len(adapted(adapter="no_frame_text")[0].conditioner.texts) == 0
    with pytest.raises(ValueError, match="width is 20, expected 0 or a multiple of the head size, 12"):
        FCABlock(*layer, width=20)


# --- a block -------------------------------------------------------------------------------------------------------


def block_inputs():
    hidden, time = randn(B, FRAMES, N, D, seed=1), randn(B, D, seed=2)
    given, text = randn(B, 2 * N, D, seed=3), randn(B, FRAMES, Q, D, seed=4)
    return hidden, time, given, text


def turn(x: Tensor) -> Tensor:
    """A stand-in for the rotary embedding: token m turns by an angle of m in every plane."""
    angle = torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, 1, 1) / 5
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1).flatten(-2)


@torch.no_grad()
def test_frames_as_a_batch_are_the_frame_wise_mask():
    """Against one attention over all keys with the spec's mask: all of x_init, the text of one's own frame."""
    block = adapted()[0].conditioner.blocks[0]
    hidden, time, given, text = block_inputs()
    out = block(hidden, time, given, text, turn)

    scale, shift, gate = block.modulation(F.silu(time))[:, None].chunk(3, dim=-1)
    u = hidden.flatten(1, 2) * (1 + scale) + shift
    keys = [turn(block.norm_k(block.to_k(given)).unflatten(-1, (4, 12)))]
    keys.append(block.norm_k(block.to_k(text.flatten(1, 2))).unflatten(-1, (4, 12)))
    values = torch.cat([block.to_v(given), block.to_v(text.flatten(1, 2))], 1).unflatten(-1, (4, 12))
    query = turn(block.norm_q(block.to_q(u)).unflatten(-1, (4, 12)))
    frame_of_key = torch.tensor([-1] * 2 * N + [f for f in range(FRAMES) for _ in range(Q)])
    frame_of_query = torch.arange(FRAMES).repeat_interleave(N)
    mask = (frame_of_key == -1) | (frame_of_key == frame_of_query[:, None])
    logits = torch.einsum("bnhd,bmhd->bhnm", query, torch.cat(keys, 1)) / 12**0.5
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = gate * block.to_out(torch.einsum("bhnm,bmhd->bnhd", weights, values).flatten(2))
    assert torch.allclose(out.flatten(1, 2), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_text_reaches_its_frame_alone_and_given_frames_reach_all():
    block = adapted()[0].conditioner.blocks[0]
    hidden, time, given, text = block_inputs()
    out = block(hidden, time, given, text, turn)
    for f in range(FRAMES):
        other = text.clone()
        other[:, f] += 1
        changed = (block(hidden, time, given, other, turn) != out).flatten(2).any(dim=2).any(dim=0)
        assert changed.tolist() == [g == f for g in range(FRAMES)]
    other = given.clone()
    other[:, 3] += 1
    assert (block(hidden, time, other, text, turn) != out).flatten(2).any(dim=2).all()
    shuffled = text[:, :, torch.randperm(Q, generator=torch.Generator().manual_seed(0))]
    assert torch.allclose(block(hidden, time, given, shuffled, turn), out, rtol=0, atol=1e-12)


@torch.no_grad()
def test_time_per_frame_is_time_per_clip_where_equal():
    block = adapted()[0].conditioner.blocks[0]
    hidden, time, given, text = block_inputs()
    per_frame = time.repeat_interleave(FRAMES, dim=0)
    assert torch.allclose(block(hidden, per_frame, given, text, turn), block(hidden, time, given, text, turn))


@torch.no_grad()
def test_the_opened_start_is_the_layers_own_attention_to_the_given_frames():
    """With alpha = beta = 0 and gamma = 1 a block adds what the frozen self-attention would read off those tokens."""
    backbone, method = adapted(open_gates=False, adapter="no_frame_text")
    block = backbone.conditioner.blocks[1]
    block.modulation.bias[2 * D :] = 1
    attn = backbone.transformer.blocks[1].attn1
    hidden, time, given, _ = block_inputs()
    query = turn(attn.norm_q(attn.to_q(hidden.flatten(1, 2))).unflatten(-1, (4, -1)))
    key, value = turn(attn.norm_k(attn.to_k(given)).unflatten(-1, (4, -1))), attn.to_v(given).unflatten(-1, (4, -1))
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2).flatten(2)
    expected = attn.to_out[0](out)
    assert torch.allclose(block(hidden, time, given, None, turn).flatten(1, 2), expected, rtol=0, atol=1e-12)


# --- frame-wise text -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_frame_wise_text_reads_words_and_image_but_no_padding():
    torch.manual_seed(0)
    module = FrameTextQFormer(TEXT_DIM, D, D, width=24, heads=3, queries=Q, frames=6).double()
    text, image = randn(B, L, TEXT_DIM, seed=1), randn(B, N, D, seed=2)
    valid = torch.arange(L) < torch.tensor([[7], [4]])
    out = module(text, valid, image, FRAMES)
    assert out.shape == (B, FRAMES, Q, D)
    padded = text.clone()
    padded[1, 4:] = 9
    assert torch.equal(module(padded, valid, image, FRAMES), out)
    padded[1, 3] = 9
    assert not torch.equal(module(padded, valid, image, FRAMES)[1], out[1])
    assert not torch.equal(module(text, valid, image + 1, FRAMES), out)
    assert (out[:, 1:] - out[:, :-1]).abs().max() > 1e-3, "frames differ, by their queries"
    with pytest.raises(ValueError, match="7 latent frames, but the frame-wise text was made for 6"):
        module(text, valid, image, 7)
    order = torch.randperm(Q, generator=torch.Generator().manual_seed(3))
    module.queries.data[:, :] = module.queries[:, order]
    permuted = module(text, valid, image, FRAMES)
    assert torch.allclose(permuted, out[:, :, order], rtol=0, atol=1e-12), "a frame's queries have no order"


# --- what is known of the clip ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layers", "patches"])
@torch.no_grad()
def test_given_features_are_those_of_the_frozen_model_alone(kind):
    backbone, _ = adapted()
    text, given = context(), clip(7)[:, :, :2]
    found = given_features(backbone, given, text, kind)
    assert [tuple(one.shape) for one in found] == [(B, 2 * N, D)] * 2
    plain, layers = nn.Module.to(tiny_transformer(3), torch.float64), []  # an untouched diffusers model
    for block in plain.blocks:
        block.attn1.register_forward_pre_hook(lambda m, args: layers.append(args[0]))
    plain(given, torch.zeros(B), text.embeddings[:, 0])
    if kind == "layers":
        assert all(torch.equal(a, b) for a, b in zip(found, layers, strict=True))
    else:
        patches = plain.patch_embedding(given).flatten(2).transpose(1, 2)
        assert torch.allclose(found[1], F.layer_norm(patches, (D,)))


@torch.no_grad()
def test_target_frames_reach_neither_given_features_nor_text():
    """A clean clip that differs after the given frames makes the very same branch."""
    backbone, method = adapted(given_frames=2)
    layout, text = method.layout_for_training([FRAMES]), context()
    one, other = clip(7), clip(7)
    other[:, :, 2:] = randn(B, 4, 3, 4, 4, seed=9)
    outs = []
    for clean in (one, other):
        branch = method.prepare(backbone, layout, text, method.conditions(clean, layout))["branch"]
        outs.append(branch(1, randn(B, FRAMES, N, D, seed=1), randn(B, D, seed=2), turn))
    assert torch.equal(*outs)
    other[:, :, 1] += 1
    branch = method.prepare(backbone, layout, text, method.conditions(other, layout))["branch"]
    changed = branch(1, randn(B, FRAMES, N, D, seed=1), randn(B, D, seed=2), turn) != outs[0]
    assert changed.flatten(2).any(dim=2).all(), "while given frames change every frame"


@torch.no_grad()
def test_prepared_once_it_serves_every_step():
    backbone, method = adapted()
    layout, text, given = method.layout_for_training([FRAMES]), context(), clip(7)[:, :, :1]
    once = method.prepare(backbone, layout, text, {"given": given})
    for level in (0.9, 0.4):
        levels = torch.full((B,), level)
        again = predict(backbone, method, clip(), text, given, levels)
        assert torch.equal(backbone(clip(), levels, text, **once, **method.backbone_kwargs(layout)), again)


def test_checkpointed_blocks_get_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        backbone, method = adapted()
        backbone.train()
        if checkpointing:
            backbone.transformer.enable_gradient_checkpointing()
        predict(backbone, method, clip(), context(), clip(7)[:, :, :1]).square().sum().backward()
        grads.append([p.grad for p in backbone.conditioner.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*grads, strict=True))


# --- the method ----------------------------------------------------------------------------------------------------


def test_the_whole_clip_is_denoised_at_one_level_and_counts_in_the_loss():
    method = get_method("fca", given_frames=2, shift=3.0, density="logit_normal")
    layout = method.layout_for_training([5])
    assert layout.roles == ["target"] * 5 and layout == method.layout_for_task("tvp", [5])
    levels = method.sample_levels(layout, 50, torch.Generator().manual_seed(0))
    assert (levels == levels[:, :1]).all() and len(set(method.model_levels(levels).tolist())) == 50
    assert method.loss_weights(layout).tolist() == pytest.approx([0.2] * 5)
    without = get_method("fca", given_frames=2, loss_on_given=False)
    assert without.loss_weights(layout).tolist() == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3])


def test_without_modules_the_given_frames_are_held_and_the_model_is_told_one_level():
    method = get_method("fca", adapter="none", shift=3.0, density="logit_normal")
    layout = method.layout_for_training([4])
    assert layout.roles == ["condition"] + ["target"] * 3
    levels = method.sample_levels(layout, 20, torch.Generator().manual_seed(0))
    assert (levels[:, 0] == 0).all() and (levels[:, 1:] == levels[:, 1:2]).all()
    assert torch.equal(method.model_levels(levels), levels[:, 1])
    assert method.loss_weights(layout).tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    plan = method.plan(layout, torch.tensor([1.0, 0.5, 0.0]), "tvp")
    assert plan.tolist() == [[0, 1, 1, 1], [0, 0.5, 0.5, 0.5], [0, 0, 0, 0]]
    backbone = base()
    inject_lora(backbone, 2, 2)
    method.attach(backbone)
    assert backbone.conditioner is None and method.conditions(clip(), layout) == {} and method.drops == {}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"adapter": "half"}, "adapter is 'half'; choose one of full, no_frame_text, none"),
        ({"given_frames": 0}, "give at least 1"),
        ({"drop_given": 1.5}, "drop_given is 1.5, expected a probability"),
    ],
)
def test_parameters_are_checked(params, message):
    with pytest.raises(ValueError, match=message):
        get_method("fca", **params)


def test_what_fca_cannot_do_is_refused():
    method = get_method("fca", **SMALL)
    with pytest.raises(ValueError, match="one shot at a time.*shots_per_scene=1"):
        method.layout_for_training([2, 2])
    with pytest.raises(ValueError, match="nothing is left to make"):
        method.layout_for_training([1])
    with pytest.raises(ValueError, match="takes no givens"):
        method.layout_for_task("tvp", [5], head=2)
    with pytest.raises(ValueError, match="no layer_branch: CogVideoX 1.5 joins 2 latent frames into one token"):
        method.attach(CogVideoXBackbone(tiny_cogvideox(version="1.5"), FlowMatching()))
    with pytest.raises(ValueError, match="no layer_branch: .* Stable Video Diffusion reads none"):
        method.attach(SVDBackbone(tiny_svd(), EDM(0.002, 700.0)))
    with pytest.raises(ValueError, match="init_features is 'pixels'; choose one of layers, patches"):
        get_method("fca", **SMALL, init_features="pixels").attach(base())
    lora = base()
    inject_lora(lora, 2, 2)
    with pytest.raises(ValueError, match="lora.rank=0"):
        method.attach(lora)
    with pytest.raises(ValueError, match="has no FCA modules"):
        method.prepare(base(), method.layout_for_training([5]), context(), {"given": clip()[:, :, :1]})
    backbone, _ = adapted()
    with pytest.raises(ValueError, match="method 'fvdm' has no conditioning modules, but the model has some"):
        get_method("fvdm").attach(backbone)
    with pytest.raises(ValueError, match="already has conditioning modules, of another method or size"):
        get_method("fca", **SMALL | {"text_width": 12}).attach(backbone)
    two = TextContext(randn(B, 2, L, TEXT_DIM, seed=0), torch.tensor([0, 0, 0, 1, 1]))
    with pytest.raises(ValueError, match="one text per clip, got 2"):
        method.prepare(backbone, method.layout_for_training([5]), two, {"given": clip()[:, :, :1]})


def test_a_model_that_has_the_modules_keeps_them():
    backbone, method = adapted()
    before = copy.deepcopy(backbone.conditioner.state_dict())
    method.attach(backbone, seed=5)
    assert all(torch.equal(before[name], w) for name, w in backbone.conditioner.state_dict().items())


@torch.no_grad()
def test_the_modules_are_saved_beside_the_transformer_and_come_back(tmp_path: Path):
    from diffusers import WanPipeline

    model = build_tiny_folder(tmp_path / "base", text_length=16, method="fca", method_params=SMALL)
    method = get_method("fca", **SMALL)
    method.attach(model.backbone, seed=4)
    for block in model.backbone.conditioner.blocks:
        block.modulation.bias += 0.3
    save_model(tmp_path / "fca", model, model.settings)
    again = load_model(tmp_path / "fca")
    x, text, given = clip(dtype=torch.float32), context(dtype=torch.float32), clip(7, torch.float32)[:, :, :1]
    expected = predict(model.backbone, method, x, text, given)
    assert torch.equal(predict(again.backbone, method, x, text, given), expected)
    save_model(tmp_path / "copy", load_model(tmp_path / "fca", parts=("text",)), model.settings, tmp_path / "fca")
    assert torch.equal(predict(load_model(tmp_path / "copy").backbone, method, x, text, given), expected)
    low = load_model(tmp_path / "fca", parts=("backbone",), dtype=torch.bfloat16).backbone
    assert {p.dtype for p in low.conditioner.parameters()} == {torch.bfloat16}
    plain = WanPipeline.from_pretrained(tmp_path / "fca", local_files_only=True).transformer
    assert torch.equal(plain.proj_out.weight, again.backbone.transformer.proj_out.weight)

    settings = (tmp_path / "fca" / "shotloom.json").read_text()
    (tmp_path / "fca" / "shotloom.json").write_text(settings.replace('"text_width": 24', '"text_width": 12'))
    with pytest.raises(
        ValueError, match="conditioner/model.safetensors does not fit the method_params of shotloom.json: size mismatch"
    ):
        load_model(tmp_path / "fca")
