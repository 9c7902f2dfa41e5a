"""The commands on tiny CogVideoX, Latte and HunyuanVideo folders: encoded shots and texts, training, sampling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline, HunyuanVideoPipeline, LattePipeline
from safetensors.torch import load_file, save
from webdataset import ShardWriter

from infra.config import load_config
from models.folder import Model, load_model
from models.scene import STORY_TEXT, EncodedSpan, Scene, Shot, Source, link_shots, shot_tensor_key
from models.tiny_cogvideox import build_tiny_cogvideox_folder
from models.tiny_hunyuan import build_tiny_hunyuan_folder
from models.tiny_latte import build_tiny_latte_folder
from models.tiny_svd import build_tiny_svd_folder
from pipelines.prepare import PrepareConfig, make_settings
from pipelines.train import TrainConfig, run_train
from preprocess.encode import Encoder, scene_texts
from preprocess.outcome import Failed
from sample.generate import GenerateSettings, generate_scene
from sample.storyboard import Storyboard, StoryboardError, StoryboardShot

BUILDERS: dict[str, Callable[..., Model]] = {
    "cogvideox": build_tiny_cogvideox_folder,
    "latte": build_tiny_latte_folder,
    "hunyuan": build_tiny_hunyuan_folder,
}
PIPELINES: dict[str, Any] = {"cogvideox": CogVideoXPipeline, "latte": LattePipeline, "hunyuan": HunyuanVideoPipeline}
FRAMES = {"cogvideox": 9, "latte": 3, "hunyuan": 9}  # of a shot; 3 latent frames of each
TEXT_LENGTH = {"cogvideox": 24, "latte": 24, "hunyuan": 33}


@pytest.fixture(scope="module", params=BUILDERS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(family) / "model"
    BUILDERS[family](
        path,
        text_length=TEXT_LENGTH[family],
        frames_per_shot=FRAMES[family],
        method="fvdm",
        method_params={"shift": 1.0},
    )
    return path


@pytest.fixture(scope="module")
def dataset(family: str, folder: Path) -> Path:
    write_dataset(folder.parent / "dataset", folder, FRAMES[family])
    return folder.parent / "dataset"


def write_dataset(path: Path, folder: Path, frames: int, size: int = 32) -> None:
    """Two scenes of two shots, encoded as `shotloom prepare` encodes them."""
    encoder = Encoder.from_folder(folder)
    (path / "shards").mkdir(parents=True)
    with ShardWriter(str(path / "shards" / "scenes-%06d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(2):
            scene = make_scene(f"scene{number}", ["red", "box"], frames, size=size)
            scene.latents = encoder.source("float16")
            texts = encoder.encode_texts([scene], "float16")
            tensors = {name: texts[text].clone() for name, text in scene_texts(scene).items()}
            pixels = np.random.default_rng(number).integers(0, 256, (2, frames, size, size, 3), dtype=np.uint8)
            for i, found in enumerate(encoder.encode_shots(list(pixels), "float16")):
                tensors |= {shot_tensor_key(i, name): value for name, value in found.items()}
            writer.write({"__key__": scene.scene_id, "json": scene.to_json().encode(), "safetensors": save(tensors)})


def make_scene(name: str, prompts: list[str], frames: int, story: str = "a story", size: int = 32) -> Scene:
    shots = []
    for i, prompt in enumerate(prompts):
        begin, end = i * frames, (i + 1) * frames
        span = EncodedSpan(begin, frames, 8.0, list(range(begin, end)), size, size)
        shots.append(Shot("", i, begin, end, begin, end, [1, 8], prompt=prompt, sentence=f"one {prompt}", encoded=span))
        shots[-1].transition = "cut" if i else "start"
    source = Source("v.mp4", "0" * 64, 1)
    return Scene(name, "v", source, 8.0, size, size, len(prompts) * frames / 8, link_shots(shots, name), story=story)


def test_texts_are_stored_as_the_model_reads_them(family, folder):
    encoder = Encoder.from_folder(folder)
    scene = make_scene("s", ["red", "box"], 9)
    scene.latents = encoder.source("float32")
    named = scene_texts(scene)
    texts = encoder.encode_texts([scene], "float32")
    if family == "cogvideox":
        assert STORY_TEXT not in named and named[shot_tensor_key(1, "text")] == "a story box"
        assert all(tokens.shape == (24, 32) for tokens in texts.values())
    elif family == "hunyuan":
        assert STORY_TEXT not in named and named[shot_tensor_key(1, "text")] == "a story box"
        assert texts["a story box"].shape == (1 + 11 + 8, 32), "the pooled text, the tokens, the template's end"
    else:
        assert named[STORY_TEXT] == "a story" and named[shot_tensor_key(1, "text")] == "box"
        assert texts["box"].shape == (4, 32)
    length = TEXT_LENGTH[family]
    counts = "42, prompt 12" if family == "hunyuan" else f"{length + 1}, prompt 4"
    with pytest.raises(Failed, match=rf"story {counts}\), the model reads {length}"):
        encoder.check_texts(make_scene("s", ["red"], 9, story="s" * length))


def test_prepare_takes_as_many_frames_as_the_vae(family, folder, tmp_path):
    def settings(**changes: Any):
        return make_settings(PrepareConfig(sources=["v"], output=tmp_path, model=folder, **changes))

    found = settings(min_shot_frames=1)
    assert (found.frame_step, found.shot_frames) == ({"cogvideox": 8, "latte": 1, "hunyuan": 4}[family], FRAMES[family])
    if family == "cogvideox":
        with pytest.raises(ValueError, match=r"shot_frames=13: the VAE takes 8k\+1 frames \(1, 9, 17, 25, ...\)"):
            settings(shot_frames=13)
    elif family == "hunyuan":
        assert settings(shot_frames=13).shot_frames == 13
        with pytest.raises(ValueError, match=r"shot_frames=14: the VAE takes 4k\+1 frames"):
            settings(shot_frames=14)
    else:
        assert settings(shot_frames=14).shot_frames == 14


def test_it_trains_exports_and_samples(family, folder, dataset, tmp_path):
    keys = {
        "model": folder, "dataset": dataset, "run_dir": tmp_path / "run", "steps": 2, "batch_size": 2, "num_workers": 0,
        "method": "fvdm", "method_params.shift": 1.0, "shots_per_scene": 1, "log_every": 1, "text_drop.story": 0.0,
        "text_drop.prompts": 0.0, "learning_rate": 1e-2, "warmup_steps": 0,
    }  # fmt: skip
    result = run_train(load_config(TrainConfig, None, [f"{key}={value}" for key, value in keys.items()]))
    before, after = (load_model(path, parts=("backbone",)).backbone.state_dict() for path in (folder, result.model_dir))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    PIPELINES[family].from_pretrained(result.model_dir, local_files_only=True)

    model = load_model(result.model_dir)
    assert model.settings.backbone == family and model.settings.train["run"]["steps"] == 2
    board = Storyboard("one", shots=[StoryboardShot("a red box")])
    settings = GenerateSettings(steps=2, guidance=1.0 if family == "hunyuan" else 3.0)
    frames, cuts = generate_scene(model, board, settings, seed=0)
    assert frames.shape == (FRAMES[family], 32, 32, 3) and not cuts
    again, _ = generate_scene(model, board, settings, seed=0)
    other, _ = generate_scene(model, board, settings, seed=1)
    assert np.array_equal(frames, again) and not np.array_equal(frames, other)
    if family == "cogvideox":
        board = Storyboard("one", shots=[StoryboardShot("a red box", frames=13)])
        with pytest.raises(StoryboardError, match=r"frames=13; a shot holds 8k\+1 frames, the nearest is"):
            generate_scene(model, board, GenerateSettings(steps=1), seed=0)


@pytest.mark.parametrize("method", ["fca", "aid"])
def test_modules_beside_its_layers_are_trained_and_sampled(method, family, folder, dataset, tmp_path):
    """FCA and AID from a first frame: the modules lie in the folder's conditioner/, plain diffusers opens the rest."""
    from PIL import Image

    small: dict[str, Any] = {"max_frames": 6, "shift": 1.0}
    small |= {"fca": {"frame_queries": 2, "text_width": 16, "text_heads": 2}, "aid": {
        "query_tokens": 2, "width": 16, "heads": 4, "states": False, "adapter_ratio": 2,
    }}[method]  # fmt: skip
    keys = {
        "model": folder, "dataset": dataset, "run_dir": tmp_path / "run", "steps": 2, "batch_size": 2, "num_workers": 0,
        "method": method, "shots_per_scene": 1, "learning_rate": 1e-2, "warmup_steps": 0, "text_drop.everything": 0.2,
        "text_drop.both": 0.2 if method == "aid" else 0.0, "ema_decay": 0.0,
    }  # fmt: skip
    given = [f"{key}={value}" for key, value in keys.items()]
    given += [f"method_params.{key}={value}" for key, value in small.items()]
    result = run_train(load_config(TrainConfig, None, given))
    weights = load_file(result.model_dir / "conditioner" / "model.safetensors")
    assert any(name.endswith(("modulation.weight", "up.weight")) and weight.any() for name, weight in weights.items())
    PIPELINES[family].from_pretrained(result.model_dir, local_files_only=True)

    model, made = load_model(result.model_dir), {}
    assert model.settings.method == method and model.backbone.conditioner is not None
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
        board = Storyboard(
            "one", shots=[StoryboardShot(sentence="it falls", first_frame=str(tmp_path / f"{name}.png"))]
        )
        settings = GenerateSettings(steps=2, guidance=1.0 if family == "hunyuan" else 3.0)
        made[name], _ = generate_scene(model, board, settings, seed=0)
        again, _ = generate_scene(load_model(result.model_dir), board, settings, seed=0)
        assert made[name].shape == (FRAMES[family], 32, 32, 3) and np.array_equal(made[name], again)
    assert not np.array_equal(made["red"], made["blue"])


