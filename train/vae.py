"""Train a small VAE, of videos or of images (`models.codecs.VAE`), from a stream of clips. Resumable, seeded.

Shapes: B batch, C channels, T video frames, H W size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn

from models.codecs import VAE, decode_latents, posterior
from train.snapshot import load_snapshot, save_snapshot

# step -> (video [B,3,T,H,W] in [-1,1], weight [B,1,T,H,W] of each pixel in the reconstruction loss)
ClipSource = Callable[[int], tuple[Tensor, Tensor]]


@dataclass
class VaeSettings:
    """How to train the VAE; the loss is weighted L1 + mse_weight * MSE + kl_weight * KL (mean over latent elements)."""

    steps: int = 2600
    polish_steps: int = 1600  # then the decoder alone, from the averaged weights: latents stay what they are
    polish_learning_rate: float = 1e-3
    learning_rate: float = 2e-3
    final_learning_rate: float = 5e-5
    warmup_steps: int = 50
    kl_weight: float = 1e-4
    mse_weight: float = 2.0
    grad_clip: float = 1.0
    ema_decay: float = 0.998
    checkpoint_every: int = 100
    log_every: int = 20
    seed: int = 0


@torch.no_grad()
def initialise_vae(vae: VAE, generator: torch.Generator, log_variance: float = -6.0, bias_scale: float = 0.3) -> None:
    """Initialise a VAE for fast training from nothing, in place.

    PyTorch's default halves the signal at every convolution while the biases stay, so that after a few layers the
    norms see hardly anything of the input. Here every convolution keeps the variance, a 3-D kernel starts as an image
    kernel on the tap of its own frame, a change of frame rate as a repeat or a skip, residual branches start at zero,
    CogVideoX's norms in the decoder start as plain ones, and the posterior starts narrow.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            continue
        weight, name = module.weight, name.removesuffix(".conv")
        fan_in = weight[0].numel() // (weight.shape[2] if weight.ndim == 5 else 1)
        values = torch.randn(weight.shape, generator=generator) / fan_in**0.5
        if weight.ndim == 5:  # causal kernels are padded in front, outside of the layer
            own = weight.shape[2] // 2 if module.padding[0] else weight.shape[2] - 1
            values[:, :, [tap for tap in range(weight.shape[2]) if tap != own]] = 0.0
        if name.endswith("time_conv"):  # changes of frame rate start as "repeat" and "keep the last"
            values = torch.zeros_like(values)
            channels = torch.arange(weight.shape[0])
            values[channels, channels % weight.shape[1], -1] = 1.0
        steered = name.endswith((".conv_y", ".conv_b"))  # what a CogVideoX decoder multiplies and adds after a norm
        weight.copy_(torch.zeros_like(values) if name.endswith("conv2") or steered else values)
        if module.bias is not None:
            bias = torch.randn(module.bias.shape, generator=generator) * bias_scale
            module.bias.copy_(torch.zeros_like(bias) if name.endswith("time_conv") or steered else bias)
            if name.endswith(".conv_y"):
                module.bias.fill_(1.0)
    head = _posterior_head(vae)
    channels = len(head.weight) // 2
    head.weight[channels:] *= 0.1
    head.bias[channels:] = log_variance  # type: ignore[index]


def _posterior_head(vae: VAE) -> nn.Conv2d | nn.Conv3d:
    """The layer that gives means and log-variances."""
    model: Any = vae
    head = getattr(model, "quant_conv", None)
    if head is None:
        head = model.encoder.conv_out
    return getattr(head, "conv", head)


@torch.no_grad()
def scale_latents(vae: VAE, std: list[float]) -> None:
    """Divide each channel of the latents by its deviation [C], in place, in the layers that write and read them.

    For a family whose configuration has one scale for all channels. What it decodes from its latents stays.
    """
    head, scale = _posterior_head(vae), torch.tensor(std)
    head.weight[: len(scale)] /= scale.view(-1, *[1] * (head.weight.ndim - 1))
    head.bias[: len(scale)] /= scale  # type: ignore[index]
    head.bias[len(scale) :] -= 2 * scale.log()  # type: ignore[index]
    for layer in _latent_readers(vae):
        layer.weight *= scale.view(1, -1, *[1] * (layer.weight.ndim - 2))


def _latent_readers(vae: VAE) -> list[nn.Conv2d | nn.Conv3d]:
    """The layers of the decoder that latents go into; CogVideoX's norms read them, too."""
    model: Any = vae
    if getattr(model, "post_quant_conv", None) is not None:
        return [model.post_quant_conv]
    norms = [module for module in model.decoder.modules() if isinstance(module, CogVideoXSpatialNorm3D)]
    layers = [model.decoder.conv_in, *(layer for norm in norms for layer in (norm.conv_y, norm.conv_b))]
    return [getattr(layer, "conv", layer) for layer in layers]


