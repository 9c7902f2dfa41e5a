"""ToyWorld training sets as the shards that `shotloom prepare` would write, rendered and encoded without a video file.

Everything is of level small and split train; held-out prompts are of split test and of another seed.

    clips             single shots with a sentence and the states that the grammar predicts from it
    scenes            3 to 6 shots with story and prompts
    dressed-scenes    3 shots; every other scene `dressed`, for three times the identities
    cast-scenes       the same, but three of four scenes have two characters: who is which is the hard part
    pairs-TASK        what is given and the shot that comes of it (toyworld.pairs)
    pairs-led-by-image  the same pairs of an image, which is the shot's own first latent frame: image-to-video data
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from models.folder import load_settings
from models.scene import (
    IMAGE_ROLES,
    EncodedSpan,
    Reference,
    Scene,
    Shot,
    Source,
    link_shots,
    reference_tensor_key,
    shot_tensor_key,
)
from models.states import StatePredictor
from pipelines.states import GrammarStates
from preprocess.asked import predict_states
from preprocess.encode import Encoder, scene_texts
from preprocess.references import STILL_FRAMES
from preprocess.shards import ShardWriter
from toyworld.pairs import PairTask, pair_texts, render_reference, sample_pair
from toyworld.render import render_shot
from toyworld.text import sentence, shot_prompt, story
from toyworld.vocabulary import FPS, LevelName
from toyworld.world import dressed, sample_scene

VERSION = 1  # change it when a training set would come out otherwise
LEVEL: LevelName = "small"  # what the shipped model knows
SEED = 11
STATES = 4
SHARD_BYTES = 50_000_000
SHOTS = {"clips": 1, "scenes": (3, 6), "dressed-scenes": 3, "cast-scenes": 3}
DRESSED = {"dressed-scenes": 1, "cast-scenes": 4}  # so many scenes plain, then as many dressed, and so on
LED_BY_IMAGE = "pairs-led-by-image"


@dataclass(frozen=True)
class Take:
    """A training scene in pixels, uint8 [T,H,W,3] each; `lead` is an image to go before the first shot's latents."""

    name: str
    story: str
    shots: list[tuple[np.ndarray, str, str]]  # frames, prompt, sentence
    references: list[tuple[str, np.ndarray]] = field(default_factory=list)
    lead: np.ndarray | None = None


def takes(kind: str, count: int, size: int) -> Iterator[Take]:
    """Training scenes 0..count-1 of a kind."""
    for index in range(count):
        if kind in SHOTS:
            yield _scene_take(kind, index, size)
        else:
            yield _pair_take(kind, index, size)


def _scene_take(kind: str, index: int, size: int) -> Take:
    cast = None if kind != "cast-scenes" else 1 if index % 4 == 0 else 2  # None: as the world draws it
    scene = sample_scene(LEVEL, seed=SEED, index=index, split="train", num_shots=SHOTS[kind], num_characters=cast)
    if kind in DRESSED and (index // DRESSED[kind]) % 2:
        scene = dressed(scene)
    words = np.random.Generator(np.random.PCG64(np.random.SeedSequence([SEED, index, 17])))
    made = [
        (render_shot(scene, k, size), shot_prompt(scene, k, words), sentence(scene, k, words))
        for k in range(len(scene.shots))
    ]
    return Take(scene.scene_id, story(scene), made)


def _pair_take(kind: str, index: int, size: int) -> Take:
    task: PairTask = "i2v_in_context" if kind == LED_BY_IMAGE else kind.removeprefix("pairs-")  # type: ignore[assignment]
    pair = sample_pair(task, LEVEL, seed=SEED, index=index, split="train")
    text, prompt = pair_texts(pair)
    shot = (render_shot(pair.target, 0, size), prompt, sentence(pair.target, 0))
    given = [(one.role, render_reference(one, size)) for one in pair.references]
    if kind == LED_BY_IMAGE:
        return Take(pair.pair_id, text, [shot], lead=given[0][1])
    return Take(pair.pair_id, text, [shot], references=[(role, as_reference(role, clip)) for role, clip in given])


def as_reference(role: str, clip: np.ndarray) -> np.ndarray:
    """A reference as it is encoded: an image stands still for as long as `prepare` takes it."""
    return np.repeat(clip, STILL_FRAMES, axis=0) if role in IMAGE_ROLES else clip


def data_key(kind: str, count: int, encoder: Encoder) -> str:
    """Changes when a training set would come out otherwise; a transformer or a decoder trained on changes nothing."""
    made_with = [VERSION, kind, count, SEED, encoder.codec.hash, encoder.text.hash, encoder.text_length]
    return hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:12]