@pytest.mark.parametrize("method", ["fvdm", "lct"])
def test_cogvideox_1_5_learns_and_makes_shots_of_whole_tokens(method, tmp_path):
    """Two latent frames are one token, and the VAE makes an odd number of them: the commands do not see it."""
    folder = tmp_path / "model"
    build_tiny_cogvideox_folder(folder, version="1.5", text_length=24)
    write_dataset(tmp_path / "dataset", folder, 9)
    keys = {
        "model": folder, "dataset": tmp_path / "dataset", "run_dir": tmp_path / "run", "steps": 2, "batch_size": 2,
        "num_workers": 0, "method": method, "method_params.shift": 1.0, "shots_per_scene": 1 if method == "fvdm" else 2,
        "lora.rank": 0 if method == "fvdm" else 2, "learning_rate": 1e-2, "warmup_steps": 0, "held_out.share": 0.1,
    }  # fmt: skip
    result = run_train(load_config(TrainConfig, None, [f"{key}={value}" for key, value in keys.items()]))
    before, after = (load_model(path, parts=("backbone",)).backbone.state_dict() for path in (folder, result.model_dir))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert result.held_out["loss/0.5"] > 0
    assert (
        CogVideoXPipeline.from_pretrained(result.model_dir, local_files_only=True).transformer.config.patch_size_t == 2
    )
    shots = [StoryboardShot("a red box")] if method == "fvdm" else [StoryboardShot("a box"), StoryboardShot("it moves")]
    frames, cuts = generate_scene(
        load_model(result.model_dir), Storyboard("one", shots=shots), GenerateSettings(steps=2, guidance=3.0), seed=0
    )
    assert frames.shape == (9 * len(shots), 32, 32, 3) and cuts == [9] * (len(shots) - 1)
    with pytest.raises(ValueError, match="joins 2 latent frames into one token.*CogVideoX 5B or Wan"):
        run_train(load_config(TrainConfig, None, [f"{k}={v}" for k, v in (keys | {"method": "tic_ft"}).items()]))


