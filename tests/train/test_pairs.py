"""Training on pairs: what a scene refers to stands before its shot, clean or in the buffer; the shot is learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.methods import get_method
from models.noise import diffusion_loss
from models.process import FlowMatching
from models.tiny import TEXT_DIM
from tests.train.tiny import TEXT_LENGTH, tiny_backbone, write_dataset
from train.loop import LoopSettings, draw, frame_weights, run_loop
from train.metrics import read
from train.scenes import ShardDataset
from train.text_drop import TextDrop

METHOD = get_method("tic_ft", buffer_frames=2, density="logit_normal")
REFERENCES = [
    [("image", 4)],
    [("portrait", 4), ("place", 4)],
    [("source", 3)],
    [("action", 2), ("first_frame", 4)],
    [("image", 4)],
]


def open_pairs(folder: Path, method=METHOD, **options) -> ShardDataset:
    options = {
        "batch_size": 1,
        "text_length": TEXT_LENGTH,
        "null_text": torch.full((TEXT_LENGTH, TEXT_DIM), -1.0),
        "layout_for": method.layout_for_training,
        "condition_frames": method.condition_frames if method.reads_references else None,
        "normalize": lambda latents: latents / 10.0 + 1.0,
        "made_with": ("vae", "text"),
        "text_drop": TextDrop(0.0),
        "latents": "mean",
    } | options
    return ShardDataset(folder, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "pairs", [[3]] * 5, references=REFERENCES)


def test_references_stand_before_the_shot_in_order_and_the_last_feeds_the_buffer(folder):
    data = open_pairs(folder)
    found = {}
    for index in range(15):
        batch = data.batch(index)
        found[int(batch.keys[0][5:8])] = batch
        assert batch.text.frame_text.tolist() == batch.layout.text_ids.tolist() == [0] * batch.latents.shape[2]
    roles = {n: "".join(role[0] for role in batch.layout.roles) for n, batch in found.items()}
    assert roles == {0: "cbbttt", 1: "ccbbttt", 2: "cbbttt", 3: "cccbbttt", 4: "cbbttt"}
    heads = {
        0: [0, -1 / 8, -2 / 8],
        1: [-10, -11, -11 - 1 / 8, -11 - 2 / 8],
        2: [-20, -20 - 1 / 8, -20 - 2 / 8],
        3: [-30, -30 - 1 / 8, -31, -31 - 1 / 8, -31 - 2 / 8],
    }
    for number, head in heads.items():
        per_frame = (found[number].latents.mean(dim=(0, 1, 3, 4)) - 1.0) * 10.0
        torch.testing.assert_close(per_frame[: len(head)], torch.tensor(head), atol=0.01, rtol=0)
        torch.testing.assert_close(per_frame[len(head) :], torch.full((3,), 10.0 * number), atol=0.02, rtol=0)


def test_conditions_are_means_and_normalised_after_any_draw(folder):
    """The authors normalise a log-variance with mean and deviation before they draw from the posterior."""
    mean, drawn = (open_pairs(folder, latents=latents).batch(0) for latents in ("mean", "sample"))
    given = ~mean.layout.is_target
    assert torch.equal(mean.latents[:, :, given], drawn.latents[:, :, given])
    noise = (drawn.latents - mean.latents)[:, :, ~given]
    assert float(noise.std()) == pytest.approx(torch.exp(torch.tensor(-2.0)).item() / 10, rel=0.2)


def test_a_pair_is_one_sample_however_batches_are_split(folder):
    data = open_pairs(folder, batch_size=2)
    for index in range(4):
        whole = data.batch(index)
        halves = [data.batch(index, slice(i, i + 1)) for i in range(2)]
        assert torch.equal(whole.latents, torch.cat([half.latents for half in halves]))
        assert whole.layout == halves[0].layout


def test_methods_that_read_no_references_leave_them_out(folder):
    data = open_pairs(folder, get_method("lct"))
    assert all(data.batch(i).latents.shape[2] == 3 and data.batch(i).layout.is_target.all() for i in range(5))


@pytest.mark.parametrize(
    ("scene", "references", "message"),
    [
        ([3], [], "has no task for references"),
        ([3], [("image", 2)], r"scene000: reference 0 \(image\) has 2 latent frames, but tic_ft needs 3"),
        ([3], [("source", 3), ("source", 3)], "scenes-000000.tar: scene000: tic_ft has no task"),
        ([3, 3], [("image", 4)], r"belong to one shot, but shots \[0, 1\] are encoded"),
    ],
)
def test_pairs_that_make_no_sample_are_refused(tmp_path, scene, references, message):
    with pytest.raises(ValueError, match=message):
        open_pairs(write_dataset(tmp_path / "pairs", [scene], references=[references]))


@pytest.mark.parametrize("model_time", ["scalar", "per_frame"])
def test_the_loop_tells_the_backbone_what_the_method_says(folder, tmp_path, model_time):
    method = get_method("tic_ft", buffer_frames=2, model_time=model_time, density="logit_normal")
    data, backbone, told = open_pairs(folder, method), tiny_backbone(), []
    backbone.register_forward_pre_hook(lambda _, args: told.append(args[1].clone()))
    settings = LoopSettings(steps=1, learning_rate=1e-3, log_every=1)
    run_loop(backbone, method, data, settings, tmp_path / "run")

    batch, process = data.batch(0), FlowMatching()
    levels, noise = draw(method, batch, settings.seed, 0)
    assert torch.equal(told[0], levels[:, -1] if model_time == "scalar" else levels)
    prediction = tiny_backbone()(
        process.add_noise(batch.latents, noise, levels),
        method.model_levels(levels),
        batch.text,
        **method.backbone_kwargs(batch.layout),
    )
    weights = frame_weights(method, batch, levels)
    assert (weights[:, ~batch.layout.is_target] == 0).all() and float(weights.sum()) == pytest.approx(1.0)
    expected = diffusion_loss(prediction, process.target(batch.latents, noise, levels), weights)
    assert read(tmp_path / "run" / "metrics.jsonl")[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_run_does_not_go_on_under_another_model_time(folder, tmp_path):
    settings = LoopSettings(steps=1, log_every=1)
    run_loop(tiny_backbone(), METHOD, open_pairs(folder), settings, tmp_path)
    other = get_method("tic_ft", buffer_frames=2, model_time="per_frame", density="logit_normal")
    with pytest.raises(ValueError, match="made with method_params=.*'scalar'"):
        run_loop(tiny_backbone(), other, open_pairs(folder, other), LoopSettings(steps=2), tmp_path)
