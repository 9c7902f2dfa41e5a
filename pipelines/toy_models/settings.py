"""What `make toy-models` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infra.knobs import knob
from pipelines.shipped import SHIPPED_WAN
from toyworld.vocabulary import LevelName


@dataclass(kw_only=True)
class ToyModelsConfig:
    """What `make toy-models` trains."""

    level: LevelName = knob("small", "ToyWorld level of the clips")
    seed: int = knob(0, "seed of worlds, weights and noise")
    run_dir: Path = knob(Path("runs/toy-models"), "snapshots, latents and logs; start again here to resume")
    out: Path = knob(SHIPPED_WAN, "model folder to write")
    start: Path | None = knob(None, "model folder to go on from, in a new run_dir; null = random weights")
    vae_steps: int = knob(2_600, "steps of the VAE")
    vae_polish_steps: int = knob(1_600, "further steps of its decoder alone")
    text_steps: int = knob(2_200, "steps of the text encoder")
    clips: int = knob(10_000, "training clips, each with three texts")
    patterned: int = knob(6_000, "further clips, whose characters also have the patterns that the level lacks")
    steps: int = knob(19_000, "steps of the transformer")
    batch_size: int = knob(16, "clips per step of the transformer")
    decoder_steps: int = knob(900, "steps of the decoder on latents that the transformer has denoised")
    learning_rate: float = knob(1e-3, "peak learning rate of the transformer; cosine to a tenth")
    width: int = knob(192, "width of the transformer; heads are 32 wide")
    layers: int = knob(6, "blocks of the transformer")
    precision: Literal["fp32", "bf16"] = knob("fp32", "bf16 pays on cores that calculate in it (avx512_bf16, amx)")
    compile: bool = knob(False, "torch.compile the transformer's blocks (needs a C++ compiler); twice as fast")
    prompts: int = knob(64, "held-out prompts that the judge scores at the end")
