"""AID from video to video: states predicted in prepare, read in training, and asked for again in sampling."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import load

from models.folder import load_model
from models.scene import Scene
from models.tiny import build_tiny_folder
from pipelines.sample import SampleConfig, run_sample
from pipelines.serve import ServeConfig, server_settings
from pipelines.states import GrammarStates, StatesConfig, make_predictor, predictor_key
from pipelines.train import TextDropConfig, TrainConfig, run_train
from preprocess.asked import Asker
from preprocess.encode import Encoder
from preprocess.parts import part_path, part_samples
from preprocess.settings import PrepareSettings
from preprocess.sources import list_sources
from preprocess.unit import prepare_video
from sample.generate import GenerateSettings, generate_scene
from sample.storyboard import Storyboard, StoryboardError, StoryboardShot
from sample.video_io import read_video, write_video
from sample.video_request import parse_request
from sample.worker import VideoSampler
from toyworld.text import sentence, state_sentences
from toyworld.video import write_video as write_toy_video
from toyworld.world import sample_scene
from train.metrics import read

SMALL = {"query_tokens": 2, "width": 16, "heads": 4, "num_states": 4, "max_frames": 8}
TOYWORLD = StatesConfig(backend="toyworld")


class Watched(GrammarStates):
    """Remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__(4)
        self.seen: list[tuple[np.ndarray, str]] = []

    def __call__(self, frames: np.ndarray, instruction: str) -> list[str]:
        self.seen.append((frames, instruction))
        return super().__call__(frames, instruction)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("aid")


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    build_tiny_folder(root / "base", method="fvdm", frames_per_shot=17)
    return root / "base"


@pytest.fixture(scope="module")
def prepared(root: Path, base: Path) -> tuple[Path, Watched, list[tuple[Scene, dict[str, torch.Tensor]]]]:
    """Two ToyWorld shots, prepared with their states."""
    for index in range(2):
        scene = sample_scene("small", seed=3, index=index, num_shots=1, num_characters=1)
        write_toy_video(scene, root / "videos" / f"{index}.mp4", size=64)
    watched = Watched()
    encoder, asker = Encoder.from_folder(base), Asker(predictor=watched)
    settings = PrepareSettings(height=32, width=32, dtype="float32", states_key=predictor_key(TOYWORLD))
    samples = []
    (root / "data" / "shards").mkdir(parents=True)
    with webdataset.ShardWriter(str(root / "data" / "shards" / "scenes-%06d.tar"), verbose=0) as writer:
        for file in list_sources([root / "videos"]).files:
            part = prepare_video(file, settings, encoder, root / "parts", asker=asker)
            assert part.source["status"] == "written", part.source["reason"]
            for key, files in part_samples(part_path(root / "parts", part.source["video_id"])):
                writer.write({"__key__": key, **files})
                samples.append((Scene.from_json(files["json"]), load(files["safetensors"])))
    return root / "data", watched, samples


def train(root: Path, base: Path, data: Path, name: str, **changes: Any) -> Path:
    options: dict[str, Any] = {
        "dataset": data, "model": base, "run_dir": root / name, "method": "aid", "method_params": SMALL,
        "shots_per_scene": 1, "steps": 3, "batch_size": 2, "warmup_steps": 0, "learning_rate": 1e-2, "num_workers": 0,
        "log_every": 1, "ema_decay": 0.0, "text_drop": TextDropConfig(everything=0.2, given=0.2, both=0.2),
    }  # fmt: skip
    result = run_train(TrainConfig(**options | changes))
    assert result.model_dir is not None
    return result.model_dir


@pytest.fixture(scope="module")
def trained(root: Path, base: Path, prepared) -> Path:
    return train(root, base, prepared[0], "run")


def test_prepare_shows_the_predictor_the_first_frame_and_the_words_alone(prepared) -> None:
    _, watched, samples = prepared
    assert len(watched.seen) == len(samples) == 2
    for (frames, instruction), (scene, tensors) in zip(watched.seen, samples, strict=True):
        assert frames.shape == (1, 32, 32, 3) and frames.std() > 1
        (shot,) = scene.shots
        assert instruction == shot.sentence
        said = [state.text for state in shot.predicted_states]
        assert said[: len(shot.states)] == [state.text for state in shot.states] and said[-1] == instruction
        assert [state.frame for state in shot.predicted_states] == [0, 4, 8, 12]
        states = tensors["s000.states_text"]
        assert states.shape == (4, len(instruction) + 1, 32) and not states[0, len(said[0]) + 1 :].any()


