"""`shotloom train` and `shotloom sample` with method fca on a tiny model: given a first frame and a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from infra.config import load_config
from models.folder import Model, load_model
from models.methods import get_method
from models.tiny import build_tiny_folder
from pipelines.sample import SampleConfig, run_sample
from pipelines.train import TrainConfig, TrainResult, run_train
from sample.abilities import starts_from_image
from sample.generate import GenerateSettings, generate_scene
from sample.storyboard import Storyboard, StoryboardError, StoryboardShot
from sample.video_io import write_video
from tests.train.tiny import write_dataset
from train.metrics import read

SMALL = "method_params={frame_queries: 2, text_width: 16, text_heads: 2, max_frames: 3}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder, and a dataset of five single shots made with it."""
    folder = tmp_path_factory.mktemp("inputs")
    model = build_tiny_folder(folder / "base", text_length=32)
    with torch.no_grad():  # untrained output layers are small; larger ones let differences show in the pixels
        model.backbone.transformer.proj_out.weight.mul_(8)
    model.backbone.transformer.save_pretrained(folder / "base" / "transformer")
    made_with = encoders(folder / "base")
    dataset = write_dataset(folder / "dataset", [[2], [3], [2], [2], [3]], made_with=made_with)
    return {"model": folder / "base", "dataset": dataset}


def encoders(folder: Path) -> tuple[str, str]:
    model = load_model(folder, parts=("codec", "text"))
    return model.codec.hash, model.text.hash


def train(inputs: dict[str, Path], run_dir: Path, *overrides: str) -> TrainResult:
    keys = {**inputs, "run_dir": run_dir, "method": "fca", "steps": 4, "batch_size": 2, "learning_rate": 1e-2}
    keys |= {"warmup_steps": 1, "checkpoint_every": 2, "log_every": 1, "num_workers": 0, "shots_per_scene": 1}
    return run_train(load_config(TrainConfig, None, [f"{k}={v}" for k, v in keys.items()] + [SMALL, *overrides]))


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory) -> TrainResult:
    return train(inputs, tmp_path_factory.mktemp("run"))


def test_only_the_modules_are_trained_and_written_beside_an_untouched_base(inputs, trained):
    assert len(read(trained.losses_path)) == 4
    base, made = (
        load_file(next((f / "transformer").glob("*.safetensors"))) for f in (inputs["model"], trained.model_dir)
    )
    assert base.keys() == made.keys() and all(torch.equal(base[name], made[name]) for name in base)
    weights = load_file(trained.model_dir / "conditioner" / "model.safetensors")
    assert all(w.any() for name, w in weights.items() if name.endswith("modulation.weight")), "the gates have opened"
    settings = load_model(trained.model_dir, parts=()).settings
    assert (settings.method, settings.method_params["text_width"]) == ("fca", 16) and starts_from_image(settings)


def test_a_stopped_run_ends_like_one_never_stopped(inputs, trained, tmp_path):
    train(inputs, tmp_path, "steps=2")
    again = train(inputs, tmp_path)
    files = [result.model_dir / "conditioner" / "model.safetensors" for result in (trained, again)]
    one, other = (load_file(file) for file in files)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def images(tmp_path: Path) -> dict[str, str]:
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    return {name: str(tmp_path / f"{name}.png") for name in ("a", "b")}


def test_shots_follow_their_first_frame_and_their_sentence(trained, images, tmp_path):
    def board(name: str, image: str, sentence: str) -> Storyboard:
        return Storyboard(name, shots=[StoryboardShot(sentence=sentence, first_frame=images[image], seed=5)])

    boards = [board("one", "a", "It falls."), board("image", "b", "It falls."), board("text", "a", "It rises.")]
    config = SampleConfig(model=trained.model_dir, out=tmp_path / "out", steps=2, guidance=2.0, min_side=0)
    report = run_sample(config, boards)
    assert (report.made, report.failed) == (3, 0), report.summary()
    model, settings = load_model(trained.model_dir), GenerateSettings(steps=2, guidance=2.0)
    frames = [generate_scene(model, one, settings, 0)[0] for one in boards]
    assert frames[0].shape == (5, 32, 32, 3)
    assert not np.array_equal(frames[0], frames[1]) and not np.array_equal(frames[0], frames[2])
    assert np.array_equal(generate_scene(model, boards[0], settings, 0)[0], frames[0])
    base = model.backbone.conditioner
    for block in base.blocks:  # closed gates: the base model, which does not know the frame
        block.modulation.weight.data.zero_()
        block.modulation.bias.data.zero_()
    plain = [generate_scene(model, one, settings, 0)[0] for one in boards[:2]]
    assert np.array_equal(*plain)


def passes(model: Model, storyboard: Storyboard, **settings: Any) -> list[tuple[bool, bool]]:
    """Of each pass of a step, whether it knows the given frame and whether it reads the text."""
    seen: list[Any] = []
    prepare = model.backbone.conditioner.prepare

    def watched(backbone: Any, given: torch.Tensor, text: Any, frames: int) -> Any:
        seen.append((given, text.embeddings))
        return prepare(backbone, given, text, frames)

    model.backbone.conditioner.prepare = watched
    generate_scene(model, storyboard, GenerateSettings(steps=1, guidance=2.0, **settings), 0)
    model.backbone.conditioner.prepare = prepare
    ((given, texts),) = seen
    return [(bool(one.any()), torch.equal(text, texts[-1])) for one, text in zip(given, texts, strict=True)]


