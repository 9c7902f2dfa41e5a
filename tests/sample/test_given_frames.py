"""Given frames at any place of a shot, from storyboard to video: where they lie, that they stay, what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.codecs import to_video
from models.folder import Model, load_model, save_model
from models.methods import get_method
from models.noise import base_levels
from models.tiny import build_tiny_folder
from pipelines.sample import SampleConfig, run_sample
from pipelines.shipped import SHIPPED_WAN
from pipelines.storyboards import load_storyboards
from sample import extension, generate
from sample.generate import GenerateSettings, generate_scene, generate_scenes
from sample.given_frames import _place
from sample.shot import GivenFrames
from sample.storyboard import Storyboard, StoryboardError, StoryboardShot
from sample.video_io import read_image, read_video, write_video

METHOD, SETTINGS = get_method("fvdm"), GenerateSettings(steps=3, guidance=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of clips of 9 video frames, which are 3 latent ones."""
    path = tmp_path_factory.mktemp("given") / "model"
    build_tiny_folder(path, method="fvdm", frames_per_shot=9)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.mp4 and b.mp4 of 14 frames, a.png and b.png, all of the model's size."""
    path = tmp_path_factory.mktemp("media")
    for seed, name in enumerate("ab"):
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        write_video(np.stack([np.roll(pixels, 4 * t, axis=1) for t in range(14)]), path / f"{name}.mp4", 8)
        Image.fromarray(pixels).save(path / f"{name}.png")
    return path


def board(
    given_frames: list[GivenFrames], task: str | None = None, plan: dict | None = None, **shot: Any
) -> Storyboard:
    shots = [StoryboardShot("A square.", given_frames=given_frames, **shot)]
    return Storyboard("b", shots=shots, task=task, plan=plan or {})  # type: ignore[arg-type]


def latents_of(model: Model, *frames: np.ndarray) -> Tensor:
    """[C, F, h, w] of frames [H, W, 3] encoded as one clip."""
    return model.codec.normalize(model.codec.encode(to_video([np.stack(frames)]))[0])[0]


