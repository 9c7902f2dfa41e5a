"""The Latte backbone against the unmodified diffusers model and against FVDM's factorised loop written out.

Latents are H x W with patches 2 x 2. Float64 where equality is claimed to rounding.
"""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import LatteTransformer3DModel
from torch import Tensor

from models.attention import block_mask, group_ids
from models.backbones.base import require
from models.backbones.latte import CAPABILITIES, LatteBackbone
from models.layout import shots_layout
from models.modules.labels import LabelEmbedding
from models.text import TextContext
from models.tiny_latte import tiny_latte
from tests.draw import randn
from tests.models.latte_reference import FRAMES, SCENE, B, L, Process, factorised_loop, inputs, make

# --- the plain model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"num_attention_heads": 6, "attention_head_dim": 16, "out_channels": 4}])
@torch.no_grad()
def test_equal_levels_are_the_plain_model_bit_for_bit(dtype, batch, changes):
    if changes:
        changes = changes | {"cross_attention_dim": 96}
    backbone, plain = make(dtype, **changes)
    x, text = randn(batch, 4, FRAMES, 8, 6, seed=1, dtype=dtype), randn(batch, L, 32, seed=2, dtype=dtype)
    level = torch.rand(batch, generator=torch.Generator().manual_seed(0))
    expected = plain(x, 999 * level, text).sample[:, :4]
    assert torch.equal(backbone(x, level, text), expected), "the prediction half, where there are two"
    assert torch.equal(backbone(x, level[:, None].expand(batch, FRAMES), text), expected)
    one_shot = dict(layout=shots_layout([FRAMES]), position_mode="time_gap", attention_rule="group_causal")
    context = TextContext(text[:, None], torch.zeros(FRAMES, dtype=torch.long))
    assert torch.equal(backbone(x, level, context, **one_shot), expected), "one shot is the base model"
    single = x[:, :, :1]
    assert torch.equal(backbone(single, level, text), plain(single, 999 * level, text).sample[:, :4])


def test_equal_levels_give_the_gradients_of_the_plain_model_bit_for_bit():
    backbone, plain = make(torch.float32)
    x, levels, text = inputs(torch.float32)
    backbone(x, levels[:, 0], text[:, 0]).square().mean().backward()
    plain(x, 999 * levels[:, 0], text[:, 0]).sample[:, :4].square().mean().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in backbone.transformer.named_parameters():
        assert torch.equal(parameter.grad, theirs[name].grad), name


def test_state_dict_is_that_of_the_plain_model(tmp_path):
    backbone, plain = make(torch.float32)
    assert list(backbone.transformer.state_dict()) == list(plain.state_dict())
    x, levels, text = inputs(torch.float32)
    expected = backbone(x, levels, text[:, 0])
    backbone.transformer.save_pretrained(tmp_path)
    loaded = LatteTransformer3DModel.from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(LatteBackbone(loaded.eval(), Process())(x, levels, text[:, 0]), expected)


# --- a level per frame -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (4, 6)], ids=["n=4", "n=F=6"])
@torch.no_grad()
def test_levels_per_frame_are_the_factorised_loop(size):
    backbone, plain = make()
    x, levels, text = inputs(size=size)
    contexts = text[:, :1].expand(-1, FRAMES, -1, -1)
    expected = factorised_loop(plain, x, levels, contexts)
    assert torch.allclose(backbone(x, levels, text[:, 0]), expected, rtol=0, atol=1e-12)
    same = levels[:, :1].expand(-1, FRAMES)
    plain_way = plain(x, 999 * levels[:, 0], text[:, 0]).sample[:, :4]
    assert torch.allclose(factorised_loop(plain, x, same, contexts), plain_way, rtol=0, atol=1e-12)