def test_training_moves_modules_and_cross_attention_only(root: Path, base: Path, trained: Path) -> None:
    losses = [line["loss"] for line in read(root / "run" / "metrics.jsonl")]
    assert len(losses) == 3 and np.isfinite(losses).all()
    before, after = load_model(base, ("backbone",)).backbone, load_model(trained, ("backbone",)).backbone
    assert (trained / "conditioner" / "model.safetensors").is_file()
    plain = before.transformer.state_dict()
    for name, value in after.transformer.state_dict().items():
        assert (".attn2." in name) != torch.equal(value, plain[name]), name
    assert after.conditioner.dual_query.decomposed.out.weight.any()
    assert all(adapters.long_term.up.weight.any() for adapters in after.conditioner.adapters)


def test_training_stops_and_goes_on_to_the_same_weights(root: Path, base: Path, prepared, trained: Path) -> None:
    for steps in (2, 3):
        resumed = train(root, base, prepared[0], "resumed", steps=steps)
    one, other = (load_model(path, ("backbone",)).backbone.state_dict() for path in (trained, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_without_states_is_refused_with_what_to_do(root: Path, base: Path, prepared, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "shards" / "scenes-%06d.tar"), verbose=0) as writer:
        from safetensors.torch import save

        for scene, tensors in prepared[2]:
            kept = {name: value for name, value in tensors.items() if name != "s000.states_text"}
            writer.write({"__key__": scene.scene_id, "json": scene.to_json().encode(), "safetensors": save(kept)})
    with pytest.raises(ValueError, match="has no predicted states; prepare the videos again with states.backend"):
        train(root, base, tmp_path, "without")
    assert train(root, base, tmp_path, "no_states", method_params=SMALL | {"states": False}, steps=1).is_dir()
    for count in (3, 5):  # sampling fills up with the instruction, as prepare does: fewer would be something else
        with pytest.raises(ValueError, match=f"has 4 states, the method reads {count}; .* or train with num_states=4"):
            train(root, base, prepared[0], "other", method_params=SMALL | {"num_states": count})


@pytest.fixture(scope="module")
def first_frame(root: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(pixels).save(root / "first.png")
    write_video(np.stack([np.roll(pixels, 4 * t, axis=1) for t in range(7)]), root / "first.mp4", 8)
    return root / "first.png"


def board(first: Path, **shot: Any) -> Storyboard:
    words = sentence(sample_scene("small", seed=3, index=9, num_shots=1, num_characters=1), 0)
    return Storyboard("tvp", shots=[StoryboardShot(sentence=words, first_frame=str(first), frames=9, **shot)])


def test_sampling_asks_the_predictor_and_follows_states_and_frame(trained: Path, first_frame: Path, root: Path) -> None:
    model, settings = load_model(trained), GenerateSettings(steps=2, guidance=3.0, image_guidance=2.0)
    watched = Watched()
    made, cuts = generate_scene(model, board(first_frame), settings, seed=1, states=watched)
    ((frames, instruction),) = watched.seen
    assert made.shape == (9, 32, 32, 3) and cuts == [] and instruction == board(first_frame).shots[0].sentence
    assert frames.shape == (1, 32, 32, 3) and np.array_equal(frames[0], np.asarray(Image.open(first_frame)))
    scene = sample_scene("small", seed=3, index=9, num_shots=1, num_characters=1)
    truth = [text for text, _ in state_sentences(scene, 0)]
    by_hand, _ = generate_scene(model, board(first_frame, states=truth), settings, seed=1)
    assert np.array_equal(made, by_hand), "states said by hand are those of the predictor"

    seen: list[torch.Tensor] = []
    hook = model.backbone.conditioner.dual_query.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    for states in (truth, truth[::-1]):
        generate_scene(model, board(first_frame, states=states), settings, seed=1)
    hook.remove()
    assert len(seen) == 2 and seen[0].shape[:2] == (3, 4), "one pass for three branches, prepared once"
    assert torch.equal(seen[0][:2], seen[1][:2]) and not torch.equal(seen[0][2], seen[1][2])


def test_a_server_takes_states_from_the_request_or_its_predictor(trained: Path, first_frame: Path, root: Path) -> None:
    config = ServeConfig(model=trained, folder=root / "serve", steps=2, image_guidance=2.0, min_side=0, states=TOYWORLD)
    sampler = VideoSampler(server_settings(config))
    words = board(first_frame).shots[0].sentence
    scene = sample_scene("small", seed=3, index=9, num_shots=1, num_characters=1)
    truth = [text for text, _ in state_sentences(scene, 0)]

    seen: list[torch.Tensor] = []
    sampler.model.backbone.conditioner.dual_query.register_forward_pre_hook(lambda m, args: seen.append(args[1]))

    def served(**said: Any) -> torch.Tensor:
        """What the model is told of the states."""
        storyboard = {"shots": [{"sentence": words, "frames": 9, **said}]}
        files = {"input_reference": first_frame.read_bytes()}
        parsed = parse_request({"storyboard": storyboard, "seed": 1}, sampler.settings.service, files)
        job, _ = sampler.store.create(parsed.request, media=parsed.media)
        asyncio.run(sampler.run(job.id))
        job = sampler.store.get(job.id)
        assert job is not None and job.result is not None, job
        assert read_video(sampler.settings.service.results / job.result)[0].shape == (9, 32, 32, 3)
        return seen.pop()

    predicted = served()
    assert torch.equal(predicted, served(states=truth)) and not seen
    assert not torch.equal(predicted, served(states=truth[::-1]))


def test_each_scale_is_that_of_its_condition(trained: Path, first_frame: Path) -> None:
    """A branch of weight zero does not run: what does run says which scale was whose."""
    model, shot, seen = load_model(trained), board(first_frame, states=["It is red."]), []
    model.backbone.conditioner.dual_query.register_forward_pre_hook(lambda m, args: seen.append(args))
    for text, image in ((3.0, 1.0), (1.0, 3.0), (1.0, 1.0)):
        generate_scene(model, shot, GenerateSettings(steps=1, guidance=text, image_guidance=image), seed=1)
    assert [len(words) for words, *_ in seen] == [2, 3, 1]
    words, states, pictures, _ = seen[0]
    assert pictures.flatten(1).any(dim=1).all() and not torch.equal(words[0], words[1])
    assert not states[0, 1:].any() and states[1].flatten(1).any(dim=1).all(), "no states; all of them"
    assert seen[1][2].flatten(1).any(dim=1).tolist() == [False, True, True]


def test_sampling_without_states_or_frame_says_what_is_missing(trained: Path, first_frame: Path) -> None:
    model, settings = load_model(trained), GenerateSettings(steps=1)
    with pytest.raises(StoryboardError, match=r"states: this model reads states: say them, or name a predictor"):
        generate_scene(model, board(first_frame), settings, seed=0)
    with pytest.raises(StoryboardError, match="5 states; this model reads 4"):
        generate_scene(model, board(first_frame, states=["a"] * 5), settings, seed=0)
    without = Storyboard("tvp", shots=[StoryboardShot(sentence="It moves.")])
    with pytest.raises(StoryboardError, match="its tasks: tvp"):
        generate_scene(model, without, settings, seed=0, states=GrammarStates(4))


@pytest.mark.parametrize("image", ["held", "concat"])
def test_several_given_frames_are_kept(base: Path, first_frame: Path, prepared, root: Path, image: str) -> None:
    params = SMALL | {"given_frames": 2, "image": image}
    model = load_model(train(root, base, prepared[0], f"two-{image}", method_params=params, steps=1))
    decoded: list[torch.Tensor] = []
    plain = model.codec.decode
    model.codec.decode = lambda latents: decoded.append(latents) or plain(latents)  # type: ignore[method-assign]
    clip = first_frame.with_suffix(".mp4")
    made, _ = generate_scene(model, board(clip), GenerateSettings(steps=1), seed=1, states=GrammarStates(4))
    assert made.shape == (9, 32, 32, 3)
    video = torch.tensor(read_video(clip)[0][:5]).permute(3, 0, 1, 2)[None] / 127.5 - 1
    given = model.codec.normalize(model.codec.encode(video)[0])
    torch.testing.assert_close(decoded[0][:, :, :2], given, atol=1e-5, rtol=1e-5)
    with pytest.raises(StoryboardError, match="holds 1 frames, but this model starts from 5"):
        generate_scene(model, board(first_frame), GenerateSettings(steps=1), seed=1, states=GrammarStates(4))


def test_the_command_predicts_states_and_a_change_of_predictor_makes_anew(
    trained: Path, first_frame: Path, tmp_path: Path
) -> None:
    config = SampleConfig(model=trained, out=tmp_path, steps=1, min_side=0, states=TOYWORLD)
    report = run_sample(config, [board(first_frame)])
    assert (report.made, report.failed) == (1, 0) and (tmp_path / "tvp.mp4").is_file()
    words = board(first_frame).shots[0].sentence
    predicted = GrammarStates(4)(np.zeros((1, 32, 32, 3), np.uint8), words)
    (record,) = report.records
    assert record["states"] == [predicted], "states are logged: a model may say what is not there (aid.md, 7.12)"
    assert json.loads((tmp_path / "tvp.json").read_text())["states"] == [predicted]
    assert json.loads(report.manifest.read_text())["states"] == [predicted]
    assert run_sample(config, [board(first_frame)]).skipped == 1
    config.states = StatesConfig(backend="toyworld", count=3)
    assert run_sample(config, [board(first_frame)]).made == 1
    config.states = StatesConfig()
    assert "this model reads states" in run_sample(config, [board(first_frame)]).records[0]["error"]


def test_the_record_holds_the_states_that_the_model_read(trained: Path, first_frame: Path, tmp_path: Path) -> None:
    """Of each shot, said or predicted, filled up as the model reads them; none where no states are read."""
    said = board(first_frame, states=["It is red."])
    config = SampleConfig(model=trained, out=tmp_path, steps=1, min_side=0, states=TOYWORLD)
    words = said.shots[0].sentence
    assert run_sample(config, [said]).records[0]["states"] == [["It is red.", words, words, words]]
    two = Storyboard("two", shots=[*said.shots, *board(first_frame).shots])
    config.independent = True
    (record,) = run_sample(config, [two]).records
    predicted = GrammarStates(4)(np.zeros((1, 32, 32, 3), np.uint8), words)
    assert record["states"] == [["It is red.", words, words, words], predicted]


def test_the_image_s_scale_can_grow_over_the_frames(trained: Path, first_frame: Path, tmp_path: Path) -> None:
    """aid.md, section 5: frame f is guided by the scale that a straight line has there (3 latent frames: 1, 2, 3)."""
    model, shot, seen = load_model(trained), board(first_frame, states=["It is red."]), []
    with torch.no_grad():  # three steps of training move little: weights of another scale show what reaches the model
        for parameter in model.backbone.conditioner.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    plain = model.codec.decode
    model.codec.decode = lambda latents: seen.append(latents) or plain(latents)  # type: ignore[method-assign]
    for scale in ([1, 3], 1.0, 2.0, 3.0):  # one step: no frame has yet seen another's guidance
        generate_scene(model, shot, GenerateSettings(steps=1, guidance=4.0, image_guidance=scale), seed=1)
    ramp, *levels = seen
    for frame in (1, 2):  # 0 is given and held
        torch.testing.assert_close(ramp[:, :, frame], levels[frame][:, :, frame], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(levels[0][:, :, frame], levels[2][:, :, frame], atol=1e-4)


def test_configs_that_cannot_work_are_refused() -> None:
    assert make_predictor(StatesConfig()) is None and predictor_key(StatesConfig()) == ""
    with pytest.raises(ValueError, match="states.backend=endpoint needs states.url and states.model"):
        StatesConfig(backend="endpoint")
    config = StatesConfig(backend="endpoint", url="http://localhost:9/v1", model="some-vlm")
    assert make_predictor(config).key == predictor_key(config)
