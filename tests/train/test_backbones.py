"""The loop over every backbone that needs nothing but texts, each with the process of its weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from models.layout import shots_layout
from models.methods import get_method
from models.process import EDM
from models.text import TextContext
from models.tiny import TEXT_DIM
from models.tiny_hunyuan import POOLED_DIM
from models.tiny_wan22 import tiny_experts
from tests.models.processes import PROCESSES
from tests.models.test_backbones import BACKBONES
from tests.train.tiny import CHANNELS, SIZE, TEXT_LENGTH, tiny_backbone
from train.batches import LatentCache, SceneBatch, keyed_generator, whole_tokens
from train.evaluate import HeldOutLoss
from train.loop import LoopSettings, draw, frame_weights, run_loop
from train.metrics import read
from train.parallel import Parallel, block_names, prepare, trainable

METHOD = get_method("fvdm", shift=3.0)
SETTINGS = LoopSettings(steps=2, log_every=1, warmup_steps=0)
BLOCKS = {
    "wan": {"WanTransformerBlock": 2},
    "hunyuan": {
        "HunyuanVideoTransformerBlock": 2,
        "HunyuanVideoSingleTransformerBlock": 2,
        "HunyuanVideoPatchEmbed": 1,
        "HunyuanVideoTokenRefiner": 1,
    },
    "cogvideox-2b": {"CogVideoXBlock": 2, "CogVideoXPatchEmbed": 1},
    "latte": {"BasicTransformerBlock": 4},
    "svd": {"SpatioTemporalResBlock": 8, "TransformerSpatioTemporalModel": 4},
}


class Pooled:
    """Adds a pooled vector and a length to each text of a source, as a HunyuanVideo's texts have them."""

    def __init__(self, source: LatentCache) -> None:
        self.source, self.batch_size = source, source.batch_size

    def identity(self):
        return self.source.identity()

    def batch(self, index: int, rows: slice = slice(None)) -> SceneBatch:
        batch = self.source.batch(index, rows)
        pooled = torch.randn(len(batch.keys), 1, POOLED_DIM, generator=keyed_generator("pooled", index))
        text = replace(batch.text, pooled=pooled, lengths=torch.full((len(batch.keys), 1), 4))
        return replace(batch, text=text)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_found_and_wrapping_keeps_parameter_names(name):
    backbone = BACKBONES[name]()
    assert Counter(type(backbone.get_submodule(block)).__name__ for block in block_names(backbone)) == BLOCKS[name]
    names = list(trainable(backbone))
    prepare(backbone, Parallel(), activation_checkpointing=True)
    assert list(trainable(backbone)) == names


@pytest.mark.parametrize("name", ["hunyuan", "cogvideox-2b", "cogvideox-5b", "latte"])
def test_the_loop_trains_it_on_the_loss_of_its_process(cache, tmp_path, name):
    source = cache(METHOD.layout_for_training)
    source = Pooled(source) if name == "hunyuan" else source
    backbone = prepare(BACKBONES[name](), Parallel(), activation_checkpointing=True)
    evaluate = HeldOutLoss(source, METHOD, batches=1, levels=(0.95,))
    run_loop(backbone, METHOD, source, replace(SETTINGS, evaluate_every=2), tmp_path, evaluate=evaluate)
    lines = read(tmp_path / "metrics.jsonl")
    assert lines[0]["tokens_per_s"] == pytest.approx(3 * 4 * lines[0]["samples_per_s"], rel=1e-4)
    assert lines[1]["eval/loss/0.95"] > 0 and lines[1]["eval/wrong_text/0.95"] > 0

    batch, plain = source.batch(0), BACKBONES[name]()
    levels, noise = draw(METHOD, batch, SETTINGS.seed, 0)
    noisy = plain.process.add_noise(batch.latents, noise, levels)
    joint = name != "latte"  # then a text has a time of its own, FVDM's mean
    prediction = plain(noisy, levels, batch.text, layout=batch.layout, **({"text_time": "mean"} if joint else {}))
    errors = (prediction - plain.process.target(batch.latents, noise, levels)).square().mean(dim=(1, 3, 4))
    expected = (errors * frame_weights(METHOD, batch, levels)).sum(dim=1).mean()
    assert lines[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["fvdm", "lct"])
