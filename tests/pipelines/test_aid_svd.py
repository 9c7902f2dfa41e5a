"""AID on a Stable Video Diffusion folder with a text encoder, by the commands: prepare, train, sample, plan, verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save
from webdataset import ShardWriter

from infra.config import load_config
from models.codecs import to_video
from models.folder import Model, load_model
from models.scene import Scene, State, shot_tensor_key
from models.tiny_svd import build_tiny_svd_folder
from pipelines.plan import PlanConfig, make_plan
from pipelines.train import TrainConfig, run_train
from preprocess.encode import Encoder, encoder_key, scene_texts
from preprocess.verify import _Samples
from sample.generate import GenerateSettings, generate_scene
from sample.shot import GivenFrames
from sample.storyboard import Storyboard, StoryboardError, StoryboardShot, derive_seed
from tests.pipelines.test_families import make_scene
from train.shards import read_shard

FRAMES, SIZE, LENGTH = 5, 16, 24
SMALL: dict[str, Any] = {
    "image": "concat", "density": "edm", "shift": 1.0, "query_tokens": 2, "width": 16, "heads": 4, "num_states": 2,
    "max_frames": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("aid-svd")


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    build_tiny_svd_folder(
        root / "base", texts=True, text_length=LENGTH, frames_per_shot=FRAMES, height=SIZE, width=SIZE, fps=8.0
    )
    return root / "base"


@pytest.fixture(scope="module")
def dataset(root: Path, base: Path) -> Path:
    """Two scenes of two shots with their predicted states, encoded as `shotloom prepare` encodes them."""
    encoder, path = Encoder.from_folder(base), root / "dataset"
    (path / "shards").mkdir(parents=True)
    with ShardWriter(str(path / "shards" / "scenes-%06d.tar"), verbose=0) as writer:
        for number in range(2):
            scene = make_scene(f"scene{number}", ["red", "box"], FRAMES, size=SIZE)
            for shot in scene.shots:
                shot.predicted_states = [State("it stands", 0), State(f"it falls {shot.index}", 2)]
            scene.latents = encoder.source("float16")
            texts = encoder.encode_texts([scene], "float16")
            tensors = {name: texts[text].clone() for name, text in scene_texts(scene).items()}
            tensors |= encoder.encode_states(scene, "float16")
            for i, found in enumerate(encoder.encode_shots(list(pixels(number)), "float16")):
                tensors |= {shot_tensor_key(i, name): value for name, value in found.items()}
            writer.write({"__key__": scene.scene_id, "json": scene.to_json().encode(), "safetensors": save(tensors)})
    return path


def pixels(number: int) -> np.ndarray:
    """uint8 [2,FRAMES,SIZE,SIZE,3]"""
    return np.random.default_rng(number).integers(0, 256, (2, FRAMES, SIZE, SIZE, 3), dtype=np.uint8)


def config(base: Path, data: Path, run_dir: Path, params: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    keys: dict[str, Any] = {
        "model": base, "dataset": data, "run_dir": run_dir, "steps": 2, "batch_size": 2, "num_workers": 0,
        "method": "aid", "shots_per_scene": 1, "learning_rate": 1e-2, "warmup_steps": 0, "log_every": 1,
        "text_drop.everything": 0.2, "text_drop.given": 0.2, "text_drop.both": 0.2, "ema_decay": 0.0,
    } | changes  # fmt: skip
    given = [f"{key}={value}" for key, value in keys.items()]
    return load_config(TrainConfig, None, [*given, f"method_params={json.dumps(SMALL if params is None else params)}"])


@pytest.fixture(scope="module")
def trained(root: Path, base: Path, dataset: Path) -> Path:
    result = run_train(config(base, dataset, root / "run"))
    assert result.model_dir is not None
    return result.model_dir


def test_prepare_embeds_first_frames(base: Path, dataset: Path, root: Path) -> None:
    model = load_model(base, parts=("image", "text"))
    records = [one for shard in sorted((dataset / "shards").glob("*.tar")) for one in read_shard(shard)]
    for number, record in enumerate(records):
        scene = Scene.from_json(record.json)
        assert scene.latents is not None
        assert (scene.latents.image_hash, scene.latents.text_hash) == (model.image_encoder.hash, model.text.hash)
        for i, span in enumerate(pixels(number)):
            expected = model.image_encoder.encode(to_video([span[:1]])[:, :, 0])[0]
            found = record.read(shot_tensor_key(i, "first_image"))
            assert found.shape == (1, 16) and torch.allclose(found.float(), expected, atol=1e-3)
    plain = root / "plain"
    build_tiny_svd_folder(plain)
    with pytest.raises(ValueError, match="reads an image, no text.*put text_encoder/ and tokenizer/ into its folder"):
        Encoder.from_folder(plain)
    other = root / "other-images"
    build_tiny_svd_folder(other, texts=True, text_length=LENGTH)
    before = encoder_key(other)
    config_file = other / "feature_extractor" / "preprocessor_config.json"
    config_file.write_text(config_file.read_text() + "\n")
    assert encoder_key(other) != before, "what embeds images counts"


def test_verify_knows_the_embeddings(dataset: Path) -> None:
    (shard, *_) = sorted((dataset / "shards").glob("*.tar"))
    record = read_shard(shard)[0]
    scene = Scene.from_json(record.json)
    tensors = {name: record.read(name) for name in record.tensors}
    assert list(problems(scene, tensors)) == []
    name = shot_tensor_key(1, "first_image")
    without = {key: value for key, value in tensors.items() if key != name}
    assert list(problems(scene, without)) == [f"{name} is missing: a shot without the embedding of its first frame"]
    wrong = tensors | {name: tensors[name][:, :8].clone()}
    assert any("the width of image embeddings 8" in one for one in problems(scene, wrong))
    assert scene.latents is not None
    scene.latents.image_hash = ""
    assert f"{name} belongs to nothing in the record" in list(problems(scene, tensors))


def problems(scene: Scene, tensors: dict[str, torch.Tensor]) -> Any:
    span = scene.shots[0].encoded
    assert span is not None
    return _Samples({"dtype": "float16", "height": span.height, "width": span.width})._tensors(scene, tensors)


def test_training_moves_modules_and_cross_attentions_only(base: Path, trained: Path) -> None:
    before, after = (load_model(path, parts=("backbone",)).backbone for path in (base, trained))
    plain = before.unet.state_dict()
    for name, value in after.unet.state_dict().items():
        assert ".attn2." in name or torch.equal(value, plain[name]), name
    moved = {n for n, v in after.unet.state_dict().items() if not torch.equal(v, plain[n])}
    assert any("temporal_transformer_blocks" in n for n in moved) and any(".transformer_blocks" in n for n in moved)
    weights = load_file(trained / "conditioner" / "model.safetensors")
    for name, weight in weights.items():
        assert not name.endswith("up.weight") or weight.any(), name
    assert weights["dual_query.decomposed.out.weight"].any() and weights["embed_mask.weight"].any()
    pipeline = StableVideoDiffusionPipeline.from_pretrained(trained, local_files_only=True)
    assert all(torch.equal(value, after.unet.state_dict()[n]) for n, value in pipeline.unet.state_dict().items())
    settings = load_model(trained, parts=()).settings
    assert settings.method == "aid" and settings.method_params["density"] == "edm"


def test_training_stops_and_goes_on_to_the_same_weights(root: Path, base: Path, dataset: Path, trained: Path) -> None:
    for steps in (1, 2):
        resumed = run_train(config(base, dataset, root / "resumed", steps=steps)).model_dir
    one, other = (load_model(path, parts=("backbone",)).backbone.state_dict() for path in (trained, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def board(root: Path, colour: str = "red", **shot: Any) -> Storyboard:
    path = root / f"{colour}.png"
    Image.new("RGB", (SIZE, SIZE), {"red": (200, 30, 30), "blue": (30, 30, 200)}[colour]).save(path)
    given = {"sentence": "it falls", "first_frame": str(path), "states": ["it stands", "it lies"]} | shot
    return Storyboard("one", shots=[StoryboardShot(**given)])


def test_sampling_follows_frame_words_and_states(trained: Path, root: Path) -> None:
    model, settings = load_model(trained), GenerateSettings(steps=2, guidance=3.0, image_guidance=2.0)
    opened(model)
    made, cuts = generate_scene(model, board(root), settings, seed=0)
    assert made.shape == (FRAMES, SIZE, SIZE, 3) and not cuts
    again, _ = generate_scene(model, board(root), settings, seed=0)
    assert np.array_equal(made, again)
    others = {
        "frame": board(root, "blue"),
        "words": board(root, sentence="it rises"),
        "states": board(root, states=["it lies", "it stands"]),
    }
    latents = decoded(model, board(root), settings)
    for name, other in others.items():
        assert not torch.equal(decoded(model, other, settings), latents), name
    red = torch.tensor([200, 30, 30]).view(1, 3, 1, 1, 1).expand(1, 3, 1, SIZE, SIZE) / 127.5 - 1
    given = model.codec.normalize(model.codec.encode(red)[0])
    torch.testing.assert_close(latents[:, :, :1], given, atol=1e-4, rtol=1e-3)


def opened(model: Model) -> None:
    """Two steps of training move little: weights of another scale show what reaches the model."""
    with torch.no_grad():
        for parameter in model.backbone.conditioner.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def decoded(model: Model, storyboard: Storyboard, settings: GenerateSettings) -> torch.Tensor:
    """The latents that the decoder is given."""
    seen: list[torch.Tensor] = []
    plain = model.codec.decode
    model.codec.decode = lambda latents: seen.append(latents) or plain(latents)  # type: ignore[method-assign]
    generate_scene(model, storyboard, settings, seed=0)
    del model.codec.decode
    return seen[0]


def test_a_pass_without_the_frame_has_no_embedding_and_no_latents(trained: Path, root: Path) -> None:
    model = load_model(trained)
    seen: list[Any] = []
    plain = model.backbone.unet.forward
    model.backbone.unet.forward = lambda *args, **kwargs: seen.append(args) or plain(*args, **kwargs)
    generate_scene(model, board(root), GenerateSettings(steps=1, guidance=3.0, image_guidance=2.0), seed=0)
    ((rows, _, contexts, ids),) = seen
    rows, contexts = rows.unflatten(0, (3, FRAMES)), contexts.unflatten(0, (3, FRAMES))  # branches: none, frame, all
    assert rows.shape[2:4] == (1, 8) and contexts.shape[2:] == (LENGTH + 2, 16)
    assert rows[:, :, :, 4:].flatten(1).any(dim=1).tolist() == [False, True, True]
    padding = contexts[:, 0, LENGTH - 1]  # no word of any of the texts: the image token alone
    assert padding.any(dim=1).tolist() == [False, True, True] and torch.equal(padding[1], padding[2])
    assert ids.tolist() == [[7.0, 127.0, 0.0]] * 3 * FRAMES


def test_noise_goes_on_the_frame_before_it_is_encoded_and_the_model_is_told(trained: Path, root: Path) -> None:
    """aid.md, section 5: noise_aug 0.02; the frame that is put back, and the one that is embedded, have none."""
    model, seen = load_model(trained), []
    hook = model.backbone.register_forward_pre_hook(lambda m, args, kw: seen.append(kw["image"]), with_kwargs=True)
    settings = GenerateSettings(steps=1, guidance=3.0, image_guidance=[1.0, 3.0], noise_aug=0.02)
    latents = decoded(model, board(root, seed=6), settings)
    hook.remove()
    red = torch.tensor([200, 30, 30]).view(1, 3, 1, 1, 1).expand(1, 3, 1, SIZE, SIZE) / 127.5 - 1
    noise = torch.randn(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(derive_seed(6, "noise_aug")))
    expected = model.codec.encode(red + 0.02 * noise)[0]  # without the VAE's scaling factor
    (image,) = seen
    assert image.latents.shape[0] == 3 and not image.latents[0].any(), "branches: none, frame, all"
    for branch in (1, 2):
        torch.testing.assert_close(image.latents[branch, :, :1], expected[0], atol=1e-4, rtol=1e-4)
    assert image.noise_aug.tolist() == pytest.approx([0.02] * 3)
    given = model.codec.normalize(model.codec.encode(red)[0])
    torch.testing.assert_close(latents[:, :, :1], given, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "params", [{"condition": "none"}, {"states": False, "reading": "global"}, {"given_frames": 2}], ids=str
)
def test_ablations_train_and_sample(params: dict[str, Any], root: Path, base: Path, dataset: Path) -> None:
    name = "-".join(map(str, params))
    folder = run_train(config(base, dataset, root / name, SMALL | params, steps=1)).model_dir
    assert folder is not None
    frames = params.get("given_frames", 1)
    first = root / "first.mp4"
    if frames > 1:
        from sample.video_io import write_video

        write_video(np.stack([np.full((SIZE, SIZE, 3), 40 * t, dtype=np.uint8) for t in range(4)]), first, 8)
    shot = {"first_frame": str(first)} if frames > 1 else {}
    made, _ = generate_scene(load_model(folder), board(root, **shot), GenerateSettings(steps=1), seed=0)
    assert made.shape == (FRAMES, SIZE, SIZE, 3)


def test_sampling_without_frame_or_states_says_what_is_missing(trained: Path, root: Path) -> None:
    model, settings = load_model(trained), GenerateSettings(steps=1)
    with pytest.raises(StoryboardError, match="states: this model reads states"):
        generate_scene(model, board(root, states=[]), settings, seed=0)
    with pytest.raises(StoryboardError, match="its tasks: tvp"):
        generate_scene(model, Storyboard("one", shots=[StoryboardShot("go")]), settings, seed=0)
    with pytest.raises(StoryboardError, match="more than the model's 24 tokens|do not fit a context of 24"):
        generate_scene(model, board(root, sentence="x" * 40), settings, seed=0)


def test_what_cannot_train_here_is_refused_before_the_first_step(root: Path, base: Path, dataset: Path) -> None:
    def refused(message: str, data: Path = dataset, params: dict[str, Any] | None = None, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            run_train(config(base, data, root / "refused", params, **changes))

    refused("method 'svd' does not train this model.*method aid", params={}, method="svd")
    refused("set method_params.image_beside=true", params={}, method="fvdm")
    refused("tic_ft puts what is given on one time axis", params={}, method="tic_ft")
    refused("no one_grid: the layers of Stable Video Diffusion differ", params={}, method="fca")
    refused("image is 'held'.*method_params.image=concat", params=SMALL | {"image": "held"})
    refused("density is 'uniform'.*density=edm", params=SMALL | {"density": "uniform"})
    refused("diffusers reads no LoRA for this model", **{"lora.rank": 2})

    from torch import nn

    other = load_model(base)
    with torch.no_grad():
        next(nn.Module.parameters(other.image_encoder.model)).add_(1)
    from models.folder import save_model

    save_model(root / "other", other, other.settings)
    with pytest.raises(ValueError, match="were embedded by the image encoder .* prepare the videos again"):
        run_train(config(root / "other", dataset, root / "refused"))
    without = root / "without"
    (without / "shards").mkdir(parents=True)
    with ShardWriter(str(without / "shards" / "scenes-%06d.tar"), verbose=0) as writer:
        for shard in sorted((dataset / "shards").glob("*.tar")):
            for record in read_shard(shard):
                kept = {name: record.read(name) for name in record.tensors if "first_image" not in name}
                scene = Scene.from_json(record.json)
                writer.write({"__key__": scene.scene_id, "json": scene.to_json().encode(), "safetensors": save(kept)})
    refused("first_image", without)


def test_fvdm_trains_on_the_same_dataset_and_samples_with_and_without_given_frames(
    root: Path, base: Path, dataset: Path
) -> None:
    """A level per frame: given frames are held; a first one also stands beside all of them, with its embedding."""
    params = {"image_beside": True, "density": "edm", "shift": 1.0, "p": 1.0, "clean_prob": 0.5}
    no_drop = {f"text_drop.{name}": 0.0 for name in ("given", "both")}
    run = config(base, dataset, root / "fvdm", params, method="fvdm", **no_drop, **{"held_out.share": 0.0})
    folder = run_train(run).model_dir
    assert folder is not None
    model = load_model(folder)
    assert model.settings.method_params["image_beside"] is True
    before = load_model(base, parts=("backbone",)).backbone.unet.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in model.backbone.unet.state_dict().items())

    settings, seen = GenerateSettings(steps=2, image_guidance=2.0), []
    plain = model.backbone.unet.forward
    model.backbone.unet.forward = lambda *args, **kwargs: seen.append(args) or plain(*args, **kwargs)
    model._parts["text"] = None  # no word reaches it
    image = str(root / "red.png")
    boards = {
        "t2v": Storyboard("one", shots=[StoryboardShot("go")]),
        "i2v": board(root, states=[]),
        "at 0": Storyboard("one", shots=[StoryboardShot("go", given_frames=[GivenFrames(image, 0)])]),
        "at the end": Storyboard("one", shots=[StoryboardShot("go", given_frames=[GivenFrames(image, -1)])]),
    }
    red = torch.tensor([200, 30, 30]).view(1, 3, 1, 1, 1).expand(1, 3, 1, SIZE, SIZE) / 127.5 - 1
    given, made = model.codec.normalize(model.codec.encode(red)[0]), {}
    for name, one in boards.items():
        seen.clear()
        made[name] = decoded(model, one, settings)
        rows, times, contexts, _ = seen[0]
        count = FRAMES if len(rows) > 2 else 1  # frames are rows where they differ in level
        beside = rows.unflatten(0, (2, count))[:, :, :, 4:]  # branches: without the image, with it
        told = [False, name in ("i2v", "at 0")]
        assert beside.flatten(1).any(dim=1).tolist() == told
        assert contexts.unflatten(0, (2, count)).flatten(1).any(dim=1).tolist() == told
        held = {"i2v": 0, "at 0": 0, "at the end": FRAMES - 1}.get(name)
        if held is not None:
            torch.testing.assert_close(made[name][:, :, [held]], given, atol=1e-4, rtol=1e-3)
            assert times.view(2, FRAMES)[0].argmin() == held
    assert torch.equal(made["i2v"], made["at 0"]) and not torch.equal(made["t2v"], made["i2v"])
    with pytest.raises(StoryboardError, match="has no image embedding"):
        generate_scene(model, Storyboard("one", shots=[StoryboardShot("go", frames=9)], task="long_video"), settings, 0)


def test_the_plan_of_the_papers_base_is_one_clock_for_all_frames() -> None:
    layout, plan = make_plan("aid", "tvp", PlanConfig(method_params=SMALL, steps=3, shift=1.0, shots=[4]))
    assert layout.roles == ["target"] * 4 and bool((plan == plan[:, :1]).all()) and plan[-1].eq(0).all()
