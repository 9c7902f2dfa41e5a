"""Shots made from references (TIC-FT): against the method's own recipe run on plain diffusers, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from PIL import Image

from models.folder import Model, load_model
from models.scene import Reference
from models.text import null_text
from models.tiny import build_tiny_folder
from sample.abilities import largest_scene, starts_from_image
from sample.generate import GenerateSettings, generate_scene
from sample.storyboard import Storyboard, StoryboardError, StoryboardShot
from sample.video_io import read_image, read_video, write_video

SETTINGS = GenerateSettings(steps=3, guidance=2.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("references")
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(root / f"{name}.png")
        write_video(np.stack([np.roll(pixels, 4 * t, axis=1) for t in range(11)]), root / f"{name}.mp4", 8)
    return root


@pytest.fixture(scope="module")
def model(root: Path) -> Model:
    made = build_tiny_folder(
        root / "model", method="tic_ft", method_params={"buffer_frames": 1}, text_length=48, frames_per_shot=9
    )
    with torch.no_grad():  # untrained output layers are small; larger ones let differences show in the pixels
        made.backbone.transformer.proj_out.weight.mul_(8)
    made.backbone.transformer.save_pretrained(root / "model" / "transformer")
    return load_model(root / "model")


def board(root: Path, *references: str, **shot) -> Storyboard:
    named = [Reference(role, str(root / path)) for role, path in (one.split(":") for one in references)]  # type: ignore[arg-type]
    return Storyboard("pair", shots=[StoryboardShot(sentence="It moves.", references=named, **shot)])


def test_it_is_the_recipe_on_plain_diffusers(model: Model, root: Path) -> None:
    """Spec: hold conditions, buffers at min(s, cap), one scalar time, guidance over text, targets alone decoded."""
    told: list[torch.Tensor] = []
    hook = model.backbone.register_forward_pre_hook(lambda _, args: told.append(args[1]))
    frames, cuts = generate_scene(model, board(root, "image:a.png", seed=4), SETTINGS, seed=0)
    hook.remove()
    transformer = WanTransformer3DModel.from_pretrained(root / "model" / "transformer")
    image = torch.tensor(np.asarray(Image.open(root / "a.png"))).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    prefix = model.codec.normalize(model.codec.encode(image.expand(-1, -1, 5, -1, -1))[0])  # 2 latent frames
    # noise is drawn segment by segment: condition, buffer, target
    generator = torch.Generator().manual_seed(4)
    noise = torch.cat([torch.randn(4, n, 4, 4, generator=generator) for n in (1, 1, 3)], dim=1)[None]
    s = [1.0, *(3 * u / (1 + 2 * u) for u in (2 / 3, 1 / 3)), 0.0]
    x = noise.clone()
    x[:, :, 0], x[:, :, 1] = prefix[:, :, 0], 0.5 * prefix[:, :, 1] + 0.5 * noise[:, :, 1]
    text = torch.nn.functional.pad(model.text.encode(["It moves."])[0], (0, 0, 0, 48))[None, :48]
    torch.testing.assert_close(torch.stack(told), torch.tensor(s[:-1])[:, None].expand(-1, 2))  # two branches
    for now, after in zip(s, s[1:], strict=False):
        with torch.no_grad():
            time = torch.tensor([1000 * now])
            plain, null = (
                transformer(x, time, t, return_dict=False)[0] for t in (text, null_text(model.text, 48)[None])
            )
        v = null + 2.0 * (plain - null)
        x[:, :, 1] += (min(after, 0.5) - min(now, 0.5)) * v[:, :, 1]
        x[:, :, 2:] += (after - now) * v[:, :, 2:]
    video = model.codec.decode(x[:, :, 2:])[0].clamp(-1, 1)
    expected = ((video + 1) * 127.5).round().permute(1, 2, 3, 0).numpy()
    assert frames.shape == (9, 32, 32, 3) and cuts == [] and frames.std() > 1
    assert np.abs(frames - expected).max() <= 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["portrait:a.png", "place:b.png"], ["portrait:b.png", "place:b.png"]),
        (["keyframe:a.png", "keyframe:b.png"], ["keyframe:b.png", "keyframe:a.png"]),
        (["source:a.mp4"], ["source:b.mp4"]),
        (["action:a.mp4", "first_frame:b.png"], ["action:b.mp4", "first_frame:b.png"]),
    ],
)
def test_every_task_makes_the_target_alone_and_follows_its_references(model, root, one, other) -> None:
    made = [generate_scene(model, board(root, *roles, frames=5), SETTINGS, seed=1)[0] for roles in (one, one, other)]
    assert made[0].shape == (5, 32, 32, 3) and np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])


def test_each_reference_is_encoded_alone_and_stands_in_its_place(model: Model, root: Path) -> None:
    seen: list[torch.Tensor] = []
    hook = model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    generate_scene(model, board(root, "action:a.mp4", "first_frame:b.png", frames=5), GenerateSettings(1, 1.0), seed=1)
    hook.remove()
    clip, image = read_video(root / "a.mp4")[0][:9], read_image(root / "b.png")[None]
    expected = [
        model.codec.normalize(model.codec.encode(torch.tensor(one).permute(3, 0, 1, 2)[None] / 127.5 - 1)[0])[0]
        for one in (clip, image)
    ]
    torch.testing.assert_close(seen[0][:, :4], torch.cat(expected, dim=1), atol=1e-5, rtol=1e-5)


def test_seeds_change_a_shot_made_from_references(model: Model, root: Path) -> None:
    first, other = (generate_scene(model, board(root, "image:a.png"), SETTINGS, seed=s)[0] for s in (1, 2))
    assert not np.array_equal(first, other)


def test_what_the_model_cannot_make_of_its_references_is_refused(model: Model, root: Path) -> None:
    def refuse(bad: Storyboard, word: str, by: Model = model) -> None:
        with pytest.raises(StoryboardError, match=word) as caught:
            generate_scene(by, bad, SETTINGS, seed=0)
        assert caught.value.param == "shots.0.references"

    refuse(board(root), "has no task for references")
    refuse(board(root, "source:a.png"), "latent frames, but tic_ft needs 2")
    refuse(board(root, "image:none.png"), "none.png")
    refuse(board(root, "image:a.png", first_frame="x.png"), "leave given, first_frame and given_frames out")
    two = board(root, "image:a.png")
    refuse(replace(two, shots=two.shots * 2), "independent=true")
    assert len(generate_scene(model, replace(two, shots=two.shots * 2), SETTINGS, 0, independent=True)[1]) == 1
    plain = build_tiny_folder(root / "lct", method="lct", text_length=48)
    refuse(board(root, "image:a.png"), "method 'lct' composes a shot of images with roles portrait and place", plain)
    fvdm = build_tiny_folder(root / "fvdm", method="fvdm", text_length=48)
    refuse(board(root, "image:a.png"), "method 'fvdm' reads no references", fvdm)


def test_what_the_method_offers(model: Model) -> None:
    assert (largest_scene(model.settings), starts_from_image(model.settings)) == (1, False)


def test_references_travel_with_the_storyboard(root: Path) -> None:
    one = board(root, "portrait:a.png", "place:b.png")
    assert Storyboard.from_dict(one.to_dict()) == one
    assert one.media() == [str(root / "a.png"), str(root / "b.png")]
    assert one.fingerprint() != board(root, "place:b.png", "portrait:a.png").fingerprint()
