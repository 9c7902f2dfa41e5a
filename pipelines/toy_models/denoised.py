"""Clips whose latents the pretrained model has noised and denoised again: what its decoder will have to decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.codecs import to_video
from models.folder import Model
from models.methods import get_method
from models.noise import base_levels
from models.text import null_text, pack_text
from pipelines.toy_models.cache import cache_clip, readable
from pipelines.toy_models.data import SIZE, pixel_weights
from toyworld.render import render_shot
from toyworld.vocabulary import LevelName
from toyworld.world import ToyScene

GROUP = 16  # clips denoised at once
NOISIEST = 0.7  # from higher levels another clip comes back than the one that was noised
STEPS = 10  # of a whole denoising run; the clips join it on the way
GUIDANCE = (1.0, 3.0)


def denoised_source(
    model: Model, level: LevelName, seed: int, batch: int = 2
) -> Callable[[int], tuple[Tensor, Tensor, Tensor]]:
    """A `train.decoder.LatentSource` of training clips; every `GROUP // batch` steps share one denoised group."""
    held: dict[int, tuple[Tensor, Tensor]] = {}

    def source(step: int) -> tuple[Tensor, Tensor, Tensor]:
        group, part = divmod(step * batch, GROUP)
        if group not in held:
            held.clear()
            held[group] = _denoised_group(model, level, seed, group)
        latents, video = (tensor[part : part + batch] for tensor in held[group])
        return latents, video, pixel_weights(video)

    return source


@torch.no_grad()
def _denoised_group(model: Model, level: LevelName, seed: int, group: int) -> tuple[Tensor, Tensor]:
    """Raw latents [GROUP,C,F,h,w] and true videos [GROUP,3,T,H,W], a function of (seed, group)."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, group, 13])))
    clips = [cache_clip(level, "train", seed + 2, group * GROUP + k) for k in range(GROUP)]
    video = to_video([render_shot(alone, 0, SIZE) for alone, _ in clips])
    clean = model.codec.normalize(model.codec.encode(video)[0])
    text, nothing = _contexts(model, clips, video)
    method = get_method(model.settings.method, **model.settings.method_params)
    layout = method.layout_for_training([clean.shape[2]])
    conditions, kwargs = method.conditions(clean, layout), method.backbone_kwargs(layout)

    def seen(context: Tensor) -> dict[str, Any]:
        return {"text": context} | method.prepare(model.backbone, layout, context, conditions) | kwargs

    process, guidance = model.backbone.process, GUIDANCE[group % len(GUIDANCE)]
    start = float(rng.random()) * NOISIEST
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(int(rng.integers(1 << 62))))
    levels = base_levels(STEPS, model.settings.level_shift)
    levels = torch.cat([torch.tensor([start]), levels[levels < start]])
    x = process.add_noise(clean, noise, levels[0])
    for now, then in zip(levels, levels[1:], strict=False):
        times, scaled = now.expand(GROUP), process.precondition(x, now)
        prediction = model.backbone(scaled, times, **seen(text))
        if guidance != 1.0:
            without = model.backbone(scaled, times, **seen(nothing))
            prediction = without + guidance * (prediction - without)
        x = process.step(x, prediction, now, then)
    return model.codec.denormalize(x), video


def _contexts(
    model: Model, clips: list[tuple[ToyScene, list[tuple[str, ...]]]], video: Tensor
) -> tuple[Tensor, Tensor]:
    """What the model reads of each clip, and nothing: [B,L,D] each."""
    if model.reads_images:
        embeddings = model.image_encoder.encode(video[:, :, 0])
        return embeddings, torch.zeros_like(embeddings)
    length = model.settings.text_length
    tokens = model.text.encode([readable(texts[:1], model.text, alone)[0][0] for alone, texts in clips])
    text = torch.stack([pack_text([one.float()], length) for one in tokens])
    return text, null_text(model.text, length).expand_as(text)
