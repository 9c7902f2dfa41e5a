"""Wan 2.2 folders against the unmodified WanPipeline: the two experts of A14B, and TI2V-5B's VAE and token times."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor

from models.backbones.experts import WanExperts
from models.backbones.wan import WanBackbone
from models.experts import Expert
from models.folder import ModelSettings, check_expert, load_model, read_index, save_model
from models.layout import ClipLayout, Segment, shots_layout
from models.methods import get_method
from models.modules.lora import inject_lora, merge_lora, save_lora
from models.noise import base_levels
from models.process import FlowMatching
from models.records import RecordError
from models.text import TextContext, null_text, pack_text
from models.tiny import TEXT_DIM, build_tiny_folder
from models.tiny_wan22 import build_tiny_a14b_folder, build_tiny_ti2v_folder, tiny_experts
from sample.guidance import Guidance
from sample.rollout import RolloutShot, rollout
from sample.sampler import sample

BOUNDARY = 0.875
PROMPTS = ["a red box", "blue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "a14b"
    build_tiny_a14b_folder(path)
    return path


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "ti2v"
    build_tiny_ti2v_folder(path)
    return path


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both_sampled(path: Path, noise: Tensor, steps: int, **call: Any) -> tuple[Tensor, Tensor]:
    """Latents of `sample.sampler.sample` and of the plain pipeline, from the same noise over the same levels."""
    model = load_model(path)
    length = model.settings.text_length
    text = torch.stack([pack_text(model.text.encode([one]), length) for one in PROMPTS])
    layout = ClipLayout((Segment("target", noise.shape[2]),))
    levels = base_levels(steps, shift=model.settings.level_shift)
    plan = levels[:, None].expand(-1, noise.shape[2])
    ours = sample(
        model.backbone, layout, plan, text, shape=tuple(noise.shape), given=None, guidance=Guidance([("text", 3.0)]),
        null={"text": null_text(model.text, length).expand_as(text)}, generator=torch.Generator().manual_seed(77),
    )  # fmt: skip

    pipeline = WanPipeline.from_pretrained(path, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    # the pipeline cannot be told its steps, so its scheduler is; it applies the shift to them itself
    unshifted = base_levels(steps, shift=1.0)[:-1].tolist()
    plain = pipeline.scheduler.set_timesteps
    pipeline.scheduler.set_timesteps = lambda count, device: plain(sigmas=unshifted, device=device)
    theirs = pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=3.0, latents=noise, max_sequence_length=length,
        output_type="latent", **call,
    ).frames  # fmt: skip
    assert torch.allclose(pipeline.scheduler.sigmas, levels, atol=1e-6)
    return ours, theirs


def drawn_noise(batch: int, channels: int, frames: int, height: int, width: int) -> Tensor:
    """What the sampler draws from the seed that `both_sampled` gives it."""
    generator = torch.Generator().manual_seed(77)
    return torch.stack([torch.randn((channels, frames, height, width), generator=generator) for _ in range(batch)])


# --- A14B: two experts -----------------------------------------------------------------------------------------------


def test_two_experts_make_what_the_pipeline_makes(folder, monkeypatch):
    ran: list[str] = []
    forward = WanBackbone.forward

    def watched(self: WanBackbone, *args: Any, **kwargs: Any) -> Tensor:
        assert self.expert is not None
        ran.append(self.expert.name)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(WanBackbone, "forward", watched)
    noise = drawn_noise(2, 4, 3, 4, 4)
    ours, theirs = both_sampled(folder, noise, 6, height=32, width=32, num_frames=9)
    assert torch.allclose(ours, theirs, atol=1e-5) and (ours - noise).abs().max() > 0.1
    shifted = base_levels(6, shift=3.0)[:-1]
    assert ran == ["high" if level >= BOUNDARY else "low" for level in shifted] and set(ran) == {"high", "low"}


def test_a_level_on_the_boundary_is_the_high_experts(tmp_path):
    """diffusers: timestep >= boundary. 0.9 is no float32, and 1000 * float32(0.9) is 900 all the same."""
    for boundary in (0.9, 0.875, 0.6):
        high, low = Expert("high", boundary), Expert("low", boundary)
        times = 1000.0 * torch.tensor([boundary, boundary - 1e-3, 1.0, 0.0])
        assert high.covers(times).tolist() == [True, False, True, False]
        assert torch.equal(low.covers(times), ~high.covers(times))


@torch.no_grad()
def test_the_highest_frame_decides():
    """One clip, one expert, whatever its frames' levels: the global clock, not each frame's own level."""
    experts = tiny_experts(boundary=0.5).eval()
    x, text = randn(4, 4, 3, 4, 4), randn(4, 8, TEXT_DIM, seed=1)
    levels = torch.tensor([[0.0, 0.3, 0.9], [0.0, 0.3, 0.4], [0.5, 0.0, 0.0], [0.2, 0.2, 0.2]])
    out = experts(x, levels, text)
    for row, expert in enumerate((experts.high, experts.low, experts.high, experts.low)):
        alone = expert(x[row : row + 1], levels[row : row + 1], text[row : row + 1])
        assert torch.allclose(out[row : row + 1], alone, atol=1e-6)
    assert torch.equal(experts(x[:1], levels[:1], text[:1]), experts.high(x[:1], levels[:1], text[:1]))
    # scalar model time (TIC-FT, FCA): the level that the model is told is the clock
    assert torch.equal(experts(x, torch.full((4,), 0.49), text), experts.low(x, torch.full((4,), 0.49), text))
    context = TextContext(randn(4, 2, 8, TEXT_DIM, seed=2), torch.tensor([0, 0, 1]))
    shots = {"layout": shots_layout([2, 1]), "position_mode": "time_gap", "attention_rule": "group_causal"}
    mixed = experts(x, levels, context, **shots)
    one = experts.low(x[1:2], levels[1:2], context.samples([1]), **shots)
    assert torch.allclose(mixed[1:2], one, atol=1e-6), "texts and layout follow their samples"


@pytest.mark.parametrize("now", [0.9, 0.4])
@pytest.mark.parametrize("history", [0.1, 0.6])
@torch.no_grad()
def test_kept_history_is_as_the_expert_at_work_sees_it(now, history):
    """A pass behind a cache is one forward over history and shot, by the expert of the highest level of both."""
    experts, boundary = tiny_experts(boundary=0.5).eval(), 0.5
    x, levels = randn(2, 4, 4, 4, 4), torch.tensor([[history, history, now, now]] * 2)
    context = TextContext(randn(2, 2, 8, TEXT_DIM, seed=1), torch.tensor([0, 0, 1, 1]))
    options = {"position_mode": "time_gap", "attention_rule": "group_causal"}
    expected = experts(x, levels, context, layout=shots_layout([2, 2]), **options)
    chosen = experts.high if max(now, history) >= boundary else experts.low
    assert torch.equal(expected, chosen(x, levels, context, layout=shots_layout([2, 2]), **options))

    cache = experts.new_cache()
    one = shots_layout([2])
    texts = [TextContext(context.embeddings[:, i : i + 1], torch.zeros(2, dtype=torch.long)) for i in range(2)]
    experts(x[:, :, :2], levels[:, :2], texts[0], layout=one, cache=cache, append=True, **options)
    out = experts(x[:, :, 2:], levels[:, 2:], texts[1], layout=one, cache=cache, **options)
    assert torch.allclose(out, expected[:, :, 2:], atol=1e-5)
    twice = TextContext(texts[1].embeddings.repeat(2, 1, 1, 1), texts[1].frame_text)
    x_twice, levels_twice = x[:, :, 2:].repeat(2, 1, 1, 1, 1), levels[:, 2:].repeat(2, 1)
    branches = experts(x_twice, levels_twice, twice, layout=one, cache=cache, **options)
    assert torch.allclose(branches, out.repeat(2, 1, 1, 1, 1), atol=1e-6), "guidance branches read one cache"
    cache.reset()
    assert cache.clock is None and not cache.high.sizes and not cache.low.sizes


@torch.no_grad()
def test_shots_in_turn_use_both_experts(monkeypatch):
    experts = tiny_experts(boundary=0.6).eval()
    method = get_method("lct", attention_rule="group_causal")
    ran: list[tuple[str, bool]] = []
    forward = WanBackbone.forward

    def watched(self: WanBackbone, *args: Any, **kwargs: Any) -> Tensor:
        ran.append((self.expert.name, kwargs["append"]))  # type: ignore[union-attr]
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(WanBackbone, "forward", watched)
    shots = [
        RolloutShot(1, randn(1, 8, TEXT_DIM, seed=i), torch.zeros(1, 8, TEXT_DIM), [torch.Generator().manual_seed(i)],
                    tuple(range(i)))
        for i in range(2)
    ]  # fmt: skip
    made = list(rollout(experts, method, "autoregressive", shots, base_levels(2, shift=1.0), size=(4, 4, 4)))
    assert [m.shape for m in made] == [(1, 4, 1, 4, 4)] * 2 and all(m.isfinite().all() for m in made)
    assert ran == [("high", False), ("low", False), ("high", True), ("low", True), ("high", False), ("low", False)]


def test_a_folder_of_two_experts_comes_back_as_it_was_written(folder, tmp_path):
    model = load_model(folder)
    assert isinstance(model.backbone, WanExperts) and model.backbone.boundary == BOUNDARY
    index = json.loads((folder / "model_index.json").read_text())
    assert index["boundary_ratio"] == BOUNDARY and index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]
    save_model(tmp_path / "again", model, model.settings)
    again = load_model(tmp_path / "again")
    for one, other in zip(model.backbone.parameters(), again.backbone.parameters(), strict=True):
        assert torch.equal(one, other)
    assert json.loads((tmp_path / "again" / "model_index.json").read_text()) == index
    rest = load_model(folder, parts=("codec",))
    save_model(tmp_path / "copied", rest, model.settings, copy_parts_from=folder)
    assert json.loads((tmp_path / "copied" / "model_index.json").read_text()) == index
    pipeline = WanPipeline.from_pretrained(tmp_path / "copied", local_files_only=True)
    assert pipeline.config.boundary_ratio == BOUNDARY
    assert torch.equal(
        pipeline.transformer_2.blocks[0].ffn.net[2].weight, model.backbone.low.transformer.blocks[0].ffn.net[2].weight
    )


@pytest.mark.parametrize("name", ["high", "low"])
def test_one_expert_is_opened_changed_and_put_back(folder, tmp_path, name):
    model = load_model(folder, parts=("backbone",), expert=name)
    assert isinstance(model.backbone, WanBackbone) and model.backbone.expert == Expert(name, BOUNDARY)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(0.5)
    with pytest.raises(ValueError, match="the model holds no backbone for transformer"):
        save_model(tmp_path / "m", model, model.settings)
    save_model(tmp_path / "m", model, model.settings, copy_parts_from=folder)
    before, after = load_model(folder).backbone, load_model(tmp_path / "m").backbone
    for half in ("high", "low"):
        for one, other in zip(getattr(before, half).parameters(), getattr(after, half).parameters(), strict=True):
            assert torch.equal(one + 0.5 if half == name else one, other)
    WanPipeline.from_pretrained(tmp_path / "m", local_files_only=True)


def test_lora_of_one_expert_is_opened_by_the_pipeline(folder, tmp_path):
    with pytest.raises(ValueError, match="a LoRA is of one model, this backbone has 2: load_model"):
        inject_lora(load_model(folder, parts=("backbone",)).backbone, 2, 2)
    backbone = load_model(folder, parts=("backbone",), expert="low").backbone
    for name in inject_lora(backbone, 2, 2):
        torch.nn.init.normal_(backbone.get_parameter(name), std=0.3)
    save_lora(backbone, tmp_path)
    pipeline = WanPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.load_lora_weights(tmp_path, load_into_transformer_2=True)
    x, text = randn(1, 4, 2, 4, 4), randn(1, 8, TEXT_DIM, seed=1)
    with torch.no_grad():
        with_lora = pipeline.transformer_2(x, torch.tensor([500.0]), text).sample
        assert torch.allclose(with_lora, backbone(x, torch.tensor([0.5]), text), atol=1e-5)
    merge_lora(backbone)
    with torch.no_grad():
        assert torch.allclose(with_lora, backbone(x, torch.tensor([0.5]), text), atol=1e-5)


def test_half_a_pair_is_refused(folder, tmp_path):
    path = tmp_path / "m"
    shutil.copytree(folder, path)
    index = json.loads((path / "model_index.json").read_text())
    for change in ({"boundary_ratio": None}, {"transformer_2": [None, None]}, {"boundary_ratio": 900}):
        (path / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(RecordError, match=r"model_index.json: boundary_ratio is .* two experts need both"):
            load_model(path, parts=())
    (path / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(path / "transformer_2")
    with pytest.raises(FileNotFoundError, match="transformer_2 is missing: the backbone"):
        load_model(path, parts=("backbone",))
    with pytest.raises(ValueError, match="two experts need one boundary"):
        WanExperts(tiny_experts(boundary=0.9).high, tiny_experts(boundary=0.8).low)
    with pytest.raises(ValueError, match="in_channels is 4 in transformer/ and 8 in transformer_2/"):
        WanExperts(tiny_experts().high, tiny_experts(in_channels=8, out_channels=8).low)


def test_which_expert_is_trained_is_said(folder, tmp_path):
    build_tiny_folder(tmp_path / "one", text_length=32)
    check_expert(folder, "low")
    check_expert(tmp_path / "one", None)
    with pytest.raises(ValueError, match="holds two experts.*set expert=high for levels from 0.875 on"):
        check_expert(folder, None)
    for refuses in (check_expert, partial(load_model, parts=())):
        with pytest.raises(ValueError, match="expert is 'high', but .* holds a single model"):
            refuses(tmp_path / "one", expert="high")


@pytest.mark.parametrize(("method", "params"), [("fca", {}), ("aid", {})])
def test_modules_beside_the_layers_are_refused(folder, method, params):
    reason = "no layer_branch: modules beside its layers belong to one model, and this Wan 2.2 has two experts"
    for expert in (None, "low"):
        backbone = load_model(folder, ("backbone",), expert=expert).backbone
        with pytest.raises(ValueError, match=reason):
            get_method(method, **params).check_backbone(backbone.capabilities)


# --- TI2V-5B ---------------------------------------------------------------------------------------------------------


def test_ti2v_makes_what_the_pipeline_makes(ti2v):
    assert WanPipeline.from_pretrained(ti2v, local_files_only=True).config.expand_timesteps is True
    noise = drawn_noise(2, 48, 2, 4, 4)
    ours, theirs = both_sampled(ti2v, noise, 4, height=64, width=64, num_frames=5)
    assert torch.allclose(ours, theirs, atol=1e-5) and (ours - noise).abs().max() > 0.1


@torch.no_grad()
def test_ti2v_codec_is_the_residual_vae(ti2v):
    model = load_model(ti2v, parts=("codec",))
    codec, vae = model.codec, WanPipeline.from_pretrained(ti2v, local_files_only=True).vae
    assert (codec.temporal_stride, codec.spatial_stride, codec.latent_channels, codec.frame_step) == (4, 16, 48, 4)
    video = torch.rand(1, 3, 9, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, logvar = codec.encode(video)
    plain = vae.encode(video).latent_dist
    assert mean.shape == (1, 48, 3, 2, 3) and torch.equal(mean, plain.mean) and torch.equal(logvar, plain.logvar)
    first, _ = codec.encode(video[:, :, :5])
    assert torch.allclose(first, mean[:, :, :2], atol=1e-5), "a prefix alone has the latents that it has in its clip"
    assert codec.decode(codec.normalize(mean)).shape == video.shape
    assert torch.allclose(codec.denormalize(codec.normalize(mean)), mean, atol=1e-5)
    with pytest.raises(ValueError, match="the VAE needs multiples of 16"):
        codec.encode(video[..., :40])


def test_ti2v_keeps_its_index_and_says_what_it_is(ti2v, tmp_path):
    model = load_model(ti2v)
    for again in ("whole", "copied"):
        part = model if again == "whole" else load_model(ti2v, parts=("codec",))
        save_model(tmp_path / again, part, model.settings, copy_parts_from=ti2v)
        assert read_index(tmp_path / again)["expand_timesteps"] is True
    (tmp_path / "whole" / "shotloom.json").unlink()
    scheduler = {  # the published one's
        "_class_name": "UniPCMultistepScheduler", "flow_shift": 5.0, "prediction_type": "flow_prediction",
        "use_flow_sigmas": True, "num_train_timesteps": 1000,
    }  # fmt: skip
    (tmp_path / "whole" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    assert isinstance(load_model(tmp_path / "whole", parts=("backbone",)).backbone.process, FlowMatching)
    assert load_model(tmp_path / "whole", parts=()).settings == ModelSettings(
        level_shift=5.0, method_params={"shift": 5.0}, frames_per_shot=121, height=704, width=1280, fps=24.0
    )
