"""`shotloom train` on a tiny model folder and a tiny dataset: the run folder, resuming, LoRA, Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from infra.config import ConfigError, load_config
from models.folder import load_model
from models.modules.lora import load_lora, merge_lora
from models.tiny import build_tiny_folder
from pipelines.train import TrainConfig, TrainResult, run_train
from tests.train.tiny import write_dataset
from train.metrics import read
from train.trainer import TrainingError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder, and a dataset of five scenes made with it."""
    folder = tmp_path_factory.mktemp("inputs")
    build_tiny_folder(folder / "base", text_length=16)
    model = load_model(folder / "base", parts=("codec", "text"))
    made_with = (model.codec.hash, model.text.hash)
    dataset = write_dataset(folder / "dataset", [[2, 2, 2], [2, 2], [2, 2, 2, 2], [3, 3, 3], [2]], made_with=made_with)
    return {"model": folder / "base", "dataset": dataset}


def train(inputs: dict[str, Path], run_dir: Path, *overrides: str, **callbacks) -> TrainResult:
    keys = {**inputs, "run_dir": run_dir, "steps": 8, "batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 2}
    keys |= {"checkpoint_every": 3, "log_every": 2, "num_workers": 0}
    return run_train(
        load_config(TrainConfig, None, [f"{k}={v}" for k, v in keys.items()] + list(overrides)), **callbacks
    )


def weights(model_dir: Path) -> dict[str, torch.Tensor]:
    return load_model(model_dir, parts=("backbone",)).backbone.state_dict()


@pytest.fixture(scope="module")
def here(inputs, tmp_path_factory) -> TrainResult:
    """A run in this process."""
    return train(inputs, tmp_path_factory.mktemp("here"))


def test_the_run_folder_and_the_model_in_it(inputs, here):
    from diffusers import WanPipeline

    run_dir = here.losses_path.parent
    assert here.steps == 8 and here.checkpoint == run_dir / "checkpoints" / "step-000008"
    assert {p.name for p in run_dir.iterdir()} == {"checkpoints", "metrics.jsonl", "tensorboard", "model"}
    assert [line["step"] for line in read(here.losses_path)] == [2, 3, 4, 6, 8]
    assert list((run_dir / "tensorboard").iterdir())

    settings = load_model(here.model_dir, parts=()).settings
    assert settings.method == "lct" and settings.method_params["position_mode"] == "time_gap"
    assert settings.text_length == 16 and settings.train["run"]["steps"] == 8
    before, after = weights(inputs["model"]), weights(here.model_dir)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[n], after[n]) for n in before if n.endswith("to_q.weight"))
    pipeline = WanPipeline.from_pretrained(here.model_dir, local_files_only=True)
    assert torch.equal(pipeline.transformer.proj_out.weight, after["transformer.proj_out.weight"])


def test_started_again_a_run_goes_on_and_says_so(inputs, here, tmp_path):
    steps, checkpoints = [], []
    train(inputs, tmp_path, "steps=4")
    result = train(
        inputs,
        tmp_path,
        on_step=lambda line: steps.append(line["step"]),
        on_checkpoint=lambda *c: checkpoints.append(c),
    )
    assert steps == [6, 8] and checkpoints[-1] == (8, result.checkpoint)
    expected, found = weights(here.model_dir), weights(result.model_dir)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_broken_display_stops_no_training(inputs, tmp_path):
    def broken(line: dict) -> None:
        raise RuntimeError("no terminal")

    with pytest.raises(RuntimeError, match="no terminal"):
        train(inputs, tmp_path, on_step=broken)
    assert (tmp_path / "model" / "model_index.json").is_file()