def _learning_rate(settings: VaeSettings, step: int) -> float:
    """Linear warm-up, then linear decay to the final rate; the polish does the same from its own peak."""
    peak, steps = settings.learning_rate, settings.steps
    if step >= settings.steps:
        peak, steps, step = settings.polish_learning_rate, settings.polish_steps, step - settings.steps
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(steps - settings.warmup_steps, 1)
    return peak + share * (settings.final_learning_rate - peak)


def freeze_encoder(vae: VAE) -> None:
    """From here on only the decoder learns."""
    model: Any = vae
    model.encoder.requires_grad_(False)
    if getattr(model, "quant_conv", None) is not None:
        model.quant_conv.requires_grad_(False)


def decode_unclamped(vae: VAE, latents: Tensor) -> Tensor:
    """Video [B,3,T,H,W] from raw latents [B,C,F,h,w], not clamped to [-1,1].

    A Wan clamps what it decodes, and the gradient of that is zero wherever a young decoder overshoots.
    """
    return _decode_wan(vae, latents) if isinstance(vae, AutoencoderKLWan) else decode_latents(vae, latents)


def _decode_wan(vae: Any, latents: Tensor) -> Tensor:
    """`vae.decode` without its final clamp: latent frame by latent frame through the causal cache."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    frames = []
    for index in range(latents.shape[2]):
        vae._conv_idx = [0]
        cache = {"feat_cache": vae._feat_map, "feat_idx": vae._conv_idx}
        frames.append(vae.decoder(hidden[:, :, index : index + 1], first_chunk=index == 0, **cache))
    vae.clear_cache()
    video = torch.cat(frames, dim=2)
    return video if vae.config.patch_size is None else unpatchify(video, patch_size=vae.config.patch_size)


def vae_loss(vae: VAE, video: Tensor, weight: Tensor, settings: VaeSettings, generator: torch.Generator):
    """(loss, figures) of one batch; the posterior is sampled with `generator`."""
    mean, logvar = posterior(vae, video)
    noise = torch.randn(mean.shape, generator=generator)
    latents = mean + torch.exp(0.5 * logvar) * noise
    loss, figures = reconstruction_loss(decode_unclamped(vae, latents), video, weight, settings.mse_weight)
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    return loss + settings.kl_weight * kl, {**figures, "kl": kl.item()}


def reconstruction_loss(
    reconstruction: Tensor, video: Tensor, weight: Tensor, mse_weight: float
) -> tuple[Tensor, dict[str, float]]:
    """Weighted L1 + mse_weight * weighted MSE of videos [B,3,T,H,W] under pixel weights [B,1,T,H,W], and its parts."""
    weight = weight / weight.mean()
    difference = reconstruction - video
    l1, mse = (weight * difference.abs()).mean(), (weight * difference.square()).mean()
    return l1 + mse_weight * mse, {"l1": l1.item(), "mse": mse.item()}


def train_vae(
    vae: Any, clips: ClipSource, settings: VaeSettings, run_dir: Path, say: Callable[[str], None] = print
) -> Any:
    """Train `vae` in place from step 0 or from the last snapshot in `run_dir`; returns it with its EMA weights.

    `clips(step)` must be a pure function of the step, so that a resumed run sees what the unbroken one would have seen.
    Figures go to `run_dir/metrics.jsonl`.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    average = {name: value.detach().clone() for name, value in vae.state_dict().items()}
    step = load_snapshot(run_dir, vae, average, optimizer, asdict(settings))
    began, first, last = time.time(), step, settings.steps + settings.polish_steps
    if step > settings.steps:
        freeze_encoder(vae)
    while step < last:
        if step == settings.steps:
            vae.load_state_dict(average)
            freeze_encoder(vae)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(settings, step)
        loss, figures = vae_loss(vae, *clips(step), settings, generator)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(settings.ema_decay, step / (step + 10))
        with torch.no_grad():
            for name, value in vae.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        if step % settings.log_every == 0 or step == last:
            seconds = (time.time() - began) / (step - first)
            row = {
                "step": step,
                "loss": loss.item(),
                "grad_norm": norm.item(),
                "seconds_per_step": round(seconds, 3),
                **figures,
            }
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            say(f"vae {step}/{last} " + " ".join(f"{k}={v:.4g}" for k, v in row.items() if k != "step"))
        if step % settings.checkpoint_every == 0 or step in (settings.steps, last):
            save_snapshot(run_dir, step, vae, average, optimizer, asdict(settings))
    vae.load_state_dict(average)
    return vae.eval()


@torch.no_grad()
def latent_statistics(vae: VAE, clips: ClipSource, batches: int) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of posterior means over `batches` batches."""
    total, square, count = 0.0, 0.0, 0
    for index in range(batches):
        mean = posterior(vae, clips(index)[0])[0].double()
        total = total + mean.sum(dim=(0, 2, 3, 4))
        square = square + mean.square().sum(dim=(0, 2, 3, 4))
        count += mean.shape[0] * mean[0, 0].numel()
    average = total / count
    spread = (square / count - average**2).clamp_min(1e-8).sqrt()
    return [round(v, 6) for v in average.tolist()], [round(v, 6) for v in spread.tolist()]
