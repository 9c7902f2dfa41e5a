"""`shotloom train` takes what a method leaves open from the model, and writes down what it took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train.trainer
from infra.config import load_config
from models.folder import load_model, load_settings
from models.methods import get_method
from models.process import VPDiffusion
from models.tiny_cogvideox import build_tiny_cogvideox_folder
from pipelines.shipped import SHIPPED_WAN
from pipelines.train import TrainConfig, run_train
from tests.models.processes import PROCESSES
from tests.pipelines.test_families import write_dataset
from train.checkpoint import STATE_FILE, identity_of

CONFIGS = Path(__file__).parents[2] / "pipelines" / "configs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CogVideoX, whose levels are not shifted and whose VAE is not causal."""
    path = tmp_path_factory.mktemp("cogvideox") / "model"
    build_tiny_cogvideox_folder(path, text_length=24, frames_per_shot=9, method="fvdm")
    write_dataset(path.parent / "dataset", path, 9)
    return path


def config(folder: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    keys = {
        "model": folder, "dataset": folder.parent / "dataset", "run_dir": run_dir, "steps": 2, "batch_size": 2,
        "num_workers": 0, "method": "fvdm", "shots_per_scene": 1, "log_every": 1, "learning_rate": 1e-2,
        "latents": "mean",
    } | changes  # fmt: skip
    return load_config(TrainConfig, None, [f"{key}={value}" for key, value in keys.items()])


def test_fvdm_on_cogvideox_trains_with_what_its_sampling_has(folder, tmp_path, monkeypatch):
    """Levels as the model's; the clean frame is the shot's first encoded alone, which is not cut out of the shot."""
    noised: list[tuple[Tensor, Tensor]] = []
    real = VPDiffusion.add_noise

    def add_noise(self: VPDiffusion, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        noised.append((x0, level))
        return real(self, x0, eps, level)

    monkeypatch.setattr(VPDiffusion, "add_noise", add_noise)
    result = run_train(config(folder, tmp_path, steps=4, **{"method_params.clean_prob": 0.6}))
    known = {"shift": 1.0, "density": "uniform", "clean_first": True}
    settings = load_settings(result.model_dir)
    assert known.items() <= settings.method_params.items()
    assert known.items() <= identity_of(tmp_path / "checkpoints")["method_params"].items()

    codec, sources = load_model(folder, parts=("codec",)).codec, []
    monkeypatch.setattr(train.trainer, "run_loop", lambda backbone, method, source, *_, **__: sources.append(source))
    with pytest.raises(AttributeError):
        run_train(config(folder, tmp_path / "only the data"))
    (source,) = sources
    alone = [
        codec.normalize(record.read(f"s{shot:03d}.first_mean").float()[None])[0, :, 0]
        for record in source.records
        for shot in range(2)
    ]
    found = {True: 0, False: 0}
    for x0, level in noised:
        for clip, levels in zip(x0, level, strict=True):
            clean = bool(levels[0] == 0)
            found[clean] += 1
            assert any(torch.allclose(clip[:, 0], one, atol=1e-5) for one in alone) == clean
            assert (levels[1:] > 0).all()
    assert min(found.values()) >= 2, "both were met"


def test_a_run_begun_with_other_levels_goes_on_with_them(folder, tmp_path, capsys):
    """Before, `shift` was 3 for every model: such a run goes on with it, and its folder says so."""
    run_train(config(folder, tmp_path, steps=1, **{"method_params.shift": 3.0}))
    state = next((tmp_path / "checkpoints").glob("*")) / STATE_FILE
    older = json.loads(state.read_text())
    del older["identity"]["method_params"]["clean_first"]  # as it was written then
    state.write_text(json.dumps(older))
    capsys.readouterr()
    result = run_train(config(folder, tmp_path))
    assert "shift=3.0, as this run began; a new one on this model takes 1.0" in capsys.readouterr().err
    assert result.steps == 2 and load_settings(result.model_dir).method_params["shift"] == 3.0
    assert identity_of(tmp_path / "checkpoints")["method_params"]["shift"] == 3.0
    with pytest.raises(ValueError, match=r"made with method_params=.*'shift': 3.0.* asked for .*'shift': 1.0"):
        run_train(config(folder, tmp_path, steps=3, **{"method_params.shift": 1.0}))


# file: what it trained with before the defaults were the model's, on a model whose sampling levels have this shift
TRAINED_WITH = {
    "train_aid_svd": (1.0, 1.0, "edm"),
    "train_aid_toyworld": (3.0, 3.0, "uniform"),
    "train_fca_toyworld": (3.0, 3.0, "uniform"),
    "train_fvdm_toyworld": (3.0, 3.0, "uniform"),
    "train_lct_causal_toyworld": (3.0, 3.0, "uniform"),
    "train_lct_diagonal_cogvideox": (1.0, 1.0, "logit_normal"),
    "train_lct_toyworld": (3.0, 3.0, "uniform"),
    "train_lct_wan22_a14b": (3.0, 3.0, "logit_normal"),
    "train_lct_wan_1b": (3.0, 3.0, "logit_normal"),
    "train_text_rope_cogvideox": (1.0, 1.0, "logit_normal"),
    "train_tic_ft_toyworld": (3.0, 1.0, "logit_normal"),
    "train_tic_ft_wan_1b": (3.0, 1.0, "logit_normal"),
}


def test_committed_configurations_train_as_before():
    assert load_settings(SHIPPED_WAN).level_shift == 3.0
    assert set(TRAINED_WITH) == {file.stem for file in CONFIGS.glob("train_*.yaml")}
    for name, (level_shift, *expected) in TRAINED_WITH.items():
        read = load_config(TrainConfig, CONFIGS / f"{name}.yaml", [])
        process = PROCESSES["vp epsilon" if "cogvideox" in name else "flow"]
        method = get_method(read.method, **read.method_params).for_model(process, level_shift)
        assert [method.shift, method.density] == expected, name