def test_lora_trains_little_and_opens_in_diffusers(inputs, tmp_path):
    from diffusers import WanPipeline

    result = train(inputs, tmp_path, "lora.rank=2", "lora.alpha=4")
    assert result.lora_dir == tmp_path / "lora"
    base = load_model(inputs["model"], parts=("backbone",)).backbone
    load_lora(base, result.lora_dir)
    merge_lora(base)
    merged = weights(result.model_dir)
    for name, weight in base.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=1e-5, atol=1e-6)
    start = weights(inputs["model"])
    changed = {
        name.split(".", 3)[3] for name in start if not torch.equal(start[name], merged[name]) and "blocks" in name
    }
    assert changed == {f"attn{i}.{layer}.weight" for i in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")}

    pipeline = WanPipeline.from_pretrained(inputs["model"], local_files_only=True)
    pipeline.load_lora_weights(result.lora_dir)
    assert pipeline.get_active_adapters()

    alone = train(inputs, tmp_path / "alone", "lora.rank=2", "lora.merge=false", "steps=2")
    assert alone.model_dir is None and not (tmp_path / "alone" / "model").exists()
    assert (alone.lora_dir / "pytorch_lora_weights.safetensors").is_file()
    with pytest.raises(ValueError, match="trains modules of its own, .*: set lora.merge=true"):  # a table of classes
        more = ["method=fvdm", "method_params={labels: 0}", "lora.rank=2", "lora.merge=false", "steps=2"]
        train(inputs, tmp_path / "lost", *more)


def test_a_dataset_of_another_model_is_refused(inputs, tmp_path):
    build_tiny_folder(tmp_path / "other", seed=1, text_length=16)
    with pytest.raises(ValueError, match="prepare the videos again with this model"):
        train({**inputs, "model": tmp_path / "other"}, tmp_path / "run")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"dataset": Path("nothing")}, "nothing: no shards"), ({"method": "lcd"}, "unknown method 'lcd'")],
)
def test_what_is_wrong_is_said_before_models_are_loaded(inputs, tmp_path, monkeypatch, wrong, words):
    monkeypatch.setattr("models.folder.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=words):
        run_train(TrainConfig(**(inputs | {"run_dir": tmp_path, "num_workers": 0} | wrong)))


def test_configurations_that_cannot_work_are_refused():
    required = ["dataset=d", "model=m", "run_dir=r"]
    for override, message in {
        "batch_size=3 accumulate=2": "multiple of accumulate",
        "num_workers=2": "needs parallel=fsdp2",
        "num_workers=0 parallel=fsdp2": "needs parallel=one_device",
        "lora.rnk=4": "lora.rank",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_config(TrainConfig, None, required + override.split())


def test_progress_counts_from_where_an_earlier_run_stopped(inputs, tmp_path, capsys):
    train(inputs, tmp_path, "steps=2")
    assert "train: started, 2 to do" in capsys.readouterr().err
    train(inputs, tmp_path, "steps=3")
    assert "train: started, 1 to do" in capsys.readouterr().err
    train(inputs, tmp_path, "steps=3")
    assert "train: 3/3 (100 %), done" in capsys.readouterr().err


def test_one_ray_worker_does_what_this_process_does(ray_module, inputs, here, tmp_path):
    steps, checkpoints = [], []
    result = train(
        inputs, tmp_path, "num_workers=1", on_step=lambda line: steps.append(line["step"]),
        on_checkpoint=lambda *c: checkpoints.append(c),
    )  # fmt: skip
    assert steps == [2, 3, 4, 6, 8] and checkpoints[-1] == (8, tmp_path / "checkpoints" / "step-000008")
    assert {p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()} == {"step-000006", "step-000008"}
    expected, found = weights(here.model_dir), weights(result.model_dir)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)  # thread counts differ
    resumed = train(inputs, tmp_path, "num_workers=0", "steps=9")  # a run may change how it runs
    assert resumed.steps == 9 and read(result.losses_path)[-1]["step"] == 9


@pytest.mark.slow
def test_an_error_of_the_job_itself_is_not_tried_again_and_again(ray_module, inputs, tmp_path):
    build_tiny_folder(tmp_path / "other", seed=1, text_length=16)
    with pytest.raises(TrainingError, match="ValueError: .*prepare the videos again with this model"):
        train({**inputs, "model": tmp_path / "other"}, tmp_path / "run", "num_workers=1")


@pytest.mark.slow
def test_two_sharded_ray_workers_do_what_this_process_does(ray_module, inputs, here, tmp_path):
    result = train(inputs, tmp_path, "num_workers=2", "parallel=fsdp2", "activation_checkpointing=true")
    expected, found = weights(here.model_dir), weights(result.model_dir)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_pairs_make_a_model_that_makes_shots_from_references(inputs, tmp_path):
    from PIL import Image

    from models.scene import Reference
    from sample.generate import GenerateSettings, generate_scene
    from sample.storyboard import Storyboard, StoryboardShot

    model = load_model(inputs["model"], parts=("codec", "text"))
    pairs = write_dataset(
        tmp_path / "pairs", [[2]] * 4, made_with=(model.codec.hash, model.text.hash), references=[[("image", 3)]] * 4
    )
    options = ["method=tic_ft", "method_params.buffer_frames=2", f"dataset={pairs}", "steps=2"]
    lora = ["lora.rank=2", "lora.merge_scale=0.75"]
    result = train(inputs, tmp_path / "run", *options, *lora)
    made = load_model(result.model_dir)
    assert made.settings.method == "tic_ft" and made.settings.train["run"]["lora_scale"] == 0.75
    assert made.settings.method_params == {
        "shift": 1.0, "density": "logit_normal", "buffer_frames": 2, "image_frames": 1, "model_time": "scalar",
    }  # fmt: skip
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "red.png")
    board = Storyboard("one", shots=[StoryboardShot("go", references=[Reference("image", str(tmp_path / "red.png"))])])
    frames, _ = generate_scene(made, board, GenerateSettings(steps=2), seed=0)
    assert frames.shape == (made.settings.frames_per_shot, 32, 32, 3)
    with pytest.raises(ValueError, match="has no task for references"):
        train(inputs, tmp_path / "shots", "method=tic_ft")
