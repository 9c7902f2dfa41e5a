"""The CogVideoX backbone in training, under LoRA and sharding, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

from models.backbones.base import require
from models.backbones.cogvideox import CogVideoXBackbone, TextContext
from models.layout import shots_layout
from models.modules.lora import inject_lora, load_lora, merge_lora, save_lora
from models.tiny_cogvideox import tiny_cogvideox
from tests.draw import randn
from tests.models.cogvideox_cases import PAIRS, SCENE, Process, inputs, make, run_plain

# --- training ------------------------------------------------------------------------------------------------------


def gradients(backbone: CogVideoXBackbone, *forwards) -> list[torch.Tensor]:
    backbone.zero_grad()
    torch.stack([backbone(*args, **options).square().sum() for args, options in forwards]).sum().backward()
    return [p.grad.clone() for p in backbone.parameters() if p.grad is not None]


def two_clips(dtype: torch.dtype = torch.float64):
    x, levels, text = inputs(dtype)
    scene = (x, levels, TextContext(text, SCENE.text_ids)), dict(layout=SCENE, position_mode="time_gap")
    clip = (
        (x, levels[:, 0], TextContext(text[:, :2], PAIRS.text_ids)),
        dict(layout=PAIRS, attention_rule="group_causal"),
    )
    return scene, clip


@pytest.mark.parametrize("version", ["2b", "5b"])
def test_checkpointing_gives_the_same_gradients_over_two_different_clips(version):
    backbone, _ = make(version)
    backbone.train()
    plain = gradients(backbone, *two_clips())
    backbone.transformer.enable_gradient_checkpointing()
    again = gradients(backbone, *two_clips())
    assert len(plain) == len(again) == len(list(backbone.parameters())), "every parameter has a gradient"
    assert all(g.abs().max() > 0 for g in plain)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("version", ["2b", "5b"])
def test_sampling_first_does_not_stop_training(version):
    backbone, _ = make(version)
    x, levels, text = inputs()
    layout = shots_layout([1, 5])  # no other test's, so that its tables are not there yet
    with torch.inference_mode():
        expected = backbone(x, levels, text[:, 0], layout=layout)
    out = backbone(x, levels, text[:, 0], layout=layout)
    out.sum().backward()
    assert torch.equal(out.detach(), expected)


@pytest.mark.parametrize("version", ["2b", "5b"])
@torch.no_grad()
def test_a_copy_stands_on_its_own(version):
    backbone, _ = make(version)
    (scene, options), (clip, _) = two_clips()
    expected = backbone(*scene, **options)
    copied = copy.deepcopy(backbone)
    for parameter in backbone.parameters():
        parameter.zero_()
    backbone(*clip)  # the original's positions change
    assert torch.equal(copied(*scene, **options), expected)


def test_bfloat16_autocast_follows_float32():
    backbone, _ = make("5b", torch.float32)
    (args, options), _ = two_clips(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = backbone(*args, **options)
    out.float().square().mean().backward()
    exact = backbone(*args, **options)
    assert (out - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters())


@torch.no_grad()
def test_an_attention_backend_is_set_on_this_backbone_alone():
    backbone, _ = make("5b", torch.float32)
    other, _ = make("5b", torch.float32)
    (args, options), _ = two_clips(torch.float32)
    expected = backbone(*args, **options)
    backbone.set_attention_backend("_native_math")
    assert torch.allclose(backbone(*args, **options), expected, atol=1e-5)
    assert torch.equal(other(*args, **options), expected)
    with pytest.raises(ValueError, match="quick"):
        backbone.set_attention_backend("quick")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2b", "5b"])
@torch.no_grad()
def test_blocks_compile_as_one_graph(version):
    backbone, _ = make(version, torch.float32)
    clips = two_clips(torch.float32)
    expected = [backbone(*args, **options) for args, options in clips]
    for block in backbone.transformer.transformer_blocks:
        block.compile(backend="eager", fullgraph=True)
    for (args, options), plain in zip(clips, expected, strict=True):
        assert torch.allclose(backbone(*args, **options), plain, atol=1e-6)


def test_sharded_blocks_compute_the_same(tmp_path):
    """FSDP2 gathers a block's weights in hooks around its call, and the root's around the transformer's."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    backbone, _ = make("2b", torch.float32)
    args, _ = two_clips(torch.float32)
    expected = backbone(*args[0], **args[1])
    grads = gradients(backbone, args)
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in backbone.transformer.transformer_blocks:
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

    backbone, _ = make("5b", torch.float32)
    (args, options), _ = two_clips(torch.float32)
    expected = backbone(*args, **options)
    tables = []
    backbone.transformer.transformer_blocks[1].attn1.register_forward_pre_hook(
        lambda module, args, kwargs: tables.append(kwargs["image_rotary_emb"].rotary), with_kwargs=True
    )
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in backbone.transformer.transformer_blocks:
            fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        fully_shard(backbone, mesh=mesh)
        with torch.autocast("cpu", torch.bfloat16):
            out = backbone(*args, **options)
        out.float().square().sum().backward()
    finally:
        destroy_process_group()
    assert 0 < (out - expected).abs().max() < 0.05 * expected.abs().max()
    assert [table.dtype for table in tables[0]] == [torch.float32] * 2


