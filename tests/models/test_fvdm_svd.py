"""FVDM on Stable Video Diffusion: a level per frame, the given first frame beside all of them, or nothing.

Against the unmodified diffusers U-Net, and against one written out frame by frame in float64.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.backbones.svd import ImageCondition, SVDBackbone
from models.methods import get_method
from models.methods.base import Method
from models.noise import base_levels
from models.process import EDM, FlowMatching
from models.text import TextContext
from models.tiny_svd import tiny_svd
from sample.guidance import Guidance
from sample.sampler import sample
from tests.draw import randn
from tests.models.svd_reference import naive_unet
from tests.models.test_backbones import BACKBONES
from train.batches import SceneBatch
from train.loop import clip_losses, draw, given_conditions

B, F, SIZE, WIDTH, SCALE = 2, 4, (2, 4), 16, 0.5
PROCESS = EDM()
PARAMS: dict[str, Any] = {"image_beside": True, "density": "edm", "shift": 1.0}
LEVELS = torch.tensor([[0.0, 0.7, 0.7, 0.7], [0.3, 0.0, 0.9, 0.5]])


def make(dtype: torch.dtype = torch.float64) -> tuple[SVDBackbone, Any]:
    """A backbone with a VAE's scaling factor and rate of its own, and the diffusers model that it wraps."""
    plain = nn.Module.to(tiny_svd(3), dtype).eval()
    return SVDBackbone(copy.deepcopy(plain), PROCESS, latent_scale=SCALE, fps=8.0).eval(), plain


def fvdm(**params: Any) -> Method:
    return get_method("fvdm", **PARAMS | params)