def test_hunyuan_learns_and_makes_scenes_of_several_shots(family, folder, dataset, tmp_path):
    if family != "hunyuan":
        pytest.skip("of two text encoders")
    keys = {
        "model": folder, "dataset": dataset, "run_dir": tmp_path / "run", "steps": 1, "batch_size": 2, "num_workers": 0,
        "method": "lct", "shots_per_scene": 2, "lora.rank": 2, "text_drop.everything": 0.5, "warmup_steps": 0,
    }  # fmt: skip
    result = run_train(load_config(TrainConfig, None, [f"{key}={value}" for key, value in keys.items()]))
    HunyuanVideoPipeline.from_pretrained(folder, local_files_only=True).load_lora_weights(result.lora_dir)
    model = load_model(result.model_dir)
    board = Storyboard("two", shots=[StoryboardShot("a red box"), StoryboardShot("it moves")], story="tale")
    frames, cuts = generate_scene(model, board, GenerateSettings(steps=2, guidance=1.0), seed=0)
    assert frames.shape == (18, 32, 32, 3) and cuts == [9]
    other = Storyboard("two", shots=[StoryboardShot("a red box"), StoryboardShot("it stays")], story="tale")
    assert not np.array_equal(
        frames[9:], generate_scene(model, other, GenerateSettings(steps=2, guidance=1.0), 0)[0][9:]
    )
    causal = [f"{key}={value}" for key, value in (keys | {"method_params.attention_rule": "group_causal"}).items()]
    with pytest.raises(ValueError, match="no kv_cache: HunyuanVideo joins text and frames"):
        run_train(load_config(TrainConfig, None, [*causal, f"run_dir={tmp_path / 'causal'}"]))


