"""CogVideoX 1.5 (two latent frames per token) from a storyboard: against the unmodified diffusers pipeline, and against
a slow loop with a time per token where first frames are given."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from PIL import Image
from torch import Tensor, nn

from models.folder import Model, load_model
from models.layout import ClipLayout, Segment, shots_layout
from models.methods import get_method
from models.noise import base_levels
from models.text import pack_text
from models.tiny_cogvideox import build_tiny_cogvideox_folder
from sample.generate import GenerateSettings, generate_scene, shot_generators
from sample.sampler import draw_noise
from sample.shot import GivenFrames
from sample.storyboard import Storyboard, StoryboardError, StoryboardShot
from tests.models import cogvideox_reference as reference
from tests.sample.film import write_film

SIZE, STEPS = (4, 4), 4  # latent; the pipeline rounds its times, but not those of 4 steps
SETTINGS = GenerateSettings(steps=STEPS, guidance=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cogvideox") / "model"
    build_tiny_cogvideox_folder(path, version="1.5", method_params={"shift": 1.0})
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_film(tmp_path_factory.mktemp("film"), frames=17)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch, model: Model) -> list[Tensor]:
    """The latents [B,C,F,H,W] that are decoded."""
    found: list[Tensor] = []
    real = type(model.codec).decode
    monkeypatch.setattr(type(model.codec), "decode", lambda self, z: (found.append(z), real(self, z))[1])
    return found


def noise_of(board: Storyboard, layout: ClipLayout) -> Tensor:
    """The start noise of a one-shot board whose clip is laid out so, [1,C,F,H,W]."""
    return draw_noise(layout, (1, 4, layout.num_frames, *SIZE), [shot_generators(board, 7)])


@pytest.mark.parametrize(("frames", "guidance"), [(9, 3.0), (17, 1.0), (1, 1.0)])
def test_a_whole_clip_is_that_of_the_pipeline(folder, model, decoded, frames, guidance):
    board = Storyboard("b", shots=[StoryboardShot(sentence="a box", frames=frames)])
    settings = GenerateSettings(steps=STEPS, guidance=guidance, text="sentence")
    ours, _ = generate_scene(model, board, settings, seed=7)

    pipeline: Any = CogVideoXPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    latent = (frames - 1) // 4 + 1
    noise = noise_of(board, shots_layout([latent + 1]))  # an odd number of latent frames, and one in front
    options = dict(
        num_frames=frames, height=32, width=32, num_inference_steps=STEPS, guidance_scale=guidance,
        max_sequence_length=7, latents=noise.transpose(1, 2),
    )  # fmt: skip
    theirs = pipeline("a box", output_type="latent", **options).frames.transpose(1, 2)
    assert theirs.shape[2] == latent + 1 and decoded[0].shape[2] == latent
    assert torch.allclose(decoded[0][0], theirs[0, :, 1:], rtol=0, atol=1e-4)
    assert (decoded[0][0] - theirs[0, :, :-1]).abs().max() > 0.1, "it is the first that is dropped"
    video = pipeline("a box", output_type="np", **options).frames[0]
    assert ours.shape == video.shape == (frames, 32, 32, 3)
    assert np.abs(ours / 255 - video).max() < 0.6 / 255


def slow_i2v(model: Model, board: Storyboard, first: Tensor, frames: int) -> Tensor:
    """Float64, token by token: first frame and its copy at time 0, all others at the clock; DDIM of v, per frame."""
    plain = nn.Module.to(copy.deepcopy(model.backbone.transformer), torch.float64)
    text = pack_text(model.text.encode(["a box"]), 7)[None].double()
    x = noise_of(board, ClipLayout((Segment("condition", 2), Segment("target", frames - 1)))).double()
    x[:, :, 0] = x[:, :, 1] = first.double()
    tokens, per_frame = (frames + 1) // 2, 4
    places: list[reference.Place] = [None] * 7
    places += [(t, y, x) for t in range(tokens) for y in range(2) for x in range(2)]
    mask = torch.ones(len(places), len(places), dtype=torch.bool)
    levels = base_levels(STEPS).double()
    process = model.backbone.process
    for now, then in zip(levels, levels[1:], strict=False):
        clock = process.to_model_time(now).double()
        times = torch.full((1, len(places)), float(clock), dtype=torch.float64)
        times[:, 7 : 7 + per_frame] = 0.0
        v = reference.forward(plain, x, [text], times, mask, places)
        (a, s), (a2, s2) = (process.signal_and_noise(level) for level in (now, then))
        clean, noise = a * x - s * v, a * v + s * x
        moved = a2 * clean + s2 * noise
        x = torch.cat([x[:, :, :2], moved[:, :, 2:]], dim=2)
    return x


@torch.no_grad()
def test_a_given_first_frame_is_a_token_of_its_own(model, film, decoded):
    """The copy in front is given, too, as CogVideoXImageToVideoPipeline repeats its image."""
    shot = StoryboardShot(sentence="a box", frames=17, first_frame=str(film.with_suffix(".png")))
    board = Storyboard("b", shots=[shot])
    generate_scene(model, board, GenerateSettings(steps=STEPS, guidance=1.0, text="sentence"), seed=7)
    pixels = torch.from_numpy(np.array(Image.open(shot.first_frame))).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    first = model.codec.normalize(model.codec.encode(pixels)[0])[:, :, 0]
    assert model.backbone.process.to_model_time(torch.zeros(())) == 0.0
    assert torch.equal(decoded[0][0, :, 0], first[0]), "held bit for bit"
    expected = slow_i2v(model, board, first, 5)
    assert torch.allclose(decoded[0][0].double(), expected[0, :, 1:], rtol=0, atol=2e-4)


GIVEN = {
    "a first clip": [GivenFrames("film", frames=9)],
    "a token": [GivenFrames("film", at=1, frames=8)],
    "first frame and last token": [GivenFrames("image"), GivenFrames("film", at=-8, frames=8)],
    "an image in the middle": [GivenFrames("image", at=5)],
    "images at both ends": [GivenFrames("image"), GivenFrames("image", at=-1)],
}
HELD = dict(zip(GIVEN, ([0, 1, 2], [1, 2], [0, 3, 4], [1, 2], [0, 3, 4]), strict=True))  # latent frames
SPLIT = {
    "half a token": ([GivenFrames("film", at=1, frames=4)], r"at=1 takes 8, 16, 24, ...: give a longer video"),
    "across tokens": (
        [GivenFrames("film", at=5, frames=8)],
        r"at=5; a token of 2 latent frames holds 8 video frames, 1 to 8 here.* 1 \(-16\) and 9 \(-8\)",
    ),
    "one token twice": (
        [GivenFrames("image", at=1), GivenFrames("image", at=8)],
        "at=8: video frames 1 to 8.* already",
    ),
}


def placed(given: list[GivenFrames], film: Path) -> Storyboard:
    files = {"film": str(film), "image": str(film.with_suffix(".png"))}
    own = [GivenFrames(files[one.path], one.at, one.start, one.frames) for one in given]
    return Storyboard("b", shots=[StoryboardShot("A box.", frames=17, given_frames=own)])


@pytest.mark.parametrize("case", GIVEN)
def test_given_tokens_are_held(model, film, decoded, case):
    board = placed(GIVEN[case], film)
    generate_scene(model, board, SETTINGS, seed=7)
    made = generate_scene(model, board, SETTINGS, seed=8)
    assert made[0].shape == (17, 32, 32, 3)
    same = [torch.equal(decoded[0][0, :, f], decoded[1][0, :, f]) for f in range(5)]
    assert same == [f in HELD[case] for f in range(5)]


@pytest.mark.parametrize("case", SPLIT)
def test_half_a_token_is_refused_with_what_can_be_given(model, film, case):
    given, message = SPLIT[case]
    with pytest.raises(StoryboardError, match=message) as error:
        generate_scene(model, placed(given, film), SETTINGS, seed=7)
    assert error.value.param == f"shots.0.given_frames.{len(given) - 1}"


def test_an_image_is_the_last_token_of_a_still_clip(model, film, decoded):
    """Encoded behind a still of itself, as in the middle of a shot; both of its latent frames are given."""
    generate_scene(model, placed(GIVEN["images at both ends"], film), SETTINGS, seed=7)
    pixels = torch.from_numpy(np.array(Image.open(film.with_suffix(".png")))).permute(2, 0, 1)[None, :, None]
    still = model.codec.encode((pixels / 127.5 - 1).expand(-1, -1, 17, -1, -1))[0]
    assert torch.allclose(decoded[0][0, :, 3:], model.codec.normalize(still)[0, :, 3:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "plan", "frames"),
    [("progressive", {}, 17), ("progressive_min", {}, 17), ("diagonal", {}, 17), ("long_video", {}, 25)],
)
def test_tasks_of_a_level_per_frame_are_refused(model, film, task, plan, frames):
    first = {"first_frame": str(film.with_suffix(".png"))} if task.startswith("progressive") else {}
    board = Storyboard("b", task=task, plan=plan, shots=[StoryboardShot("A box.", frames=frames, **first)])
    with pytest.raises(StoryboardError, match=f"task={task}: this model joins 2.*CogVideoX 5B or Wan") as error:
        generate_scene(model, board, SETTINGS, seed=7)
    assert error.value.param == "task"


@pytest.mark.parametrize("task", ["edit", "noisy_frames"])
def test_tasks_whose_levels_agree_in_a_token_are_let_through(model, film, task):
    path = str(film) if task == "edit" else str(film.with_suffix(".png"))
    shot = StoryboardShot("A box.", frames=None if task == "edit" else 17, first_frame=path)
    made, _ = generate_scene(model, Storyboard("b", task=task, shots=[shot]), SETTINGS, seed=7)
    assert len(made) == (9 if task == "edit" else 17)


def test_every_shot_of_a_scene_fills_its_own_tokens(tmp_path, monkeypatch):
    """LCT: an image that is a shot, and two shots to make; each is decoded without what stood in front of it."""
    lct = build_tiny_cogvideox_folder(tmp_path / "lct", version="1.5", method="lct", text_length=7)
    image = tmp_path / "a.png"
    Image.fromarray(np.full((32, 32, 3), 90, dtype=np.uint8)).save(image)
    seen: list[tuple[Any, ...]] = []
    real = type(lct.backbone).forward

    def watched(self: Any, x: Tensor, levels: Tensor, text: Any, **options: Any) -> Tensor:
        seen.append((x, levels, text, options["layout"]))
        return real(self, x, levels, text, **options)

    monkeypatch.setattr(type(lct.backbone), "forward", watched)
    shots = [StoryboardShot("a", given=str(image)), StoryboardShot("b", frames=9), StoryboardShot("c", frames=17)]
    frames, cuts = generate_scene(lct, Storyboard("b", shots=shots), SETTINGS, seed=7)
    assert frames.shape[0] == 1 + 9 + 17 and cuts == [1, 10]
    assert (frames[0] == 90).all()
    x, levels, text, layout = seen[0]
    assert [s.stop - s.start for s in layout.shot_slices] == [2, 4, 6] and x.shape[2] == 12
    assert text.frame_text.tolist() == [0] * 2 + [1] * 4 + [2] * 6
    level = get_method("lct").context_level
    assert levels[0].tolist() == pytest.approx([level] * 2 + [1.0] * 10)
