"""`shotloom train held_out.*`: what is measured, where it is reported, and that it changes nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from infra.config import ConfigError, load_config
from models.folder import load_model
from models.methods import get_method
from models.tiny import build_tiny_folder
from pipelines.train import TrainConfig, TrainResult, run_train
from tests.train.tiny import write_dataset
from train.evaluate import LEVELS
from train.metrics import read

SCENES = [[2, 2, 2], [2, 2], [2, 2, 2, 2], [3, 3, 3], [2], [2, 2], [2, 2, 2], [2, 2]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    build_tiny_folder(folder / "base", text_length=16)
    model = load_model(folder / "base", parts=("codec", "text"))
    made_with = (model.codec.hash, model.text.hash)
    write_dataset(folder / "other", SCENES[:3], made_with=made_with, prefix="other", seed=5)
    return {"model": folder / "base", "dataset": write_dataset(folder / "dataset", SCENES, made_with=made_with)}


def train(inputs: dict[str, Path], run_dir: Path, *overrides: str, **callbacks) -> TrainResult:
    keys = {**inputs, "run_dir": run_dir, "steps": 5, "batch_size": 2, "learning_rate": 3e-3, "warmup_steps": 0}
    keys |= {"checkpoint_every": 3, "log_every": 5, "num_workers": 0}
    return run_train(
        load_config(TrainConfig, None, [f"{k}={v}" for k, v in keys.items()] + list(overrides)), **callbacks
    )


def keys_seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Scenes of the batches that are trained on, and of those that are measured."""
    seen: dict[str, set[str]] = {"train": set(), "measure": set()}
    from train import evaluate, loop

    plain = loop.clip_losses

    def noting(kind: str):
        def losses(backbone, method, batch, *rest):
            assert torch.is_grad_enabled() == (kind == "train")
            seen[kind] |= {key.split("/")[0] for key in batch.keys}
            return plain(backbone, method, batch, *rest)

        return losses

    monkeypatch.setattr(loop, "clip_losses", noting("train"))
    monkeypatch.setattr(evaluate, "clip_losses", noting("measure"))
    return seen


def evaluations(result: TrainResult) -> dict[int, dict[str, float]]:
    lines = {line["step"]: line for line in read(result.losses_path)}
    found = {step: {k: v for k, v in line.items() if k.startswith("eval/")} for step, line in lines.items()}
    return {step: figures for step, figures in found.items() if figures}


def test_a_share_is_measured_every_so_often_and_never_trained_on(inputs, tmp_path, monkeypatch):
    seen = keys_seen(monkeypatch)
    override = ["held_out.share=0.4", "held_out.every=2", "held_out.batches=3", "steps=24", "single_shot_prob=0.5"]
    result = train(inputs, tmp_path, *override)
    assert seen["measure"] and not seen["train"] & seen["measure"]
    assert len(seen["train"] | seen["measure"]) == len(SCENES)
    found = evaluations(result)
    assert list(found) == list(range(2, 25, 2))
    assert {f"eval/loss/{level:g}" for level in LEVELS} <= found[24].keys()
    assert all(value > 0 for figures in found.values() for value in figures.values())
    assert result.held_out == {name.removeprefix("eval/"): value for name, value in found[24].items()}
    assert "\nHeld-out scenes: loss/0.2 " in result.summary()
    record = json.loads((result.model_dir / "shotloom.json").read_text())["train"]["run"]
    assert record["held_out_share"] == 0.4 and record["held_out"] == result.held_out
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("eval/loss/0.5")] == list(found)


def test_going_on_does_not_change_the_split(inputs, tmp_path, monkeypatch):
    share = ["held_out.share=0.4", "held_out.every=3"]
    whole = train(inputs, tmp_path / "whole", *share)
    seen = keys_seen(monkeypatch)
    train(inputs, tmp_path / "parts", *share, "steps=3")
    before, seen["measure"] = set(seen["measure"]), set()
    resumed = train(inputs, tmp_path / "parts", *share)
    assert seen["measure"] == before and not seen["train"] & before
    assert evaluations(resumed) == evaluations(whole), "the same figures, step by step"
    with pytest.raises(ValueError, match="made with held_out_share=0.4, asked for 0.5"):
        train(inputs, tmp_path / "parts", "held_out.share=0.5", "steps=6")
    again = train(inputs, tmp_path / "parts", *share)  # nothing is left to do
    assert again.held_out == whole.held_out


def test_a_second_dataset_is_measured_and_training_stays_what_it_was(inputs, tmp_path, monkeypatch):
    plain = train(inputs, tmp_path / "plain")
    assert plain.held_out == {} and not evaluations(plain) and "Held-out" not in plain.summary()
    assert "held_out" not in load_model(plain.model_dir, parts=()).settings.train["run"]
    seen = keys_seen(monkeypatch)
    other = inputs["dataset"].parent / "other"
    measured = train(inputs, tmp_path / "measured", f"held_out.dataset={other}", "held_out.every=2")
    assert seen["measure"] <= {f"other{i:03d}" for i in range(3)} and list(evaluations(measured)) == [2, 4, 5]
    first, second = (load_model(r.model_dir, parts=("backbone",)).backbone.state_dict() for r in (plain, measured))
    assert all(torch.equal(first[name], second[name]) for name in first)
    run = load_model(measured.model_dir, parts=()).settings.train["run"]
    assert run["held_out_dataset"] == "other" and str(other) not in json.dumps(run)


def test_a_dataset_that_is_trained_on_is_no_held_out_one(inputs, tmp_path):
    with pytest.raises(ValueError, match="8 of its scenes are trained on, such as 'scene000'"):
        train(inputs, tmp_path, f"held_out.dataset={inputs['dataset']}")


def test_what_cannot_be_measured_is_named():
    required = ["dataset=d", "model=m", "run_dir=r"]
    for override, message in {
        "held_out.share=1": "held_out.share=1.0: expected at least 0 and less than 1",
        "held_out.share=0.1 held_out.dataset=e": "set one of them",
        "held_out.every=0 held_out.share=0.1": "held_out.every=0",
        "held_out.shre=0.1": "held_out.share",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_config(TrainConfig, None, required + override.split())


def test_held_out_loss_stands_where_the_plan_stands():
    """Given frames stay given: TIC-FT's buffer under its cap, AID's first frame clean."""
    clock = torch.tensor([0.5, 0.0])
    tic_ft, aid = get_method("tic_ft"), get_method("aid")
    layout = tic_ft.layout_for_training([2], [5])
    assert tic_ft.plan(layout, clock, tic_ft.tasks[0])[0].tolist() == [0.0, 0.0, 0.25, 0.5, 0.5, 0.5, 0.5]
    assert aid.plan(aid.layout_for_training([3]), clock, aid.tasks[0])[0].tolist() == [0.0, 0.5, 0.5]
