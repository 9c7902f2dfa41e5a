"""The SVD backbone against the unmodified diffusers U-Net and against a loop over frames and positions.

Float64 where equality is claimed to rounding.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch import Tensor

from models.backbones.base import require
from models.backbones.svd import CAPABILITIES, ImageCondition, SVDBackbone
from models.layout import shots_layout
from models.text import TextContext
from models.tiny_svd import tiny_svd
from tests.draw import randn
from tests.models.svd_reference import FRAMES, SCENE, B, D, L, Process, inputs, make, naive_unet, run_plain

# --- the plain model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(4, 6), (5, 3)], ids=["even", "odd"])
@torch.no_grad()
def test_equal_levels_are_the_plain_model_bit_for_bit(dtype, batch, size):
    backbone, plain = make(dtype)
    x, levels, text, image = inputs(dtype, batch=batch, size=size)
    level = levels[:, 0]
    for context in (text[:, 0], text[:, 0, :1]):  # several tokens; SVD's own single one
        expected = run_plain(plain, x, level, context, image)
        assert torch.equal(backbone(x, level, context, image=image), expected)
        assert torch.equal(backbone(x, level[:, None].expand(batch, FRAMES), context, image=image), expected)
        same = TextContext(context[:, None], torch.zeros(FRAMES, dtype=torch.long))
        assert torch.equal(backbone(x, level, same, image=image, layout=SCENE), expected)


def test_equal_levels_give_the_gradients_of_the_plain_model_bit_for_bit():
    backbone, plain = make(torch.float32)
    x, levels, text, image = inputs(torch.float32)
    backbone(x, levels[:, 0], text[:, 0], image=image).square().mean().backward()
    run_plain(plain, x, levels[:, 0], text[:, 0], image).square().mean().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in backbone.unet.named_parameters():
        assert torch.equal(parameter.grad, theirs[name].grad), name


def test_state_dict_is_that_of_the_plain_model(tmp_path):
    backbone, plain = make(torch.float32)
    assert list(backbone.unet.state_dict()) == list(plain.state_dict())
    x, levels, text, image = inputs(torch.float32)
    expected = backbone(x, levels, text[:, 0], image=image)
    backbone.unet.save_pretrained(tmp_path)
    loaded = UNetSpatioTemporalConditionModel.from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(SVDBackbone(loaded.eval(), Process())(x, levels, text[:, 0], image=image), expected)


# --- a level and a context per frame ----------------------------------------------------------------------------------


@torch.no_grad()
def test_levels_per_frame_are_the_loop_over_frames():
    backbone, plain = make()
    x, levels, text, image = inputs()
    contexts = text[:, :1].expand(-1, FRAMES, -1, -1)
    expected = naive_unet(plain, x, levels, contexts, image)
    assert torch.allclose(backbone(x, levels, text[:, 0], image=image), expected, rtol=0, atol=1e-12)
    same = levels[:, :1].expand(-1, FRAMES)
    plain_way = run_plain(plain, x, levels[:, 0], text[:, 0], image)
    assert torch.allclose(naive_unet(plain, x, same, contexts, image), plain_way, rtol=0, atol=1e-12)
    single, _ = make(torch.float32)
    image = ImageCondition(image.latents.float())
    out = single(x.float(), levels, text[:, 0].float(), image=image)
    assert torch.allclose(out.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "frame_text", [[0, 0, 1, 2, 2], [0, 1, 2, 0, 1], [2, 0, 2, 2, 0], [1] * 5],
    ids=["shots", "interleaved", "unread group", "one group"],
)  # fmt: skip
@pytest.mark.parametrize("equal_levels", [False, True])
@torch.no_grad()
def test_contexts_per_frame_are_the_loop_over_frames(frame_text, equal_levels):
    backbone, plain = make()
    x, levels, text, image = inputs()
    levels = levels[:, :1].expand(-1, FRAMES) if equal_levels else levels
    out = backbone(x, levels, TextContext(text, torch.tensor(frame_text)), image=image)
    assert torch.allclose(out, naive_unet(plain, x, levels, text[:, frame_text], image), rtol=0, atol=1e-12)


@torch.no_grad()
def test_temporal_attention_can_read_other_contexts_than_spatial():
    backbone, plain = make()
    x, levels, text, image = inputs()
    context = TextContext(text, SCENE.text_ids)
    pooled = randn(B, 2 * L, D, seed=7)
    out = backbone(x, levels, context, image=image, temporal_text=pooled)
    everywhere = pooled[:, None].expand(-1, FRAMES, -1, -1)
    expected = naive_unet(plain, x, levels, text[:, SCENE.text_ids], image, temporal_contexts=everywhere)
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)
    frame_0 = backbone(x, levels, context, image=image, temporal_text=text[:, 0])
    own = backbone(x, levels, context, image=image)
    assert (own - frame_0).abs().max() > 1e-4, "reading frame 0's context everywhere is something else"


@torch.no_grad()
def test_the_same_context_for_each_frame_is_one_context():
    backbone, _ = make()
    x, levels, text, image = inputs()
    single = backbone(x, levels[:, 0], text[:, 0], image=image)
    each = TextContext(text[:, :1].expand(-1, FRAMES, -1, -1), torch.arange(FRAMES))
    assert torch.allclose(backbone(x, levels[:, 0], each, image=image), single, rtol=0, atol=1e-12)
    repeated = backbone(x, levels[:, 0], text[:, 0, :1].expand(-1, 4, -1), image=image)
    assert torch.allclose(repeated, backbone(x, levels[:, 0], text[:, 0, :1], image=image), rtol=0, atol=1e-12)


@torch.no_grad()
def test_samples_do_not_mix_and_each_frame_feels_its_own_level():
    backbone, _ = make()
    x, levels, text, image = inputs()
    out = backbone(x, levels, text[:, 0], image=image)
    turned = ImageCondition(image.latents.flip(0))
    swapped = backbone(x.flip(0), levels.flip(0), text[:, 0].flip(0), image=turned)
    assert torch.allclose(swapped.flip(0), out, rtol=0, atol=1e-12)
    for f in range(FRAMES):
        other = levels.clone()
        other[:, f] = 0.2 * other[:, f]
        change = (backbone(x, other, text[:, 0], image=image) - out).abs().mean(dim=(0, 1, 3, 4))
        assert change.argmax() == f and (change > 0).all()


@torch.no_grad()
def test_without_temporal_layers_a_frame_knows_no_other():
    backbone, plain = make()
    x, levels, text, image = inputs()
    context, options = TextContext(text, SCENE.text_ids), dict(image=image, attention_rule="same_frame")
    out = backbone(x, levels, context, **options)
    expected = naive_unet(plain, x, levels, text[:, SCENE.text_ids], image, image_only=True)
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)
    for f in range(FRAMES):
        other_x, other = x.clone(), levels.clone()
        other[:, f], other_x[:, :, f] = 0.5 * other[:, f], -other_x[:, :, f]
        changed = (backbone(other_x, other, context, **options) != out).any(dim=(0, 1, 3, 4))
        assert changed.tolist() == [g == f for g in range(FRAMES)]


@torch.no_grad()
def test_times_reach_the_model_in_float32_and_once_per_frame():
    backbone, _ = make(torch.bfloat16)
    x, levels, text, image = inputs(torch.bfloat16)
    seen: dict[str, Tensor] = {}
    backbone.unet.time_proj.register_forward_pre_hook(lambda m, args: seen.update(times=args[0]))
    resnet = backbone.unet.up_blocks[1].resnets[0]
    resnet.spatial_res_block.register_forward_pre_hook(lambda m, args: seen.update(spatial=args[1]))
    resnet.temporal_res_block.register_forward_pre_hook(lambda m, args: seen.update(temporal=args[1]))
    backbone(x, levels, text[:, 0], image=image)
    assert seen["times"].dtype == torch.float32 and torch.equal(
        seen["times"], Process().to_model_time(levels).flatten()
    )
    assert seen["spatial"].shape == (B * FRAMES, 128) and seen["temporal"].shape == (B, FRAMES, 128)


# --- the image and the numbers beside it ------------------------------------------------------------------------------


@torch.no_grad()
def test_the_image_is_one_for_all_frames_or_one_for_each():
    backbone, _ = make()
    x, levels, text, image = inputs()
    out = backbone(x, levels, text[:, 0], image=image)
    each = ImageCondition(image.latents.repeat(1, 1, FRAMES, 1, 1))
    assert torch.equal(backbone(x, levels, text[:, 0], image=each), out)
    each.latents[:, :, 2] = 0
    options = dict(attention_rule="same_frame")
    changed = backbone(x, levels, text[:, 0], image=each, **options) != backbone(
        x, levels, text[:, 0], image=image, **options
    )
    assert changed.any(dim=(0, 1, 3, 4)).tolist() == [False, False, True, False, False]


@torch.no_grad()
def test_numbers_are_for_all_samples_or_for_each():
    backbone, _ = make()
    x, levels, text, image = inputs()
    seen: list[Tensor] = []
    backbone.unet.add_time_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 3)))
    out = backbone(x, levels[:, 0], text[:, 0], image=image)
    assert torch.equal(seen[0], torch.tensor([[6.0, 127.0, 0.02]] * B)), "told one frame per second less"
    for name, value in (("fps", 25.0), ("motion_bucket", 30.0), ("noise_aug", 0.5)):
        default = getattr(image, name)
        second = dataclasses.replace(image, **{name: torch.tensor([default, value])})
        change = (backbone(x, levels[:, 0], text[:, 0], image=second) - out).abs().amax(dim=(1, 2, 3, 4))
        assert change[0] == 0 and change[1] > 0, name
        both = backbone(x, levels, text[:, 0], image=second)
        alone = dataclasses.replace(image, latents=image.latents[1:], **{name: value})
        assert torch.allclose(both[1:], backbone(x[1:], levels[1:], text[1:, 0], image=alone), rtol=0, atol=1e-12)


# --- training --------------------------------------------------------------------------------------------------------


def gradients(backbone: SVDBackbone, *forwards) -> list[Tensor]:
    backbone.zero_grad()
    torch.stack([backbone(*args, **options).square().sum() for args, options in forwards]).sum().backward()
    return [p.grad.clone() for p in backbone.parameters() if p.grad is not None]


def three_clips():
    x, levels, text, image = inputs()
    shots = (x, levels, TextContext(text, SCENE.text_ids)), dict(image=image)
    other = TextContext(text.flip(1), torch.tensor([0, 1, 0, 1, 2]))
    frames = (x, levels[:, 0], other), dict(image=image, temporal_text=text[:, 1])
    return shots, frames, ((x, levels[:, 0], text[:, 0]), dict(image=image))


def test_gradients_are_those_of_the_loop():
    backbone, plain = make()
    x, levels, text, image = inputs()
    backbone(x, levels, TextContext(text, SCENE.text_ids), image=image).square().sum().backward()
    naive_unet(plain, x, levels, text[:, SCENE.text_ids], image).square().sum().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in backbone.unet.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name].grad, rtol=1e-8, atol=1e-8), name


@pytest.mark.parametrize("how", ["diffusers", "wrapped blocks"])
def test_checkpointing_gives_the_same_gradients_over_different_clips(how):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    backbone, _ = make()
    backbone.train()
    plain = gradients(backbone, *three_clips())
    if how == "diffusers":
        backbone.unet.enable_gradient_checkpointing()
    else:
        names = [n for n, m in backbone.named_modules() if type(m).__name__ in backbone.unet._no_split_modules]
        assert len(names) == 8 + 4  # 2 down, 2 in the middle, 4 up; 1, 1 and 2 of them with attention
        for name in names:
            backbone.set_submodule(name, checkpoint_wrapper(backbone.get_submodule(name)))
    again = gradients(backbone, *three_clips())
    assert len(plain) == len(again) == len(list(backbone.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(plain, again, strict=True))


def test_sampling_first_does_not_stop_training():
    backbone, _ = make()
    x, levels, text, image = inputs()
    with torch.inference_mode():
        expected = backbone(x, levels, text[:, 0], image=image)
    out = backbone(x, levels, text[:, 0], image=image)
    out.sum().backward()
    assert torch.equal(out.detach(), expected)


@torch.no_grad()
def test_a_copy_stands_on_its_own():
    backbone, _ = make()
    x, levels, text, image = inputs()
    context = TextContext(text, SCENE.text_ids)
    expected = backbone(x, levels, context, image=image)
    copied = copy.deepcopy(backbone)
    backbone(x, levels[:, 0], text[:, 0], image=image)  # the original's clip changes
    for parameter in backbone.parameters():
        parameter.zero_()
    assert torch.equal(copied(x, levels, context, image=image), expected)


def test_bfloat16_autocast_follows_float32():
    backbone, _ = make(torch.float32)
    x, levels, text, image = inputs(torch.float32)
    context = TextContext(text, SCENE.text_ids)
    with torch.autocast("cpu", torch.bfloat16):
        out = backbone(x, levels, context, image=image)
    out.float().square().mean().backward()
    exact = backbone(x, levels, context, image=image)
    assert (out - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters())


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_sharded_blocks_compute_the_same(tmp_path, precision):
    """FSDP2 gathers and casts at the calls of the blocks that `_no_split_modules` names, and of the root."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = torch.float32 if precision == "bf16" else torch.float64
    backbone, _ = make(dtype)
    x, levels, text, image = inputs(dtype)
    args = (x, levels, TextContext(text, SCENE.text_ids)), dict(image=image)
    expected = backbone(*args[0], **args[1])
    grads = gradients(backbone, args)
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        low = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bf16" else MixedPrecisionPolicy()
        blocks = backbone.unet._no_split_modules
        for block in [m for m in backbone.modules() if type(m).__name__ in blocks]:
            fully_shard(block, mesh=mesh, mp_policy=low)
        fully_shard(backbone, mesh=mesh)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = backbone(*args[0], **args[1])
        if precision == "fp64":
            assert torch.equal(out, expected)
            sharded = [g.full_tensor() for g in gradients(backbone, args)]
            assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(grads, sharded, strict=True))
        else:
            assert (out - expected).abs().max() < 0.05 * expected.abs().max()
            out.float().square().sum().backward()
    finally:
        destroy_process_group()


