"""The commands on tiny Wan 2.2 folders: one expert trained, the other as it was, both sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from infra.config import ConfigError, load_config
from models.backbones.experts import WanExperts
from models.experts import Expert
from models.folder import load_model, read_index
from models.layout import shots_layout
from models.methods import get_method
from models.process import FlowMatching
from models.tiny_wan22 import build_tiny_a14b_folder, build_tiny_ti2v_folder
from pipelines.train import TrainConfig, TrainResult, run_train
from sample.generate import GenerateSettings, generate_scene
from sample.storyboard import Storyboard, StoryboardShot
from tests.pipelines.test_families import write_dataset
from train.loop import draw_levels

BOUNDARY = 0.875


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("a14b") / "model"
    build_tiny_a14b_folder(path)
    write_dataset(path.parent / "dataset", path, 5)
    return path


def train(folder: Path, run_dir: Path, **changes: Any) -> TrainResult:
    keys = {
        "model": folder, "dataset": folder.parent / "dataset", "run_dir": run_dir, "steps": 2, "batch_size": 2,
        "num_workers": 0, "method": "lct", "shots_per_scene": 2, "log_every": 1, "learning_rate": 1e-2,
        "warmup_steps": 0,
    }  # fmt: skip
    return run_train(load_config(TrainConfig, None, [f"{key}={value}" for key, value in (keys | changes).items()]))


def changed(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_experts_are_trained_one_after_another(folder, tmp_path):
    first = train(folder, tmp_path / "high", expert="high")
    second = train(first.model_dir, tmp_path / "low", expert="low", dataset=folder.parent / "dataset")
    start, middle, end = (load_model(path).backbone for path in (folder, first.model_dir, second.model_dir))
    assert isinstance(start, WanExperts) and isinstance(middle, WanExperts) and isinstance(end, WanExperts)
    assert changed(start.high, middle.high) and not changed(start.low, middle.low)
    assert not changed(middle.high, end.high) and changed(middle.low, end.low)
    for result, name in ((first, "high"), (second, "low")):
        assert read_index(result.model_dir)["boundary_ratio"] == BOUNDARY
        assert load_model(result.model_dir, parts=()).settings.train["run"]["expert"] == name
    assert WanPipeline.from_pretrained(second.model_dir, local_files_only=True).config.boundary_ratio == BOUNDARY

    model = load_model(second.model_dir)
    board = Storyboard("two", shots=[StoryboardShot("a red box"), StoryboardShot("it moves")])
    frames, cuts = generate_scene(model, board, GenerateSettings(steps=3, guidance=3.0), seed=0)
    again, _ = generate_scene(load_model(second.model_dir), board, GenerateSettings(steps=3, guidance=3.0), seed=0)
    before, _ = generate_scene(load_model(folder), board, GenerateSettings(steps=3, guidance=3.0), seed=0)
    assert frames.shape == (10, 32, 32, 3) and cuts == [5]
    assert np.array_equal(frames, again) and not np.array_equal(frames, before)


def test_a_run_does_not_go_on_as_the_other_expert(folder, tmp_path):
    train(folder, tmp_path / "run", expert="high", steps=1)
    with pytest.raises(ValueError, match="expert"):
        train(folder, tmp_path / "run", expert="low", steps=2)


def test_lora_of_one_expert(folder, tmp_path):
    result = train(folder, tmp_path / "run", expert="low", **{"lora.rank": 2})
    start, end = load_model(folder).backbone, load_model(result.model_dir).backbone
    assert not changed(start.high, end.high) and changed(start.low, end.low)
    pipeline = WanPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.load_lora_weights(result.lora_dir, load_into_transformer_2=True)
    pipeline.transformer_2.fuse_lora()
    fused = pipeline.transformer_2.blocks[0].attn1.to_q.base_layer.weight
    assert torch.allclose(fused, end.low.transformer.blocks[0].attn1.to_q.weight, atol=1e-6)


def test_what_cannot_be_trained_is_refused_before_the_first_step(folder, tmp_path):
    with pytest.raises(ValueError, match="holds two experts, which are trained one after another: set expert=high"):
        train(folder, tmp_path / "run")
    with pytest.raises(ConfigError, match="expert"):
        train(folder, tmp_path / "run", expert="both")
    for method, params in (("fca", {}), ("aid", {"text_drop.both": 0.05}), ("fvdm", {"method_params.labels": 3})):
        with pytest.raises(ValueError, match="two experts"):
            train(folder, tmp_path / method, expert="high", method=method, shots_per_scene=1, **params)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["high", "low"])
@pytest.mark.parametrize(("method", "params"), [("lct", {}), ("fvdm", {}), ("fvdm", {"p": 1.0}), ("tic_ft", {})])
def test_an_expert_learns_what_it_will_be_asked(name, method, params):
    """The method's own draws, those of the other expert left out: in every sample the highest level decides."""
    found, expert = get_method(method, **params).for_model(FlowMatching(), 3.0), Expert(name, BOUNDARY)
    layout = (
        found.layout_for_training([4], condition_frames=[4])  # type: ignore[call-arg]
        if method == "tic_ft"
        else shots_layout([2, 2])
    )
    generator = torch.Generator().manual_seed(0)

    def learns_at(levels: torch.Tensor) -> torch.Tensor:
        clock = levels if levels.ndim == 1 else levels.amax(dim=1)
        return expert.covers(1000 * clock)

    drawn = torch.cat([draw_levels(found, layout, generator, learns_at) for _ in range(300)])
    clock = drawn.amax(dim=1)
    assert bool((clock >= BOUNDARY).all()) if name == "high" else bool((clock < BOUNDARY).all())
    free = found.sample_levels(layout, 40_000, torch.Generator().manual_seed(1))
    own = free[learns_at(found.model_levels(free))].amax(dim=1)
    assert abs(float(clock.mean() - own.mean())) < 4 * float(own.std()) / 300**0.5


def test_levels_that_are_never_the_experts_are_an_error():
    method, generator = get_method("lct", shift=3.0), torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="draws no levels for this expert: the highest of 4 frames"):
        draw_levels(method, shots_layout([2, 2]), generator, lambda levels: torch.zeros(len(levels), dtype=torch.bool))


def test_ti2v_trains_exports_and_samples(tmp_path):
    folder = tmp_path / "model"
    build_tiny_ti2v_folder(folder)
    write_dataset(tmp_path / "dataset", folder, 5, size=64)
    result = train(folder, tmp_path / "run", method="fvdm", shots_per_scene=1)
    assert WanPipeline.from_pretrained(result.model_dir, local_files_only=True).config.expand_timesteps is True
    board = Storyboard("one", shots=[StoryboardShot("a red box")])
    frames, _ = generate_scene(load_model(result.model_dir), board, GenerateSettings(steps=2), seed=0)
    assert frames.shape == (5, 64, 64, 3)
