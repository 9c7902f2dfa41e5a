"""AID on Stable Video Diffusion in training: recomputed and sharded it learns the same, on EDM's loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed import destroy_process_group, init_process_group

from models.text import TextContext
from tests.draw import randn
from tests.models.test_aid_svd import LEVELS, PROCESS, SIZE, B, F, adapted, inputs, run
from train.batches import SceneBatch
from train.loop import clip_losses, given_conditions
from train.parallel import Parallel, prepare, trainable


def gradients(backbone, method) -> dict[str, Tensor]:
    for factor in (1.0, 2.0):  # two clips: what a block recomputes is its own clip's
        x, text, conditions = inputs()
        run(backbone, method, x * factor, LEVELS / factor, text, conditions).square().mean().backward()
    return {name: p.grad for name, p in trainable(backbone).items() if p.grad is not None}


@pytest.mark.parametrize("how", ["diffusers", "wrapped", "sharded", "sharded and wrapped"])
def test_recomputed_and_sharded_modules_learn_the_same(how, tmp_path):
    expected = gradients(*adapted())
    backbone, method = adapted()
    backbone.train()
    if how == "diffusers":
        backbone.unet.enable_gradient_checkpointing()
        found = gradients(backbone, method)
    elif how == "wrapped":
        found = gradients(prepare(backbone, Parallel(), activation_checkpointing=True), method)
    else:
        init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            sharded = prepare(backbone, Parallel(sharded=True), activation_checkpointing="wrapped" in how)
            found = {name: gradient.full_tensor() for name, gradient in gradients(sharded, method).items()}
        finally:
            destroy_process_group()
    assert found.keys() == expected.keys() and any(name.startswith("conditioner.") for name in found)
    for name, gradient in found.items():
        assert torch.allclose(expected[name], gradient, rtol=1e-8, atol=1e-10), name


@torch.no_grad()
def test_the_loss_is_edms_of_a_batch_whose_samples_lose_what_they_lose():
    """Against EDM's loss written out: weight (sigma^2+1)/sigma^2 of the error of the predicted clean clip."""
    backbone, method = adapted(torch.float32)
    clean, text, told = inputs(torch.float32)
    layout = method.layout_for_training([F])
    context = TextContext(text[:, None], torch.zeros(F, dtype=torch.long))
    batch = SceneBatch(
        clean, layout, context, ["a", "b"], states=told["states"], given_lost=torch.tensor([True, False]),
        embedding=told["embedding"],
    )  # fmt: skip
    conditions = given_conditions(method, batch, 0, 0)
    assert conditions["given"].shape == (B, 5, 1, *SIZE) and not conditions["given"][0].any()
    assert torch.equal(conditions["embedding"], told["embedding"]), "lost by its mask"
    levels = method.sample_levels(layout, B, torch.Generator().manual_seed(3))
    noise = randn(*clean.shape, seed=6, dtype=torch.float32)
    losses, _, weights = clip_losses(backbone, method, batch, levels, noise, conditions)
    assert torch.allclose(weights, torch.full((B, F), 1 / F))

    _, sigma = PROCESS.signal_and_noise(levels[:, 0])
    sigma = sigma.float().view(-1, 1, 1, 1, 1)
    noisy = clean + sigma * noise
    found = run(backbone, method, noisy / (sigma**2 + 1).sqrt(), levels[:, 0], text, conditions)
    denoised = noisy / (sigma**2 + 1) - sigma / (sigma**2 + 1).sqrt() * found
    expected = ((sigma**2 + 1) / sigma**2 * (denoised - clean) ** 2).mean(dim=(1, 2, 3, 4))
    assert torch.allclose(losses, expected, rtol=1e-3)
