"""Latents that a model has noised and denoised: near the clip's own, and a function of the step alone."""

from __future__ import annotations

from pathlib import Path

import torch

from models.folder import load_model
from pipelines.shipped import SHIPPED_WAN
from pipelines.toy_models.denoised import GROUP, denoised_source


def test_denoised_latents_stay_near_the_clip_and_depend_on_the_step_only(repo_root: Path) -> None:
    model = load_model(SHIPPED_WAN)
    source = denoised_source(model, "small", 0, batch=4)
    latents, video, weight = source(0)
    assert latents.shape == (4, 8, 5, 8, 8) and video.shape == (4, 3, 17, 64, 64) and weight.shape == (4, 1, 17, 64, 64)
    assert torch.equal(latents, denoised_source(model, "small", 0, batch=4)(0)[0])
    assert not torch.equal(source(1)[1], video), "other clips"
    clean = model.codec.encode(video)[0]
    off = (model.codec.normalize(latents) - model.codec.normalize(clean)).square().mean().sqrt()
    assert 1e-3 < off < 0.6, "changed, but the same clip"
    assert not torch.equal(source(GROUP // 4)[1], video), "the next group"
