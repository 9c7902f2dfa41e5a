"""Media a sidecar refers to: encoded alone, in order, at training size; and what cannot be used is said by name."""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from models.codecs import to_video
from models.methods import get_method
from models.scene import Reference, Scene
from preprocess import unit
from preprocess.asked import Asker
from preprocess.encode import Encoder
from preprocess.outcome import Failed
from preprocess.parts import part_path, part_samples
from preprocess.references import STILL_FRAMES, SeenReference, read_reference
from preprocess.settings import ASKED, CaptionBackend, PrepareSettings
from preprocess.sources import list_sources
from preprocess.unit import Part, prepare_video
from sample.video_io import fit_frames, read_image
from tests.preprocess.runs import count_calls, records, run_here
from tests.preprocess.videos import pan, three_shots, write
from toyworld.pairs import render_reference, sample_pair, write_pair

SETTINGS = PrepareSettings(height=32, width=32, dtype="float32")


def prepare(videos: Path, encoder: Encoder, settings: PrepareSettings = SETTINGS, asker: Asker | None = None) -> Part:
    return prepare_video(list_sources([videos]).files[0], settings, encoder, videos.parent / "parts", asker=asker)


def read(reference: Reference, folder: Path) -> np.ndarray:
    """One that lies at a path from `folder`."""
    place = str(folder / reference.path)
    return read_reference(SeenReference(reference.role, reference.path, place), folder, SETTINGS)


def sample_of(videos: Path, part: Part) -> tuple[Scene, dict[str, torch.Tensor]]:
    ((_, files),) = part_samples(part_path(videos.parent / "parts", part.source["video_id"]))
    return Scene.from_json(files["json"]), load(files["safetensors"])


@pytest.mark.parametrize("task", ["multi_image", "v2v_style"])
def test_a_pair_becomes_a_scene_with_the_latents_of_its_references(task: str, tmp_path: Path, encoder: Encoder) -> None:
    pair = sample_pair(task, index=3)  # type: ignore[arg-type]
    write_pair(pair, tmp_path, size=64)
    part = prepare(tmp_path / "videos", encoder)
    assert part.source["status"] == "written", part.source["reason"]
    scene, tensors = sample_of(tmp_path / "videos", part)
    assert [one.role for one in scene.references] == [one.role for one in pair.references]
    assert (scene.story, scene.shots[0].prompt) != ("", "") and scene.captions.backend == "sidecar"
    roles, lengths = [one.role for one in scene.references], []
    for i, one in enumerate(pair.references):
        latents = tensors[f"r{i:03d}.latent_mean"]
        lengths.append(latents.shape[1])
        pixels = fit_frames(render_reference(one, 64), 32, 32)
        still = pixels.repeat(STILL_FRAMES, 0) if len(pixels) == 1 else pixels
        expected = encoder.codec.encode(to_video([still]))[0][0]
        assert latents.shape == expected.shape
        error = (latents - expected).abs().mean() / expected.std()
        assert error < (1e-3 if len(pixels) == 1 else 0.2), "a clip comes through H.264, an image does not"
    assert sum(get_method("tic_ft").condition_frames(roles, lengths)) == 5, (
        "1 and 1 + 3 frames of two images, or a clip of 5"
    )


def test_references_have_the_size_of_their_video(tmp_path: Path, encoder: Encoder) -> None:
    """Whatever theirs would be: they stand before its shot in one clip."""
    write_pair(sample_pair("multi_image", index=3), tmp_path, size=64)
    (video,) = (tmp_path / "videos").glob("*.mp4")
    write(video, [image[:48] for image in pan(1, size=96)])
    sizes = replace(SETTINGS, sizes=((32, 32), (32, 64)))
    part = prepare_video(list_sources([video]).files[0], sizes, encoder, tmp_path / "parts")
    assert part.source["status"] == "written", part.source["reason"]
    scene, tensors = sample_of(tmp_path / "videos", part)
    assert (scene.shots[0].encoded.height, scene.shots[0].encoded.width) == (32, 64)
    assert len(scene.references) == 2
    for i in range(2):
        assert tensors[f"r{i:03d}.latent_mean"].shape == (*tensors["s000.latent_mean"].shape[:2], 4, 8)


