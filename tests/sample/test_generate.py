"""Whole scenes from a tiny model folder: against a naive diffusers loop, and what shots, seeds and media decide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from PIL import Image

from models.folder import Model, load_model
from models.layout import shots_layout
from models.noise import base_levels, noise_plan
from models.text import null_text
from models.tiny import build_tiny_folder
from sample.abilities import largest_scene, starts_from_image
from sample.generate import GenerateSettings, generate_scene, generate_scenes
from sample.guidance import Guidance
from sample.sampler import sample
from sample.storyboard import Storyboard, StoryboardError, StoryboardShot, derive_seed
from sample.video_io import write_video

SETTINGS = GenerateSettings(steps=3, guidance=2.0)
BOARD = Storyboard("two", "[Story] A walk.", [StoryboardShot("One goes.", "A walks."), StoryboardShot("One comes.")])
SINGLE = Storyboard("one", shots=[StoryboardShot(sentence="A red circle grows.")])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for method in ("fvdm", "lct"):
        model = build_tiny_folder(root / method, method=method, text_length=96)
        with torch.no_grad():  # untrained output layers are small; larger ones let differences show in the pixels
            model.backbone.transformer.proj_out.weight.mul_(8)
        model.backbone.transformer.save_pretrained(root / method / "transformer")
    return {method: root / method for method in ("fvdm", "lct")}


@pytest.fixture(scope="module")
def lct(folders: dict[str, Path]) -> Model:
    return load_model(folders["lct"])


@pytest.fixture(scope="module")
def fvdm(folders: dict[str, Path]) -> Model:
    return load_model(folders["fvdm"])


def test_plain_t2v_equals_a_naive_loop_over_plain_diffusers(tmp_path: Path) -> None:
    fvdm = build_tiny_folder(tmp_path / "model", method="fvdm", text_length=96)
    steps, scale, shape = 6, 3.0, (2, 4, 3, 4, 4)
    text = torch.randn(2, 96, fvdm.text.dim, generator=torch.Generator().manual_seed(0))
    null = null_text(fvdm.text, 96).expand(2, -1, -1)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    layout = shots_layout([3])
    plan = noise_plan(layout, base_levels(steps, shift=fvdm.settings.level_shift), "uniform")
    ours = sample(
        fvdm.backbone, layout, plan, text, shape=shape, generator=generators,
        guidance=Guidance([("text", scale)]), null={"text": null},
    )  # fmt: skip

    transformer = WanTransformer3DModel.from_pretrained(tmp_path / "model" / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "model" / "scheduler")
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1].tolist())
    x = torch.stack([torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    with torch.no_grad():
        for time in scheduler.timesteps:
            conditional = transformer(x, time.expand(2), text, return_dict=False)[0]
            unconditional = transformer(x, time.expand(2), null, return_dict=False)[0]
            velocity = unconditional + scale * (conditional - unconditional)
            x = scheduler.step(velocity, time, x, return_dict=False)[0]
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)
    assert x.std() > 0.1


def test_a_scene_has_its_frames_and_cuts(lct: Model) -> None:
    board = replace(BOARD, shots=[replace(BOARD.shots[0], frames=9), BOARD.shots[1], BOARD.shots[1]])
    frames, cuts = generate_scene(lct, board, SETTINGS, seed=0)
    assert frames.shape == (9 + 5 + 5, 32, 32, 3) and frames.dtype == np.uint8 and cuts == [9, 14]
    assert frames.std() > 1


def test_seeds_repeat_and_change_a_scene(lct: Model) -> None:
    first, _ = generate_scene(lct, BOARD, SETTINGS, seed=1)
    again, _ = generate_scene(lct, BOARD, SETTINGS, seed=1)
    other, _ = generate_scene(lct, BOARD, SETTINGS, seed=2)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    pinned = replace(BOARD, shots=[replace(shot, seed=5 + i) for i, shot in enumerate(BOARD.shots)])
    assert np.array_equal(generate_scene(lct, pinned, SETTINGS, 1)[0], generate_scene(lct, pinned, SETTINGS, 2)[0])


def test_a_batch_gives_each_scene_what_it_gets_alone(lct: Model) -> None:
    boards = [replace(BOARD, name=f"b{i}", story=f"[Story] Walk {i}.") for i in range(3)]
    together = generate_scenes(lct, boards, SETTINGS, [7, 8, 9])
    for board, seed, clip in zip(boards, (7, 8, 9), together, strict=True):
        alone, cuts = generate_scene(lct, board, SETTINGS, seed)
        difference = np.abs(alone.astype(int) - clip.frames)
        assert difference.max() <= 1 and cuts == clip.cuts  # matrix products of another batch size round differently
    assert not np.array_equal(together[0].frames, together[1].frames)
    with pytest.raises(ValueError, match="one shape"):
        generate_scenes(lct, [BOARD, SINGLE], SETTINGS, [0, 0])


def test_shots_of_a_scene_see_one_another_and_independent_ones_do_not(lct: Model) -> None:
    changed = replace(BOARD, shots=[BOARD.shots[0], replace(BOARD.shots[1], prompt="A dog barks loudly at night.")])

    def first_shot(board: Storyboard, independent: bool) -> np.ndarray:
        return generate_scene(lct, board, SETTINGS, seed=3, independent=independent)[0][:5]

    assert np.array_equal(first_shot(BOARD, True), first_shot(changed, True))
    assert not np.array_equal(first_shot(BOARD, False), first_shot(changed, False))


def test_scene_guidance_amplifies_the_other_shots(lct: Model, fvdm: Model) -> None:
    plain = generate_scene(lct, BOARD, SETTINGS, seed=3)[0]
    alone = generate_scene(lct, BOARD, SETTINGS, seed=3, independent=True)[0]
    guided = generate_scene(lct, BOARD, replace(SETTINGS, scene_guidance=2.0), seed=3)[0]
    assert not np.array_equal(guided, plain) and not np.array_equal(guided, alone)
    ignored = generate_scene(lct, BOARD, replace(SETTINGS, scene_guidance=0.0), seed=3)[0]
    np.testing.assert_array_equal(ignored, alone, "scale 0: as if there were no other shots")
    own = replace(BOARD, shots=BOARD.shots[:1])
    for scale in (None, 4.0):  # a lone shot has no others
        settings = replace(SETTINGS, scene_guidance=scale)
        np.testing.assert_array_equal(generate_scene(lct, own, settings, seed=3)[0], alone[: len(alone) // 2])
        np.testing.assert_array_equal(generate_scene(lct, BOARD, settings, seed=3, independent=True)[0], alone)
    with pytest.raises(StoryboardError, match="scene_guidance=2: a model of method 'fvdm' makes one shot") as caught:
        generate_scene(fvdm, SINGLE, replace(SETTINGS, scene_guidance=2.0), seed=3)
    assert caught.value.param == "scene_guidance"


def test_an_independent_shot_is_the_shot_made_alone(lct: Model) -> None:
    frames, cuts = generate_scene(lct, BOARD, SETTINGS, seed=3, independent=True)
    assert cuts == [5]
    for index in range(2):
        shot = replace(BOARD.shots[index], seed=derive_seed(3, index))
        alone, _ = generate_scene(lct, replace(BOARD, shots=[shot]), SETTINGS, seed=99)
        assert np.abs(frames[5 * index : 5 * index + 5].astype(int) - alone).max() <= 1


def test_texts_reach_the_pixels_and_the_setting_chooses_which(lct: Model) -> None:
    def make(board: Storyboard, text: str = "scene") -> np.ndarray:
        return generate_scene(lct, board, replace(SETTINGS, text=text), seed=0)[0]

    base = make(BOARD)
    other_story = replace(BOARD, story="[Story] A long and stormy night.")
    assert not np.array_equal(base, make(other_story))
    assert not np.array_equal(base, make(BOARD, "sentence"))
    assert np.array_equal(make(BOARD, "sentence"), make(other_story, "sentence"))
    assert not np.array_equal(base, make(replace(BOARD, negative="A blur.")))


def test_given_shots_come_back_untouched_and_change_the_others(lct: Model, tmp_path: Path) -> None:
    picture, film = np.zeros((40, 60, 3), np.uint8), np.full((7, 32, 32, 3), 200, np.uint8)
    picture[:, :30] = (200, 40, 40)
    Image.fromarray(picture).save(tmp_path / "a.png")
    write_video(film, tmp_path / "a.mp4", 8)
    results = {}
    for name, length in (("a.png", 1), ("a.mp4", 5)):
        board = replace(BOARD, shots=[replace(BOARD.shots[0], given=str(tmp_path / name)), BOARD.shots[1]])
        frames, cuts = generate_scene(lct, board, SETTINGS, seed=3)
        assert len(frames) == length + 5 and cuts == [length]
        results[name] = frames[length:]
    assert np.abs(frames[:5].astype(int) - 200).max() <= 2, "the film as it was given"
    assert not np.array_equal(results["a.png"], results["a.mp4"])


def test_a_given_first_frame_is_kept(fvdm: Model, tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32, 3), 220, np.uint8)).save(tmp_path / "light.png")
    Image.fromarray(np.full((32, 32, 3), 30, np.uint8)).save(tmp_path / "dark.png")
    clips = []
    for name in ("light.png", "dark.png"):
        board = replace(SINGLE, shots=[replace(SINGLE.shots[0], first_frame=str(tmp_path / name))])
        clips.append(generate_scene(fvdm, board, SETTINGS, seed=3)[0])
        image = torch.tensor(np.asarray(Image.open(tmp_path / name))).permute(2, 0, 1)[None, :, None] / 127.5 - 1
        kept = fvdm.codec.decode(fvdm.codec.normalize(fvdm.codec.encode(image)[0]))[0, :, 0].clamp(-1, 1)
        expected = ((kept + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        assert np.abs(clips[-1][0].astype(int) - expected).max() <= 1
    assert not np.array_equal(clips[0][1:], clips[1][1:])


def test_progress_is_told_over_the_whole_run(lct: Model) -> None:
    calls: list[tuple[int, int]] = []
    uneven = replace(BOARD, shots=[replace(BOARD.shots[0], frames=9), BOARD.shots[1]])
    generate_scene(lct, uneven, SETTINGS, 0, independent=True, callback=lambda k, total: calls.append((k, total)))
    assert calls == [(k, 6) for k in range(1, 7)]


@pytest.mark.parametrize(
    ("board", "param", "word"),
    [
        (BOARD, "shots.0.prompt", "independent=true"),
        (replace(BOARD, shots=[replace(BOARD.shots[0], given="no.mp4"), BOARD.shots[1]]), "shots.0.given", "no.mp4"),
        (replace(SINGLE, shots=[StoryboardShot("x" * 200)]), "shots.0.prompt", "96"),
        (replace(SINGLE, negative="x" * 200), "negative", "96"),
    ],
)
def test_what_the_model_cannot_make_is_refused(fvdm: Model, board: Storyboard, param: str, word: str) -> None:
    with pytest.raises(StoryboardError, match=word) as caught:
        generate_scene(fvdm, board, SETTINGS, seed=0)
    assert caught.value.param == param


def test_what_a_method_offers(lct: Model, fvdm: Model) -> None:
    assert (largest_scene(lct.settings), starts_from_image(lct.settings)) == (9, False)
    assert (largest_scene(fvdm.settings), starts_from_image(fvdm.settings)) == (1, True)