@torch.no_grad()
def test_with_its_process_it_is_the_diffusers_sampling_loop():
    process = pytest.importorskip("models.process").EDM(0.002, 700.0)
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002,
        sigma_max=700.0, timestep_spacing="leading", steps_offset=1, interpolation_type="linear",
    )  # fmt: skip
    scheduler.set_timesteps(4)
    _, plain = make(torch.float32)
    backbone = SVDBackbone(copy.deepcopy(plain), process)
    x, _, text, image = inputs(torch.float32)
    theirs = ours = x * scheduler.init_noise_sigma
    levels = torch.cat([process.to_level(scheduler.sigmas[:-1]), torch.zeros(1)])
    still = image.latents.repeat(1, 1, FRAMES, 1, 1)
    ids = torch.tensor([[6.0, 127.0, 0.02]]).repeat(B, 1)
    for k, t in enumerate(scheduler.timesteps):
        sample = torch.cat([scheduler.scale_model_input(theirs, t), still], dim=1).transpose(1, 2)
        theirs = scheduler.step(plain(sample, t, text[:, 0], ids).sample.transpose(1, 2), t, theirs).prev_sample
        now, after = (levels[i].expand(B, FRAMES) for i in (k, k + 1))
        ours = process.step(ours, backbone(process.precondition(ours, now), now, text[:, 0], image=image), now, after)
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def test_lora_on_the_layers_of_its_blocks():
    """peft's own injection: the class is no PeftAdapterMixin, which `models.modules.lora` builds on."""
    from peft import LoraConfig, inject_adapter_in_model

    backbone, _ = make()
    x, levels, text, image = inputs()
    context = TextContext(text, SCENE.text_ids)
    expected = backbone(x, levels, context, image=image)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=targets), backbone.unet)
    out = backbone(x, levels, context, image=image)
    assert torch.allclose(out, expected, rtol=0, atol=1e-12), "B starts at zero"
    out.square().sum().backward()
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * 2 * 2 * (2 * 4 + 2) and all("lora_" in name for name in trained)
    assert all(p.grad.abs().sum() > 0 for name, p in backbone.named_parameters() if "lora_B" in name)


