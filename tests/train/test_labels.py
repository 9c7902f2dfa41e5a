"""Classes from the caption file to the model: what shards say, what a sample is told, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.config import load_config
from models.folder import load_model
from models.methods import get_method
from models.tiny import build_tiny_folder
from pipelines.train import TrainConfig, run_train
from sample.generate import GenerateSettings, generate_scene
from sample.storyboard import Storyboard, StoryboardShot
from tests.train.test_scenes import open_dataset
from tests.train.tiny import TEXT_LENGTH, tiny_backbone, write_dataset
from train.evaluate import HeldOutLoss
from train.loop import LoopSettings, draw, given_conditions, run_loop
from train.metrics import read

METHOD = get_method("fvdm", labels=3, label_drop=0.5, shift=3.0)
SCENES, LABELS = [[2, 2], [2, 2], [2]], [[0, 0], [2, 2], [1]]


def open_labelled(folder: Path, **options):
    defaults = {"layout_for": METHOD.layout_for_training, "classes": 3, "shots_per_scene": 1, "batch_size": 4}
    return open_dataset(folder, **defaults | options)


def test_every_sample_comes_with_the_class_of_its_shots(dataset):
    folder = dataset(SCENES, labels=LABELS)
    for options in ({}, {"shots_per_scene": 2}, {"single_shot_prob": 1.0}):
        data = open_labelled(folder, **options)
        for index in range(4):
            batch = data.batch(index)
            of_scenes = [LABELS[int(key[5:8])][0] for key in batch.keys]
            assert batch.labels is not None and batch.labels.tolist() == of_scenes
            assert data.batch(index, slice(1, 3)).labels.tolist() == of_scenes[1:3]
    assert open_labelled(folder, classes=None).batch(0).labels is None, "a method that reads words"
    assert open_labelled(folder, classes=0).batch(0).labels is None, "an unconditional one"


def test_other_labels_are_other_data(dataset, tmp_path):
    one = open_labelled(dataset(SCENES, labels=LABELS))
    other = open_labelled(write_dataset(tmp_path / "other", SCENES, labels=[[0, 0], [2, 2], [0]]))
    words = open_labelled(tmp_path / "other", classes=None)
    assert one.identity()["labels"] != other.identity()["labels"] and "labels" not in words.identity()


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([[0, 0], [2, None], [1]], {}, r"scenes-000000.tar: scene001 shot 1: label is missing.*0 to 2.*'scene001.mp4'"),
        ([[0, 0], [2, 2], [3]], {}, r"000001.tar: scene002 shot 0: label is 3.*0 to 2.*set method_params.labels=4"),
        ([[0, 1], [2, 2], [1]], {"shots_per_scene": 2}, r"scene000 shots 0 to 1: label is \[0, 1\].*shots_per_scene=1"),
    ],
)
def test_labels_that_do_not_fit_are_refused_by_file_field_and_value(dataset, labels, options, message):
    with pytest.raises(ValueError, match=message):
        open_labelled(dataset(SCENES, labels=labels), **options)


def test_the_loss_is_that_of_the_class_in_place_of_text(dataset, tmp_path):
    source, backbone, plain = open_labelled(dataset(SCENES, labels=LABELS)), tiny_backbone(), tiny_backbone()
    for one in (backbone, plain):
        METHOD.attach(one)
    settings = LoopSettings(steps=1, log_every=1, warmup_steps=0, evaluate_every=1)
    run_loop(backbone, METHOD, source, settings, tmp_path / "run", evaluate=HeldOutLoss(source, METHOD, batches=1))
    (line,) = read(tmp_path / "run" / "metrics.jsonl")
    assert line["eval/loss/0.95"] > 0 and not any("wrong_text" in name for name in line)

    batch = source.batch(0)
    levels, noise = draw(METHOD, batch, settings.seed, 0)
    kept = given_conditions(METHOD, batch, settings.seed, 0)["label"] > 0
    assert kept.any() and not kept.all()
    rows = torch.where(kept, batch.labels, 3)  # the last row is none
    text = plain.conditioner.table.weight[rows][:, None]
    losses = []
    for b in range(len(rows)):  # one by one, its context told as text is
        noisy = plain.process.add_noise(batch.latents[b : b + 1], noise[b : b + 1], levels[b : b + 1])
        v = plain(noisy, levels[b : b + 1], text[b : b + 1])
        errors = (v - (noise[b] - batch.latents[b])[None]).square().mean(dim=(1, 3, 4))
        learnt = levels[b : b + 1] > 0
        losses.append((errors * learnt).sum() / learnt.sum())
    assert line["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_the_command_trains_a_model_that_is_then_told_a_class(tmp_path):
    folder = tmp_path / "model"
    build_tiny_folder(folder, text_length=TEXT_LENGTH, frames_per_shot=5)
    model = load_model(folder)
    write_dataset(tmp_path / "dataset", SCENES, labels=LABELS, made_with=(model.codec.hash, model.text.hash))
    keys = {
        "model": folder, "dataset": tmp_path / "dataset", "run_dir": tmp_path / "run", "steps": 2, "batch_size": 2,
        "num_workers": 0, "method": "fvdm", "method_params.labels": 3, "shots_per_scene": 1, "learning_rate": 1e-1,
        "warmup_steps": 0, "log_every": 1,
    }  # fmt: skip

    def config(**changes):
        return load_config(TrainConfig, None, [f"{key}={value}" for key, value in (keys | changes).items()])

    trained = load_model(run_train(config()).model_dir)
    assert trained.settings.method_params["labels"] == 3
    assert trained.backbone.conditioner.table.weight.shape == (4, 32)

    def make(label: int) -> np.ndarray:
        board = Storyboard("b", shots=[StoryboardShot(label=label)])
        return generate_scene(trained, board, GenerateSettings(steps=2, guidance=2.0), seed=0)[0]

    assert not np.array_equal(make(0), make(2)) and np.array_equal(make(1), make(1))
    with pytest.raises(
        ValueError, match="scene001 shot 0: label is 2, but method_params.labels=2 means classes 0 to 1"
    ):
        run_train(config(**{"method_params.labels": 2, "run_dir": tmp_path / "other"}))


def test_a_label_of_no_class_is_no_record(dataset):
    scene = replace(open_labelled(dataset(SCENES, labels=LABELS)).records[0])
    from models.scene import Scene, SceneError

    found = Scene.from_json(scene.json)
    assert [shot.label for shot in found.shots] == [0, 0]
    found.shots[1].label = -1
    with pytest.raises(SceneError, match=r"scene 'scene000', shots\[1\]: label is -1"):
        found.to_json()
    old = scene.json.replace(',"label":0', "")
    assert "label" not in old and [shot.label for shot in Scene.from_json(old).shots] == [None, None]
