"""Folders of the families beside Wan: plain diffusers opens what we write and makes what we make, and the reverse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXPipeline,
    DDIMScheduler,
    HunyuanVideoPipeline,
    LattePipeline,
    StableVideoDiffusionPipeline,
)
from torch import Tensor

from models.backbones.cogvideox import CogVideoXBackbone
from models.backbones.hunyuan import HunyuanVideoBackbone
from models.backbones.latte import LatteBackbone
from models.backbones.svd import SVDBackbone
from models.codecs import VideoCodec
from models.folder import Model, ModelSettings, load_model, save_model
from models.layout import shots_layout
from models.methods import get_method
from models.noise import base_levels
from models.process import EDM, VPDiffusion
from models.records import RecordError
from models.schedules import process_of_scheduler
from models.text import TextContext, null_text, pack_text, unpack_pooled
from models.tiny import build_tiny_folder
from models.tiny_cogvideox import build_tiny_cogvideox_folder
from models.tiny_hunyuan import build_tiny_hunyuan_folder
from models.tiny_latte import build_tiny_latte_folder
from models.tiny_svd import build_tiny_svd_folder

PROMPTS = ["red", "a box"]
BUILDERS: dict[str, Callable[..., Model]] = {
    "cogvideox": build_tiny_cogvideox_folder, "latte": build_tiny_latte_folder, "svd": build_tiny_svd_folder,
    "hunyuan": build_tiny_hunyuan_folder,
}  # fmt: skip
PIPELINES: dict[str, Any] = {
    "cogvideox": CogVideoXPipeline, "latte": LattePipeline, "svd": StableVideoDiffusionPipeline,
    "hunyuan": HunyuanVideoPipeline,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, build in BUILDERS.items():
        build(root / name)
    return {name: root / name for name in BUILDERS}


@pytest.fixture(scope="module")
def pipelines(folders) -> dict[str, Any]:
    found = {name: PIPELINES[name].from_pretrained(folders[name], local_files_only=True) for name in folders}
    for pipeline in found.values():
        pipeline.set_progress_bar_config(disable=True)
    return found


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def make(model: Model, noise: Tensor, texts: list[str], steps: int, guidance: float) -> Tensor:
    """Denoised latents of a plain loop over base levels, guided by classifier-free guidance."""
    length, process = model.settings.text_length, model.backbone.process
    text = torch.stack([pack_text(model.text.encode([one]), length) for one in texts])
    null = null_text(model.text, length).expand_as(text)
    x, levels = process.pure_noise(noise), base_levels(steps, model.settings.level_shift)
    for now, then in zip(levels, levels[1:], strict=False):
        at = now.expand(len(texts))
        with_text, without = model.backbone(x, at, text), model.backbone(x, at, null)
        x = process.step(x, without + guidance * (with_text - without), now, then)
    return x


def test_cogvideox_makes_what_its_pipeline_makes(folders, pipelines):
    model, pipeline = load_model(folders["cogvideox"]), pipelines["cogvideox"]
    assert isinstance(model.backbone, CogVideoXBackbone) and isinstance(model.backbone.process, VPDiffusion)
    assert model.backbone.process.prediction == "v"
    noise = randn(2, 4, 3, 4, 4)
    ours = make(model, noise, PROMPTS, 4, 4.0)
    theirs = pipeline(
        PROMPTS, num_frames=9, height=32, width=32, num_inference_steps=4, guidance_scale=4.0, max_sequence_length=7,
        latents=noise.transpose(1, 2), output_type="latent",
    ).frames  # fmt: skip
    assert torch.allclose(ours, theirs.transpose(1, 2), atol=1e-4)
    assert (ours - noise).abs().max() > 0.1
    video = model.codec.decode(ours)
    assert video.shape == (2, 3, 9, 32, 32)
    assert torch.allclose(video, pipeline.decode_latents(theirs), atol=1e-4)


def test_latte_makes_what_its_pipeline_makes(folders, pipelines):
    model, pipeline = load_model(folders["latte"]), pipelines["latte"]
    assert isinstance(model.backbone, LatteBackbone) and model.backbone.process.prediction == "epsilon"
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    noise = randn(2, 4, 6, 4, 4)
    ours = make(model, noise, PROMPTS, 4, 4.0)
    prompts, _ = pipeline.encode_prompt(PROMPTS)
    theirs = pipeline(
        prompt_embeds=prompts, negative_prompt=None, video_length=6,
        negative_prompt_embeds=null_text(model.text, 120).expand_as(prompts),
        height=32, width=32, num_inference_steps=4, guidance_scale=4.0, latents=noise, output_type="latent",
    ).frames  # fmt: skip  # given embeddings: of its own negative text the pipeline leaves the padding in, unmasked
    # epsilon at alpha_bar 4e-5 makes clips of a hundred deviations of an untrained model
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.std()))
    video = model.codec.decode(ours)
    assert video.shape == (2, 3, 6, 32, 32)
    assert torch.allclose(video, pipeline.decode_latents(ours, 6), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_hunyuan_makes_what_its_pipeline_makes(folders, pipelines, scale):
    """From the words on: two encoders, guidance as an input (6), and classifier-free guidance beside it."""
    model, pipeline = load_model(folders["hunyuan"]), pipelines["hunyuan"]
    assert isinstance(model.backbone, HunyuanVideoBackbone) and model.backbone.embedded_guidance == 6.0
    noise = randn(2, 4, 3, 4, 4)
    ours = make(model, noise, PROMPTS, 4, scale)
    theirs = pipeline(
        PROMPTS, negative_prompt=["", ""], true_cfg_scale=scale, num_frames=9, height=32, width=32,
        num_inference_steps=4, max_sequence_length=32, latents=noise, output_type="latent",
    ).frames  # fmt: skip
    assert torch.allclose(ours, theirs, atol=1e-4) and (ours - noise).abs().max() > 0.1
    video = model.codec.decode(ours)
    assert video.shape == (2, 3, 9, 32, 32)
    assert torch.allclose(video, pipeline.vae.decode(theirs / 0.7).sample, atol=1e-4)


def test_hunyuan_reads_two_encoders_as_its_pipeline_does(folders, pipelines):
    text, pipeline = load_model(folders["hunyuan"], parts=("text",)).text, pipelines["hunyuan"]
    texts = ["a red box", "", "Blue, twice"]
    ours = text.encode(texts)
    tokens, pooled, mask = pipeline.encode_prompt(texts, max_sequence_length=32)
    for own, their, vector, valid in zip(ours, tokens, pooled, mask, strict=True):
        assert len(own) == 1 + int(valid.sum()) and own.shape[1] == 32
        assert torch.allclose(own[1:], their[valid.bool()], atol=1e-5)
        assert torch.allclose(own[0, :16], vector, atol=1e-5) and not own[0, 16:].any()
    assert [text.num_tokens(one) for one in texts] == [len(own) for own in ours]
    assert len(ours[0]) == len(ours[1]) + len("a red box"), "a byte is a token"
    assert len(ours[1]) == 1 + 8, "of the template, what stands behind the text: cut into 8"
    assert text.parts(["a story", "", "a shot"]) == ["a story a shot"]
    with pytest.warns(UserWarning, match="over 33 tokens"):
        cut = text.encode(["x" * 40])[0]
    assert torch.allclose(cut[1:], pipeline.encode_prompt(["x" * 40], max_sequence_length=32)[0][0], atol=1e-5)


def test_a_packed_context_is_the_pooled_text_and_the_valid_tokens(folders):
    """What the dataset and the sampler hold says the same as `TextContext(lengths=, pooled=)`."""
    model = load_model(folders["hunyuan"])
    found = model.text.encode(["one", "another shot"])
    packed = TextContext(torch.stack([pack_text([one], 33) for one in found])[None], torch.tensor([0, 0, 1]))
    apart = unpack_pooled(packed, 16)
    assert apart.lengths is not None and apart.pooled is not None
    assert apart.lengths.tolist() == [[len(one) - 1 for one in found]]
    assert torch.equal(apart.pooled[0], torch.stack([one[0, :16] for one in found]))
    assert torch.equal(apart.embeddings, packed.embeddings[:, :, 1:])
    x, levels = randn(1, 4, 3, 4, 4), torch.tensor([[0.2, 0.7, 0.7]])
    for mode in ("contiguous", "diagonal"):
        options = {"layout": shots_layout([2, 1]), "position_mode": mode}
        with torch.no_grad():
            assert torch.equal(
                model.backbone(x, levels, packed, **options), model.backbone(x, levels, apart, **options)
            )


def test_hunyuan_encodes_and_decodes_clips_of_4k_and_1(folders, pipelines):
    codec, vae = load_model(folders["hunyuan"], parts=("codec",)).codec, pipelines["hunyuan"].vae
    assert (codec.temporal_stride, codec.spatial_stride, codec.latent_channels, codec.frame_step) == (4, 8, 4, 4)
    for frames in (1, 5, 21):  # 21: in overlapping pieces
        video = torch.rand(1, 3, frames, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
        mean, _ = codec.encode(video)
        assert mean.shape == (1, 4, codec.num_latent_frames(frames), 2, 3)
        assert torch.allclose(mean, vae.encode(video).latent_dist.mean, atol=1e-5)
        assert torch.allclose(codec.normalize(mean), 0.7 * mean, atol=1e-6)
        decoded = codec.decode(codec.normalize(mean))
        assert decoded.shape == video.shape and torch.allclose(decoded, vae.decode(mean).sample, atol=1e-4)


def test_what_hunyuan_cannot_is_refused_with_the_reason(folders, tmp_path):
    backbone = load_model(folders["hunyuan"], parts=("backbone",)).backbone
    for method, params, message in (
        ("lct", {"attention_rule": "group_causal"}, "HunyuanVideo joins text and frames in one attention"),
    ):
        with pytest.raises(ValueError, match=message):
            get_method(method, **params).check_backbone(backbone.capabilities)
    with pytest.raises(ValueError, match="HunyuanVideoBackbone reads padding or a pooled text besides"):
        get_method("fvdm", labels=3).attach(backbone)
    shutil.copytree(folders["hunyuan"], tmp_path / "m")
    config = tmp_path / "m" / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "gemma"}))
    with pytest.raises(ValueError, match="model_type is 'gemma', supported is llama"):
        load_model(tmp_path / "m", parts=("text",))
    for folder in ("text_encoder_2", "tokenizer_2"):
        shutil.rmtree(tmp_path / "m" / folder)
        with pytest.raises(FileNotFoundError, match=f"{folder} is missing: the text"):
            load_model(tmp_path / "m", parts=("text",))
        shutil.copytree(folders["hunyuan"] / folder, tmp_path / "m" / folder)


def test_latte_encodes_every_frame_alone(folders, pipelines):
    model, vae = load_model(folders["latte"], parts=("codec",)), pipelines["latte"].vae
    assert (model.codec.temporal_stride, model.codec.frame_step, model.codec.spatial_stride) == (1, 1, 8)
    video = torch.rand(2, 3, 5, 32, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, logvar = model.codec.encode(video)
    assert mean.shape == logvar.shape == (2, 4, 5, 4, 3) and model.codec.num_latent_frames(5) == 5
    for frame in range(5):
        plain = vae.encode(video[:, :, frame]).latent_dist
        assert torch.allclose(mean[:, :, frame], plain.mode(), atol=1e-5)
        assert torch.allclose(logvar[:, :, frame], plain.logvar, atol=1e-4)
    assert torch.allclose(model.codec.normalize(mean), mean * vae.config.scaling_factor, atol=1e-6)
    assert torch.allclose(model.codec.denormalize(model.codec.normalize(mean)), mean, atol=1e-6)


@torch.no_grad()
def test_svd_sees_images_and_decodes_as_its_pipeline_does(folders, pipelines):
    from PIL import Image

    model, pipeline = load_model(folders["svd"]), pipelines["svd"]
    assert isinstance(model.backbone, SVDBackbone) and isinstance(model.backbone.process, EDM) and model.reads_images
    assert model.backbone.process.sigma_max == 700.0
    pixels = torch.randint(0, 256, (24, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = pixels.permute(2, 0, 1)[None].float() / 127.5 - 1
    theirs = pipeline._encode_image(Image.fromarray(pixels.numpy()), "cpu", 1, False)
    ours = model.image_encoder.encode(image)
    assert ours.shape == (1, 1, 16) and torch.allclose(ours, theirs, atol=1e-5)
    mean, _ = model.codec.encode(image[:, :, None])
    assert torch.allclose(mean[:, :, 0], pipeline._encode_vae_image(image, "cpu", 1, False), atol=1e-5)
    latents = randn(2, 4, 6, 4, 4)
    video = model.codec.decode(latents)
    assert video.shape == (2, 3, 6, 8, 8)
    plain = torch.cat([pipeline.decode_latents(one[None].transpose(1, 2), 6) for one in latents])
    assert torch.allclose(video, plain, atol=1e-4), "its decoder sees the frames of one clip together"
    with pytest.raises(ValueError, match="a svd reads an image, no text: sample from a first frame"):
        _ = model.text


def test_how_many_frames_a_folder_takes_needs_no_weights(folders, tmp_path):
    build_tiny_folder(tmp_path / "wan")
    steps = {name: VideoCodec.frame_step_of(path) for name, path in (folders | {"wan": tmp_path / "wan"}).items()}
    assert steps == {"wan": 4, "cogvideox": 8, "latte": 1, "svd": 1, "hunyuan": 4}
    for name, path in folders.items():
        assert load_model(path, parts=("codec",)).codec.frame_step == steps[name]


def test_a_shift_of_the_latents_is_undone():
    from models.tiny_latte import tiny_image_vae

    vae: Any = tiny_image_vae()
    vae.register_to_config(shift_factor=0.25)
    codec, mean = VideoCodec(vae), randn(1, 4, 2, 3, 3)
    assert torch.allclose(codec.normalize(mean), (mean - 0.25) * 0.7, atol=1e-6)
    assert torch.allclose(codec.denormalize(codec.normalize(mean)), mean, atol=1e-6)


def test_cogvideox_reads_the_padding_as_its_pipeline_does(folders, pipelines):
    text = load_model(folders["cogvideox"], parts=("text",)).text
    texts = ["red", "", "blue r"]
    ours = torch.stack(text.encode(texts))
    theirs = pipelines["cogvideox"]._get_t5_prompt_embeds(texts, max_sequence_length=7)
    assert ours.shape == (3, 7, 32) and torch.allclose(ours, theirs, atol=1e-5)
    assert torch.equal(null_text(text, 7), ours[1])
    assert text.parts(["a story", "", "a shot"]) == ["a story a shot"] and text.num_tokens("red") == 4
    with pytest.warns(UserWarning, match="over 7 tokens"):
        cut = text.encode(["a red box"])
    assert torch.allclose(
        cut[0], pipelines["cogvideox"]._get_t5_prompt_embeds(["a red box"], max_sequence_length=7)[0], atol=1e-5
    )


def test_latte_reads_lower_case_with_zeros_after_it(folders, pipelines):
    text = load_model(folders["latte"], parts=("text",)).text
    texts = ["A Red BOX", "x"]
    ours = torch.stack([pack_text([one], 120) for one in text.encode(texts)])
    theirs, _ = pipelines["latte"].encode_prompt(texts)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert text.parts(["one", "two"]) == ["one", "two"]


def test_what_reads_texts_otherwise_has_another_hash(folders, tmp_path):
    wan = build_tiny_folder(tmp_path / "wan", text_length=7)
    others = [load_model(folders[name], parts=("text",)) for name in ("cogvideox", "latte")]
    hashes = {wan.text.hash, *(model.text.hash for model in others)}
    assert len(hashes) == 3, "the weights are the same"


@pytest.mark.parametrize("name", BUILDERS)
def test_a_folder_comes_back_as_it_was_written(tmp_path, folders, name):
    first = load_model(folders[name])
    save_model(tmp_path / "again", first, first.settings)
    again = load_model(tmp_path / "again")
    assert again.settings == first.settings and again.settings.backbone == name
    for part in ("backbone", "codec"):
        one, other = (getattr(m, part) for m in (first, again))
        states = [(m if part == "backbone" else m.vae).state_dict() for m in (one, other)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    for part in ("text", "image"):
        assert first.has(part) == again.has(part) == (part == ("image" if name == "svd" else "text"))
        assert not first.has(part) or first._parts[part].hash == again._parts[part].hash
    for file in ("scheduler/scheduler_config.json", "model_index.json"):
        assert (tmp_path / "again" / file).read_text() == (folders[name] / file).read_text()

    backbone = load_model(folders[name], parts=("backbone",))
    save_model(tmp_path / "copied", backbone, first.settings, copy_parts_from=folders[name])
    PIPELINES[name].from_pretrained(tmp_path / "copied", local_files_only=True)


@pytest.mark.parametrize("name", BUILDERS)
def test_weights_can_be_written_in_half_precision(tmp_path, folders, name):
    model = load_model(folders[name])
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    save_model(tmp_path / "half", model, model.settings, dtype=torch.float16)
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())
    sizes = [sum(f.stat().st_size for f in path.rglob("*.safetensors")) for path in (folders[name], tmp_path / "half")]
    assert sizes[1] < 0.6 * sizes[0]
    for key, value in load_model(tmp_path / "half").backbone.state_dict().items():
        assert torch.equal(value, before[key].half().to(value.dtype)) or not value.is_floating_point()
    PIPELINES[name].from_pretrained(tmp_path / "half", local_files_only=True)


def test_plain_folders_say_what_they_were_trained_for(tmp_path, folders):
    found = {}
    for name, folder in folders.items():
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "shotloom.json").unlink()
        found[name] = load_model(tmp_path / name, parts=()).settings
    shared = {"fps": 8.0, "level_shift": 1.0, "method_params": {"shift": 1.0}, "width": 32, "height": 32}
    assert found["cogvideox"] == ModelSettings(backbone="cogvideox", text_length=7, frames_per_shot=21, **shared)
    assert found["svd"] == ModelSettings(
        backbone="svd",
        method="svd",
        text_length=77,
        level_shift=1.0,
        fps=7.0,
        frames_per_shot=6,
        height=576,
        width=1024,
    )
    assert found["hunyuan"] == ModelSettings(
        backbone="hunyuan", text_length=257, level_shift=7.0, method_params={"shift": 7.0}, frames_per_shot=129,
        height=720, width=1280, fps=24.0,
    )  # fmt: skip
    assert found["latte"] == ModelSettings(backbone="latte", text_length=120, frames_per_shot=6, **shared)


def test_the_scheduler_decides_the_process(tmp_path, folders):
    shutil.copytree(folders["latte"], tmp_path / "m")
    file = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"prediction_type": "v_prediction", "beta_end": 0.01}))
    process = load_model(tmp_path / "m", parts=("backbone",)).backbone.process
    expected = process_of_scheduler(config | {"prediction_type": "v_prediction", "beta_end": 0.01})
    levels = torch.linspace(0, 1, 7)
    for one, other in zip(process.signal_and_noise(levels), expected.signal_and_noise(levels), strict=True):
        assert torch.equal(one, other)
    assert process.prediction == "v"
    file.unlink()
    with pytest.raises(FileNotFoundError, match="scheduler_config.json is missing: it says which diffusion process"):
        load_model(tmp_path / "m", parts=("backbone",))


def test_what_does_not_open_is_refused_with_the_reason(tmp_path, folders):
    path = tmp_path / "m"
    shutil.copytree(folders["cogvideox"], path)
    index, settings = (json.loads((path / name).read_text()) for name in ("model_index.json", "shotloom.json"))
    for kind, message in (
        ("HunyuanVideoImageToVideoPipeline", "use the text-to-video model"),
        ("CogVideoXImageToVideoPipeline", "use the text-to-video model"),
        ("MochiPipeline", "supported are WanPipeline, CogVideoXPipeline, LattePipeline"),
    ):
        (path / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
        with pytest.raises(RecordError, match=f"model_index.json: _class_name is '{kind}', .*{message}"):
            load_model(path, parts=())
    (path / "model_index.json").write_text(json.dumps(index))
    (path / "shotloom.json").write_text(json.dumps(settings | {"backbone": "wan"}))
    with pytest.raises(RecordError, match="backbone is 'wan', but model_index.json names CogVideoXPipeline"):
        load_model(path, parts=())
    (path / "shotloom.json").write_text(json.dumps(settings))
    shutil.rmtree(path / "vae")
    shutil.copytree(folders["latte"] / "vae", path / "vae")
    with pytest.raises(ValueError, match="a AutoencoderKL, but a CogVideoXPipeline has a AutoencoderKLCogVideoX"):
        load_model(path, parts=("codec",))


def test_a_plain_cogvideox_1_5_folder_opens_and_comes_back(tmp_path):
    build_tiny_cogvideox_folder(tmp_path / "m", version="1.5")
    (tmp_path / "m" / "shotloom.json").unlink()
    model = load_model(tmp_path / "m")
    assert model.backbone.capabilities.frames_per_token == 2 and model.backbone.capabilities.per_frame_levels
    expected = ModelSettings(
        backbone="cogvideox", text_length=7, frames_per_shot=21, fps=16.0, height=768, width=1360, level_shift=1.0,
        method_params={"shift": 1.0},
    )  # fmt: skip
    assert model.settings == expected, "the sizes in its configuration are the largest there are"
    save_model(tmp_path / "again", model, model.settings)
    plain = CogVideoXPipeline.from_pretrained(tmp_path / "again", local_files_only=True)
    state = plain.transformer.state_dict()
    assert plain.transformer.config.patch_size_t == 2 and len(state) == len(model.backbone.transformer.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in model.backbone.transformer.state_dict().items())


def test_what_does_not_fit_is_not_written(tmp_path, folders):
    model = load_model(folders["latte"])
    with pytest.raises(ValueError, match="backbone is 'wan', but the model is LatteTransformer3DModel"):
        save_model(tmp_path / "m", model, ModelSettings())
    model.scheduler = None
    with pytest.raises(ValueError, match="a latte folder needs a scheduler"):
        save_model(tmp_path / "m", model, model.settings)
    assert not (tmp_path / "m").exists()
