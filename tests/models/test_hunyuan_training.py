"""Training the HunyuanVideo backbone: gradients, checkpointing, sharding, LoRA, low precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from models.backbones.hunyuan import HunyuanVideoBackbone
from models.layout import shots_layout
from models.modules.lora import inject_lora, load_lora, save_lora
from tests.draw import randn
from tests.models.hunyuan_inputs import MODES, RULES, SCENE, inputs, make, one_text, replace


def gradients(backbone: HunyuanVideoBackbone, *forwards) -> list[torch.Tensor]:
    backbone.zero_grad()
    torch.stack([backbone(*args, **options).square().sum() for args, options in forwards]).sum().backward()
    return [p.grad.clone() for p in backbone.parameters() if p.grad is not None]


@pytest.mark.parametrize("by", ["diffusers", "wrapper"])
def test_checkpointing_gives_the_same_gradients_over_two_different_clips(by):
    backbone, _ = make()
    backbone.train()
    x, levels, text = inputs()
    scene = (x, levels, text), dict(layout=SCENE, position_mode="diagonal", attention_rule="group_causal")
    clip = (x, levels[:, 0], one_text(text)), dict(position_mode="time_gap")
    plain = gradients(backbone, scene, clip)
    if by == "diffusers":
        backbone.transformer.enable_gradient_checkpointing()
    else:  # around all that diffusers names, the token refiner, too
        names = backbone.transformer._no_split_modules
        for name, module in list(backbone.named_modules()):
            if type(module).__name__ in names:
                backbone.set_submodule(name, checkpoint_wrapper(module))
    again = gradients(backbone, scene, clip)
    assert len(plain) == len(again) == len(list(backbone.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_those_of_finite_differences(mode, rule):
    backbone, _ = make()
    x, levels, text = inputs()
    options = dict(layout=SCENE, position_mode=mode, attention_rule=rule)

    def loss() -> torch.Tensor:
        return backbone(x, levels, text, **options).square().mean()

    loss().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in backbone.parameters() if parameter.ndim > 1)
    way = [randn(*p.shape, seed=i) / p.numel() ** 0.5 for i, p in enumerate(backbone.parameters())]
    slope = sum((p.grad * w).sum() for p, w in zip(backbone.parameters(), way, strict=True))
    ends, step = [], 1e-3
    with torch.no_grad():
        for move in (step, -2 * step):
            for p, w in zip(backbone.parameters(), way, strict=True):
                p += move * w
            ends.append(loss())
    assert (ends[0] - ends[1]).item() / (2 * step) == pytest.approx(slope.item(), rel=1e-3)


def test_sampling_first_does_not_stop_training():
    backbone, _ = make()
    x, levels, text = inputs()
    options = dict(layout=shots_layout([1, 2, 3]), position_mode="diagonal")  # no other test's: tables not there yet
    text = replace(text, frame_text=options["layout"].text_ids)
    with torch.inference_mode():
        expected = backbone(x, levels, text, **options)
    out = backbone(x, levels, text, **options)
    out.sum().backward()
    assert torch.equal(out.detach(), expected)


@torch.no_grad()
def test_a_copy_stands_on_its_own():
    backbone, _ = make()
    x, levels, text = inputs()
    expected = backbone(x, levels, text, layout=SCENE)
    copied = copy.deepcopy(backbone)
    backbone(x, levels, one_text(text))  # the original's clip changes
    for parameter in backbone.parameters():
        parameter.zero_()
    assert torch.equal(copied(x, levels, text, layout=SCENE), expected)


@torch.no_grad()
def test_the_attention_backend_is_set_in_this_backbone_alone():
    backbone, plain = make(torch.float32)
    x, levels, text = inputs(torch.float32)
    expected = backbone(x, levels, text, layout=SCENE)
    backbone.set_attention_backend("_native_math")
    assert torch.allclose(backbone(x, levels, text, layout=SCENE), expected, rtol=0, atol=1e-5)
    used = {
        p._attention_backend for p in backbone.transformer.attn_processors.values() if hasattr(p, "_attention_backend")
    }
    assert used == {"_native_math"}
    assert HunyuanVideoBackbone(plain).transformer.transformer_blocks[0].attn.processor._attention_backend is None
    with pytest.raises(ValueError, match="nonsense"):
        backbone.set_attention_backend("nonsense")


@pytest.mark.parametrize("text_of", [lambda text: text, one_text], ids=["rows", "plain"])
def test_bfloat16_autocast_follows_float32(text_of):
    backbone, _ = make(torch.float32)
    x, levels, text = inputs(torch.float32)
    levels, text = levels[:, 0], text_of(text)
    with torch.autocast("cpu", torch.bfloat16):
        out = backbone(x, levels, text)
    out.float().square().mean().backward()
    exact = backbone(x, levels, text)
    assert (out - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_blocks_compile_as_one_graph(rule):
    backbone, _ = make(torch.float32)
    x, levels, text = inputs(torch.float32)
    options = dict(layout=SCENE, position_mode="diagonal", attention_rule=rule)
    expected = backbone(x, levels, text, **options)
    for block in (*backbone.transformer.transformer_blocks, *backbone.transformer.single_transformer_blocks):
        block.compile(backend="eager", fullgraph=True)
    assert torch.allclose(backbone(x, levels, text, **options), expected, atol=1e-6)


@contextmanager
def sharded(backbone: HunyuanVideoBackbone, folder: Path, policy: MixedPrecisionPolicy) -> Iterator[None]:
    """FSDP2 around everything that the diffusers class declares, found by class name."""
    names = backbone.transformer._no_split_modules
    units = [module for module in backbone.transformer.modules() if type(module).__name__ in names]
    assert len(units) == 2 + 2 + 2, "all blocks, the refiner and the patch embedding"
    init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for unit in units:
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        fully_shard(backbone.transformer, mesh=mesh)
        yield
    finally:
        destroy_process_group()


def test_sharded_blocks_compute_the_same(tmp_path):
    """FSDP2 gathers a block's weights in hooks around its call, and the root's around the transformer's."""
    backbone, _ = make(torch.float32)
    args = inputs(torch.float32), dict(layout=SCENE, position_mode="diagonal")
    expected = backbone(*args[0], **args[1])
    grads = gradients(backbone, args)
    with sharded(backbone, tmp_path, MixedPrecisionPolicy()):
        assert torch.equal(backbone(*args[0], **args[1]), expected)
        again = [g.full_tensor() for g in gradients(backbone, args)]
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(grads, again, strict=True))