# --- backends, capabilities, errors ----------------------------------------------------------------------------------


@torch.no_grad()
def test_an_attention_backend_is_this_backbones_alone():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    backbone, _ = make()
    other, _ = make()
    before = _AttentionBackendRegistry.get_active_backend()[0]
    x, levels, text, image = inputs()
    context = TextContext(text, SCENE.text_ids)
    expected = backbone(x, levels, context, image=image)
    backbone.set_attention_backend("_native_math")
    assert torch.allclose(backbone(x, levels, context, image=image), expected, rtol=0, atol=1e-12)
    processors = [m.processor for m in backbone.modules() if hasattr(m, "processor")]
    assert len(processors) == 16 and {p._attention_backend.value for p in processors} == {"_native_math"}
    assert all(m.processor._attention_backend is None for m in other.modules() if hasattr(m, "processor"))
    assert _AttentionBackendRegistry.get_active_backend()[0] == before


@torch.no_grad()
def test_what_does_not_fit_is_named():
    backbone, _ = make()
    x, levels, text, image = inputs()
    context = TextContext(text, SCENE.text_ids)
    for args, options, message in (
        ((x, levels[:, :4], context), {}, r"levels have shape \(2, 4\), expected \[2\] or \[2,5\]"),
        ((x, levels, context), dict(layout=shots_layout([3, 3])), "layout has 6 latent frames, x has 5"),
        ((x, levels, TextContext(text, SCENE.text_ids[:4])), {}, "text is for 2 samples of 4 frames"),
        ((x, levels, TextContext(text[:, :2], SCENE.text_ids)), {}, r"groups 0\.\.1"),
        ((x, levels, context), dict(temporal_text=text[:1, 0]), "text is for 1 samples of 5 frames"),
        ((x, levels, context), dict(image=None), "SVD needs `image`, an ImageCondition"),
        ((x, levels, context), dict(image=ImageCondition(x[:, :, :2])), r"expected \[2,4,1 or 5,4,6\]"),
        ((x, levels, context), dict(image=ImageCondition(x[:, :3])), r"expected \[2,4,1 or 5,4,6\]"),
        ((x, levels, context), dict(image=ImageCondition(x[:, :, 0])), r"expected \[2,4,1 or 5,4,6\]"),
        ((x, levels, context), dict(attention_rule="group_causal"), "carry the future into the past"),
        ((x, levels, context), dict(position_mode="time_gap"), "half a gap"),
        ((x, levels, context), dict(position_mode="diagonal"), "no positions in space"),
    ):
        with pytest.raises(ValueError, match=message):
            backbone(*args, **{"image": image, **options})
    with pytest.raises(ValueError, match="in_channels is 4 with out_channels 4"):
        SVDBackbone(tiny_svd(in_channels=4), Process())
    with pytest.raises(ValueError, match="3 \\* addition_time_embed_dim = 24"):
        SVDBackbone(tiny_svd(projection_class_embeddings_input_dim=16), Process())


def test_wrong_pairings_are_refused_before_anything_runs():
    require(CAPABILITIES, per_frame_levels=True, text_per_shot=True, attention_rule="same_frame")
    for options, reason in (
        ({"position_mode": "time_gap"}, "half a gap"),
        ({"attention_rule": "group_causal"}, "past"),
    ):
        with pytest.raises(ValueError, match=reason):
            require(SVDBackbone.capabilities, **options)