@pytest.mark.parametrize("kind", ["tar", "address"])
def test_references_in_a_tar_or_at_an_address_are_as_the_files(kind: str, tmp_path: Path, encoder: Encoder) -> None:
    """And what lies outside of it is not reached."""
    here = tmp_path / "here"
    write_pair(sample_pair("multi_image", index=3), here, size=64)
    _, true = sample_of(here / "videos", prepare(here / "videos", encoder))
    files = {path.relative_to(here).as_posix(): path.read_bytes() for path in here.rglob("*") if path.suffix != ".tar"
             and path.is_file()}  # fmt: skip
    (captions,) = (
        name for name in files if name.startswith("videos/") and name.endswith(".json") and "truth" not in name
    )
    for outside in (False, True):
        if outside:
            record = json.loads(files[captions])
            record["references"][0]["path"] = (
                f"../../../../../../..{here}/references/{next((here / 'references').iterdir()).name}"
            )
            files[captions] = json.dumps(record).encode()
        source = tmp_path / f"{outside}.tar"
        if kind == "tar":
            with tarfile.open(source, "w") as tar:
                for name, data in files.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        else:
            fs = fsspec.filesystem("memory")
            for name, data in files.items():
                fs.pipe(f"/pairs{outside}/{name}", data)
        (file,) = list_sources([source if kind == "tar" else f"memory://pairs{outside}/videos"]).files
        parts = tmp_path / f"parts{outside}"
        part = prepare_video(file, SETTINGS, encoder, parts)
        if outside:
            assert (part.source["status"], part.source["stage"]) == ("failed", "encode")
            assert "no file" in part.source["reason"] or "no such file" in part.source["reason"]
            continue
        assert part.source["status"] == "written", part.source["reason"]
        ((_, sample),) = part_samples(part_path(parts, file.video_id))
        got = load(sample["safetensors"])
        assert got.keys() == true.keys() and all(torch.equal(got[name], true[name]) for name in true)


def test_other_references_make_other_latents_though_the_pictures_stay(tmp_path: Path, encoder: Encoder) -> None:
    write_pair(sample_pair("i2v_in_context", index=3), tmp_path, size=64)
    first = sample_of(tmp_path / "videos", prepare(tmp_path / "videos", encoder))[1]
    (image,) = (tmp_path / "references").glob("*.png")
    Image.fromarray(np.full((64, 64, 3), 9, np.uint8)).save(image)
    second = sample_of(tmp_path / "videos", prepare(tmp_path / "videos", encoder))[1]
    assert torch.equal(first["s000.latent_mean"], second["s000.latent_mean"])
    assert not torch.equal(first["r000.latent_mean"], second["r000.latent_mean"])


