"""Stable Video Diffusion from a first frame: what `generate_scene` makes is what diffusers' whole pipeline makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
from torch import Tensor

from models.folder import Model, load_model
from models.tiny import build_tiny_folder
from models.tiny_svd import build_tiny_svd_folder
from pipelines.sample import SampleConfig, run_sample
from pipelines.serve import ServeConfig, server_settings
from sample.generate import GenerateSettings, generate_scene, generate_scenes
from sample.storyboard import Storyboard, StoryboardShot, derive_seed

FRAMES, SIZE, STEPS, SEED = 6, 8, 3, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("svd")
    build_tiny_svd_folder(path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path / "first.png")
    return path


def board(folder: Path, seed: int = SEED, name: str = "one") -> Storyboard:
    return Storyboard(name, shots=[StoryboardShot("go", first_frame=str(folder / "first.png"), seed=seed)])


def latents_of(model: Model, storyboard: Storyboard, **settings: Any) -> Tensor:
    """The latents that the decoder is given."""
    seen: list[Tensor] = []
    plain = model.codec.decode
    model.codec.decode = lambda latents: seen.append(latents) or plain(latents)  # type: ignore[method-assign]
    generate_scene(model, storyboard, GenerateSettings(steps=STEPS, **settings), 0)
    del model.codec.decode
    return seen[0]


@pytest.mark.parametrize(
    ("scales", "noise_aug"), [((1.0, 3.0), 0.02), ((1.0, 3.0), 0.5), ((2.0, 2.0), 0.02), ((3.0, 1.5), 0.0)]
)
def test_it_makes_what_the_unmodified_pipeline_makes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, scales: tuple[float, float], noise_aug: float
) -> None:
    """Guidance that grows over the frames and noise on the image before it is encoded, as the pipeline has them."""
    pipeline = StableVideoDiffusionPipeline.from_pretrained(folder / "model", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, FRAMES, 4, 4, generator=torch.Generator().manual_seed(1))
    theirs = pipeline(
        Image.open(folder / "first.png"), height=SIZE, width=SIZE, num_frames=FRAMES, num_inference_steps=STEPS,
        min_guidance_scale=scales[0], max_guidance_scale=scales[1], noise_aug_strength=noise_aug, fps=7,
        generator=torch.Generator().manual_seed(derive_seed(SEED, "noise_aug")), latents=noise.transpose(1, 2),
        output_type="latent",
    ).frames  # fmt: skip

    model = load_model(folder / "model")
    levels = torch.cat([model.backbone.process.to_level(pipeline.scheduler.sigmas[:-1]), torch.zeros(1)])
    monkeypatch.setattr("sample.generate.base_levels", lambda *args, **kwargs: levels)
    monkeypatch.setattr("sample.sampler.draw_noise", lambda *args: noise)
    ours = latents_of(model, board(folder), image_guidance=scales, noise_aug=noise_aug)
    assert torch.allclose(ours, theirs.transpose(1, 2), rtol=1e-3, atol=1e-3)
    others = {"image_guidance": 2.5, "noise_aug": noise_aug}, {"image_guidance": scales, "noise_aug": noise_aug + 0.1}
    for other in others:
        assert not torch.allclose(latents_of(model, board(folder), **other), ours, rtol=1e-3, atol=1e-3)


def test_a_plain_number_and_no_noise_are_as_they_were(folder: Path) -> None:
    model = load_model(folder / "model")
    plain = latents_of(model, board(folder), image_guidance=1.5)
    assert torch.equal(latents_of(model, board(folder)), plain), "1.5 where nothing is said"
    assert torch.equal(latents_of(model, board(folder), image_guidance=[1.5, 1.5], noise_aug=0.0), plain)


def test_the_noise_on_the_image_comes_from_the_shots_seed_alone(folder: Path) -> None:
    """Not from its neighbours in the batch, and the start noise stays what it is."""
    model, settings = load_model(folder / "model"), GenerateSettings(steps=2, noise_aug=0.3)
    told: list[Any] = []
    model.backbone.register_forward_pre_hook(lambda m, args, kwargs: told.append(kwargs["image"]), with_kwargs=True)
    boards = [board(folder, 1), board(folder, 2, "two"), board(folder, 1, "three")]
    clips = [clip.frames for clip in generate_scenes(model, boards, settings, [0, 0, 0])]
    assert np.array_equal(clips[0], clips[2]) and not np.array_equal(clips[0], clips[1])
    (first, second, third) = told[0].latents[3:]
    assert torch.equal(first, third) and not torch.equal(first, second) and not told[0].latents[:3].any()
    assert told[0].noise_aug.tolist() == pytest.approx([0.3] * 6), "told in every pass, as the pipeline does"
    lone = generate_scene(model, boards[1], settings, 0)[0]
    assert np.abs(lone.astype(int) - clips[1].astype(int)).max() <= 1
    torch.testing.assert_close(told[-1].latents[1], second)


def test_noise_for_a_model_that_is_not_told_of_it_is_refused(folder: Path, tmp_path: Path) -> None:
    build_tiny_folder(tmp_path / "wan")
    with pytest.raises(ValueError, match=r"noise_aug=0.02: .*Stable Video Diffusion.*; leave it out"):
        run_sample(SampleConfig(model=tmp_path / "wan", out=tmp_path / "out", noise_aug=0.02), [board(folder)])
    with pytest.raises(ValueError, match=r"noise_aug=0.02: .*Stable Video Diffusion.*; leave it out"):
        server_settings(ServeConfig(model=tmp_path / "wan", folder=tmp_path / "jobs", noise_aug=0.02))
    with pytest.raises(ValueError, match=r"noise_aug=0.02: .*Stable Video Diffusion.*; leave it out"):
        generate_scene(load_model(tmp_path / "wan"), board(folder), GenerateSettings(steps=1, noise_aug=0.02), 0)
    for value in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="noise_aug=.*; give 0 or a positive number"):
            GenerateSettings(noise_aug=value)


def test_the_commands_take_a_ramp_and_the_noise(folder: Path, tmp_path: Path) -> None:
    config = SampleConfig(
        model=folder / "model", out=tmp_path, steps=1, min_side=32, image_guidance=[1, 3], noise_aug=0.02
    )
    report = run_sample(config, [board(folder)])
    assert (report.made, report.failed) == (1, 0), report.summary()
    served = server_settings(
        ServeConfig(model=folder / "model", folder=tmp_path / "jobs", image_guidance=[1, 3], noise_aug=0.02)
    )
    assert (served.image_guidance, served.noise_aug) == ([1, 3], 0.02)
    for ask in (SampleConfig, ServeConfig):
        with pytest.raises(ValueError, match=r"image_guidance is \[1, 2, 3\]; .*first and that of the last frame"):
            ask(model=folder / "model", image_guidance=[1, 2, 3])
