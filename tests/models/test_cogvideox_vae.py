"""CogVideoX's VAE in the codec: shapes, units, which lengths come back, and what an encoded clip leaks."""

from __future__ import annotations

import pytest
import torch

from models.codecs import VideoCodec
from models.tiny_cogvideox import tiny_cogvideox_vae


@pytest.fixture(scope="module")
def codec() -> VideoCodec:
    return VideoCodec(tiny_cogvideox_vae())


def video(frames: int, batch: int = 1) -> torch.Tensor:
    return 2 * torch.rand(batch, 3, frames, 16, 24, generator=torch.Generator().manual_seed(1)) - 1


@pytest.mark.parametrize("frames", [1, 9, 17])
def test_a_clip_comes_back_at_its_length(codec, frames):
    mean, logvar = codec.encode(video(frames, batch=2))
    assert mean.shape == logvar.shape == (2, 4, codec.num_latent_frames(frames), 2, 3)
    decoded = codec.decode(codec.normalize(mean))
    assert decoded.shape == (2, 3, frames, 16, 24)
    assert torch.allclose(decoded, codec.vae.decode(mean).sample, atol=1e-5), "units undone before decoding"


def test_units_are_those_of_the_pipeline(codec):
    mean, _ = codec.encode(video(9))
    assert torch.allclose(codec.normalize(mean), 0.7 * mean, rtol=1e-6, atol=0)
    assert torch.allclose(codec.denormalize(codec.normalize(mean)), mean, rtol=1e-6, atol=0)


def test_lengths_that_would_come_back_longer_are_refused(codec):
    with torch.no_grad():
        assert codec.vae.decode(torch.zeros(1, 4, 2, 2, 3)).sample.shape[2] == 8, "2 latents: 8 frames, not 5"
    for frames in (0, 5, 8, 13):
        with pytest.raises(ValueError, match=rf"{frames} frames: the VAE takes 8k\+1 frames \(1, 9, 17, ...\)"):
            codec.num_latent_frames(frames)
    with pytest.raises(ValueError, match=r"13 frames: the VAE takes 8k\+1"):
        codec.decode(torch.zeros(1, 4, 4, 2, 3))


def test_a_frame_given_must_be_encoded_alone(codec):
    """Its latents change with later frames of the first piece of 9, not with those after; samples do not mix."""
    clip = video(17)
    latents = codec.encode(clip)[0]
    near, far = clip.clone(), clip.clone()
    near[:, :, 8] *= -1
    far[:, :, 9:] *= -1
    assert (codec.encode(near)[0][:, :, 0] - latents[:, :, 0]).abs().max() > 1e-4
    assert torch.allclose(codec.encode(far)[0][:, :, :3], latents[:, :, :3], rtol=0, atol=1e-6)
    assert (codec.encode(clip[:, :, :1])[0] - latents[:, :, :1]).abs().max() > 1e-4
    beside = codec.encode(torch.cat([clip, -clip]))[0][:1]
    assert torch.allclose(beside, latents, rtol=0, atol=1e-6)


def test_a_folder_says_which_vae_it_holds(codec, tmp_path):
    codec.vae.save_pretrained(tmp_path / "vae")
    again = VideoCodec.from_folder(tmp_path)
    assert type(again.vae) is type(codec.vae) and again.hash == codec.hash
    config = tmp_path / "vae" / "config.json"
    config.write_text(config.read_text().replace("AutoencoderKLCogVideoX", "AutoencoderKLMochi"))
    with pytest.raises(ValueError, match=r"config.json: _class_name is 'AutoencoderKLMochi', supported are"):
        VideoCodec.from_folder(tmp_path)