@torch.no_grad()
def test_levels_per_frame_in_float32():
    backbone, plain = make(torch.float32)
    x, levels, text = inputs(torch.float32)
    expected = factorised_loop(make()[1], x.double(), levels, text[:, :1].expand(-1, FRAMES, -1, -1).double())
    assert torch.allclose(backbone(x, levels, text[:, 0]).double(), expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_equal_levels_beside_a_sample_with_unequal_ones():
    backbone, _ = make()
    x, levels, text = inputs()
    levels[0] = 0.4
    both = backbone(x, levels, text[:, 0])
    alone = backbone(x[:1], levels[:1], text[:1, 0])
    assert torch.allclose(both[:1], alone, rtol=0, atol=1e-12), "the two ways through the model agree"


@torch.no_grad()
def test_samples_do_not_mix_and_each_frame_feels_its_own_level():
    backbone, _ = make()
    x, levels, text = inputs()
    out = backbone(x, levels, text[:, 0])
    swapped = backbone(x.flip(0), levels.flip(0), text[:, 0].flip(0))
    assert torch.allclose(swapped.flip(0), out, rtol=0, atol=1e-12)
    for f in range(FRAMES):
        other = levels.clone()
        other[:, f] = 0.5 * other[:, f]
        change = (backbone(x, other, text[:, 0]) - out).abs().mean(dim=(0, 1, 3, 4))
        assert change.argmax() == f and (change > 0).all()


@torch.no_grad()
def test_modulation_stays_per_frame_and_time_stays_float32():
    backbone, _ = make(torch.bfloat16)
    seen: dict[str, Tensor] = {}
    model = backbone.transformer
    model.transformer_blocks[1].register_forward_pre_hook(lambda m, args: seen.update(spatial=args[4]))
    model.temporal_transformer_blocks[1].register_forward_pre_hook(
        lambda m, args: seen.update(temporal=args[4], hidden=args[0])
    )
    model.adaln_single.register_forward_pre_hook(lambda m, args: seen.update(time=args[0]))
    x, levels, text = inputs(torch.bfloat16)
    levels[0, 0] = 0.9987
    backbone(x, levels, text[:, 0])
    assert seen["spatial"].shape == seen["temporal"].shape == (B * FRAMES, 6 * 48)
    assert seen["hidden"].shape == (B * FRAMES, 4, 48) and seen["hidden"].dtype == torch.bfloat16
    assert seen["time"].dtype == torch.float32 and seen["time"][0].item() == pytest.approx(997.7, abs=1e-2)


# --- rules and positions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equal_levels", [False, True])
@pytest.mark.parametrize("rule", ["full", "group_causal", "same_frame"])
@torch.no_grad()
def test_rules_are_masks_of_the_temporal_attention(rule, equal_levels):
    backbone, plain = make()
    x, levels, text = inputs()
    levels = levels[:, :1].expand(-1, FRAMES) if equal_levels else levels
    mask = block_mask(torch.arange(FRAMES) if rule == "same_frame" else group_ids(SCENE), rule)
    positions = torch.tensor([0, 1, 2, 6, 10, 11])
    expected = factorised_loop(plain, x, levels, text[:, :1].expand(-1, FRAMES, -1, -1), positions, mask)
    options = dict(layout=SCENE, position_mode="time_gap", position_gap=3, attention_rule=rule)
    assert torch.allclose(backbone(x, levels, text[:, 0], **options), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_without_temporal_mixing_a_frame_knows_no_other_frames_level():
    backbone, _ = make()
    x, levels, text = inputs()
    out = backbone(x, levels, text[:, 0], attention_rule="same_frame")
    for f in range(FRAMES):
        other_x, other = x.clone(), levels.clone()
        other[:, f], other_x[:, :, f] = 0.5 * other[:, f], -other_x[:, :, f]
        changed = (backbone(other_x, other, text[:, 0], attention_rule="same_frame") != out).any(dim=(0, 1, 3, 4))
        assert changed.tolist() == [g == f for g in range(FRAMES)]


@torch.no_grad()
def test_group_causal_earlier_shots_never_feel_later_ones():
    backbone, _ = make(torch.float32)
    x, levels, text = inputs(torch.float32)
    for first, rule in ((3, "group_causal"), (4, "group_causal"), (3, "full")):
        options = dict(layout=SCENE, position_mode="time_gap", attention_rule=rule)
        out = backbone(x, levels, TextContext(text, SCENE.text_ids), **options)
        other_x, other_levels, other_text = x.clone(), levels.clone(), text.clone()
        other_x[:, :, first:] += 1.0
        other_levels[:, first:] *= 0.5
        other_text[:, SCENE.text_ids[first] :] += 1.0
        out2 = backbone(other_x, other_levels, TextContext(other_text, SCENE.text_ids), **options)
        assert torch.equal(out[:, :, :first], out2[:, :, :first]) == (rule == "group_causal")
        assert (out[:, :, first:] != out2[:, :, first:]).any(dim=(0, 1, 3, 4)).all()


@torch.no_grad()
def test_clips_of_another_length_read_on_in_the_same_table():
    backbone, plain = make()
    long_model = make(video_length=9)[1]
    x, text = randn(B, 4, 9, 4, 4, seed=1), randn(B, L, 32, seed=2)
    levels = torch.tensor([0.3, 0.8])
    for frames, reference in ((9, long_model), (6, plain)):
        clip = x[:, :, :frames]
        expected = reference(clip, 999 * levels, text).sample[:, :4]
        assert torch.equal(backbone(clip, levels, text), expected)


# --- text per frame --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame_text",
    [[0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2], [2, 0, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1]],
    ids=["shots", "interleaved", "unread group", "one group"],
)
@pytest.mark.parametrize("equal_levels", [False, True])
@torch.no_grad()
def test_text_per_frame_against_the_loop(frame_text, equal_levels):
    backbone, plain = make()
    x, levels, text = inputs()
    levels = levels[:, :1].expand(-1, FRAMES) if equal_levels else levels
    expected = factorised_loop(plain, x, levels, text[:, frame_text])
    out = backbone(x, levels, TextContext(text, torch.tensor(frame_text)))
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_one_text_for_all_is_the_same_text_for_each():
    backbone, _ = make()
    x, levels, text = inputs()
    single = backbone(x, levels, text[:, 0])
    each = backbone(x, levels, TextContext(text[:, :1].expand(-1, FRAMES, -1, -1), torch.arange(FRAMES)))
    assert torch.allclose(single, each, rtol=0, atol=1e-12)


def test_a_label_stands_in_the_place_of_text():
    backbone, _ = make(torch.float32)
    labels = LabelEmbedding(3, 32)
    x, levels, _ = inputs(torch.float32)
    out = backbone(x, levels, labels(torch.tensor([2, 0])))
    change = (out - backbone(x, levels, labels(torch.tensor([1, 0])))).abs().amax(dim=(1, 2, 3, 4))
    assert (change > 0).tolist() == [True, False]
    dropped = labels(torch.tensor([2, 0]), drop=torch.tensor([True, False]))
    assert torch.equal(dropped[:1], labels.null(1)) and torch.equal(dropped[1:], labels(torch.tensor([0])))
    unconditional = backbone(x, levels, LabelEmbedding(0, 32).null(B))
    assert unconditional.shape == x.shape
    out.sum().backward()
    assert (labels.table.weight.grad.abs().sum(dim=1) > 0).tolist() == [True, False, True, False]
    with pytest.raises(ValueError, match=r"labels are \[3\], this table has 0\.\.2"):
        labels(torch.tensor([3]))


# --- training --------------------------------------------------------------------------------------------------------


def gradients(backbone: LatteBackbone, *forwards) -> list[Tensor]:
    backbone.zero_grad()
    torch.stack([backbone(*args, **options).square().sum() for args, options in forwards]).sum().backward()
    return [p.grad.clone() for p in backbone.parameters() if p.grad is not None]


def two_clips():
    x, levels, text = inputs()
    scene = (x, levels, TextContext(text, SCENE.text_ids)), dict(layout=SCENE, position_mode="time_gap")
    other = shots_layout([2, 4])
    clip = (
        (x, levels[:, 0], TextContext(text[:, :2], other.text_ids)),
        dict(layout=other, attention_rule="group_causal"),
    )
    return scene, clip, ((x, levels[:, 0], text[:, 0]), {})


def test_gradients_are_those_of_the_loop():
    backbone, plain = make()
    x, levels, text = inputs()
    backbone(x, levels, TextContext(text, SCENE.text_ids)).square().sum().backward()
    factorised_loop(plain, x, levels, text[:, SCENE.text_ids]).square().sum().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in backbone.transformer.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name].grad, rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("how", ["diffusers", "wrapped blocks"])
