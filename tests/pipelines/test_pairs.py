"""ToyWorld pairs from files to a training sample: each part of its latents decodes to what it should show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.folder import Model, load_model
from models.methods import get_method
from models.text import null_text
from pipelines.shipped import SHIPPED_WAN
from preprocess.encode import Encoder
from preprocess.parts import part_path, part_samples
from preprocess.settings import PrepareSettings
from preprocess.shards import ShardWriter
from preprocess.sources import list_sources
from preprocess.unit import prepare_video
from toyworld.judge import psnr
from toyworld.pairs import render_reference, sample_pair, write_pair
from toyworld.render import render_shot
from train.scenes import ShardDataset
from train.text_drop import TextDrop

LEAST_DB = {"portrait": 16.0}  # the shipped VAE never saw white; everything else is above 24


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(SHIPPED_WAN, parts=("codec", "text"))


def decoded(model: Model, latents: torch.Tensor) -> np.ndarray:
    """Frames [T,H,W,3], 0..255, of normalised latents [C,F,H,W]."""
    video = model.codec.decode(latents[None])[0].clamp(-1, 1)
    return ((video + 1) * 127.5).permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize("task", ["multi_image", "v2v_style", "action_transfer"])
def test_a_training_sample_shows_its_references_and_then_its_target(task: str, model: Model, tmp_path: Path) -> None:
    pair = sample_pair(task, index=3)  # type: ignore[arg-type]
    write_pair(pair, tmp_path)
    encoder = Encoder(model.codec, model.text, model.settings.text_length)
    (source,) = list_sources([tmp_path / "videos"]).files
    prepare_video(source, PrepareSettings(), encoder, tmp_path / "parts")
    with ShardWriter(tmp_path / "data" / "shards", 1 << 30) as writer:
        for key, files in part_samples(part_path(tmp_path / "parts", source.video_id)):
            writer.write(key, files)

    method = get_method("tic_ft")
    data = ShardDataset(
        tmp_path / "data", batch_size=1, text_length=model.settings.text_length,
        null_text=null_text(model.text, model.settings.text_length), layout_for=method.layout_for_training,
        condition_frames=method.condition_frames, normalize=model.codec.normalize,
        made_with=(model.codec.hash, model.text.hash), text_drop=TextDrop(0.0), latents="mean",
    )  # fmt: skip
    batch = data.batch(0)
    latents, at, figures = batch.latents[0], 0, {}
    lengths = [None if len(render_reference(one)) == 1 else 5 for one in pair.references]
    frames = method.condition_frames([one.role for one in pair.references], lengths)
    for one, count in zip(pair.references, frames, strict=True):
        shown = decoded(model, latents[:, at : at + count])
        figures[one.role] = min(psnr(given, made) for given, made in zip(_still(one, len(shown)), shown, strict=True))
        at += count
    assert batch.layout.roles[at - 3 :] == ["buffer"] * 3 + ["target"] * 5
    figures["target"] = psnr(render_shot(pair.target, 0, 64), decoded(model, latents[:, at:]))
    assert all(figure > LEAST_DB.get(role, 22.0) for role, figure in figures.items()), figures
    for one in (x for x in pair.references if x.role == "portrait"):  # nothing else of the sample would pass for it
        others = [render_shot(pair.target, 0, 64), *(_still(x, 17) for x in pair.references if x is not one)]
        assert figures["portrait"] > 3.0 + max(psnr(_still(one, 1), other[:1]) for other in others)


def _still(one, count: int) -> np.ndarray:
    pixels = render_reference(one, 64)
    return pixels.repeat(count, 0) if len(pixels) == 1 else pixels[:count]
