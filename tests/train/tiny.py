"""A tiny Wan and prepared datasets as real WebDataset tars. Sizes: 4 channels, 4x4 latents, texts of width 32."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import webdataset
from safetensors.torch import save

from models.backbones.wan import WanBackbone
from models.scene import (
    STORY_TEXT,
    EncodedSpan,
    LatentSource,
    Reference,
    Scene,
    Shot,
    Source,
    link_shots,
    reference_tensor_key,
    shot_tensor_key,
)
from models.tiny import LATENT_CHANNELS, TEXT_DIM, tiny_transformer

CHANNELS, SIZE, TEXT_LENGTH = LATENT_CHANNELS, 4, 12


def tiny_backbone(seed: int = 0) -> WanBackbone:
    return WanBackbone(tiny_transformer(seed))


def write_dataset(
    folder: Path,
    scenes: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    per_shard: int = 2,
    made_with: tuple[str, str] = ("vae", "text"),
    references: Sequence[Sequence[tuple[str, int]]] = (),
    states: int = 0,  # predicted states of every shot, of six tokens each
    joined: bool = False,  # story and prompt are one text, and with `apart` each alone, too
    apart: bool = False,
    prefix: str = "scene",
    labels: Sequence[Sequence[int | None]] = (),  # class of each shot, per scene
) -> Path:
    """Write scenes given as latent frames per shot (0 = not encoded). Shot i of scene n is filled around 10 n + i.

    `references` are (role, latent frames) per scene; frame f of reference r of scene n is -(10 n + r) - f/8.
    """
    (folder / "shards").mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    pattern = str(folder / "shards" / "scenes-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=per_shard, verbose=0) as writer:
        for number, frames in enumerate(scenes):
            scene, tensors = make_scene(number, frames, generator, states, prefix)
            scene.latents = LatentSource(*made_with, "float16", joined)
            for shot, label in zip(scene.shots, labels[number] if labels else (), strict=False):
                shot.label = label
            if joined:
                story = tensors.pop(STORY_TEXT)
                for i in range(len(frames)):
                    prompt = tensors[shot_tensor_key(i, "text")]
                    tensors[shot_tensor_key(i, "text")] = torch.cat([story, prompt])
                    tensors |= {STORY_TEXT: story, shot_tensor_key(i, "prompt_text"): prompt} if apart else {}
            for r, (role, count) in enumerate(references[number] if references else ()):
                scene.references.append(Reference(role, f"{number}-{r}"))
                filled = -(10.0 * number + r) - torch.arange(count).view(1, -1, 1, 1) / 8
                tensors[reference_tensor_key(r)] = filled.expand(CHANNELS, -1, SIZE, SIZE).half().contiguous()
            writer.write({"__key__": scene.scene_id, "json": scene.to_json().encode(), "safetensors": save(tensors)})
    return folder


def make_scene(
    number: int, frames: Sequence[int], generator: torch.Generator, states: int = 0, prefix: str = "scene"
) -> tuple[Scene, dict[str, torch.Tensor]]:
    shots, tensors = [], {STORY_TEXT: torch.full((5, TEXT_DIM), 1.0 + number)}
    for i, count in enumerate(frames):
        span = EncodedSpan(i * 40, 4 * count - 3, 8.0, list(range(i * 40, i * 40 + 4 * count - 3)), 32, 32)
        shot = Shot("", i, i * 40, i * 40 + 40, i * 40, i * 40 + 40, [1, 8], encoded=span if count else None)
        shot.transition = "cut" if i else "start"
        shot.prompt, shot.sentence = f"shot {i}", f"scene {number} shot {i}" if i % 2 == 0 else ""
        shots.append(shot)
        tensors[shot_tensor_key(i, "text")] = torch.full((3 + i, TEXT_DIM), 100.0 + i)
        if states:
            tensors[shot_tensor_key(i, "states_text")] = torch.full((states, 6, TEXT_DIM), 300.0 + i)
        if shot.sentence:
            tensors[shot_tensor_key(i, "sentence_text")] = torch.full((4, TEXT_DIM), 200.0 + i)
        if count:
            shape = (CHANNELS, count, SIZE, SIZE)
            noise = torch.randn(shape, generator=generator)
            tensors[shot_tensor_key(i, "latent_mean")] = (10.0 * number + i + 0.01 * noise).half()
            tensors[shot_tensor_key(i, "latent_logvar")] = torch.full(shape, -4.0).half()
            for name, value in (("first", 0.25), ("last", 0.75)):  # encoded alone: neither is a slice of the shot
                tensors[shot_tensor_key(i, f"{name}_mean")] = torch.full((CHANNELS, 1, SIZE, SIZE), value + i).half()
                tensors[shot_tensor_key(i, f"{name}_logvar")] = torch.full((CHANNELS, 1, SIZE, SIZE), -4.0).half()
    scene_id = f"{prefix}{number:03d}"
    source = Source(f"{scene_id}.mp4", "0" * 64, 1)
    total = 40 * len(frames)
    scene = Scene(scene_id, f"video{number}", source, 8.0, 32, 32, total / 8, link_shots(shots, scene_id))
    scene.story = f"story {number}"
    return scene, tensors


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    reader = dcp.FileSystemReader(checkpoint)
    index = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in index.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state