def test_checkpointing_gives_the_same_gradients_over_different_clips(how):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    backbone, _ = make()
    backbone.train()
    plain = gradients(backbone, *two_clips())
    if how == "diffusers":
        backbone.transformer.enable_gradient_checkpointing()
    else:
        names = [n for n, m in backbone.named_modules() if type(m).__name__ in backbone.transformer._no_split_modules]
        assert len(names) == 4
        for name in names:
            backbone.set_submodule(name, checkpoint_wrapper(backbone.get_submodule(name)))
    again = gradients(backbone, *two_clips())
    assert len(plain) == len(again) == len(list(backbone.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(plain, again, strict=True))


def test_sampling_first_does_not_stop_training():
    backbone, _ = make()
    x, levels, text = inputs()
    layout = shots_layout([1, 5])  # no other test's, so that its table is not there yet
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
    backbone(x, levels[:, 0], text[:, 0])  # the original's clip changes
    for parameter in backbone.parameters():
        parameter.zero_()
    assert torch.equal(copied(x, levels, context, layout=SCENE), expected)
    assert copied._rows is not backbone._rows


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
    args, options = (x, levels, TextContext(text, SCENE.text_ids)), dict(layout=SCENE, attention_rule=rule)
    expected, equal = backbone(*args, **options), backbone(x, levels[:, 0], text[:, 0])
    for block in (*backbone.transformer.transformer_blocks, *backbone.transformer.temporal_transformer_blocks):
        block.compile(backend="eager", fullgraph=True)
    assert torch.allclose(backbone(*args, **options), expected, atol=1e-6)
    assert torch.allclose(backbone(x, levels[:, 0], text[:, 0]), equal, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sharded_blocks_compute_the_same(tmp_path, precision):
    """FSDP2 gathers and casts at the calls of the blocks that `_no_split_modules` names, and of the root."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    backbone, _ = make(torch.float32)
    x, levels, text = inputs(torch.float32)
    args = (x, levels, TextContext(text, SCENE.text_ids)), dict(layout=SCENE, position_mode="time_gap")
    expected = backbone(*args[0], **args[1])
    grads = gradients(backbone, args)
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        low = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bf16" else MixedPrecisionPolicy()
        blocks = backbone.transformer._no_split_modules
        for block in [m for m in backbone.modules() if type(m).__name__ in blocks]:
            fully_shard(block, mesh=mesh, mp_policy=low)
        fully_shard(backbone, mesh=mesh)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = backbone(*args[0], **args[1])
        if precision == "fp32":
            assert torch.equal(out, expected)
            sharded = [g.full_tensor() for g in gradients(backbone, args)]
            assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(grads, sharded, strict=True))
        else:
            assert (out - expected).abs().max() < 0.05 * expected.abs().max()
            out.float().square().sum().backward()
    finally:
        destroy_process_group()


@torch.no_grad()
def test_with_its_process_it_is_the_diffusers_sampling_loop():
    processes = pytest.importorskip("models.process")
    from diffusers import DDIMScheduler

    _, plain = make()
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    process = processes.VPDiffusion(scheduler.alphas_cumprod, "epsilon")
    backbone = LatteBackbone(copy.deepcopy(plain), process)
    x, _, text = inputs()
    theirs, ours = x, x
    for t, level in zip(scheduler.timesteps, (1.0, 0.75, 0.5, 0.25), strict=True):
        theirs = scheduler.step(plain(theirs, t.expand(B), text[:, 0]).sample[:, :4], t, theirs).prev_sample
        now, after = torch.full((B, FRAMES), level), torch.full((B, FRAMES), level - 0.25)
        ours = process.step(ours, backbone(ours, now, text[:, 0]), now, after)
        # the last of theirs ends at timestep 0, ours at the clean clip
        assert level == 0.25 or torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_lora_on_the_layers_of_its_blocks():
    """peft's own injection: the class is no PeftAdapterMixin, which `models.modules.lora` builds on."""
    from peft import LoraConfig, inject_adapter_in_model

    backbone, _ = make(torch.float32)
    x, levels, text = inputs(torch.float32)
    expected = backbone(x, levels, text[:, 0])
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=targets), backbone.transformer)
    out = backbone(x, levels, text[:, 0])
    assert torch.equal(out, expected), "B starts at zero"
    out.square().sum().backward()
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    # two spatial blocks with two attentions, two temporal ones with one, of four layers each; a feed-forward of two
    assert len(trained) == 2 * (2 * (2 * 4 + 2) + 2 * (4 + 2)) and all("lora_" in name for name in trained)
    assert all(p.grad.abs().sum() > 0 for name, p in backbone.named_parameters() if "lora_B" in name)


