"""One video through all stages in this process: the part holds what the contract asks; bad files end by name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load

from models.scene import Scene
from models.tiny_cogvideox import build_tiny_cogvideox_folder
from preprocess.dataset import SOURCE_SCHEMA
from preprocess.decode import DecodeCount
from preprocess.encode import Encoder
from preprocess.parts import Part, part_path, part_samples
from preprocess.settings import PrepareSettings
from preprocess.sources import list_sources
from preprocess.unit import Unit, decode_stage, prepare_video, probe_stage, run_stage
from preprocess.workplace import Workplace
from tests.preprocess.videos import moving_square, three_shots, write
from toyworld.video import write_video
from toyworld.world import sample_scene

SETTINGS = PrepareSettings(height=32, width=32, max_shots=2)


def prepare(path: Path, encoder: Encoder, parts: Path, settings: PrepareSettings = SETTINGS) -> Part:
    return prepare_video(list_sources([path]).files[0], settings, encoder, parts)


def scenes_of(folder: Path, part: Part) -> list[tuple[Scene, dict[str, torch.Tensor]]]:
    path = part_path(folder, part.source["video_id"])
    return [(Scene.from_json(files["json"]), load(files["safetensors"])) for _, files in part_samples(path)]


def test_a_toyworld_video_becomes_scenes(tmp_path: Path, encoder: Encoder) -> None:
    scene = sample_scene("small", seed=4, index=0, num_shots=3)
    video = write_video(scene, tmp_path / "toy.mp4", size=64)
    part = prepare(video.video, encoder, tmp_path / "parts")
    assert part.source["status"] == "written" and part.source["reason"] == ""
    made = scenes_of(tmp_path / "parts", part)
    assert [s.scene_id for s, _ in made] == part.keys
    shots = [shot for s, _ in made for shot in s.shots]
    assert [shot.start_frame for shot in shots] == [0, *scene.cuts]
    for record, tensors in made:
        assert record.captions is not None and record.captions.backend == "sidecar"
        assert record.latents is not None and record.latents.vae_hash == encoder.codec.hash
        assert tensors["text.story"].shape[1] == encoder.text.dim
        for i, shot in enumerate(record.shots):
            assert shot.encoded is not None and shot.encoded.num_frames == 17
            assert tensors[f"s{i:03d}.latent_mean"].shape == (4, 5, 4, 4)
            assert tensors[f"s{i:03d}.first_mean"].shape == tensors[f"s{i:03d}.last_logvar"].shape == (4, 1, 4, 4)
            assert len(tensors[f"s{i:03d}.text"]) == len(shot.prompt.encode()) + 1  # bytes and the end token
            assert f"s{i:03d}.sentence_text" in tensors
    assert part.source["decoded_frames"] <= 1.15 * part.source["source_frames"]
    assert [row["shot_id"] for row in part.shots] == [shot.shot_id for shot in shots]


def test_joined_texts_are_stored_apart_on_demand(tmp_path: Path) -> None:
    """CogVideoX reads story and prompt as one padded text; LCT's global prompt as a group needs each alone."""
    build_tiny_cogvideox_folder(tmp_path / "model", text_length=300)
    encoder = Encoder.from_folder(tmp_path / "model")
    video = write_video(sample_scene("small", seed=4, index=0, num_shots=2), tmp_path / "toy.mp4", size=64).video
    plain = PrepareSettings(height=32, width=32, frame_step=8)
    found = {}
    for apart in (False, True):
        parts = tmp_path / f"apart-{apart}"
        part = prepare(video, encoder, parts, replace(plain, texts_apart=apart))
        ((record, found[apart]),) = scenes_of(parts, part)
    said = {
        "text.story": record.story,
        "s000.prompt_text": record.shots[0].prompt,
        "s001.prompt_text": record.shots[1].prompt,
    }
    assert found[True].keys() - found[False].keys() == said.keys() and found[False].keys() < found[True].keys()
    for name, expected in zip(said, encoder.text.encode(list(said.values())), strict=True):
        assert torch.equal(found[True][name], expected.half()), name
    assert not torch.equal(found[True]["s000.text"], found[True]["s000.prompt_text"])


def test_same_video_same_bytes(tmp_path: Path, encoder: Encoder) -> None:
    path = write(tmp_path / "a.mp4", three_shots(17))
    one, two = (prepare(path, encoder, tmp_path / name) for name in ("p1", "p2"))
    assert one.shots == two.shots
    files = [part_path(tmp_path / name, one.source["video_id"]).read_bytes() for name in ("p1", "p2")]
    assert files[0] == files[1]


def test_shots_of_one_story_stay_together_and_long_scenes_are_cut_evenly(tmp_path: Path, encoder: Encoder) -> None:
    path = write(tmp_path / "a.mp4", three_shots(17))
    path.with_suffix(".json").write_text('{"story": "Three squares.", "shots": []}')
    made = [scene for scene, _ in scenes_of(tmp_path / "parts", prepare(path, encoder, tmp_path / "parts"))]
    assert [len(scene.shots) for scene in made] == [2, 1]
    assert made[0].shots[0].transition == "start" and made[1].shots[0].transition == "cut"