def test_sharded_in_bfloat16_times_and_rotary_tables_stay_float32(tmp_path):
    backbone, _ = make(torch.float32)
    x, levels, text = inputs(torch.float32)
    expected = backbone(x, levels, text, layout=SCENE)
    times, tables = [], []
    refiner = backbone.transformer.context_embedder.time_text_embed
    refiner.register_forward_pre_hook(lambda module, args: times.append(args[0]))
    for block in (backbone.transformer.transformer_blocks[1], backbone.transformer.single_transformer_blocks[1]):
        block.attn.register_forward_pre_hook(
            lambda module, args, kwargs: tables.append(kwargs["image_rotary_emb"].rotary[0]), with_kwargs=True
        )
    with sharded(backbone, tmp_path, MixedPrecisionPolicy(torch.bfloat16, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16):
            out = backbone(x, levels, text, layout=SCENE)
        out.float().square().sum().backward()
    assert 0 < (out - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(torch.isfinite(p.grad.full_tensor()).all() for p in backbone.parameters())
    text_levels = torch.stack([levels[:, :3].amax(1), levels[:, 3], levels[:, 4:].amax(1)], dim=1)
    assert torch.equal(times[0], 1000 * text_levels.flatten()), "bfloat16 cannot tell 999 from 1000"
    assert [table.dtype for table in tables] == [torch.float32] * 2


def test_lora_trains_and_is_read_by_diffusers(tmp_path):
    backbone, plain = make(torch.float32)
    x, levels, text = inputs(torch.float32)
    expected = backbone(x, levels, text, layout=SCENE)
    names = inject_lora(backbone, rank=2, alpha=2, targets=backbone.lora_targets)
    assert torch.equal(backbone(x, levels, text, layout=SCENE), expected)
    assert any(".single_transformer_blocks.1.attn.to_q." in name for name in names)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(backbone.named_parameters()):
            parameter.add_(0.1 * randn(*parameter.shape, seed=i).float() if "lora_B" in name else 0.0)
    out = backbone(x, levels, text, layout=SCENE)
    out.square().sum().backward()
    assert all((p.grad is not None and bool(p.grad.any())) == p.requires_grad for p in backbone.parameters())
    assert not torch.equal(out, expected)
    file = save_lora(backbone, tmp_path)
    again, _ = make(torch.float32)
    load_lora(again, file)
    assert torch.equal(again(x, levels, text, layout=SCENE), out)
    pipeline = HunyuanVideoPipeline(None, None, plain, None, None, None, None)
    pipeline.load_lora_weights(tmp_path)
    assert torch.equal(HunyuanVideoBackbone(pipeline.transformer)(x, levels, text, layout=SCENE), out)