# --- backends, capabilities, errors ----------------------------------------------------------------------------------


@torch.no_grad()
def test_an_attention_backend_is_this_backbones_alone():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    backbone, _ = make()
    other, _ = make()
    before = _AttentionBackendRegistry.get_active_backend()[0]
    x, levels, text = inputs()
    expected = backbone(x, levels, text[:, 0])
    backbone.set_attention_backend("_native_math")
    assert torch.allclose(backbone(x, levels, text[:, 0]), expected, rtol=0, atol=1e-12)
    processors = [m.processor for m in backbone.modules() if hasattr(m, "processor")]
    assert len(processors) == 6 and {p._attention_backend.value for p in processors} == {"_native_math"}
    assert all(m.processor._attention_backend is None for m in other.modules() if hasattr(m, "processor"))
    assert _AttentionBackendRegistry.get_active_backend()[0] == before
    with pytest.raises(ValueError, match="nonsense"):
        backbone.set_attention_backend("nonsense")


@torch.no_grad()
def test_what_does_not_fit_is_named():
    backbone, _ = make()
    x, levels, text = inputs()
    context = TextContext(text, SCENE.text_ids)
    for args, options, message in (
        ((x, levels[:, :4], context), {}, r"levels have shape \(2, 4\), expected \[2\] or \[2,6\]"),
        ((x, levels, context), dict(layout=shots_layout([3, 2])), "layout has 5 latent frames, x has 6"),
        ((x[..., :3], levels, context), {}, "4x3 is not a multiple of the model's patch or stride, 2"),
        ((x, levels, TextContext(text, SCENE.text_ids[:4])), {}, "text is for 2 samples of 4 frames"),
        ((x, levels, TextContext(text[:, :2], SCENE.text_ids)), {}, r"groups 0\.\.1"),
        ((x, levels, context), dict(position_mode="diagonal"), "one absolute table to the patch grid"),
    ):
        with pytest.raises(ValueError, match=message):
            backbone(*args, **options)
    with pytest.raises(ValueError, match="ada_norm_single"):
        LatteBackbone(tiny_latte(norm_type="layer_norm"), Process())
    with pytest.raises(ValueError, match="out_channels is 6 with in_channels 4"):
        LatteBackbone(tiny_latte(out_channels=6), Process())


def test_wrong_pairings_are_refused_before_anything_runs():
    require(CAPABILITIES, per_frame_levels=True, position_mode="time_gap", attention_rule="group_causal")
    require(LatteBackbone.capabilities, text_per_shot=True)
    with pytest.raises(ValueError, match=r"diagonal.*shots cannot move apart in space"):
        require(CAPABILITIES, position_mode="diagonal")