def test_the_given_frames_have_a_scale_of_their_own_which_is_off_by_default(trained, images):
    board = Storyboard("one", shots=[StoryboardShot(sentence="It falls.", first_frame=images["a"], seed=5)])
    model = load_model(trained.model_dir)
    assert passes(model, board) == [(True, False), (True, True)], "as it was: the given frame in both"
    assert passes(model, board, image_guidance=3.0) == [(False, False), (True, False), (True, True)]
    made = {
        scale: generate_scene(model, board, GenerateSettings(steps=2, guidance=2.0, image_guidance=scale), 0)[0]
        for scale in (None, 1.0, 3.0)
    }
    assert np.array_equal(made[None], made[1.0]) and not np.array_equal(made[None], made[3.0])


def test_samples_can_lose_given_frame_and_text_together(inputs, trained, tmp_path):
    """So that the pass without both is trained (fca.md, section 4: text 10 %, given frames 10 %, both 5 %)."""
    before = load_file(trained.model_dir / "conditioner" / "model.safetensors")
    for name, drops in (("given", ["text_drop.given=0.5"]), ("both", ["text_drop.both=0.5"])):
        result = train(inputs, tmp_path / name, *drops)
        weights = load_file(result.model_dir / "conditioner" / "model.safetensors")
        assert any(not torch.equal(weight, before[key]) for key, weight in weights.items()), name
    with pytest.raises(ValueError, match="text_drop.both .* does not guide by given frames"):
        held = "method_params={adapter: none}"
        train(inputs, tmp_path / "held", held, "lora.rank=2", "text_drop.both=0.1")


def test_the_given_frames_can_be_shown_as_their_files_have_them(trained, images, tmp_path):
    """fca.md, section 5: for display, and for metrics over given frames and predictions (Seer's)."""
    board = Storyboard("one", shots=[StoryboardShot(sentence="It falls.", first_frame=images["a"], seed=5)])
    config = {"model": trained.model_dir, "steps": 2, "min_side": 0}
    model, given = load_model(trained.model_dir), np.asarray(Image.open(images["a"]))
    plain, _ = generate_scene(model, board, GenerateSettings(steps=2), 0)
    shown, _ = generate_scene(model, board, GenerateSettings(steps=2, given_pixels=True), 0)
    assert np.array_equal(shown[0], given) and not np.array_equal(plain[0], given)
    assert np.array_equal(shown[1:], plain[1:]), "the others are as they were"
    reports = [
        run_sample(SampleConfig(**config, given_pixels=value, out=tmp_path / "out"), [board]) for value in (False, True)
    ]
    assert [report.made for report in reports] == [1, 1], "another setting, another video"


def test_without_a_first_frame_it_is_refused(trained):
    board = Storyboard("none", shots=[StoryboardShot(sentence="It falls.")])
    with pytest.raises(StoryboardError, match=r"its tasks: tvp"):
        generate_scene(load_model(trained.model_dir), board, GenerateSettings(steps=1), 0)


def test_several_given_latent_frames_come_from_a_video(inputs, images, tmp_path):
    dataset = write_dataset(tmp_path / "longer", [[3], [3]], made_with=encoders(inputs["model"]))
    params = SMALL.replace("{", "{given_frames: 2, adapter: no_frame_text, ")
    result = train(inputs, tmp_path / "run", params, f"dataset={dataset}")
    model = load_model(result.model_dir)
    write_video(np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8), tmp_path / "start.mp4", 8)
    board = Storyboard("two", shots=[StoryboardShot(sentence="On.", first_frame=str(tmp_path / "start.mp4"), frames=9)])
    assert generate_scene(model, board, GenerateSettings(steps=1), 0)[0].shape == (9, 32, 32, 3)
    board.shots[0].first_frame = images["a"]
    with pytest.raises(StoryboardError, match="holds 1 frames, but this model starts from 5"):
        generate_scene(model, board, GenerateSettings(steps=1), 0)


def test_without_modules_it_is_a_lora_with_the_given_frames_held(inputs, images, tmp_path):
    result = train(inputs, tmp_path / "run", "method_params={adapter: none}", "lora.rank=2", "steps=2")
    assert not (result.model_dir / "conditioner").exists()
    model = load_model(result.model_dir)
    assert list(get_method("fca", **model.settings.method_params).guided) == ["text"], "held frames are in every pass"
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append((args[0][0, :, 0].clone(), args[1].clone())))
    board = Storyboard("lora", shots=[StoryboardShot(sentence="It falls.", first_frame=images["a"])])
    generate_scene(model, board, GenerateSettings(steps=3), 0)
    assert all(torch.equal(first, seen[0][0]) for first, _ in seen), "held in every step"
    assert all(told.ndim == 1 for _, told in seen), "and one time for all frames"


def test_modules_and_low_rank_updates_do_not_go_together(inputs, tmp_path):
    with pytest.raises(ValueError, match="set lora.rank=0, or adapter=none"):
        train(inputs, tmp_path, "lora.rank=2")