def test_images_cover_the_training_size_and_clips_are_one_shot(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 250
    Image.fromarray(wide).save(tmp_path / "wide.png")
    frames = read(Reference("image", "wide.png"), tmp_path)
    assert frames.shape == (STILL_FRAMES, 32, 32, 3) and (frames > 200).all(), "the middle, at full height"
    noise = np.random.default_rng(0).integers(0, 256, (50, 37, 3), dtype=np.uint8)
    turned = Image.fromarray(noise)
    turned.getexif()[0x0112] = 6  # orientation: a quarter turn
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    frames = read(Reference("image", "turned.png"), tmp_path)
    sampled = fit_frames(read_image(tmp_path / "turned.png")[None], 32, 32)
    assert np.array_equal(frames[:1], sampled), "training and sampling see the same pixels"
    assert np.array_equal(read_image(tmp_path / "turned.png"), np.rot90(noise, -1))
    (tmp_path / "text.png").write_text("not an image")
    for role, name, message in (
        ("image", "none.png", "reference none.png: no such file"),
        ("image", "text.png", "reference text.png: no readable image"),
    ):
        with pytest.raises(Failed, match=message):
            read(Reference(role, name), tmp_path)  # type: ignore[arg-type]


def test_a_reference_is_given_so_no_filter_takes_it(tmp_path: Path) -> None:
    write(tmp_path / "still.mp4", [pan()[0]] * 17)
    assert read(Reference("source", "still.mp4"), tmp_path).shape == (17, 32, 32, 3)


def test_a_reference_that_is_missing_sets_the_video_aside_by_name(tmp_path: Path, encoder: Encoder) -> None:
    files = write_pair(sample_pair("i2v_in_context", index=3), tmp_path, size=64).target
    captions = json.loads(files.captions.read_text())
    os.unlink(next((tmp_path / "references").glob("*.png")))
    part = prepare(tmp_path / "videos", encoder)
    assert part.source["status"] == "failed" and "no such file beside the captions" in part.source["reason"]
    captions["references"][0]["role"] = "face"
    files.captions.write_text(json.dumps(captions))
    part = prepare(tmp_path / "videos", encoder)
    assert part.source["status"] == "failed" and "references[0].role is 'face'" in part.source["reason"]


class OneShot:
    """A vision chat model that says the same of every scene of one shot."""

    def chat(self, turns: object) -> str:
        states = [{"text": "It goes on.", "frame": 0}]
        shot = {
            "shot": 0,
            "entities": [],
            "states": states,
            "prompt": "A shot.",
            "sentence": "A shot.",
            "camera": "static camera",
        }
        return json.dumps({"entities": [], "environment": "A room", "story": "It goes on.", "shots": [shot]})


@pytest.mark.parametrize("captions", ["sidecar_or_describe", "describe", "endpoint", "transformers"])
def test_references_and_classes_are_of_every_scene_whoever_captions(
    captions: CaptionBackend, tmp_path: Path, encoder: Encoder
) -> None:
    """Also of scenes that no caption covers."""
    write(tmp_path / "videos" / "v.mp4", three_shots())
    Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(tmp_path / "who.png")
    told = {"shots": [], "label": 3, "references": [{"role": "portrait", "path": "../who.png"}]}
    (tmp_path / "videos" / "v.json").write_text(json.dumps(told))
    asked = {"caption_model": "some-vlm"} if captions in ASKED else {}
    settings = replace(SETTINGS, captions=captions, max_shots=1, **asked)
    part = prepare(tmp_path / "videos", encoder, settings, Asker(OneShot()) if asked else None)
    assert part.source["status"] == "written", part.source["reason"]
    samples = list(part_samples(part_path(tmp_path / "parts", part.source["video_id"])))
    assert len(samples) == 3
    for _, files in samples:
        scene, tensors = Scene.from_json(files["json"]), load(files["safetensors"])
        assert scene.references == [Reference("portrait", "../who.png")] and "r000.latent_mean" in tensors
        assert [shot.label for shot in scene.shots] == [3]
    assert all(json.loads(row["references"]) == told["references"] for row in part.shots)


@pytest.mark.parametrize("kind", ["local", "address"])
def test_references_of_a_list_are_as_those_of_captions(kind: str, tmp_path: Path, encoder: Encoder) -> None:
    here = tmp_path / "here"
    write_pair(sample_pair("multi_image", index=3), here, size=64)
    (video,) = (here / "videos").glob("*.mp4")
    captions = json.loads(video.with_suffix(".json").read_text())
    _, true = sample_of(here / "videos", prepare(here / "videos", encoder))
    references = [one | {"path": one["path"].removeprefix("../")} for one in captions.pop("references")]
    video.with_suffix(".json").write_text(json.dumps(captions))
    listing = json.dumps({"path": f"videos/{video.name}", "references": references, "label": 2})
    if kind == "local":
        (here / "list.jsonl").write_text(listing)
        source = str(here / "list.jsonl")
    else:
        fs = fsspec.filesystem("memory")
        fs.pipe("/listed/list.jsonl", listing.encode())
        for path in (one for one in here.rglob("*") if one.is_file() and one.suffix != ".tar"):
            fs.pipe(f"/listed/{path.relative_to(here).as_posix()}", path.read_bytes())
        source = "memory://listed/list.jsonl"
    (file,) = list_sources([source]).files
    part = prepare_video(file, SETTINGS, encoder, tmp_path / "parts")
    assert part.source["status"] == "written", part.source["reason"]
    ((_, files),) = part_samples(part_path(tmp_path / "parts", file.video_id))
    scene, got = Scene.from_json(files["json"]), load(files["safetensors"])
    assert [asdict(one) for one in scene.references] == references and scene.shots[0].label == 2
    assert got.keys() == true.keys() and all(torch.equal(got[name], true[name]) for name in true)
    assert {one["path"] for one in json.loads(part.shots[0]["references"])} == {one["path"] for one in references}

    if kind == "local":  # and both is one too many
        video.with_suffix(".json").write_text(json.dumps(captions | {"references": references}))
        part = prepare_video(list_sources([source]).files[0], SETTINGS, encoder, tmp_path / "parts")
        assert (part.source["status"], part.source["stage"]) == ("failed", "captions")
        assert f"{video.stem}.json and the list both name references" in part.source["reason"]


@pytest.fixture
def clip_pair(tmp_path: Path) -> Path:
    """A folder of one video, which refers to ../clip.mp4."""
    write(tmp_path / "videos" / "v.mp4", pan(1, size=64))
    write(tmp_path / "clip.mp4", pan(2, size=64))
    told = {"references": [{"role": "source", "path": "../clip.mp4"}]}
    (tmp_path / "videos" / "v.json").write_text(json.dumps(told))
    return tmp_path / "videos"


def test_a_bad_clip_is_named_and_mending_it_is_noticed(clip_pair: Path, tmp_path: Path, model: Path) -> None:
    clip, out = tmp_path / "clip.mp4", tmp_path / "out"
    whole = clip.read_bytes()
    clip.write_bytes(b"no video" * 99)
    for _ in range(2):
        work, todo = run_here(clip_pair, out, model)
        row = work.finished[work.files[0].video_id].part.source
        assert (row["status"], row["stage"]) == ("failed", "encode")
        assert row["reason"].startswith("reference ../clip.mp4: ")
    assert todo == 0, "nothing has changed"
    clip.unlink()
    assert run_here(clip_pair, out, model)[1] == 1
    clip.write_bytes(whole)
    assert run_here(clip_pair, out, model)[1] == 1 and len(records(out)) == 1
    assert run_here(clip_pair, out, model)[1] == 0
    os.utime(clip, ns=(1, 1))
    assert run_here(clip_pair, out, model)[1] == 0, "touched, not changed"


def test_a_bad_clip_is_left_out_by_other_captions(clip_pair: Path, tmp_path: Path, model: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"no video" * 99)
    run_here(clip_pair, tmp_path / "out", model)
    (clip_pair / "v.json").write_text('{"references": []}')
    work, todo = run_here(clip_pair, tmp_path / "out", model)
    assert todo == 1 and work.finished[work.files[0].video_id].part.source["status"] == "written"


@pytest.mark.parametrize("kind", ["file", "tar"])
def test_a_changed_reference_costs_no_decode(
    kind: str, clip_pair: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def source() -> Path:
        if kind == "file":
            return clip_pair
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for path in (clip_pair / "v.mp4", clip_pair / "v.json", tmp_path / "clip.mp4"):
                tar.add(path, path.relative_to(tmp_path).as_posix())
        return tmp_path / "x.tar"

    source()  # a tar holds the clip as a source of its own, too
    run_here(source(), tmp_path / "out", model)
    ((_, before),) = [one for one in records(tmp_path / "out").values() if one[0].references]
    write(tmp_path / "clip.mp4", pan(3, size=64))
    calls = count_calls(monkeypatch, (unit, "read_shots"))
    assert run_here(source(), tmp_path / "out", model)[1] == (1 if kind == "file" else 2)
    assert calls["read_shots"] == (0 if kind == "file" else 1)
    ((_, after),) = [one for one in records(tmp_path / "out").values() if one[0].references]
    assert torch.equal(before["s000.latent_mean"], after["s000.latent_mean"])
    assert not torch.equal(before["r000.latent_mean"], after["r000.latent_mean"])