class Watch:
    """Every call of the denoising loop: its layout, plan and options, and what came out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, Tensor, dict[str, Any], Tensor]] = []
        real = generate.sample

        def watched(backbone: Any, layout: Any, plan: Tensor, text: Any, /, **options: Any) -> Tensor:
            made = real(backbone, layout, plan, text, **options)
            self.calls.append((layout, plan, options, made.clone()))
            return made

        for module in (generate, extension):
            monkeypatch.setattr(module, "sample", watched)


# --- where given frames lie ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "step"), [(4, 4), (4, 8), (1, 1)], ids=["wan", "cogvideox", "latte"])
@pytest.mark.parametrize("name", ["a.png", "a.mp4"])
def test_every_place_is_taken_or_refused_by_the_rule(media: Path, name: str, stride: int, step: int) -> None:
    """Brute force over all places of a shot: what is encoded, and that its last frames are the file's."""
    length, video = 17, read_video(media / "a.mp4")[0]

    def num_latent_frames(frames: int) -> int:
        assert frames >= 1 and (frames - 1) % step == 0, "a length that the VAE takes"
        return (frames - 1) // stride + 1

    codec: Any = SimpleNamespace(temporal_stride=stride, frame_step=step, num_latent_frames=num_latent_frames)
    for at in range(-length, length):
        place = at % length
        latent = next(k for k in range(length) if stride * k >= place)
        one = GivenFrames(str(media / name), at=at)
        whole = place == 0 or (place - 1) % stride == 0
        if name == "a.mp4" and not whole:
            with pytest.raises(ValueError, match=f"at={at}; a latent frame holds 4 video frames"):
                _place(one, length, codec)
            continue
        clip = _place(one, length, codec)
        assert clip.start == latent and num_latent_frames(len(clip.pixels)) >= clip.count
        covered = range(place, place + (1 if place == 0 else stride)) if name == "a.png" else None
        if name == "a.png":
            assert clip.count == 1 and covered is not None and (clip.pixels == read_image(media / name)).all()
            continue
        fits = min(14, length - place)
        taken = (fits - 1) // step * step + 1 if place == 0 else fits // stride * stride
        assert clip.count == (num_latent_frames(taken) if place == 0 else taken // stride)
        assert (clip.pixels[-taken:] == video[:taken]).all()
        assert (clip.pixels[:-taken] == video[0]).all(), "behind a still of its own first frame"
        assert (len(clip.pixels) == taken) == (place == 0)


def test_the_frames_of_a_video_that_are_taken_can_be_chosen(media: Path, model: Model) -> None:
    video = read_video(media / "a.mp4")[0]
    for one, taken in (
        (GivenFrames(str(media / "a.mp4"), start=-5), video[9:]),
        (GivenFrames(str(media / "a.mp4"), start=2, frames=5), video[2:7]),
        (GivenFrames(str(media / "a.mp4"), at=-8, start=3, frames=4), video[3:7]),
        (GivenFrames(str(media / "a.mp4"), at=-4), video[:4]),
    ):
        assert (_place(one, 17, model.codec).pixels[-len(taken) :] == taken).all()


TASKS: list[
    tuple[str, dict[str, Any], list[tuple[str, dict[str, Any]]]]
] = [  # FVDM's task, its givens, as a storyboard
    ("i2v", {}, [("a.png", {})]),
    ("interpolation", {}, [("a.png", {}), ("b.png", {"at": -1})]),
    ("extension", {"head": 3}, [("a.mp4", {"start": -9})]),
    ("transition", {"head": 2, "tail": 1}, [("a.mp4", {"start": -5}), ("b.mp4", {"at": -4})]),
    ("next_frame", {}, [("a.mp4", {"frames": 13})]),
    ("any_frame", {"frames": [1, 3]}, [("b.png", {"at": 10}), ("a.png", {"at": 3})]),
    ("tvp", {"head": 2}, [("a.mp4", {"frames": 5})]),
]


@pytest.mark.parametrize(("task", "givens", "files"), TASKS, ids=[task for task, _, _ in TASKS])
def test_every_task_of_given_frames_is_reached_and_keeps_them(model, media, monkeypatch, task, givens, files) -> None:
    """Roles and plan are FVDM's; given latents are bit-equal; an oracle recovers the frames that are made."""
    truth = torch.randn(1, 4, 5, 4, 4, generator=torch.Generator().manual_seed(5))

    def oracle(x: Tensor, levels: Tensor, text: Any, **_: Any) -> Tensor:
        return (x - truth) / levels.view(1, 1, -1, 1, 1).clamp_min(1e-3)

    monkeypatch.setattr(model.backbone, "forward", oracle)
    watch = Watch(monkeypatch)
    given = [GivenFrames(str(media / name), **options) for name, options in files]
    frames, cuts = generate_scene(model, board(given, frames=17), SETTINGS, seed=1)
    assert frames.shape == (17, 32, 32, 3) and cuts == []
    ((layout, plan, options, made),) = watch.calls
    asked = METHOD.layout_for_task(task, [5], **givens)
    assert layout.roles == asked.roles
    assert torch.equal(plan, METHOD.plan(asked, base_levels(3, model.settings.level_shift), task))
    held = layout.is_given
    assert torch.equal(made[:, :, held], options["given"][:, :, held]) and (made[:, :, held] != 0).any()
    torch.testing.assert_close(made[:, :, ~held], truth[:, :, ~held], atol=1e-4, rtol=1e-4)


def test_given_clips_are_encoded_alone(model: Model, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the beginning as a clip, what comes later as the last latent frames of a clip behind its own still."""
    watch = Watch(monkeypatch)
    a, b, image = read_video(media / "a.mp4")[0], read_video(media / "b.mp4")[0], read_image(media / "a.png")
    given = [
        GivenFrames(str(media / "a.mp4"), frames=5),
        GivenFrames(str(media / "a.png"), at=11),
        GivenFrames(str(media / "b.mp4"), at=-4, start=2),
    ]
    generate_scene(model, board(given, frames=17), SETTINGS, seed=1)
    ((_, _, options, made),) = watch.calls
    expected = torch.zeros_like(made[0])
    expected[:, :2] = latents_of(model, *a[:5])
    expected[:, 3] = latents_of(model, *[image] * 13)[:, 3]
    expected[:, 4] = latents_of(model, *[b[2]] * 9, *b[2:6])[:, 3]
    torch.testing.assert_close(options["given"][0], expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(made[:, :, [0, 1, 3, 4]], options["given"][:, :, [0, 1, 3, 4]])


def test_latents_are_nearly_those_that_the_frames_have_in_their_film(tmp_path: Path) -> None:
    """With a trained VAE: behind stills, a video or an image is nearer to the film's latents than a lone image is."""
    codec = load_model(SHIPPED_WAN, parts=("codec",)).codec
    film = np.full((17, 64, 64, 3), 90, np.uint8)
    for t in range(17):
        film[t, 20:36, 4 + 2 * t : 20 + 2 * t] = (220, 40, 40)
    write_video(film, tmp_path / "film.mp4", 8)
    film = read_video(tmp_path / "film.mp4")[0]
    Image.fromarray(film[14]).save(tmp_path / "14.png")

    def encode(frames: np.ndarray) -> Tensor:
        return codec.normalize(codec.encode(to_video([frames]))[0])[0]

    own = encode(film)[:, 4]
    video = _place(GivenFrames(str(tmp_path / "film.mp4"), at=-4, start=-4), 17, codec)
    image = _place(GivenFrames(str(tmp_path / "14.png"), at=14), 17, codec)
    lone = (encode(film[14:15])[:, 0] - own).square().mean()
    assert (encode(video.pixels)[:, -1] - own).square().mean() < 0.1 * lone
    assert (encode(image.pixels)[:, -1] - own).square().mean() < 0.5 * lone


def test_tasks_of_frames_take_given_frames_too(model: Model, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    ends = [GivenFrames(str(media / "a.png")), GivenFrames(str(media / "b.png"), at=-1)]
    cases: list[tuple[str | None, dict[str, Any], list[GivenFrames], dict[str, Any]]] = [
        ("noisy_frames", {"multipliers": [0.2, 0.4]}, ends, {"frames": [0, 2]}),
        ("edit", {"edit_level": 0.7}, [GivenFrames(str(media / "a.mp4"), at=1, frames=4)], {"frames": [1]}),
        ("diagonal", {"lag": 2}, [GivenFrames(str(media / "a.mp4"), frames=5)], {"head": 2}),
        (None, {"context_level": 0.1}, ends, {"frames": [0, 2]}),
    ]
    for task, plan, given, givens in cases:
        generate_scene(model, board(given, task, plan), SETTINGS, seed=1)
        layout, levels, options, made = watch.calls[-1]
        name = task or "any_frame"
        assert layout == METHOD.layout_for_task(name, [3], **givens)
        assert torch.equal(levels, METHOD.plan(layout, base_levels(3, model.settings.level_shift), name, **plan))
        assert (options["given"] != 0).flatten(3).any(dim=3).all(dim=1)[0].tolist() == [
            f != "target" for f in layout.roles
        ]
        assert torch.equal(made[:, :, layout.is_given], options["given"][:, :, layout.is_given])


# --- longer than a clip --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "plan", "windows"),
    [
        (17, {}, [range(3), range(2, 5)]),
        (21, {"overlap": 2}, [range(3), range(1, 4), range(2, 5)]),
        (21, {"overlap": 1, "context_level": 0.05}, [range(3), range(2, 4), range(3, 6)]),
    ],
)
def test_a_long_video_is_one_shot_of_overlapping_clips(model, media, monkeypatch, length, plan, windows) -> None:
    watch, told = Watch(monkeypatch), []
    ends = [GivenFrames(str(media / "a.png")), GivenFrames(str(media / "b.png"), at=-1)]
    both = [board(ends, "long_video", plan, frames=length, seed=seed) for seed in (1, 2)]
    first, second = generate_scenes(model, both, SETTINGS, [0, 0], callback=lambda *step: told.append(step))
    assert first.frames.shape == (length, 32, 32, 3) and first.cuts == []
    assert not np.array_equal(first.frames, second.frames)
    latents = (length - 1) // 4 + 1
    video = torch.full((2, 4, latents, 4, 4), torch.nan)
    video[:, :, 0] = latents_of(model, read_image(media / "a.png"))[:, 0]
    video[:, :, -1] = latents_of(model, *[read_image(media / "b.png")] * 13)[:, 3]
    assert len(watch.calls) == len(windows)
    for frames, (layout, levels, options, made) in zip(windows, watch.calls, strict=True):
        window = video[:, :, frames.start : frames.stop]
        known = ~window.isnan().any(dim=1).flatten(2).any(dim=2)[0]
        assert layout == METHOD.layout_for_task("any_frame", [len(frames)], frames=known.nonzero().flatten().tolist())
        assert (levels[:, known] == plan.get("context_level", 0)).all()
        torch.testing.assert_close(made[:, :, known], window[:, :, known], atol=1e-6, rtol=1e-6)
        assert torch.equal(made[:, :, known], options["given"][:, :, known]), "overlap and given frames are bit-equal"
        window[:] = made
    assert not video.isnan().any() and told[-1] == (3 * len(windows), 3 * len(windows))
    decoded = model.codec.decode(video[:1])[0].clamp(-1, 1).permute(1, 2, 3, 0)
    assert np.abs(((decoded + 1) * 127.5).round().numpy() - first.frames).max() <= 1


def test_a_long_video_may_start_from_nothing_or_from_a_film_longer_than_a_clip(model, media, monkeypatch) -> None:
    watch = Watch(monkeypatch)
    assert len(generate_scene(model, board([], "long_video", frames=13), SETTINGS, seed=1)[0]) == 13
    assert [layout.roles.count("condition") for layout, *_ in watch.calls] == [0, 2]
    watch.calls.clear()
    film = [GivenFrames(str(media / "a.mp4"))]  # 13 of its 14 frames, 4 latent ones
    generate_scene(model, board(film, "long_video", {"overlap": 1}, frames=25), SETTINGS, seed=1)
    assert [layout.roles.count("condition") for layout, *_ in watch.calls] == [1, 2], "no clip is made that is known"


# --- classes -------------------------------------------------------------------------------------------------------


def test_a_model_of_classes_is_told_the_label_of_a_shot(tmp_path: Path) -> None:
    path = tmp_path / "classes"
    model = build_tiny_folder(path, method="fvdm", method_params={"labels": 3})
    get_method("fvdm", labels=3).attach(model.backbone)
    assert model.backbone.conditioner is not None
    model.backbone.conditioner.table.weight.data.mul_(200)  # type: ignore[operator, union-attr]
    save_model(path, model, model.settings)
    model = load_model(path)

    def made(*labels: int | None, **changes: Any) -> list[np.ndarray]:
        boards = [Storyboard("b", shots=[StoryboardShot(label=label)], seed=1, **changes) for label in labels]
        settings = GenerateSettings(steps=2, guidance=2.0)
        return [clip.frames for clip in generate_scenes(model, boards, settings, [1] * len(boards))]

    one, two, none = made(0, 2, -1)
    assert not np.array_equal(one, two) and not np.array_equal(one, none)
    assert np.abs(made(2)[0].astype(int) - two).max() <= 1
    long = Storyboard("b", shots=[StoryboardShot(label=1, frames=9)], task="long_video")  # two clips of 5 frames
    assert len(generate_scene(model, long, SETTINGS, seed=1)[0]) == 9
    with pytest.raises(StoryboardError, match="label=3; this model reads no words: give a class, 0 to 2, or -1"):
        made(3)
    with pytest.raises(StoryboardError, match="prompt and sentence are both empty"):
        made(None)
    with pytest.raises(StoryboardError, match="this model reads no words; leave story and negative out"):
        made(1, story="A story.")
    words = Storyboard("b", shots=[StoryboardShot("A square.")])
    with pytest.raises(StoryboardError, match="label=None; this model reads no words"):
        generate_scene(model, words, SETTINGS, seed=1)


def test_labels_are_for_models_of_classes(model: Model) -> None:
    for shot, message in (
        (StoryboardShot(label=1), "label=1; this model reads words: write a prompt"),
        (StoryboardShot("A square.", label=1), "a label stands in the place of words"),
        (StoryboardShot(label=-2), "label=-2; give a class, counted from 0, or -1 for none"),
    ):
        with pytest.raises(StoryboardError, match=message):
            generate_scene(model, Storyboard("b", shots=[shot]), SETTINGS, seed=1)


# --- refusals, files, the command ----------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_by_name(model: Model, media: Path) -> None:
    a, b, image = (str(media / name) for name in ("a.mp4", "b.mp4", "a.png"))
    write_video(np.zeros((2, 32, 32, 3), np.uint8), media / "two.mp4", 8)
    two = str(media / "two.mp4")
    for given, param, message in (
        ([GivenFrames(image, at=9)], ".0", r"given_frames\[0\]: at=9; the shot has frames 0 to 8, from the end -9"),
        ([GivenFrames(a, at=6)], ".0", r"at=6; a latent frame holds 4 .* 5 to 8 here.*nearest places are 5 \(-4\)"),
        ([GivenFrames(a, at=2)], ".0", r"nearest places are 1 \(-8\) and 5 \(-4\)"),
        ([GivenFrames(image), GivenFrames(b)], ".1", r"given_frames\[1\]: at=0: video frames 0 to 0, .* already"),
        ([GivenFrames(image, 6), GivenFrames(image, 8)], ".1", r"at=8: video frames 5 to 8, .* of given_frames\[0\]"),
        ([GivenFrames(a)], "", "nothing is left to generate"),
        ([GivenFrames(a, start=14)], ".0", "start=14; .*a.mp4 has frames 0 to 13"),
        ([GivenFrames(a, at=5, frames=5)], ".0", "frames=5; there are 14 in .*a.mp4 from start=0 on, and 4 in the"),
        ([GivenFrames(a, frames=6)], ".0", "frames=6; at=0 takes 1, 5, 9, ..., for example 5"),
        ([GivenFrames(a, at=1, frames=5)], ".0", "frames=5; at=1 takes 4, 8, 12, ..., for example 4"),
        ([GivenFrames(two, at=1)], ".0", "2 frames of .*two.mp4; at=1 takes 4, 8, 12, ...: give a longer video or"),
        ([GivenFrames(image, frames=4)], ".0", "leave them out for an image"),
        ([GivenFrames("")], ".0", "path is empty"),
        ([GivenFrames(a, frames=0)], ".0", "frames=0; give at least 1"),
        ([GivenFrames(str(media / "no.mp4"))], ".0", "no.mp4: not a readable video"),
    ):
        with pytest.raises(StoryboardError, match=message) as caught:
            generate_scene(model, board(given), SETTINGS, seed=0)
        assert caught.value.param == f"shots.0.given_frames{param}"
        assert str(caught.value).startswith("storyboard 'b', shot 0: given_frames")


def test_what_contradicts_given_frames_is_refused(model: Model, media: Path) -> None:
    image = str(media / "a.png")
    given = [GivenFrames(image)]
    more = board(given)
    more.shots.append(StoryboardShot("More."))
    for asked, message in (
        (board(given, first_frame=image), "both first_frame and given_frames are set"),
        (board(given, given=image), "both given and given_frames are set"),
        (board(given, "progressive"), "task progressive: given_frames does not go with it; give first_frame"),
        (board(given, "autoregressive"), "given_frames does not go with task autoregressive"),
        (board([GivenFrames(image, at=-1)], "diagonal"), r"give the first ones only \(at: 0\)"),
        (board(given, plan={"lag": 1}), "the plan of task 'any_frame' takes no lag"),
        (board(given, plan={"context_level": 2}), "context_level is 2, expected 0 to 1"),
        (board(given, "long_video"), "the shot has 9 frames, this model's clips have 9; ask for more"),
        (board(given, "long_video", {"overlap": 3}, frames=17), "overlap is 3, expected 1 to 2 of the clip's 3"),
        (board(given, "long_video", {"overlap": "a"}, frames=17), "plan={'overlap': 'a'}|plan={'clip': 3"),
        (more, "a shot with given frames is made alone; independent=true"),
    ):
        with pytest.raises(StoryboardError, match=message):
            generate_scene(model, asked, SETTINGS, seed=0)
    alone, cuts = generate_scene(model, more, SETTINGS, seed=0, independent=True)
    assert len(alone) == 18 and cuts == [9]


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("lct", "the frames of a shot share their noise level; give a whole shot"),
        ("fca", "one noise level for a whole clip"),
        ("aid", "it was trained for tvp alone"),
        ("tic_ft", "one noise level for a whole clip"),
        ("svd", "one noise level for a whole clip"),
    ],
)
def test_methods_that_hold_no_frames_say_why(media: Path, method: str, reason: str) -> None:
    model: Any = SimpleNamespace(
        settings=SimpleNamespace(method=method, method_params={}, backbone="wan", frames_per_shot=9),
        codec=SimpleNamespace(frame_step=4),
    )
    with pytest.raises(StoryboardError, match=f"method '{method}' holds no frames inside a shot: .*{reason}") as caught:
        generate_scene(model, board([GivenFrames(str(media / "a.png"))]), SETTINGS, seed=0)
    assert caught.value.param == "shots.0.given_frames"


