"""Training the VAE's decoder alone: it learns from the latents it is given, the encoder stays, a killed run goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.train.test_vae import clips, tiny_vae
from train.decoder import DecoderSettings, train_decoder
from train.vae import decode_unclamped

SETTINGS = DecoderSettings(steps=6, warmup_steps=2, checkpoint_every=2, log_every=1)


def smoothed(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents that are off by a constant, which a decoder of the encoder's own latents cannot know."""
    video, weight = clips(step)
    with torch.no_grad():
        return tiny_vae().encode(video).latent_dist.mean + 0.5, video, weight


def error(vae: torch.nn.Module, step: int) -> float:
    latents, video, _ = smoothed(step)
    with torch.no_grad():
        return (decode_unclamped(vae, latents) - video).abs().mean().item()  # type: ignore[arg-type]


def test_the_decoder_learns_these_latents_and_the_encoder_stays(tmp_path: Path) -> None:
    vae = tiny_vae()
    before, video = error(vae, 1000), clips(1000)[0]
    train_decoder(vae, smoothed, replace(SETTINGS, steps=120, checkpoint_every=1000), tmp_path, say=lambda _: None)
    assert error(vae, 1000) < 0.7 * before
    assert not vae.training and not any(parameter.requires_grad for parameter in vae.parameters())
    with torch.no_grad():
        assert torch.equal(vae.encode(video).latent_dist.mean, tiny_vae().encode(video).latent_dist.mean)


def test_a_killed_run_ends_with_the_weights_of_one_never_killed(tmp_path: Path) -> None:
    whole, killed, again = tiny_vae(), tiny_vae(), tiny_vae(seed=9)
    train_decoder(whole, smoothed, SETTINGS, tmp_path / "whole", say=lambda _: None)

    def dies(step: int) -> tuple[Tensor, Tensor, Tensor]:
        if step == 3:
            raise KeyboardInterrupt
        return smoothed(step)

    with pytest.raises(KeyboardInterrupt):
        train_decoder(killed, dies, SETTINGS, tmp_path / "killed", say=lambda _: None)
    train_decoder(again, smoothed, SETTINGS, tmp_path / "killed", say=lambda _: None)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
