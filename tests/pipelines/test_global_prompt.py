"""LCT in the paper's form on a CogVideoX folder: text-position tune, scenes with the story as a group, samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from webdataset import ShardWriter

from infra.config import load_config
from models.folder import load_model
from models.layout import shots_layout, with_story
from models.scene import STORY_TEXT, shot_tensor_key
from models.tiny_cogvideox import build_tiny_cogvideox_folder
from pipelines.plan import PlanConfig, run_plan
from pipelines.prepare import PrepareConfig, make_settings
from pipelines.train import TrainConfig, TrainResult, run_train
from preprocess.encode import Encoder, scene_texts
from sample.generate import GenerateSettings, generate_scene, generate_scenes
from sample.sampler import draw_noise
from sample.storyboard import Storyboard, StoryboardShot
from tests.pipelines.test_families import make_scene

FRAMES, TEXT_LENGTH = 9, 24  # 3 latent frames to a shot
DIAGONAL = "method_params={position_mode: diagonal, shift: 1.0}"
GROUP = "method_params={position_mode: diagonal, global_prompt: group, shift: 1.0, context_prob: 0.5}"
SETTINGS = GenerateSettings(steps=2, guidance=3.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("group") / "base"
    build_tiny_cogvideox_folder(path, text_length=TEXT_LENGTH, frames_per_shot=FRAMES, method="fvdm")
    return path


@pytest.fixture(scope="module")
def dataset(base: Path) -> Path:
    """Two scenes of two shots, encoded as `shotloom prepare texts_apart=true` encodes them."""
    encoder, path = Encoder.from_folder(base), base.parent / "dataset"
    (path / "shards").mkdir(parents=True)
    with ShardWriter(str(path / "shards" / "scenes-%06d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(2):
            scene = make_scene(f"scene{number}", ["red", "box"], FRAMES, story=f"story {number}")
            scene.latents = encoder.source("float16")
            texts = encoder.encode_texts([scene], "float16", apart=True)
            tensors = {name: texts[text].clone() for name, text in scene_texts(scene, apart=True).items()}
            pixels = np.random.default_rng(number).integers(0, 256, (2, FRAMES, 32, 32, 3), dtype=np.uint8)
            for i, found in enumerate(encoder.encode_shots(list(pixels), "float16")):
                tensors |= {shot_tensor_key(i, name): value for name, value in found.items()}
            writer.write({"__key__": scene.scene_id, "json": scene.to_json().encode(), "safetensors": save(tensors)})
    return path


def train(model: Path, dataset: Path, run_dir: Path, *overrides: str) -> TrainResult:
    keys = {
        "model": model, "dataset": dataset, "run_dir": run_dir, "steps": 2, "batch_size": 2, "num_workers": 0,
        "shots_per_scene": 2, "single_shot_prob": 0.3, "learning_rate": 1e-2, "warmup_steps": 0,
    }  # fmt: skip
    return run_train(load_config(TrainConfig, None, [f"{key}={value}" for key, value in keys.items()] + [*overrides]))


@pytest.fixture(scope="module")
def tuned(base: Path, dataset: Path) -> Path:
    result = train(base, dataset, base.parent / "tune", DIAGONAL, "shots_per_scene=1", "single_shot_prob=1")
    assert result.model_dir is not None
    return result.model_dir


@pytest.fixture(scope="module")
def grouped(tuned: Path, dataset: Path) -> Path:
    result = train(tuned, dataset, tuned.parent.parent / "scenes", GROUP, "text_drop.story=0.1")
    assert result.model_dir is not None
    return result.model_dir


def text_positions(folder: Path) -> bool:
    return json.loads((folder / "shotloom.json").read_text())["text_positions"]


def test_each_text_is_also_encoded_alone(base, tmp_path):
    encoder = Encoder.from_folder(base)
    scene = make_scene("s", ["red", "box"], FRAMES)
    scene.latents = encoder.source("float32")
    named = scene_texts(scene, apart=True)
    assert (named[STORY_TEXT], named[shot_tensor_key(1, "prompt_text")]) == ("a story", "box")
    assert named[shot_tensor_key(1, "text")] == "a story box", "and the one text stays"
    assert set(encoder.encode_texts([scene], "float32", apart=True)) == set(named.values())

    def settings(**changes):
        return make_settings(PrepareConfig(sources=["v"], output=tmp_path, model=base, min_shot_frames=1, **changes))

    plain, apart = settings(), settings(texts_apart=True)
    assert plain.vision_key() == apart.vision_key(), "latents stay"
    assert plain.caption_key("t") != apart.caption_key("t"), "texts are encoded again"


def test_scenes_on_a_base_whose_text_has_no_positions_are_refused(base, dataset, tmp_path):
    message = "was never trained with any: first train it .* on single shots alone .*train_text_rope_cogvideox.yaml"
    for more in (["shots_per_scene=2"], ["shots_per_scene=2", "single_shot_prob=0.9"]):
        with pytest.raises(ValueError, match=message):
            train(base, dataset, tmp_path / "run", DIAGONAL, *more)
    with pytest.raises(ValueError, match=message):  # one shot behind its story is a scene
        train(base, dataset, tmp_path / "run", GROUP, "shots_per_scene=1")
    gap = train(base, dataset, tmp_path / "gap", "method_params.shift=1.0")
    assert gap.model_dir is not None and not text_positions(gap.model_dir), "a time gap gives text no positions"


def test_the_tune_is_recorded_and_scenes_go_on_from_it(base, tuned, grouped):
    assert not load_model(base, parts=()).settings.text_positions
    assert text_positions(tuned) and text_positions(grouped)
    settings = load_model(grouped, parts=()).settings
    assert settings.method_params["global_prompt"] == "group" and settings.train["run"]["steps"] == 2
    before, after = (load_model(path, parts=("backbone",)).backbone.state_dict() for path in (tuned, grouped))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)


def board(story: str, name: str = "one", **first) -> Storyboard:
    return Storyboard(name, story=story, shots=[StoryboardShot("red", **first), StoryboardShot("box")])


def test_samples_of_it(grouped, tmp_path):
    from PIL import Image

    model, seen = load_model(grouped), []
    model.backbone.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    frames, cuts = generate_scene(model, board("story 0"), SETTINGS, seed=0)
    assert frames.shape == (2 * FRAMES, 32, 32, 3) and cuts == [FRAMES], "the dummy frame is dropped"
    for (x, levels), kwargs in seen:
        layout, text = kwargs["layout"], kwargs["text"]
        assert layout == with_story(shots_layout([3, 3])) and text.frame_text.tolist() == [2, 0, 0, 0, 1, 1, 1]
        assert (x[:, :, 0] == 0).all() and (levels[:, 0] == 0).all() and (levels[:, 1:] > 0).all()
        null, found = text.embeddings  # the branches of guidance
        assert torch.equal(found, torch.stack(model.text.encode(["red", "box", "story 0"])))
        assert torch.equal(null, model.text.encode([""])[0].expand(3, -1, -1))
    other, _ = generate_scene(model, board("another story"), SETTINGS, seed=0)
    assert not np.array_equal(frames[:FRAMES], other[:FRAMES]) and not np.array_equal(frames[FRAMES:], other[FRAMES:])

    seen.clear()
    generate_scene(model, board(""), SETTINGS, seed=0)
    assert all(kwargs["layout"] == shots_layout([3, 3]) for _, kwargs in seen), "no story, no group"
    with pytest.raises(ValueError, match="a batch needs storyboards of one shape"):
        generate_scenes(model, [board("a"), board("", "two")], SETTINGS, [0, 1])

    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "red.png")
    seen.clear()
    given, _ = generate_scene(model, board("story 0", given=str(tmp_path / "red.png")), SETTINGS, seed=0)
    assert given.shape[0] == 1 + FRAMES and (given[0] == [200, 30, 30]).all()
    (_, levels), kwargs = seen[0]
    assert kwargs["layout"].roles == ["dummy", "history", "target", "target", "target"]
    assert levels[0, :2].tolist() == pytest.approx([0.0, 0.1])


def test_shots_in_turn_behind_the_story(grouped, dataset, tmp_path):
    """The causal stage on the paper's form, and storyboards made shot after shot: the story stays in front."""
    causal = GROUP.replace("{", "{attention_rule: group_causal, ")
    result = train(grouped, dataset, tmp_path / "causal", causal)
    model, seen = load_model(result.model_dir), []
    model.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs["layout"].roles[0], kwargs["cache"].sizes)), with_kwargs=True
    )
    board = Storyboard(
        "one", story="story 0", shots=[StoryboardShot(p) for p in ("red", "box", "red")], task="autoregressive"
    )
    frames, cuts = generate_scene(model, board, SETTINGS, seed=0)
    assert frames.shape == (3 * FRAMES, 32, 32, 3) and cuts == [FRAMES, 2 * FRAMES]
    steps = [("target", (1, *[3] * shot)) for shot in range(3) for _ in range(SETTINGS.steps + (shot < 2))]
    assert seen == [("dummy", ()), *steps]
    other = Storyboard("one", story="another", shots=board.shots, task="autoregressive")
    changed, _ = generate_scene(model, other, SETTINGS, seed=0)
    assert not np.array_equal(frames[2 * FRAMES :], changed[2 * FRAMES :])
    seen.clear()
    generate_scene(model, Storyboard("one", shots=board.shots, task="autoregressive"), SETTINGS, seed=0)
    assert all(role == "target" for role, _ in seen), "no story, no group"


def test_a_group_moves_nobody_elses_noise():
    plain, story = shots_layout([2, 1]), with_story(shots_layout([2, 1]))

    def noise(layout, each: bool):
        own = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return draw_noise(layout, (1, 4, layout.num_frames, 2, 2), [own] if each else own[:1])

    for each in (True, False):
        assert (noise(story, each)[:, :, 0] == 0).all()
        assert torch.equal(noise(story, each)[:, :, 1:], noise(plain, each))


def test_the_plan_shows_the_group():
    params = {"position_mode": "diagonal", "global_prompt": "group"}
    table = run_plan("lct", "joint", PlanConfig(shots=[2, 1], steps=2, method_params=params)).splitlines()
    assert table[2].split() == ["role", "dumm", "targ", "targ", "targ"]
    assert [line.split()[1] for line in table[4:6]] == ["0.000", "0.000"]
