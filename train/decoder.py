"""Train the decoder of a small video VAE alone, on latents as a diffusion model leaves them.

A diffusion model returns latents that are a little smoother than the encoder's. They are as good to its loss, but a
decoder that has only seen the encoder's draws round corners and filled outlines from them. Here it learns the true
frames from latents that the model has noised and denoised again. The encoder stays as it is, so latents made with it
stay valid. One process, resumable, seeded.

Shapes: B batch, C channels, F latent frames, T video frames, H W size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.codecs import VAE
from train.snapshot import load_snapshot, save_snapshot
from train.vae import decode_unclamped, freeze_encoder, reconstruction_loss

# step -> (raw latents [B,C,F,h,w], video [B,3,T,H,W] in [-1,1], weight [B,1,T,H,W] of each pixel)
LatentSource = Callable[[int], tuple[Tensor, Tensor, Tensor]]


@dataclass
class DecoderSettings:
    """How to train it; the learning rate falls linearly to a twentieth."""

    steps: int = 900
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    mse_weight: float = 2.0
    grad_clip: float = 1.0
    ema_decay: float = 0.99
    checkpoint_every: int = 100
    log_every: int = 20
    seed: int = 0


def train_decoder(
    vae: VAE, latents: LatentSource, settings: DecoderSettings, run_dir: Path,
    say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Train `vae`'s decoder in place from step 0 or from the last snapshot in `run_dir`; it ends with its EMA weights.

    `latents(step)` must be a pure function of the step. Figures go to `run_dir/metrics.jsonl`.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    vae.requires_grad_(True)
    freeze_encoder(vae)
    learned = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    average = {name: value.detach().clone() for name, value in vae.state_dict().items()}
    first = step = load_snapshot(run_dir, vae, average, optimizer, asdict(settings))
    began = time.time()
    while step < settings.steps:
        share = step / settings.steps
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min((step + 1) / settings.warmup_steps, 1.0 - 0.95 * share)
        given, video, weight = latents(step)
        loss, figures = reconstruction_loss(decode_unclamped(vae, given), video, weight, settings.mse_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(settings.ema_decay, step / (step + 10))
        with torch.no_grad():
            for name, value in vae.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        if step % settings.log_every == 0 or step == settings.steps:
            rate = round((time.time() - began) / (step - first), 3)
            row = {"step": step, "loss": loss.item(), **figures, "seconds_per_step": rate}
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            say(f"decoder {step}/{settings.steps} " + " ".join(f"{k}={v:.4g}" for k, v in row.items() if k != "step"))
        if step % settings.checkpoint_every == 0 or step == settings.steps:
            save_snapshot(run_dir, step, vae, average, optimizer, asdict(settings))
    vae.load_state_dict(average)
    vae.eval().requires_grad_(False)