def dataset(folder: Path, kind: str, count: int, model: Path) -> Path:
    """The folder of a training set, made if it is not there, whole or not at all."""
    predictor = GrammarStates(STATES) if kind == "clips" else None
    encoder = Encoder.from_folder(model, threads=torch.get_num_threads())
    made = folder / f"{kind}-{count}-{data_key(kind, count, encoder)}"
    if made.is_dir():
        return made
    temporary = made.with_name(f".{made.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    size = load_settings(model).height
    with ShardWriter(temporary / "shards", SHARD_BYTES) as writer:
        for take in takes(kind, count, size):
            writer.write(take.name, encode_take(take, encoder, predictor))
    try:
        temporary.rename(made)
    except OSError:  # another run has made it in the meantime
        if not made.is_dir():
            raise
        shutil.rmtree(temporary)
    return made


def encode_take(take: Take, encoder: Encoder, predictor: StatePredictor | None = None) -> dict[str, bytes]:
    """The sample of a scene, {extension: bytes}, as `prepare` writes it."""
    scene = _record(take)
    spans = [frames for frames, _, _ in take.shots]
    if predictor is not None:
        predict_states(scene, lambda shot, instruction: predictor(spans[shot.index][:1], instruction))
    encoder.check_texts(scene)
    scene.latents = encoder.source("float16")
    texts = encoder.encode_texts([scene], "float16")
    tensors = {name: texts[text].clone() for name, text in scene_texts(scene).items()}
    tensors |= encoder.encode_states(scene, "float16")
    for index, latents in enumerate(encoder.encode_shots(spans, "float16")):
        tensors |= {shot_tensor_key(index, name): value for name, value in latents.items()}
    for index, mean in enumerate(encoder.encode_references([clip for _, clip in take.references], "float16")):
        tensors[reference_tensor_key(index)] = mean
    if take.lead is not None:
        (led,) = encoder.encode_shots([take.lead], "float16")
        for part in ("mean", "logvar"):
            name = shot_tensor_key(0, f"latent_{part}")
            tensors[name] = torch.cat([led[f"latent_{part}"], tensors[name]], dim=1)
    return {"json": scene.to_json().encode(), "safetensors": save(tensors)}


def _record(take: Take) -> Scene:
    shots, begin = [], 0
    for number, (frames, prompt, said) in enumerate(take.shots):
        count = len(frames) + (0 if number or take.lead is None else 4)  # a latent frame is four video frames
        end = begin + count
        height, width = frames.shape[1:3]
        span = EncodedSpan(begin, count, float(FPS), list(range(begin, end)), height, width)
        shots.append(
            Shot(
                "", number, begin, end, begin, end, [1, FPS], transition="cut" if number else "start", encoded=span,
                prompt=prompt, sentence=said,
            )
        )  # fmt: skip
        begin = end
    source = Source(f"{take.name}.mp4", "0" * 64, 0)
    record = Scene(take.name, take.name, source, float(FPS), width, height, begin / FPS, link_shots(shots, take.name))
    record.story = take.story
    record.references = [
        Reference(role, f"{take.name}-{number}")  # type: ignore[arg-type]
        for number, (role, _) in enumerate(take.references)
    ]
    return record
