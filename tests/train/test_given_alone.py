"""FVDM with a VAE whose latents know later frames (CogVideoX, HunyuanVideo): what is shown clean was encoded alone."""

from __future__ import annotations

import pytest
import torch

from models.backbones.wan import WanBackbone
from models.methods import get_method
from models.process import FlowMatching
from tests.train.test_scenes import open_dataset
from train.batches import whole_tokens
from train.loop import clip_losses, draw

ALONE = 0.25  # of the first shot's first frame (tests.train.tiny)


class Seen:
    """In the place of a backbone: what it is shown, and at which levels."""

    process, capabilities = FlowMatching(), WanBackbone.capabilities

    def __call__(self, x, levels, **_):
        self.x, self.levels = x, levels
        return torch.zeros_like(x)


@pytest.mark.parametrize("patch", [1, 2], ids=["a frame per token", "two"])
def test_a_clean_first_frame_is_the_one_encoded_alone_and_a_noisy_one_is_the_clips(dataset, patch):
    method = get_method("fvdm", p=0.5, clean_prob=0.5).for_model(Seen.process, 3.0, causal_vae=False)
    data = open_dataset(
        dataset([[3]] * 4), layout_for=method.layout_for_training, given_frames=1, given_alone=True, batch_size=8,
        shots_per_scene=1, normalize=lambda x: x,
    )  # fmt: skip
    shown = {True: 0, False: 0}
    for index in range(4):
        batch, seen = whole_tokens(data.batch(index), patch), Seen()
        levels, noise = draw(method, batch, 0, index * 8, patch=patch)
        losses, _, weights = clip_losses(seen, method, batch, levels, noise, {})
        for row in range(8):
            clean = bool(levels[row, 0] == 0)
            shown[clean] += 1
            head = seen.x[row, :, :patch]
            if clean:
                assert torch.equal(head, torch.full_like(head, ALONE)) and not weights[row, :patch].any()
            else:
                expected = FlowMatching().add_noise(batch.latents, noise, levels)[row, :, :patch]
                assert torch.equal(head, expected) and (batch.latents[row, :, 0] - ALONE).abs().min() > 0.1
            assert (levels[row, patch:] > 0).all(), "later frames, of which no latent knows nothing, are not clean"
        target = noise - batch.latents
        expected = (target.square().mean(dim=(1, 3, 4)) * weights).sum(dim=1)
        torch.testing.assert_close(losses, expected)
    assert min(shown.values()) > 5