def test_shots_that_do_not_look_alike_are_scenes_of_their_own(tmp_path: Path, encoder: Encoder) -> None:
    part = prepare(write(tmp_path / "a.mp4", three_shots(17)), encoder, tmp_path / "parts")
    made = [scene for scene, _ in scenes_of(tmp_path / "parts", part)]
    assert [len(scene.shots) for scene in made] == [1, 1, 1]
    assert made[0].shots[0].transition == "start" and made[1].shots[0].transition == "cut"
    assert made[0].captions is not None and made[0].captions.backend == "describe"


@pytest.mark.parametrize(
    ("frames", "fps", "status", "reason"),
    [
        (1, 8, "filtered", "too short: 0.12 s, 1 frames"),
        (3, 8, "filtered", "too short"),
        (20, 2, "filtered", "frame rate too low: 2.00 frames/s, under 4"),
        (5, 8, "written", ""),
    ],
)
def test_unfit_videos_are_filtered_by_rule(
    tmp_path: Path, encoder: Encoder, frames: int, fps: float, status: str, reason: str
) -> None:
    path = write(tmp_path / "a.mp4", moving_square(frames, (30, 120, 40), (220, 40, 40), step=1), fps=fps)
    part = prepare(path, encoder, tmp_path / "parts")
    assert part.source["status"] == status and reason in part.source["reason"]


def test_small_pictures_are_filtered(tmp_path: Path, encoder: Encoder) -> None:
    path = write(tmp_path / "a.mp4", moving_square(20, (30, 120, 40), (220, 40, 40), size=24, step=0.1))
    part = prepare(path, encoder, tmp_path / "parts")
    assert part.source["status"] == "filtered" and "too small: 24x24, shorter side under 32" in part.source["reason"]


def test_all_shots_too_short(tmp_path: Path, encoder: Encoder) -> None:
    images = three_shots(17)
    cuts = [images[i] for start in (0, 17, 34) for i in range(start, start + 11)]
    part = prepare(write(tmp_path / "a.mp4", cuts, fps=24), encoder, tmp_path / "parts")
    assert part.source["status"] == "filtered" and "no shot is long enough" in part.source["reason"]


def test_broken_and_missing_files_fail_by_name(tmp_path: Path, encoder: Encoder) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "list.txt").write_text("empty.mp4\ntext.mp4\nmissing.mp4\n")
    parts = [
        prepare_video(file, SETTINGS, encoder, tmp_path / "parts")
        for file in list_sources([tmp_path / "list.txt"]).files
    ]
    assert [p.source["status"] for p in parts] == ["failed"] * 3
    assert [p.source["reason"].split(" (")[0] for p in parts] == [
        "the file is empty",
        "not a readable video container",
        "no such file",
    ]


def test_file_names_that_are_no_text_are_prepared_and_written_out(tmp_path: Path, encoder: Encoder) -> None:
    path = write(tmp_path / "a.mp4", three_shots(17)).rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \xff.mp4"))
    part = prepare(path, encoder, tmp_path / "parts")
    assert part.source["status"] == "written", part.source["reason"]
    assert part.source["name"] == r"caf\udce9 \udcff.mp4"
    pa.Table.from_pylist([part.source], SOURCE_SCHEMA)  # a table takes no lone surrogates


def test_a_bad_sidecar_fails_its_video(tmp_path: Path, encoder: Encoder) -> None:
    path = write(tmp_path / "a.mp4", three_shots(17))
    path.with_suffix(".json").write_text('{"shots": [{"start_frame": 0}]}')
    part = prepare(path, encoder, tmp_path / "parts")
    assert (part.source["status"], part.source["stage"]) == ("failed", "captions")
    assert "a.json.shots[0]: missing field" in part.source["reason"]


def test_a_bug_in_a_stage_ends_one_unit_and_says_so(tmp_path: Path) -> None:
    unit = Unit(list_sources([write(tmp_path / "a.mp4", three_shots(5))]).files[0])

    def stage(unit: Unit) -> None:
        raise KeyError("surprise")

    run_stage("decode", stage, unit)
    assert (unit.status, unit.stage, unit.reason) == ("failed", "decode", "unexpected KeyError: 'surprise'")


def test_units_travel_as_json(tmp_path: Path) -> None:
    place = Workplace(SETTINGS, tmp_path / "parts", tmp_path / "scratch", "key")
    unit = Unit(list_sources([write(tmp_path / "a.mp4", three_shots(17))]).files[0])
    for name, stage in (("probe", probe_stage), ("decode", decode_stage)):
        run_stage(name, lambda u, stage=stage: stage(u, place), unit)
        assert unit.status == "", unit.reason
        again = Unit.from_json(unit.to_json())
        assert again == unit
        unit = again
    assert isinstance(unit.count, DecodeCount) and unit.count.decoded == 51
    assert place.scratch_file(unit).stat().st_size == 51 * 32 * 32 * 3
    assert len(unit.to_json()) < 20_000  # no frame travels


def test_settings_that_cannot_work_are_refused() -> None:
    for changes, message in (
        ({"shot_frames": 16}, "shot_frames=16: the VAE takes 4k"),
        ({"min_shot_frames": 21}, "min_shot_frames=21 is more than shot_frames=17"),
        ({"height": 50}, "multiples of 8"),
        ({"max_seconds": 0.0}, "max_seconds=0.0 must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            PrepareSettings(**changes)