def test_a_model_that_takes_its_guidance_as_an_input_is_not_guided_again(family, folder, tmp_path):
    """diffusers' sign of distilled weights is guidance_embeds; without it, any scale is the caller's choice."""
    from models.folder import is_distilled
    from pipelines.sample import SampleConfig, run_sample
    from pipelines.serve import ServeConfig, server_settings
    from sample.video_request import ApiError, parse_request

    def service(**changes: Any):
        return server_settings(ServeConfig(model=folder, folder=tmp_path / "jobs", **changes)).service

    model, board = load_model(folder), Storyboard("one", shots=[StoryboardShot("a red box", frames=1)])
    config = SampleConfig(model=folder, storyboards=[], out=tmp_path / "out", steps=1)
    if family != "hunyuan":
        assert not is_distilled(folder) and model.backbone.embedded_guidance is None and not service().distilled
        return
    assert is_distilled(folder) and model.backbone.embedded_guidance == 6.0
    reason = "guidance=5: this model was distilled to take its guidance as an input.*set guidance=1"
    with pytest.raises(StoryboardError, match=f"'one': {reason}") as refused:
        generate_scene(model, board, GenerateSettings(steps=1), seed=0)
    assert refused.value.param == "guidance"
    with pytest.raises(ValueError, match=reason):
        run_sample(config, [board])
    assert not config.out.exists(), "before anything is made"
    with pytest.raises(ValueError, match=reason):
        service()
    told = service(guidance=1.0)
    with pytest.raises(ApiError, match="guidance=2.5: this model was distilled") as answer:
        parse_request({"prompt": "x", "guidance": 2.5}, told)
    assert (answer.value.status, answer.value.param) == (400, "guidance")
    assert parse_request({"prompt": "x", "guidance": 1}, told).request["guidance"] == 1
    generate_scene(model, board, GenerateSettings(steps=1, guidance=1.0), seed=0)