def told(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The first sample's first frame is given, the second's is not."""
    given = randn(B, 4, 1, *SIZE, seed=4, dtype=dtype)
    given[1] = 0
    return {"given": given, "embedding": randn(B, 1, WIDTH, seed=5, dtype=dtype)}


def text(dtype: torch.dtype = torch.float64) -> Tensor:
    return randn(B, 7, 8, seed=2, dtype=dtype)  # of any text encoder


def run(backbone: SVDBackbone, method: Method, x: Tensor, levels: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    layout = method.layout_for_training([F])
    prepared = method.prepare(backbone, layout, text(x.dtype), conditions)
    return backbone(x, method.model_levels(levels), **prepared, **method.backbone_kwargs(layout))


# --- what the model is told ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_level_per_frame_beside_the_image_is_the_loop_over_frames():
    backbone, plain = make()
    x, conditions = randn(B, 4, F, *SIZE, seed=1), told()
    token, image = conditions["embedding"].clone(), conditions["given"] / SCALE
    token[1] = 0
    contexts = token[:, None].expand(-1, F, -1, -1)
    beside = ImageCondition(image, 8.0, noise_aug=0.0)
    expected = naive_unet(plain, x, LEVELS, contexts, beside, process=PROCESS)
    found = run(backbone, fvdm(), x, LEVELS, conditions)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    for name in ("given", "embedding"):
        other = {**conditions, name: conditions[name] * 2}
        changed = (run(backbone, fvdm(), x, LEVELS, other) != found).flatten(1).any(dim=1)
        assert changed.tolist() == [True, False], "nothing of what is not given reaches the model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_equal_levels_are_the_diffusers_model_bit_for_bit(dtype):
    backbone, plain = make(dtype)
    x, conditions = randn(B, 4, F, *SIZE, seed=1, dtype=dtype), told(dtype)
    levels = torch.tensor([[0.4], [0.8]]).expand(B, F)
    beside = (conditions["given"] / SCALE).expand(-1, -1, F, -1, -1)
    token = conditions["embedding"] * torch.tensor([1.0, 0.0], dtype=dtype).view(-1, 1, 1)
    inputs = torch.cat([x, beside], dim=1).transpose(1, 2)
    ids = torch.tensor([[7.0, 127.0, 0.0]]).repeat(B, 1)
    expected = plain(inputs, PROCESS.to_model_time(levels[:, 0]), token, ids).sample.transpose(1, 2)
    assert torch.equal(run(backbone, fvdm(), x, levels, conditions), expected)


def test_the_first_frame_is_told_where_it_is_given():
    method, clean = fvdm(), randn(B, 4, F, *SIZE, seed=6)
    layout = method.layout_for_training([F])
    assert method.conditions(clean, layout).keys() == {"given"}
    assert torch.equal(method.conditions(clean, layout)["given"], clean[:, :, :1])
    backbone, _ = make()
    conditions = method.conditions(torch.zeros_like(clean), layout) | {"embedding": told()["embedding"]}
    prepared = method.prepare(backbone, layout, text(), conditions)
    assert not prepared["image"].latents.any() and not prepared["text"].embeddings.any()
    with pytest.raises(ValueError, match="reads the image embedding of the first frame"):
        method.prepare(backbone, layout, text(), method.conditions(clean, layout))
    assert get_method("fvdm").conditions(clean, layout) == {}


# --- training --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_loss_is_edms_of_each_frame_at_its_own_level_and_clean_frames_have_none():
    backbone, plain = make(torch.float32)
    method, clean = fvdm(p=1.0, clean_prob=1.0, image_drop=0.0), randn(B, 4, F, *SIZE, seed=6, dtype=torch.float32)
    layout = method.layout_for_training([F])
    context = TextContext(text(torch.float32)[:, None], torch.zeros(F, dtype=torch.long))
    embedding = told(torch.float32)["embedding"]
    batch = SceneBatch(clean, layout, context, ["a", "b"], embedding=embedding)
    levels, noise = draw(method, batch, 0, 0)
    assert (levels == 0).any(dim=1).all() and len(levels.unique()) > 2
    conditions = given_conditions(method, batch, 0, 0)
    losses, errors, weights = clip_losses(backbone, method, batch, levels, noise, conditions)
    assert losses.isfinite().all() and not weights[levels == 0].any()

    _, sigma = PROCESS.signal_and_noise(levels)
    sigma = sigma.float()[:, None, :, None, None]
    noisy = clean + sigma * noise
    token = embedding[:, None].expand(-1, F, -1, -1)
    beside = ImageCondition(clean[:, :, :1] / SCALE, 8.0, noise_aug=0.0)
    found = naive_unet(plain, noisy / (sigma**2 + 1).sqrt(), levels, token, beside, process=PROCESS)
    denoised = noisy / (sigma**2 + 1) - sigma / (sigma**2 + 1).sqrt() * found
    per_frame = (denoised - clean).square().mean(dim=(1, 3, 4)) * ((sigma**2 + 1) / sigma**2).flatten(1)
    learnt = levels > 0
    expected = torch.stack([row[kept].mean() for row, kept in zip(per_frame, learnt, strict=True)])
    assert torch.allclose(losses, expected, rtol=1e-3)
    assert torch.allclose(errors[learnt], per_frame[learnt], rtol=2e-3)


def test_a_share_of_the_samples_is_told_no_image():
    method, count = fvdm(image_drop=0.3), 400
    layout = method.layout_for_training([F])
    context = TextContext(torch.zeros(count, 1, 2, 8), layout.text_ids)
    clean = randn(count, 4, F, 2, 2, seed=6, dtype=torch.float32)
    batch = SceneBatch(clean, layout, context, [str(i) for i in range(count)], embedding=torch.ones(count, 1, WIDTH))
    conditions = given_conditions(method, batch, 0, 0)
    prepared = method.prepare(make(torch.float32)[0], layout, context, conditions)
    lost = ~prepared["image"].latents.flatten(1).any(dim=1)
    assert lost.float().mean().item() == pytest.approx(0.3, abs=0.07)
    assert torch.equal(~prepared["text"].embeddings.flatten(1).any(dim=1), lost), "its embedding is lost with it"
    assert method.drops == {"given": 0.3} and get_method("fvdm").drops == {}


# --- sampling --------------------------------------------------------------------------------------------------------

TASKS = {
    "t2v": {}, "i2v": {}, "interpolation": {}, "any_frame": {"frames": [2]}, "noisy_frames": {"frames": [0]},
    "progressive": {},
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_sampling_is_the_loop_over_frames_and_given_ones_are_held(task):
    """Euler steps of every frame between its own sigmas, on the U-Net written out; guidance is over the image."""
    (backbone, plain), method, scale = make(), fvdm(), 2.0
    layout = method.layout_for_task(task, [F], **TASKS[task])
    plan = method.plan(layout, base_levels(2), task)
    source, embedding = randn(B, 4, F, *SIZE, seed=7), randn(B, 1, WIDTH, seed=5)
    known = layout.is_given.tolist()
    held = [f for f in range(F) if known[f] and bool((plan[:, f] == plan[0, f]).all())]
    given = source if task == "progressive" else source * layout.is_given.view(-1, 1, 1)
    context = TextContext(text()[:, None], torch.zeros(F, dtype=torch.long))
    conditions = method.conditions(given, layout) | {"embedding": embedding}
    made = sample(
        backbone, layout, plan, context, shape=(B, 4, F, *SIZE), generator=torch.Generator().manual_seed(0),
        given=given, guidance=Guidance([("image", scale)], method.guided), conditions=conditions,
        null={"text": context}, model_levels=method.model_levels, prepare=partial(method.prepare, backbone, layout),
        **method.backbone_kwargs(layout),
    )  # fmt: skip
    assert torch.equal(made[:, :, held], given.float()[:, :, held])

    generator = torch.Generator().manual_seed(0)
    noise = torch.zeros(B, 4, F, *SIZE)
    for b in range(B):
        start = 0
        for segment in layout.segments:
            stop = start + segment.num_frames
            noise[b, :, start:stop] = torch.randn(4, stop - start, *SIZE, generator=generator)
            start = stop

    def sigmas(row: Tensor) -> Tensor:
        return PROCESS.signal_and_noise(row)[1].view(-1, 1, 1)

    x = torch.where((plan[0] == 1).view(-1, 1, 1), 0.0, given) + sigmas(plan[0]) * noise
    token, image = torch.zeros_like(embedding), torch.zeros_like(source[:, :, :1])
    if known[0]:
        token, image = embedding, given[:, :, :1] / SCALE
    for row, after in zip(plan, plan[1:], strict=False):
        sigma, levels = sigmas(row), row.expand(B, F)
        predictions = []
        for kept in (0.0, 1.0) if known[0] else (0.0,):
            beside = ImageCondition(kept * image, 8.0, noise_aug=0.0)
            contexts = (kept * token)[:, None].expand(-1, F, -1, -1)
            scaled = (x / (sigma**2 + 1).sqrt()).double()
            predictions.append(naive_unet(plain, scaled, levels, contexts, beside, process=PROCESS))
        without, with_image = predictions[0], predictions[-1]
        found = without + scale * (with_image - without)
        denoised = x / (sigma**2 + 1) - sigma / (sigma**2 + 1).sqrt() * found
        slope = torch.where(sigma > 0, (x - denoised) / sigma.clamp_min(1e-12), 0.0)
        x = x + (sigmas(after) - sigma) * slope
    assert torch.allclose(made.double(), x, rtol=1e-3, atol=1e-3), (made - x).abs().max()


# --- refusals --------------------------------------------------------------------------------------------------------


def test_pairings_are_refused_with_the_reason_before_anything_runs():
    svd = BACKBONES["svd"]().capabilities
    fvdm().check_backbone(svd)
    with pytest.raises(ValueError, match="beside every noisy frame: set method_params.image_beside=true"):
        get_method("fvdm").check_backbone(svd)
    for params in ({}, {"model_time": "per_frame"}, {"buffer_frames": 0}):
        with pytest.raises(ValueError, match="tic_ft puts what is given on one time axis .* reads no text"):
            get_method("tic_ft", **params).check_backbone(svd)
    with pytest.raises(ValueError, match="takes an image beside every noisy frame, of which method 'lct' tells"):
        get_method("lct", position_mode="contiguous").check_backbone(svd)
    for name in BACKBONES:
        if name != "svd":
            with pytest.raises(ValueError, match="only Stable Video Diffusion takes an image beside its frames: leave"):
                fvdm().check_backbone(BACKBONES[name]().capabilities)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: fvdm(density="uniform").check_process(EDM()), "fvdm: density is 'uniform', but .*density=edm"),
        (lambda: fvdm().check_process(EDM(sigma_max=80.0)), "fvdm: sigma_max is 80 in the model's scheduler"),
        (lambda: fvdm().check_process(FlowMatching()), "density is 'edm', but this model is no EDM"),
        (lambda: fvdm(image_drop=1.5), "image_drop is 1.5, expected a probability"),
        (lambda: fvdm(labels=3), "labels is 3 with image_beside"),
        (lambda: fvdm().layout_for_training([2, 2]), "one shot at a time"),
        (lambda: fvdm().layout_for_task("t2v", [2, 2]), "one shot at a time"),
        (lambda: fvdm().layout_for_task("long_video", [8]), "this Stable Video Diffusion has no image embedding"),
    ],
)
def test_what_does_not_fit_is_refused(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()
