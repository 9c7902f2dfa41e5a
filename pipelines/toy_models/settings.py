"""What `make toy-models` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infra.knobs import knob
from pipelines.shipped import SHIPPED_WAN, WEIGHTS
from toyworld.vocabulary import LevelName


@dataclass(kw_only=True)
class ToyModelsConfig:
    """What `make toy-models` trains."""

    backbone: Literal["wan", "cogvideox", "latte", "svd"] = knob(
        "wan", "which model: the others take the text encoder of a finished one"
    )
    level: LevelName = knob("small", "ToyWorld level of the clips")
    seed: int = knob(0, "seed of worlds, weights and noise")
    run_dir: Path | None = knob(None, "snapshots, latents and logs, to resume from; null = runs/toy-BACKBONE")
    out: Path | None = knob(None, "model folder to write; null = toyworld/weights/BACKBONE-small")
    start: Path | None = knob(None, "model folder to go on from, in a new run_dir; null = random weights")
    vae_steps: int = knob(2_600, "steps of the VAE")
    vae_polish_steps: int = knob(1_600, "further steps of its decoder alone")
    text_steps: int | None = knob(
        None, "steps of the text encoder; null = 5,000, with `start` none; a taken one learns on where padding is read"
    )
    text_from: Path | None = knob(None, "model folder whose text encoder is taken; null = wan-small, for wan none")
    clips: int = knob(10_000, "training clips, each with three texts")
    patterned: int = knob(10_000, "further clips, whose characters also have the patterns that the level lacks")
    steps: int = knob(19_000, "steps of the transformer; 0, with `start`: it stays as it is")
    batch_size: int = knob(16, "clips per step of the transformer")
    decoder_steps: int = knob(900, "steps of the decoder on latents that the transformer has denoised")
    learning_rate: float = knob(1e-3, "peak learning rate of the transformer; cosine to a tenth")
    width: int | None = knob(None, "width of the transformer (heads of 32) or U-Net; null = the shipped model's")
    layers: int | None = knob(None, "blocks of the transformer; null = the shipped model's")
    save_half: bool | None = knob(None, "write weights in 16 bits; null = all but wan's")
    precision: Literal["fp32", "bf16"] = knob("fp32", "bf16 pays on cores that calculate in it (avx512_bf16, amx)")
    compile: bool = knob(False, "torch.compile the transformer's blocks (needs a C++ compiler); twice as fast")
    prompts: int = knob(64, "held-out prompts that the judge scores at the end")

    def __post_init__(self) -> None:
        wan = self.backbone == "wan"
        self.run_dir = self.run_dir or Path("runs/toy-models" if wan else f"runs/toy-{self.backbone}")
        self.out = self.out or WEIGHTS / f"{self.backbone}-small"
        if self.steps < 1 and self.start is None:
            raise ValueError(f"steps={self.steps} trains no transformer: give start=FOLDER, whose transformer is kept")
        if self.text_steps is None:
            self.text_steps = 0 if self.start else 5_000
        self.save_half = not wan if self.save_half is None else self.save_half
        if not wan:
            self.text_from = self.text_from or SHIPPED_WAN

    @property
    def folder(self) -> Path:
        """`run_dir`, which is always known by now."""
        assert self.run_dir is not None
        return self.run_dir