def test_a_given_frame_stays(family, folder, tmp_path):
    """From an image, as method fvdm does: the frame is encoded alone and held through sampling."""
    from PIL import Image

    model = load_model(folder)
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "red.png")
    board = Storyboard("one", shots=[StoryboardShot("go", first_frame=str(tmp_path / "red.png"))])
    made: list[torch.Tensor] = []
    decode = model.codec.decode
    model.codec.decode = lambda latents: made.append(latents) or decode(latents)  # type: ignore[method-assign]
    generate_scene(model, board, GenerateSettings(steps=2, guidance=1.0), seed=0)
    video = torch.tensor([200, 30, 30]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 32, 32) / 127.5 - 1
    alone = model.codec.normalize(model.codec.encode(video)[0])
    assert torch.equal(made[0][:, :, :1].cpu(), alone)


def test_given_frames_stay_at_both_ends_and_in_a_video_longer_than_a_clip(family, folder, tmp_path):
    """An image that ends a shot is the last latent frame of a still clip; a long video is of overlapping clips."""
    from PIL import Image

    from sample.shot import GivenFrames

    model = load_model(folder)
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
    ends = [GivenFrames(str(tmp_path / "red.png")), GivenFrames(str(tmp_path / "blue.png"), at=-1)]
    made: list[torch.Tensor] = []
    decode = model.codec.decode
    model.codec.decode = lambda latents: made.append(latents) or decode(latents)  # type: ignore[method-assign]
    still = torch.tensor([30, 30, 200]).view(1, 3, 1, 1, 1).expand(1, 3, 17, 32, 32) / 127.5 - 1
    last = model.codec.normalize(model.codec.encode(still)[0])[:, :, -1]
    for frames, task in ((FRAMES[family], None), (2 * FRAMES[family] - 1, "long_video")):
        board = Storyboard("one", shots=[StoryboardShot("go", frames=frames, given_frames=ends)], task=task)
        pixels, cuts = generate_scene(model, board, GenerateSettings(steps=2, guidance=1.0), seed=0)
        assert len(pixels) == frames and not cuts
        torch.testing.assert_close(made[-1][:, :, -1].cpu(), last, atol=1e-4, rtol=1e-3)


def test_parts_of_a_joined_text_cannot_be_dropped(family, folder, dataset, tmp_path):
    if family == "latte":
        pytest.skip("texts are apart")
    keys = {
        "model": folder, "dataset": dataset, "run_dir": tmp_path / "run", "steps": 1, "batch_size": 2, "num_workers": 0,
        "method": "fvdm", "text_drop.story": 0.1, "log_every": 1, "shots_per_scene": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"encoded as one text.*set text_drop.story=0"):
        run_train(load_config(TrainConfig, None, [f"{key}={value}" for key, value in keys.items()]))


def test_svd_makes_a_shot_of_its_first_frame(tmp_path):
    from PIL import Image

    from pipelines.serve import ServeConfig, server_settings

    build_tiny_svd_folder(tmp_path / "svd")
    model = load_model(tmp_path / "svd")
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    settings = GenerateSettings(steps=2, image_guidance=2.0)

    def make(image: str, seed: int = 0) -> np.ndarray:
        board = Storyboard("one", shots=[StoryboardShot("go", first_frame=str(tmp_path / f"{image}.png"))])
        return generate_scene(model, board, settings, seed)[0]

    frames = make("red")
    assert frames.shape == (6, 8, 8, 3) and np.array_equal(frames, make("red"))
    assert not np.array_equal(frames, make("blue")) and not np.array_equal(frames, make("red", seed=1))
    with pytest.raises(StoryboardError, match="method 'svd' cannot make 1 shots .* .its tasks: i2v"):
        generate_scene(model, Storyboard("one", shots=[StoryboardShot("go")]), settings, 0)
    service = server_settings(ServeConfig(model=tmp_path / "svd", folder=tmp_path / "jobs")).service
    assert "first_frame" not in service.refused_fields and service.max_shots == 1 and service.frame_step == 1
    with pytest.raises(ValueError, match="reads an image, no text.*to prepare or train put text_encoder/"):
        Encoder.from_folder(tmp_path / "svd")
