"""FVDM's tasks from a storyboard: each is the method's layout and plan, from the latents of what it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.folder import Model
from models.methods import get_method
from models.noise import base_levels
from models.tiny import build_tiny_folder
from pipelines.storyboards import load_storyboards
from sample import generate
from sample.generate import GenerateSettings, generate_scene
from sample.storyboard import FRAME_TASKS, Storyboard, StoryboardError, StoryboardShot
from sample.video_io import fit_frames, read_image, read_video
from tests.sample.film import write_film

METHOD, SETTINGS = get_method("fvdm"), GenerateSettings(steps=3, guidance=1.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return build_tiny_folder(tmp_path_factory.mktemp("fvdm") / "model", method="fvdm", frames_per_shot=9)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_film(tmp_path_factory.mktemp("film"), frames=7)


def board(task: str | None, film: Path | None, **options: Any) -> Storyboard:
    shot = StoryboardShot("A square.", first_frame=str(film or ""), **options.pop("shot", {}))
    return Storyboard("b", shots=[shot], task=task, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "plan", "still", "givens"),
    [
        ("edit", {"edit_level": 0.6}, None, {"frames": [0, 1]}),
        ("noisy_frames", {"multipliers": [0.3]}, 1, {"frames": [0]}),
        ("progressive", {}, 9, {}),
        ("progressive_min", {"slope": 0.4}, 9, {}),
        ("diagonal", {"lag": 2}, 1, {"head": 1}),
    ],
)
def test_a_storyboard_asks_for_a_task_of_its_method(model, film, monkeypatch, task, plan, still, givens) -> None:
    calls = []

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((args, kwargs))
        return real(*args, **kwargs)

    real = generate.sample
    monkeypatch.setattr(generate, "sample", watched)
    path = film if task == "edit" else film.with_suffix(".png")
    frames, _ = generate_scene(model, board(task, path, plan=plan), SETTINGS, seed=1)
    (((_, layout, levels, _), options),) = calls
    # seven frames of a film are five of the form 4k+1, which are two latent ones; else the shot has its usual length
    count = 2 if task == "edit" else 3
    assert layout == METHOD.layout_for_task(task, [count], **givens)
    assert torch.equal(levels, METHOD.plan(layout, base_levels(3, model.settings.level_shift), task, **plan))
    pixels = read_video(film)[0][:5] if still is None else read_image(path)[None].repeat(still, axis=0)
    video = torch.tensor(fit_frames(pixels, 32, 32)).permute(3, 0, 1, 2)[None] / 127.5 - 1
    latents = model.codec.normalize(model.codec.encode(video)[0])
    given = options["given"][:, :, : latents.shape[2]]
    torch.testing.assert_close(given, latents, atol=1e-5, rtol=1e-5)
    assert frames.shape == (5 if task == "edit" else 9, 32, 32, 3)


def test_an_edit_at_a_low_level_is_near_the_film(model, film) -> None:
    near, far = (
        generate_scene(model, board("edit", film, plan={"edit_level": level}), SETTINGS, seed=1)[0].astype(float)
        for level in (0.001, 1.0)
    )
    latents = model.codec.encode(torch.tensor(read_video(film)[0][:5]).permute(3, 0, 1, 2)[None] / 127.5 - 1)[0]
    film_again = (model.codec.decode(latents)[0].clamp(-1, 1).permute(1, 2, 3, 0).numpy() + 1) * 127.5
    assert np.abs(near - film_again).mean() < 0.5 * np.abs(far - film_again).mean()


def test_a_diagonal_plan_needs_no_media_and_goes_alone_as_well(model) -> None:
    made, _ = generate_scene(model, board("diagonal", None), SETTINGS, seed=1)
    alone, _ = generate_scene(model, board("diagonal", None, shot={"seed": None}), SETTINGS, seed=1, independent=True)
    assert made.shape == (9, 32, 32, 3) and np.array_equal(made, alone)
    assert not np.array_equal(made, generate_scene(model, board(None, None), SETTINGS, seed=1)[0])


def test_what_does_not_fit_a_task_is_refused_by_name(model, film, tmp_path) -> None:
    two = board("edit", film)
    two.shots.append(StoryboardShot("More."))
    lct = build_tiny_folder(tmp_path / "lct", method="lct")
    for asked, made, message in (
        (two, model, "task edit: it makes one shot, got 2"),
        (board("progressive", None), model, "first_frame is empty; it names the image to start from"),
        (board(None, film, plan={"lag": 1}), model, "plan={'lag': 1} is for a task of edit, noisy_frames"),
        (board("edit", film, plan={"lag": 1}), model, "the plan of task 'edit' takes no lag"),
        (board("edit", film, plan={"speed": 1}), model, "plan={'speed': 1}: .*speed"),
        (board("edit", film, history=2), model, "history=2 is for shots made one after another"),
        (board("diagonal", None), lct, "task=diagonal: method 'lct' has no task 'diagonal'"),
    ):
        with pytest.raises(StoryboardError, match=message):
            generate_scene(made, asked, SETTINGS, seed=0)


def test_tasks_come_from_files(film, tmp_path) -> None:
    for task in FRAME_TASKS:
        (tmp_path / "b.yaml").write_text(
            f"task: {task}\nplan: {{slope: 0.5}}\nshots: [{{prompt: A, first_frame: {film}}}]"
        )
        (read,) = load_storyboards([tmp_path / "b.yaml"])
        assert (read.task, read.plan) == (task, {"slope": 0.5}) and Storyboard.from_dict(read.to_dict()) == read