def test_clips_fill_whole_tokens_whose_frames_share_a_level(cache, tmp_path, name):
    """CogVideoX 1.5: 3 latent frames become 4, the first in front of itself with noise of its own."""
    method = get_method(name, shift=3.0, **({"p": 1.0, "clean_prob": 0.3} if name == "fvdm" else {}))
    source, seen = cache(method.layout_for_training), []
    backbone = BACKBONES["cogvideox-1.5"]()
    backbone.register_forward_pre_hook(lambda _, args, options: seen.append((args, options)), with_kwargs=True)
    evaluate = HeldOutLoss(source, method, batches=1, levels=(0.5,))
    run_loop(backbone, method, source, replace(SETTINGS, evaluate_every=2), tmp_path, evaluate=evaluate)
    lines = read(tmp_path / "metrics.jsonl")
    assert lines[0]["tokens_per_s"] == pytest.approx(2 * 4 * lines[0]["samples_per_s"], rel=1e-4)
    assert lines[1]["eval/loss/0.5"] > 0

    batch = whole_tokens(source.batch(0), 2)
    clean = source.batch(0).latents
    assert torch.equal(batch.latents[:, :, 1:], clean) and torch.equal(batch.latents[:, :, 0], clean[:, :, 0])
    levels, noise = draw(method, batch, SETTINGS.seed, 0, patch=2)
    assert torch.equal(levels[:, 0::2], levels[:, 1::2]) and (noise[:, :, 0] != noise[:, :, 1]).all()
    assert (levels[:, 0] != levels[:, 2]).any() == (name == "fvdm"), "a level per token; LCT: per shot"
    (noisy, told), options = seen[0]
    assert torch.equal(told, levels) and options["text"].frame_text.tolist() == [0] * 4
    signal, sigma = (c.float().view(4, 1, 4, 1, 1) for c in backbone.process.signal_and_noise(levels))
    assert torch.allclose(noisy, signal * batch.latents + sigma * noise, rtol=0, atol=1e-6)

    plain = BACKBONES["cogvideox-1.5"]()
    target = signal * noise - sigma * batch.latents
    options = {"text_time": "mean" if name == "fvdm" else "max"} | method.backbone_kwargs(batch.layout)
    prediction = plain(noisy, levels, batch.text, **options)
    errors = (prediction - target).square().mean(dim=(1, 3, 4))
    learnt = (levels > 0).float() if name == "fvdm" else method.learns(levels).float()
    expected = (errors * learnt / learnt.sum(dim=1, keepdim=True).clamp_min(1e-9)).sum(dim=1).mean()
    assert lines[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert seen[-1][0][1].unique().tolist() == [0.5], "held-out clips, too"


def test_levels_per_token_are_drawn_as_often_as_the_method_says():
    """PTSS by token: p of the samples have independent levels, each uniform."""
    method = get_method("fvdm", p=0.3, clean_prob=0.0, shift=1.0)
    layout = shots_layout([4, 6])
    batch = SceneBatch(torch.zeros(2000, 1, 10, 1, 1), layout, None, [])  # type: ignore[arg-type]
    levels, _ = draw(method, batch, 0, 0, patch=2)
    assert torch.equal(levels[:, 0::2], levels[:, 1::2])
    apart = (levels[:, ::2] != levels[:, :1]).any(dim=1)
    assert apart.float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert levels[apart].mean().item() == pytest.approx(0.5, abs=0.03)


class OneBatch:
    """A source of one batch, the same for training and for evaluation."""

    def __init__(self, batch: SceneBatch) -> None:
        self.found, self.batch_size = batch, len(batch.keys)

    def identity(self):
        return {}

    def batch(self, index: int, rows: slice = slice(None)) -> SceneBatch:
        return self.found


@pytest.mark.parametrize("process", ["flow", "vp epsilon", "vp x0", "vp v, no signal at 1", "edm"])
@pytest.mark.parametrize("method", ["fvdm", "lct", "tic_ft"])
def test_held_out_loss_is_the_loss_of_training(tmp_path, process, method):
    """On the same clips, levels and noise: the weights of frames and of levels are in both."""
    method = get_method(method)
    if method.name == "tic_ft":  # condition | buffer | target: most frames have no loss
        layout = method.layout_for_training([3], [4])
    else:
        layout = method.layout_for_training([1, 3])
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, CHANNELS, layout.num_frames, SIZE, SIZE, generator=generator)
    text = torch.randn(4, 1 + int(layout.text_ids.max()), TEXT_LENGTH, TEXT_DIM, generator=generator)
    batch = SceneBatch(latents, layout, TextContext(text, layout.text_ids), list("abcd"))
    backbone = tiny_backbone()
    backbone.process = PROCESSES[process]
    evaluate = HeldOutLoss(OneBatch(batch), method, batches=1, levels=(0.3, 1.0))
    found = evaluate(0, backbone)

    noise = torch.stack([torch.randn(latents.shape[1:], generator=keyed_generator("held-out", n)) for n in range(4)])
    for level in (0.3, 1.0):
        levels = (
            method.caps(layout).clamp_max(level) if method.name == "tic_ft" else torch.full((len(layout.roles),), level)
        )
        levels = levels.expand(4, -1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("train.loop.draw", lambda *_, levels=levels: (levels, noise))
            trained = run_loop(
                tiny_like(backbone), method, OneBatch(batch), replace(SETTINGS, steps=1), tmp_path / f"{level}"
            )
        assert trained.step == 1
        (line,) = read(tmp_path / f"{level}" / "metrics.jsonl")
        assert found[f"loss/{level:g}"] == pytest.approx(line["loss"], rel=1e-5)
    x0 = process == "vp x0"
    weight = backbone.process.loss_weight(torch.tensor([0.3], dtype=torch.float64)).item()
    assert (weight > 1.01) == x0, "one of the processes weights its loss, so that the test can tell"


def tiny_like(backbone):
    """A backbone with the same weights and process, to train."""
    other = tiny_backbone()
    other.process = backbone.process
    return other


def test_one_model_time_leaves_what_each_frame_is_scaled_by(cache, tmp_path):
    """The process scales every frame by its own level, whatever the method tells the backbone."""
    method, backbone, seen = get_method("tic_ft"), tiny_backbone(), []
    backbone.process = EDM(0.002, 80.0)
    backbone.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    monotone = cache(METHOD.layout_for_training)
    batch = monotone.batch(0)
    levels, noise = torch.rand(4, 3), torch.randn(batch.latents.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.loop.draw", lambda *_: (levels, noise))
        run_loop(backbone, method, monotone, replace(SETTINGS, steps=1), tmp_path)
    x, told = seen[0]
    assert torch.equal(told, levels.amax(dim=1))
    noisy = backbone.process.add_noise(batch.latents, noise, levels)
    assert torch.equal(x, backbone.process.precondition(noisy, levels))


def test_a_wrong_pairing_is_refused_before_the_first_batch(tmp_path):
    with pytest.raises(ValueError, match="joins 2 latent frames into one token"):
        run_loop(BACKBONES["cogvideox-1.5"](), get_method("tic_ft"), None, SETTINGS, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_held_out_loss_of_an_expert_is_that_of_its_levels(cache):
    experts = tiny_experts(boundary=0.6)
    for expert, levels in ((experts.high, {0.6, 0.95}), (experts.low, {0.2, 0.5}), (experts, {0.2, 0.5, 0.6, 0.95})):
        evaluate = HeldOutLoss(cache(METHOD.layout_for_training), METHOD, batches=1, levels=(0.2, 0.5, 0.6, 0.95))
        found = evaluate(0, expert.eval())
        assert {float(name.split("/")[1]) for name in found if name.startswith("loss/")} == levels
