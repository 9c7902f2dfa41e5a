"""Method svd: the loop hands the U-Net the first frame's image; sampling is that of diffusers' scheduler and U-Net."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from models.backbones.svd import SVDBackbone
from models.methods import get_method
from models.process import EDM
from models.schedules import process_of_scheduler
from models.text import TextContext
from models.tiny_svd import SCHEDULER, tiny_svd
from sample.guidance import Guidance
from sample.sampler import sample
from tests.train.tiny import tiny_backbone
from train.batches import LatentCache, write_cache
from train.loop import LoopSettings, draw, given_conditions, run_loop
from train.metrics import read

METHOD = get_method("svd", latent_scale=0.5)
SETTINGS = LoopSettings(steps=2, log_every=1, warmup_steps=0)
FRAMES, WIDTH = 3, 16


def make() -> SVDBackbone:
    return SVDBackbone(tiny_svd(3), process_of_scheduler(SCHEDULER))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    """Nine clips, each with the embedding of its first frame, one token, as its text; a third of them lose it."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("cache") / "clips.safetensors"
    images = [torch.randn(1, WIDTH, generator=generator) for _ in range(9)]
    write_cache(path, torch.randn(9, 4, FRAMES, 4, 4, generator=generator), images, torch.arange(9))
    return LatentCache(
        [path], batch_size=6, text_length=1, null_text=torch.zeros(1, WIDTH), layout_for=METHOD.layout_for_training,
        text_drop_prob=0.34,
    )  # fmt: skip


def test_the_loop_trains_on_edm_s_loss_of_the_model_that_sees_the_image(source, tmp_path):
    run_loop(make(), METHOD, source, SETTINGS, tmp_path)
    first = read(tmp_path / "metrics.jsonl")[0]

    batch, unet, process = source.batch(0), make().unet, EDM(0.002, 700.0)
    levels, noise = draw(METHOD, batch, SETTINGS.seed, 0)
    assert bool((levels == levels[:, :1]).all()), "one level per sample"
    lost = (batch.text.embeddings == 0).flatten(1).all(dim=1)
    assert 0 < int(lost.sum()) < len(lost)
    _, sigma = process.signal_and_noise(levels[:, 0])
    sigma = sigma.float().view(-1, 1, 1, 1, 1)
    noisy = batch.latents + sigma * noise
    image = batch.latents[:, :, :1] / 0.5 * ~lost.view(-1, 1, 1, 1, 1)
    inputs = torch.cat([noisy / (sigma**2 + 1).sqrt(), image.expand_as(noisy)], dim=1).transpose(1, 2)
    ids = torch.tensor([[6.0, 127.0, 0.0]]).repeat(len(lost), 1)
    with torch.no_grad():
        found = unet(inputs, 0.25 * sigma.flatten().log(), batch.text.embeddings[:, 0], ids).sample.transpose(1, 2)
    clean = noisy / (sigma**2 + 1) - sigma / (sigma**2 + 1).sqrt() * found
    expected = ((sigma**2 + 1) / sigma**2 * (clean - batch.latents) ** 2).mean()
    assert first["loss"] == pytest.approx(float(expected), rel=1e-3)


def test_the_image_is_lost_with_its_embedding(source):
    batch = source.batch(0)
    prepared = METHOD.prepare(make(), batch.layout, batch.text, given_conditions(METHOD, batch, 0, 0))
    lost = (batch.text.embeddings == 0).flatten(1).all(dim=1)
    image = prepared["image"]
    assert image.latents.shape == (6, 4, 1, 4, 4) and not image.latents[lost].any()
    assert torch.equal(image.latents[~lost], batch.latents[~lost][:, :, :1] / 0.5)
    assert (image.fps, image.motion_bucket, image.noise_aug) == (7.0, 127.0, 0.0)


def test_levels_are_those_of_the_published_model():
    layout = METHOD.layout_for_training([FRAMES])
    levels = METHOD.sample_levels(layout, 4000, torch.Generator().manual_seed(0))
    assert levels.shape == (4000, FRAMES) and bool((levels == levels[:, :1]).all())
    _, sigma = EDM(0.002, 700.0).signal_and_noise(levels[:, 0])
    assert sigma.log().mean() == pytest.approx(0.7, abs=0.08) and sigma.log().std() == pytest.approx(1.6, abs=0.06)


@torch.no_grad()
def test_sampling_is_that_of_diffusers_scheduler_and_unet():
    backbone, batch, scale = make().eval(), 2, 3.0
    plain = copy.deepcopy(tiny_svd(3)).eval()
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    embedding, first, noise = randn(batch, 1, WIDTH), randn(batch, 4, 1, 4, 4), randn(batch, 4, FRAMES, 4, 4)
    scheduler = EulerDiscreteScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(4)
    x = noise.transpose(1, 2) * scheduler.init_noise_sigma
    ids = torch.tensor([[6.0, 127.0, 0.0]]).repeat(2 * batch, 1)
    image = torch.cat([torch.zeros_like(first), first / 0.5]).expand(-1, -1, FRAMES, -1, -1).transpose(1, 2)
    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(torch.cat([x, x]), time)
        texts = torch.cat([torch.zeros_like(embedding), embedding])
        without, with_image = plain(torch.cat([scaled, image], dim=2), time, texts, ids).sample.chunk(2)
        x = scheduler.step(without + scale * (with_image - without), time, x).prev_sample

    layout = METHOD.layout_for_task("i2v", [FRAMES])
    levels = torch.cat([backbone.process.to_level(scheduler.sigmas[:-1]), torch.zeros(1)])
    text = TextContext(embedding[:, None], torch.zeros(FRAMES, dtype=torch.long))
    null = replace(text, embeddings=torch.zeros_like(text.embeddings))
    conditions = METHOD.conditions(first.expand_as(noise), layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sample.sampler.draw_noise", lambda *_: noise)
        made = sample(
            backbone, layout, METHOD.plan(layout, levels, "i2v"), text, shape=tuple(noise.shape), generator=generator,
            guidance=Guidance([("image", scale)], METHOD.guided), null={"text": null}, conditions=conditions,
            model_levels=METHOD.model_levels, prepare=lambda *seen: METHOD.prepare(backbone, layout, *seen),
            **METHOD.backbone_kwargs(layout),
        )  # fmt: skip
    assert torch.allclose(made, x.transpose(1, 2), rtol=1e-3, atol=1e-3)
    assert (made - noise).abs().max() > 0.1


def test_a_model_that_takes_no_image_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="no image_beside: only Stable Video Diffusion .* use method fvdm"):
        run_loop(tiny_backbone(), METHOD, source, SETTINGS, tmp_path)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: get_method("svd", latent_scale=0.0), "latent_scale is 0.0; give a positive number"),
        (lambda: METHOD.layout_for_training([2, 2]), "one shot at a time"),
        (lambda: METHOD.layout_for_task("i2v", [3], head=1), "takes no givens"),
        (lambda: METHOD.layout_for_task("t2v", [3]), "no task 't2v'"),
    ],
)
def test_what_it_does_not_do_is_refused(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()
