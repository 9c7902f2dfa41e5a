"""Storyboards made shot by shot, from words and media to pixels: what decides a shot, and what is refused and where."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.folder import Model, load_model
from models.scene import Reference
from models.tiny import build_tiny_folder
from models.tiny_cogvideox import build_tiny_cogvideox_folder
from sample.abilities import check_task
from sample.generate import GenerateSettings, generate_scene, generate_scenes, scene_shape
from sample.storyboard import Storyboard, StoryboardError, StoryboardShot
from sample.video_io import write_video

CAUSAL = {"attention_rule": "group_causal", "context_level": 0.2}
SETTINGS = GenerateSettings(steps=2, guidance=2.0, task="autoregressive")
BOARD = Storyboard(
    "three",
    "[Story] A walk.",
    [
        StoryboardShot("[SHOT CUT] One goes."),
        StoryboardShot("[SHOT CUT] One comes.", frames=1),
        StoryboardShot("Rest."),
    ],
)


def with_shot(board: Storyboard, index: int, **changes) -> Storyboard:
    shots = list(board.shots)
    shots[index] = replace(shots[index], **changes)
    return replace(board, shots=shots)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("in_turn")
    for name, value in (("dark.png", 30), ("light.png", 220)):
        Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(root / name)
    write_video(np.full((5, 32, 32, 3), 200, np.uint8), root / "film.mp4", 8)
    return root


def open_model(folder: Path, method: str, **params) -> Model:
    made = build_tiny_folder(folder, method=method, method_params=params, text_length=96)
    with torch.no_grad():  # untrained output layers are small; larger ones let differences show in the pixels
        made.backbone.transformer.proj_out.weight.mul_(8)
    made.backbone.transformer.save_pretrained(folder / "transformer")
    return load_model(folder)


@pytest.fixture(scope="module")
def causal(root: Path) -> Model:
    return open_model(root / "causal", "lct", **CAUSAL)


@pytest.fixture(scope="module")
def full(root: Path) -> Model:
    return open_model(root / "full", "lct")


def test_each_shot_sees_what_it_is_told_to(causal: Model) -> None:
    frames, cuts = generate_scene(causal, BOARD, SETTINGS, seed=3)
    first, third = frames[:5], frames[6:]
    assert len(frames) == 11 and cuts == [5, 6] and frames.std() > 1

    def make(board: Storyboard, settings: GenerateSettings = SETTINGS) -> np.ndarray:
        return generate_scene(causal, board, settings, seed=3)[0]

    assert np.array_equal(make(replace(BOARD, task="autoregressive"), GenerateSettings(2, 2.0)), frames)
    changed = make(with_shot(BOARD, 1, prompt="[SHOT CUT] Another one."))
    assert np.array_equal(changed[:5], first), "what comes later changes nothing"
    assert not np.array_equal(changed[6:], third)
    # a history of the one before, said by the run, the storyboard or the shot
    nearest = make(BOARD, replace(SETTINGS, history=1))
    assert np.array_equal(nearest[:6], frames[:6]) and not np.array_equal(nearest[6:], third)
    assert np.array_equal(make(replace(BOARD, history=1)), nearest)
    assert np.array_equal(make(with_shot(BOARD, 2, history=[1])), nearest)
    # a shot that sees only the first does not know the second
    chosen = [with_shot(with_shot(BOARD, 2, history=[0]), 1, prompt=p) for p in ("One comes.", "Another one.")]
    one, other = (make(board) for board in chosen)
    assert np.array_equal(one[6:], other[6:]) and not np.array_equal(one[5], other[5])
    # the first shot is what a scene of it alone is, and made by themselves all are what the baseline says
    assert np.array_equal(make(replace(BOARD, shots=BOARD.shots[:1]), GenerateSettings(2, 2.0)), first)
    alone = [
        generate_scene(causal, board, settings, seed=3, independent=True)[0]
        for board, settings in ((BOARD, GenerateSettings(2, 2.0)), (replace(BOARD, history=1), SETTINGS))
    ]
    assert np.array_equal(*alone) and np.array_equal(alone[0][:5], first)


def test_scene_guidance_reaches_the_shots_that_see_others(causal: Model) -> None:
    plain, cuts = generate_scene(causal, BOARD, SETTINGS, seed=1)
    guided, _ = generate_scene(causal, BOARD, replace(SETTINGS, scene_guidance=3.0), seed=1)
    assert np.array_equal(guided[: cuts[0]], plain[: cuts[0]]), "the first shot sees none"
    assert not np.array_equal(guided[cuts[0] : cuts[1]], plain[cuts[0] : cuts[1]])


def test_a_batch_of_scenes_and_its_progress(causal: Model) -> None:
    calls: list[tuple[int, int]] = []
    other = replace(with_shot(BOARD, 0, prompt="[SHOT CUT] Another one."), name="other")
    clips = generate_scenes(
        causal, [BOARD, other], SETTINGS, [3, 4], callback=lambda done, total: calls.append((done, total))
    )
    assert calls == [(k, 6) for k in range(1, 7)]
    for clip, board, seed in zip(clips, (BOARD, other), (3, 4), strict=True):
        alone = generate_scene(causal, board, SETTINGS, seed)[0]
        assert np.abs(clip.frames.astype(int) - alone).max() <= 1
    settings = causal.settings
    shapes = {
        scene_shape(board, settings)
        for board in (
            BOARD,
            replace(BOARD, history=2),
            replace(BOARD, task="extension"),
            with_shot(BOARD, 2, history=[1]),
        )
    }
    assert len(shapes) == 4 and scene_shape(other, settings) in shapes
    with pytest.raises(ValueError, match="storyboards of one shape, got 2"):
        generate_scenes(causal, [BOARD, replace(other, history=2)], SETTINGS, [3, 4])


def test_a_given_film_goes_on_without_a_cut(causal: Model, root: Path) -> None:
    results = []
    for media in ("film.mp4", "dark.png"):
        shots = [
            StoryboardShot("One goes.", given=str(root / media)),
            StoryboardShot("It goes on."),
            StoryboardShot("On."),
        ]
        frames, cuts = generate_scene(causal, Storyboard("on", "A walk.", shots, task="extension"), SETTINGS, seed=3)
        assert cuts == [], "one shot that goes on has no cuts"
        results.append(frames)
    assert np.abs(results[0][:5].astype(int) - 200).max() <= 2 and len(results[0]) == 15 and len(results[1]) == 11
    assert not np.array_equal(results[0][5:], results[1][1:])


def test_a_shot_composed_of_who_and_where(full: Model, causal: Model, root: Path) -> None:
    def board(*names: str) -> Storyboard:
        roles = ("portrait", "place")
        references = [Reference(role, str(root / name)) for role, name in zip(roles, names, strict=False)]  # type: ignore[arg-type]
        return Storyboard("composed", shots=[StoryboardShot("One goes.", references=references)])

    settings = GenerateSettings(2, 2.0)
    for model in (full, causal):
        seen: list[torch.Tensor] = []
        hook = model.backbone.register_forward_pre_hook(lambda _, args, note=seen: note.append(args[:2]))
        frames, cuts = generate_scene(model, board("dark.png", "light.png"), settings, seed=3)
        hook.remove()
        assert frames.shape == (5, 32, 32, 3) and cuts == []
        level = model.settings.method_params.get("context_level", 0.1)
        for x, levels in seen:
            assert levels.shape[1] == 4 and torch.allclose(levels[:, :2], torch.tensor(level))
            assert torch.equal(x[:, :, :2], seen[0][0][:, :, :2]), "images keep their noise"
        swapped, _ = generate_scene(model, board("light.png", "dark.png"), settings, seed=3)
        plain, _ = generate_scene(model, board(), settings, seed=3)
        assert not np.array_equal(frames, swapped) and not np.array_equal(frames, plain)
    for references, word in (
        ([Reference("source", str(root / "film.mp4"))], "roles portrait and place"),
        ([Reference("portrait", str(root / "dark.png"))] * 9, "at most 8"),
    ):
        with pytest.raises(StoryboardError, match=word) as caught:
            generate_scene(full, with_shot(board(), 0, references=references), settings, seed=0)
        assert caught.value.param == "shots.0.references"


@pytest.mark.parametrize("null_text", ["all", "shot"])
@pytest.mark.parametrize("form", ["prefix", "group"])
def test_guidance_goes_without_the_same_texts_together_and_in_turn(root: Path, form: str, null_text) -> None:
    """A shot behind a given one, in one context and behind a cache: one rule says what the passes without text see."""
    film, frames = root / "five.mp4", 5
    if form == "prefix":
        model = open_model(root / f"{form}-{null_text}", "lct", **CAUSAL)
    else:
        film, frames = root / "nine.mp4", 9
        grouped = CAUSAL | {"position_mode": "diagonal", "global_prompt": "group"}
        model = build_tiny_cogvideox_folder(
            root / f"{form}-{null_text}", text_length=24, method="lct", method_params=grouped
        )
        with torch.no_grad():
            model.backbone.transformer.proj_out.weight.mul_(8)
    write_video(np.random.default_rng(0).integers(0, 256, (frames, 32, 32, 3), np.uint8), film, 8)
    shots = [StoryboardShot("One goes.", given=str(film)), StoryboardShot("One comes.")]
    board = Storyboard("two", "A long walk.", shots)
    made = {
        (task, rule): generate_scene(model, board, GenerateSettings(2, 6.0, task=task, null_text=rule), seed=3)[0]
        for task, rule in (("auto", null_text), ("autoregressive", null_text), ("autoregressive", "all"))
    }
    together, in_turn = made["auto", null_text].astype(int), made["autoregressive", null_text].astype(int)
    assert np.abs(together - in_turn).max() <= 1 and in_turn[frames:].std() > 1
    if null_text == "shot":
        other = made["autoregressive", "all"].astype(int)
        assert np.abs(other[frames:] - in_turn[frames:]).max() > 1, "the story is not dropped"


def with_params(model: Model, params: dict[str, Any]) -> Model:
    other = copy.copy(model)
    other.settings = replace(model.settings, method_params=params)
    return other


def told_levels(model: Model, board: Storyboard, settings: GenerateSettings) -> tuple[np.ndarray, list[torch.Tensor]]:
    seen: list[torch.Tensor] = []
    hook = model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[1].clone()))
    frames, _ = generate_scene(model, board, settings, seed=3)
    hook.remove()
    return frames, seen


def test_the_level_of_what_is_seen_is_chosen_for_a_storyboard(causal: Model, full: Model, root: Path) -> None:
    """t_c as an option of the plan, where it was a setting of the model alone."""
    plan = {"context_level": 0.4}
    frames, seen = told_levels(causal, replace(BOARD, plan=plan), SETTINGS)
    history = [levels for levels in seen if len(levels) == 1]  # one branch: the passes that keep a shot
    assert len(history) == 2 and all((levels == torch.tensor(0.4)).all() for levels in history)
    other = with_params(causal, CAUSAL | plan)
    assert np.array_equal(frames, generate_scene(other, BOARD, SETTINGS, seed=3)[0])
    assert not np.array_equal(frames, generate_scene(causal, BOARD, SETTINGS, seed=3)[0])
    given = with_shot(replace(BOARD, plan=plan), 0, given=str(root / "dark.png"))
    references = [Reference("portrait", str(root / "dark.png")), Reference("place", str(root / "light.png"))]
    composed = Storyboard("composed", shots=[StoryboardShot("One goes.", references=references)], plan=plan)
    for board, held in ((given, 1), (composed, 2)):
        _, seen = told_levels(full, board, GenerateSettings(2, 2.0))
        assert all((levels[:, :held] == torch.tensor(0.4)).all() for levels in seen)
    # a shot by itself sees nothing at any level
    alone = [
        generate_scene(causal, board, SETTINGS, seed=3, independent=True)[0]
        for board in (replace(BOARD, plan=plan), BOARD)
    ]
    assert np.array_equal(*alone)


@pytest.mark.parametrize(
    ("plan", "settings", "word"),
    [
        ({"context_level": 2}, SETTINGS, "context_level is 2, expected 0 to 1"),
        ({"context_level": 0}, SETTINGS, "context_level is 0, but this model met no clean shot"),
        ({"context_level": "low"}, SETTINGS, r"plan=\{'context_level': 'low'\}"),
        ({"lag": 2}, SETTINGS, r"plan=\{'lag': 2\}: .*lag"),
        ({"context_level": 0.4}, GenerateSettings(2), "is for a task of .*autoregressive.*given shots"),
    ],
)
def test_a_plan_that_is_none_is_refused_before_anything_is_made(causal: Model, plan, settings, word) -> None:
    calls: list[int] = []
    with pytest.raises(StoryboardError, match=word) as caught:
        generate_scene(causal, replace(BOARD, plan=plan), settings, seed=0, callback=lambda done, _: calls.append(done))
    assert caught.value.param == "plan" and not calls


def test_images_as_shots_are_doubted_where_training_had_none(
    causal: Model, full: Model, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    composed = Storyboard(
        "composed", shots=[StoryboardShot("One.", references=[Reference("portrait", str(root / "dark.png"))])]
    )
    trained = with_params(full, {"single_frame_prob": 0.1})
    film = with_shot(BOARD, 0, given=str(root / "film.mp4"))
    image = with_shot(BOARD, 0, given=str(root / "dark.png"))
    for model, board, settings, doubts in (
        (full, composed, GenerateSettings(1, 1.0), True),
        (trained, composed, GenerateSettings(1, 1.0), False),
        (full, film, GenerateSettings(1, 1.0), False),
        (full, image, GenerateSettings(1, 1.0), True),
        (causal, image, replace(SETTINGS, steps=1), True),
    ):
        generate_scene(model, board, settings, seed=0)
        said = capsys.readouterr().err
        assert (f"storyboard {board.name!r}, shot 0: an image as a shot, which this model never met" in said) == doubts
        assert ("single_frame_prob=0.1 to 0.2" in said) == doubts


@pytest.mark.parametrize(
    ("changes", "settings", "param", "word"),
    [
        ({"history": 2}, GenerateSettings(2), "history", "set task to autoregressive or extension"),
        ({"history": 9}, SETTINGS, "history", "1 to 8 earlier shots"),
        ({"history": 0}, SETTINGS, "history", "1 to 8 earlier shots"),
        ({"shot": {"history": [1]}}, SETTINGS, "shots.1.history", "numbers of earlier shots: 0 to 0"),
        ({"shot": {"history": [0, 0]}}, SETTINGS, "shots.1.history", "each once"),
        ({"shot": {"history": [-1]}}, SETTINGS, "shots.1.history", "numbers of earlier shots"),
        ({"shot": {"history": [0]}}, GenerateSettings(2), "shots.1.history", "set task"),
        ({"shot": {"history": [0], "given": "a.png"}}, SETTINGS, "shots.1.history", "a given shot is not made"),
        ({"shot": {"first_frame": "a.png"}}, SETTINGS, "shots.1.first_frame", "does not go with task autoregressive"),
        ({"shot": {"references": [Reference("portrait", "a")]}}, SETTINGS, "shots.1.references", "does not go with"),
        ({"task": "extension"}, SETTINGS, "shots.1.prompt", r"prompt has '\[SHOT CUT\]', but task extension"),
    ],
)  # fmt: skip
def test_what_does_not_fit_names_its_field(causal: Model, changes, settings, param, word) -> None:
    board = with_shot(BOARD, 1, **changes.pop("shot", {}))
    with pytest.raises(StoryboardError, match=word) as caught:
        generate_scene(causal, replace(board, **changes), settings, seed=0)
    assert caught.value.param == param


def test_a_model_that_sees_all_shots_says_why_it_cannot(full: Model, causal: Model, root: Path) -> None:
    with pytest.raises(
        StoryboardError, match="needs a model of attention_rule group_causal, this one's is full"
    ) as caught:
        generate_scene(full, BOARD, SETTINGS, seed=0)
    assert caught.value.param == "task"
    check_task("autoregressive", causal.settings)
    check_task("auto", full.settings)
    with pytest.raises(ValueError, match="task=extension: method 'fvdm' has no task 'extension'|takes"):
        check_task("extension", replace(full.settings, method="fvdm", method_params={}))
    late = with_shot(BOARD, 2, given=str(root / "dark.png"))
    with pytest.raises(StoryboardError, match="comes after all that is made") as caught:
        generate_scene(causal, late, GenerateSettings(2), seed=0)
    assert caught.value.param == "shots.2.given"
    with pytest.raises(ValueError, match="history=9; a shot sees 1 to 8"):
        GenerateSettings(history=9)