def test_the_command_makes_what_files_ask_for(folder: Path, media: Path, tmp_path: Path) -> None:
    (media / "boards.yaml").write_text(
        """
storyboards:
  - name: between
    shots: [{prompt: A, frames: 13, given_frames: [{path: a.mp4, start: -5}, {path: b.mp4, at: -4}]}]
  - name: long
    task: long_video
    plan: {overlap: 1}
    shots: [{prompt: A, frames: 17, given_frames: [{path: a.png}, {path: b.png, at: -1}]}]
  - name: bad
    shots: [{prompt: A, given_frames: [{path: a.mp4, at: 3}]}]
"""
    )
    boards = load_storyboards([media / "boards.yaml"])
    assert [Path(path).name for path in boards[0].media()] == ["a.mp4", "b.mp4"]
    assert all(
        Path(path).is_absolute() and Storyboard.from_dict(one.to_dict()) == one
        for one in boards
        for path in one.media()
    )
    report = run_sample(
        SampleConfig(model=folder, storyboards=media / "boards.yaml", out=tmp_path, steps=2, min_side=0)
    )
    assert (report.made, report.failed) == (2, 1)
    assert [record.get("frames") for record in report.records] == [13, 17, None]
    assert "storyboard 'bad', shot 0: given_frames[0]: at=3; a latent frame holds 4" in report.records[2]["error"]
    assert len(read_video(tmp_path / "long.mp4")[0]) == 17
