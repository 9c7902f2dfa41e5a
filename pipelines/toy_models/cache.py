"""ToyWorld clips as latents with their texts, made once and kept on disk for pretraining the transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.codecs import VideoCodec, to_video
from models.image_encoder import ImageEncoder
from models.text import TextEncoder
from pipelines.toy_models.data import SIZE, TEXT_LENGTH
from toyworld.render import render_shot
from toyworld.text import sentence, shot_prompt, story
from toyworld.vocabulary import LEVELS, LevelName, Split
from toyworld.world import ToyScene, dressed, sample_scene, single_shot
from train.batches import write_cache

TEXTS_PER_CLIP = 3  # two wordings of the sentence, and the story with the shot's prompt


def cache_clip(
    level: LevelName, split: Split, seed: int, index: int, patterned: bool = False
) -> tuple[ToyScene, list[tuple[str, ...]]]:
    """One shot of a scene of 1 to 9 shots, alone, and its texts: each a tuple of strings encoded one by one.

    Shots come from whole scenes so that the model also knows the story form of a prompt: characters that the shot does
    not show, and a number of shots that is not one. Casts are large, or hardly any clip would show two characters at
    once and the model would not learn which of them has which colour and shape. `patterned` is for
    `toyworld.world.dressed`, unless that makes the texts too long for the model.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index, 11])))
    cast = 1 + int(rng.integers(LEVELS[level].max_characters, size=2).max())
    scene = sample_scene(level, seed=seed, index=index, split=split, num_characters=cast)
    chosen = int(rng.integers(len(scene.shots)))
    if patterned:
        scene = dressed(scene)
    alone = single_shot(scene, chosen)
    texts = [(sentence(alone, 0, rng),), (sentence(alone, 0, rng),), (story(scene), shot_prompt(scene, chosen, rng))]
    if patterned and max(sum(len(part) + 1 for part in text) for text in texts) > TEXT_LENGTH:
        return cache_clip(level, split, seed, index)
    return alone, texts


def readable(texts: list[tuple[str, ...]], encoder: TextEncoder, scene: ToyScene) -> list[tuple[str, ...]]:
    """The texts that a model reads whole, as the strings that its encoder is given; the plainest wording, if none."""
    found = [tuple(encoder.parts(text)) for text in texts]
    fitting = [text for text in found if sum(encoder.num_tokens(part) for part in text) <= encoder.max_length]
    return fitting or [tuple(encoder.parts([sentence(scene, 0)]))]


@torch.no_grad()
def build_cache(
    folder: Path, codec: VideoCodec, encoder: TextEncoder | ImageEncoder, *, level: LevelName,
    split: Split, seed: int, clips: int, patterned: bool = False, part_size: int = 1000,
    say: Callable[[str], None] = print,
) -> list[Path]:  # fmt: skip
    """Write `clips` clips to `folder` in parts of `part_size` and return the parts; those already there are kept.

    Every clip stands in its part once per text that the model reads whole (at most `TEXTS_PER_CLIP` rows share one
    latent). For a model that reads images the only text is the embedding of the clip's first frame.
    """
    paths = []
    known: dict[str, Tensor] = {}
    for begin in range(0, clips, part_size):
        path = folder / f"{split}{'-patterned' if patterned else ''}-{begin:06d}.safetensors"
        paths.append(path)
        if path.exists():
            continue
        latents, ids, images = [], [], []
        bank: dict[tuple[str, ...], int] = {}
        for index in range(begin, min(begin + part_size, clips)):
            alone, texts = cache_clip(level, split, seed, index, patterned)
            video = to_video([render_shot(alone, 0, SIZE)])
            if isinstance(encoder, ImageEncoder):
                images.append(encoder.encode(video[:, :, 0])[0].half())
                texts = [(str(index),)]
            else:
                texts = readable(texts, encoder, alone)
            mean, _ = codec.encode(video)
            latents += [codec.normalize(mean)[0].half()] * len(texts)
            ids += [bank.setdefault(text, len(bank)) for text in texts]
        write_cache(path, torch.stack(latents), images or contexts(bank, encoder, known), torch.tensor(ids))
        say(f"latents {min(begin + part_size, clips)}/{clips} ({split})")
    return paths


def contexts(texts: Iterable[tuple[str, ...]], encoder: TextEncoder, known: dict[str, Tensor]) -> list[Tensor]:
    """Valid tokens [L,D] of every text, float16; `known` holds the strings that were encoded before."""
    bank = list(texts)
    fresh = sorted({part for text in bank for part in text} - known.keys())
    for start in range(0, len(fresh), 256):
        chunk = fresh[start : start + 256]
        known |= dict(zip(chunk, (tokens.half() for tokens in encoder.encode(chunk)), strict=True))
    return [torch.cat([known[part] for part in text]) for text in bank]