def test_lora_trains_is_read_by_diffusers_and_merges(tmp_path):
    backbone, plain = make("5b", torch.float32)
    (args, options), _ = two_clips(torch.float32)
    before = backbone(*args, **options)
    names = inject_lora(backbone, rank=2, alpha=4, targets=CogVideoXBackbone.lora_targets)
    assert len(names) == 2 * 2 * len(CogVideoXBackbone.lora_targets), "2 blocks, A and B each"
    assert torch.equal(backbone(*args, **options), before)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(backbone.named_parameters()):
            if name in names:
                parameter.copy_(0.1 * randn(*parameter.shape, seed=i))
    backbone(*args, **options).square().sum().backward()
    assert all((p.grad is not None) == (n in names) for n, p in backbone.named_parameters())

    tuned = backbone(*args, **options)
    assert (tuned - before).abs().max() > 1e-3
    file = save_lora(backbone, tmp_path)
    assert all(key.startswith("transformer.transformer_blocks.") for key in load_file(file))
    other, _ = make("5b", torch.float32)
    load_lora(other, file)
    assert torch.equal(other(*args, **options), tuned)
    plain.load_lora_adapter(tmp_path, weight_name=file.name, prefix="transformer", local_files_only=True)
    x, levels, text = args[0], args[1], args[2].embeddings[:, 0]
    assert torch.equal(run_plain(plain, x, 999 * levels[:, 0], text), backbone(x, levels[:, 0], text))
    merge_lora(backbone)
    assert torch.allclose(backbone(*args, **options), tuned, rtol=0, atol=1e-5)


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
    for changes in ({"in_channels": 8}, {"ofs_embed_dim": 16}, {"use_learned_positional_embeddings": True}):
        with pytest.raises(ValueError, match="image-to-video CogVideoX"):
            CogVideoXBackbone(tiny_cogvideox(version="5b", **changes), Process())


@torch.no_grad()
def test_what_a_version_cannot_do_is_refused_with_the_reason():
    x, levels, text = inputs(pairs=True)
    backbone, _ = make("2b")
    with pytest.raises(ValueError, match="absolute sines.* use time_gap"):
        backbone(x, levels, text[:, 0], position_mode="diagonal")
    with pytest.raises(ValueError, match=r"position_mode is 'diagonal': CogVideoX 2B.*has contiguous, time_gap"):
        require(backbone.capabilities, position_mode="diagonal")
    require(backbone.capabilities, per_frame_levels=True, position_mode="time_gap", text_per_shot=True)
    with pytest.raises(ValueError, match="attention_rule is 'causal': unknown here"):
        require(backbone.capabilities, attention_rule="causal")

    backbone, _ = make("1.5")
    assert backbone.capabilities.frames_per_token == 2
    context, scene = TextContext(text[:, :2], PAIRS.text_ids), dict(layout=PAIRS)
    unequal = levels.clone()
    unequal[1, 3] += 0.1
    for args, options, message in (
        ((x, unequal, context), scene, "levels differ inside a pair of frames"),
        ((x, levels, text[:, 0]), dict(layout=SCENE), r"shots have \[3, 1, 2\] latent frames.*a multiple of 2"),
        ((x[:, :, :5], levels[:, :5], text[:, 0]), {}, r"shots have \[5\] latent frames"),
        ((x, levels, text[:, 0]), scene | dict(position_gap=3), "position_gap is 3"),
        ((x, levels, TextContext(text, torch.tensor([0, 0, 0, 1, 1, 1]))), {}, "the frames of a pair must read one"),
    ):
        with pytest.raises(ValueError, match=message):
            backbone(*args, **options)
