"""ToyWorld clips as training data for the small models: pure functions of (seed, step)."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from models.codecs import to_video
from toyworld.render import render_shot
from toyworld.vocabulary import LevelName
from toyworld.world import ToyScene, sample_scene

SIZE = 64  # pixels, height and width of every clip
TEXT_LENGTH = 256  # tokens, which are bytes; the longest story of level small with its shot prompt takes about 210


def clip_scene(level: LevelName, seed: int, index: int) -> ToyScene:
    """Training scene `index`: one shot, no held-out identity, no held-out (identity, action) pair."""
    return sample_scene(level, seed=seed, index=index, split="train", num_shots=1)


IMAGE_STEPS = 500  # the VAE first learns single frames, which show more of the world per second of work


def vae_batch(seed: int, step: int, images: bool = False) -> tuple[Tensor, Tensor]:
    """Clips [B,3,T,H,W] for VAE step `step` and their `pixel_weights`; with `images` always clips of one frame.

    Two thirds of the clips are of level small, the others of level full, so that the VAE also serves later levels.
    """
    batch, frames = (16, 1) if images or step < IMAGE_STEPS else (3, 9)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, step])))
    videos = []
    for _ in range(batch):
        level: LevelName = "small" if rng.random() < 0.67 else "full"
        scene = clip_scene(level, seed, int(rng.integers(1 << 31)))
        begin = int(rng.integers(scene.num_frames - frames + 1))
        clip = render_shot(scene, 0, SIZE)[begin : begin + frames]
        if rng.random() < 0.25:
            clip = clip[::-1].copy()
        videos.append(clip)
    video = to_video(videos)
    return video, pixel_weights(video)


def pixel_weights(video: Tensor) -> Tensor:
    """Weights [B,1,T,H,W] of the pixels of videos [B,3,T,H,W]: characters are small but matter most."""
    away = (video - video.median(dim=-1, keepdim=True).values).abs().mean(dim=1, keepdim=True)
    return 1.0 + 5.0 * (away > 0.08).float()
