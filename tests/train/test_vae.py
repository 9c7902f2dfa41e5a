"""The small VAE's training: initialisation, decoding without the clamp, resuming, and the polish of the decoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderKLWan

from models.codecs import decode_latents, posterior
from train.vae import VaeSettings, decode_unclamped, initialise_vae, latent_statistics, scale_latents, train_vae

SETTINGS = VaeSettings(steps=4, polish_steps=3, warmup_steps=2, checkpoint_every=2, log_every=1)


def tiny_vae(seed: int = 0, patch_size: int | None = 2) -> AutoencoderKLWan:
    channels = 12 if patch_size else 3
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=2, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True],
        patch_size=patch_size, in_channels=channels, out_channels=channels,
        latents_mean=[0.0] * 2, latents_std=[1.0] * 2,
    )  # fmt: skip
    initialise_vae(vae, torch.Generator().manual_seed(seed))
    return vae


def clips(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    colour = torch.rand(2, 3, 1, 1, 1, generator=generator) * 2 - 1
    video = colour.expand(2, 3, 5, 16, 16).clone()
    return video, torch.ones(2, 1, 5, 16, 16)


@pytest.mark.parametrize("patch_size", [2, None])
def test_decode_unclamped_is_decode_inside_the_range(patch_size: int | None) -> None:
    vae = tiny_vae(patch_size=patch_size).eval()
    latents = torch.randn(1, 2, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        free = decode_unclamped(vae, latents)
        assert torch.equal(free.clamp(-1, 1), vae.decode(latents).sample)


def test_initialised_vae_repeats_a_still_image() -> None:
    """At the start a video model is an image model: every frame of a still clip decodes to the same picture."""
    vae = tiny_vae().eval()
    still = torch.rand(1, 3, 1, 16, 16, generator=torch.Generator().manual_seed(2)).expand(1, 3, 9, 16, 16) * 2 - 1
    with torch.no_grad():
        video = decode_unclamped(vae, vae.encode(still).latent_dist.mean)
    assert video.std() > 0.05  # something of the input arrives
    assert torch.allclose(video, video[:, :, :1].expand_as(video), atol=1e-5)


def test_training_learns_one_batch_by_heart(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=150, polish_steps=0, checkpoint_every=1000)
    losses: list[float] = []
    train_vae(
        tiny_vae(),
        lambda step: clips(0),
        settings,
        tmp_path,
        say=lambda line: losses.append(float(line.split("l1=")[1].split()[0])),
    )
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_a_killed_run_ends_with_the_weights_of_one_never_killed(tmp_path: Path) -> None:
    whole = train_vae(tiny_vae(), clips, SETTINGS, tmp_path / "whole", say=lambda _: None)

    def dies(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step == 5:
            raise KeyboardInterrupt
        return clips(step)

    with pytest.raises(KeyboardInterrupt):
        train_vae(tiny_vae(), dies, SETTINGS, tmp_path / "killed", say=lambda _: None)
    again = train_vae(tiny_vae(seed=9), clips, SETTINGS, tmp_path / "killed", say=lambda _: None)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_the_polish_leaves_latents_alone(tmp_path: Path) -> None:
    plain = train_vae(tiny_vae(), clips, replace(SETTINGS, polish_steps=0), tmp_path / "plain", say=lambda _: None)
    polished = train_vae(tiny_vae(), clips, SETTINGS, tmp_path / "polished", say=lambda _: None)
    with torch.no_grad():
        video, _ = clips(100)
        assert torch.equal(plain.encode(video).latent_dist.mean, polished.encode(video).latent_dist.mean)
    assert any(
        not torch.equal(value, plain.decoder.state_dict()[n]) for n, value in polished.decoder.state_dict().items()
    )


def test_another_seed_is_refused(tmp_path: Path) -> None:
    train_vae(tiny_vae(), clips, SETTINGS, tmp_path, say=lambda _: None)
    with pytest.raises(ValueError, match="seed 0, asked for 1"):
        train_vae(tiny_vae(), clips, replace(SETTINGS, seed=1), tmp_path, say=lambda _: None)


def test_latent_statistics_normalise() -> None:
    vae = tiny_vae().eval()
    mean, std = latent_statistics(vae, clips, batches=3)
    with torch.no_grad():
        latents = torch.cat([vae.encode(clips(k)[0]).latent_dist.mean for k in range(3)])
    assert torch.allclose(latents.mean(dim=(0, 2, 3, 4)), torch.tensor(mean), atol=1e-4)
    assert torch.allclose(
        latents.double().var(dim=(0, 2, 3, 4), correction=0).sqrt().float(), torch.tensor(std), rtol=1e-3
    )


def other_vae(name: str) -> AutoencoderKL | AutoencoderKLCogVideoX:
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "latent_channels": 2, "norm_num_groups": 4}
    if name == "cogvideox":
        vae = AutoencoderKLCogVideoX(**sizes, scaling_factor=1.0)
    else:
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(**sizes, **blocks, scaling_factor=1.0)
    initialise_vae(vae, torch.Generator().manual_seed(0))
    return vae.eval()


@pytest.mark.parametrize("name", ["cogvideox", "latte"])
@torch.no_grad()
def test_other_vaes_start_as_image_models_with_a_narrow_posterior(name: str) -> None:
    vae = other_vae(name)
    still = torch.rand(1, 3, 1, 32, 32, generator=torch.Generator().manual_seed(2)).expand(1, 3, 9, 32, 32) * 2 - 1
    mean, logvar = posterior(vae, still)
    video = decode_latents(vae, mean)
    assert video.shape == still.shape and video.std() > 0.05 and mean.std() > 0.05
    assert torch.allclose(video, video[:, :, :1].expand_as(video), atol=1e-4)
    assert -9 < logvar.mean() < -4


@pytest.mark.parametrize("name", ["cogvideox", "latte"])
def test_other_vaes_learn(name: str, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=12, polish_steps=2, checkpoint_every=1000)
    losses: list[float] = []
    vae = train_vae(
        other_vae(name),
        lambda step: tuple(x.repeat(1, 1, 1, 2, 2)[:, :, :1] for x in clips(0)),
        settings,
        tmp_path,
        lambda line: losses.append(float(line.split("loss=")[1].split()[0])),
    )
    assert len(losses) == 14 and losses[11] < 0.6 * losses[0]
    assert not vae.training


@pytest.mark.parametrize("name", ["cogvideox", "latte"])
@torch.no_grad()
def test_scaled_latents_decode_to_the_same(name: str) -> None:
    vae = other_vae(name)
    video = torch.rand(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    noise = torch.Generator().manual_seed(4)
    for module in vae.decoder.modules():  # norms that read the latents, as after training
        for layer in (getattr(module, "conv_y", None), getattr(module, "conv_b", None)):
            if layer is not None:
                layer.conv.weight.add_(0.3 * torch.randn(layer.conv.weight.shape, generator=noise))
    mean, logvar = posterior(vae, video)
    decoded = decode_latents(vae, mean)
    _, scale = latent_statistics(vae, lambda _: (video, video), batches=1)
    scale_latents(vae, scale)
    scaled, scaled_logvar = posterior(vae, video)
    assert torch.allclose(scaled.transpose(0, 1).flatten(1).std(dim=1), torch.ones(2), atol=1e-2)
    column = torch.tensor(scale).view(1, -1, 1, 1, 1)
    assert torch.allclose(scaled * column, mean, atol=1e-4)
    assert torch.allclose(scaled_logvar, logvar - 2 * column.log(), atol=1e-3)
    assert torch.allclose(decode_latents(vae, scaled), decoded, atol=1e-3)
