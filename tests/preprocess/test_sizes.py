"""Several training sizes: which one a video takes, what the dataset says of it, and what a change of sizes costs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from models.codecs import VideoCodec
from preprocess import unit as unit_module
from preprocess.dataset import SHOT_SCHEMA, SOURCE_SCHEMA
from preprocess.encode import Encoder
from preprocess.filters import NO_FILTERS
from preprocess.replay import replay
from preprocess.report import PrepareReport
from preprocess.settings import PrepareSettings
from preprocess.sizes import choose_size
from preprocess.verify import verify
from tests.preprocess.runs import SHARD_BYTES, Predictor, count_calls, records, run_here
from tests.preprocess.videos import texture, three_shots, write, write_planes

WIDE, TALL, SQUARE, SMALL = (32, 64), (64, 32), (48, 48), (16, 32)  # height, width
ONE = PrepareSettings(height=48, width=48, filters=NO_FILTERS)
SIZES = replace(ONE, sizes=(WIDE, TALL, SQUARE))


def footage(height: int, width: int) -> list[np.ndarray]:
    """Three shots cropped from squares of 96 pixels."""
    return [image[:height, :width] for image in three_shots(17)]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A wide, a tall and a square video, and a file that is none."""
    folder = tmp_path / "videos"
    for name, shape in {"wide": (48, 96), "tall": (96, 48), "square": (96, 96)}.items():
        write(folder / f"{name}.mp4", footage(*shape))
    (folder / "empty.mp4").touch()
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """All that decodes frames, and all that runs the VAE or the text encoder."""
    return count_calls(
        monkeypatch, (unit_module, "read_shots"), (unit_module, "find_bars"), (VideoCodec, "encode"),
        (Encoder, "encode_shots"), (Encoder, "encode_texts"),
    )  # fmt: skip


def taken(output: Path) -> dict[str, set[tuple[int, int]]]:
    """The sizes of the encoded shots of each video, by the records."""
    found: dict[str, set[tuple[int, int]]] = {}
    for scene, _ in records(output).values():
        spans = [shot.encoded for shot in scene.shots if shot.encoded]
        found.setdefault(scene.source.path, set()).update((span.height, span.width) for span in spans)
    return found


def table(output: Path, name: str) -> list[dict]:
    return pq.read_table(output / f"{name}.parquet").to_pylist()


# ---------------------------------------------------------------- which size


@pytest.mark.parametrize(
    ("picture", "sizes", "expected"),
    [
        ((1080, 1920), [(480, 832), (832, 480), (640, 640)], (480, 832)),
        ((1920, 1080), [(480, 832), (832, 480), (640, 640)], (832, 480)),
        ((1000, 1100), [(480, 832), (832, 480), (640, 640)], (640, 640)),
        ((480, 640), [(480, 832), (640, 640)], (480, 832)),  # 4:3 loses 23 or 25 %: the one that is enlarged less
        ((480, 560), [(480, 832), (640, 640)], (640, 640)),  # enlarged, but no other size has about this aspect
        ((1080, 1920), [(480, 832), (704, 1280)], (704, 1280)),  # both about 16:9, neither enlarged: the larger
        ((480, 854), [(480, 832), (704, 1280)], (480, 832)),  # the larger would be enlarged
        ((240, 427), [(480, 832), (704, 1280)], (480, 832)),  # both would: the one that is less
        ((480, 854), [(240, 320), (704, 1280)], (704, 1280)),  # to avoid it is no reason for another aspect
        ((1080, 1920), [(1080, 1920)], (1080, 1920)),
        ((600, 800), [(400, 400), (800, 800)], (400, 400)),  # two squares for 4:3
        ((100, 100), [(100, 200), (200, 100)], (100, 200)),  # as far from both: the wider
    ],
)
def test_a_picture_takes_the_size_of_its_aspect_that_it_is_not_enlarged_for(picture, sizes, expected):
    assert {choose_size(picture, order) for order in permutations(sizes)} == {expected}


def test_the_chosen_size_loses_hardly_more_of_the_picture_than_any_other():
    """Against a loop over all sizes: what is cropped away, and whether the picture is enlarged."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes = [tuple(int(n) * 16 for n in rng.integers(4, 80, 2)) for _ in range(rng.integers(1, 6))]
        picture = tuple(int(n) for n in rng.integers(40, 2000, 2))

        def kept(size, picture=picture):
            ratio = (picture[1] * size[0]) / (picture[0] * size[1])
            return min(ratio, 1 / ratio)

        def grows(size, picture=picture):
            return max(size[0] / picture[0], size[1] / picture[1])

        chosen, best = choose_size(picture, sizes), max(map(kept, sizes))
        assert chosen in sizes and kept(chosen) >= best / 1.05 - 1e-12
        alike = [size for size in sizes if kept(size) >= best / 1.05 + 1e-12]
        if any(grows(size) <= 1 for size in alike):
            assert grows(chosen) <= 1, "one of about the same aspect is not enlarged"
        else:
            assert grows(chosen) <= min(map(grows, alike)) + 1e-12


def test_sizes_that_cannot_work_are_refused():
    for sizes, message in (
        (((50, 64),), "sizes: 64x50: height and width must be multiples of 8"),
        (((32, 64), (32, 64)), "sizes: 64x32 is listed twice"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(ONE, sizes=sizes)


# ---------------------------------------------------------------- the dataset


def test_every_video_takes_its_size_and_the_dataset_says_so(videos: Path, tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    run_here(videos, out, model, SIZES)
    assert taken(out) == {"wide.mp4": {WIDE}, "tall.mp4": {TALL}, "square.mp4": {SQUARE}}
    for scene, tensors in records(out).values():
        for i, shot in enumerate(scene.shots):
            assert shot.encoded is not None
            assert tensors[f"s{i:03d}.latent_mean"].shape[2:] == (shot.encoded.height // 8, shot.encoded.width // 8)
            assert tensors[f"s{i:03d}.first_mean"].shape[2:] == (shot.encoded.height // 8, shot.encoded.width // 8)
    sources = {row["name"]: row for row in table(out, "sources")}
    said = {name: (row["encoded_height"], row["encoded_width"]) for name, row in sources.items()}
    assert said == {"wide.mp4": WIDE, "tall.mp4": TALL, "square.mp4": SQUARE, "empty.mp4": (0, 0)}
    assert (sources["wide.mp4"]["picture_height"], sources["wide.mp4"]["picture_width"]) == (48, 96)
    for row in table(out, "manifest"):
        assert (row["encoded_height"], row["encoded_width"]) == said[row["source"]]
    facts = json.loads((out / "dataset.json").read_text())
    assert facts["settings"]["sizes"] == [list(WIDE), list(TALL), list(SQUARE)]
    assert verify(out).faults == []
    report = PrepareReport(out)
    report.count_shots(table(out, "manifest"))
    assert report.sizes == {"48x48": 3, "64x32": 3, "32x64": 3}
    assert "encoded at 64x32 (3 shots), 48x48 (3), 32x64 (3)" in report.summary()


def test_latents_are_those_of_the_video_prepared_at_that_size_alone(videos: Path, tmp_path: Path, model: Path) -> None:
    """Byte for byte, and a list of one size, or the model's own, is that size."""
    run_here(videos, tmp_path / "sizes", model, SIZES)
    found = records(tmp_path / "sizes")
    for size in (WIDE, TALL, SQUARE):
        run_here(videos, tmp_path / str(size), model, replace(ONE, height=size[0], width=size[1]))
        alone = records(tmp_path / str(size))
        same = [key for key, (scene, _) in found.items() if scene.shots[0].encoded.height == size[0]]
        assert len(same) == 3
        for key in same:
            assert found[key][0] == alone[key][0] and found[key][1].keys() == alone[key][1].keys()
            assert all(torch.equal(found[key][1][name], alone[key][1][name]) for name in alone[key][1])
    run_here(videos, tmp_path / "list", model, replace(ONE, sizes=(SQUARE,)))
    for name in ("shards/scenes-000000.tar", "index.parquet", "manifest.parquet", "sources.parquet"):
        assert (tmp_path / "list" / name).read_bytes() == (tmp_path / str(SQUARE) / name).read_bytes(), name


def test_black_bars_pixel_aspect_and_rotation_come_before_the_choice(tmp_path: Path, model: Path) -> None:
    folder, boxed = tmp_path / "videos", []
    for picture in (texture(k, 96, 0) for k in range(2)):
        for step in range(0, 34, 2):
            frame = np.zeros_like(picture)
            frame[24:72] = np.maximum(np.roll(picture, step, 1)[24:72], 60)
            boxed.append(frame)
    write(folder / "boxed.mp4", boxed)
    grey = np.random.default_rng(1).integers(40, 200, (96, 96), np.uint8)
    for name, width, how in (
        ("turned.mp4", 48, {"orient": {"degrees": 90.0}}), ("stretched.mp4", 96, {"aspect": Fraction(2, 1)})
    ):  # fmt: skip
        planes = [grey[:, :width], *[np.full((48, width // 2), 128, np.uint8)] * 2]
        write_planes(folder / name, planes, "yuv420p", "libx264", count=24, **how)
    (folder / "images").mkdir()
    for k, image in enumerate(footage(48, 96)[:17]):
        Image.fromarray(image).save(folder / "images" / f"{k:03d}.png")
    run_here(folder, tmp_path / "out", model, SIZES, frames_fps=8)
    names = ("boxed.mp4", "turned.mp4", "stretched.mp4", "images")
    assert taken(tmp_path / "out") == dict.fromkeys(names, {WIDE})
    rows = {row["name"]: (row["picture_height"], row["picture_width"]) for row in table(tmp_path / "out", "sources")}
    assert rows["turned.mp4"] == (48, 96) and rows["stretched.mp4"] == (96, 192)
    assert 42 <= rows["boxed.mp4"][0] <= 48 and rows["boxed.mp4"][1] == 96
    run_here(folder, tmp_path / "bars", model, replace(SIZES, crop_bars=False), frames_fps=8)
    assert taken(tmp_path / "bars") == dict.fromkeys(names, {WIDE}) | {"boxed.mp4": {SQUARE}}


def test_verify_notices_sizes_that_do_not_agree(videos: Path, tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    run_here(videos, out, model, SIZES)
    facts = json.loads((out / "dataset.json").read_text())
    facts["settings"]["sizes"] = [list(WIDE), list(TALL)]
    (out / "dataset.json").write_text(json.dumps(facts))
    assert any("is encoded at 48x48, dataset.json knows 64x32, 32x64" in fault for fault in verify(out).faults)
    facts["settings"]["sizes"].append(list(SQUARE))
    (out / "dataset.json").write_text(json.dumps(facts))
    assert verify(out).faults == []
    for name, schema in (("manifest", SHOT_SCHEMA), ("sources", SOURCE_SCHEMA)):
        rows = table(out, name)
        (one := next(row for row in rows if row["encoded_width"]))["encoded_width"] = 40
        path = out / f"{name}.parquet"
        whole = path.read_bytes()
        pq.write_table(pa.Table.from_pylist(rows, schema), path)
        assert any("encoded_width" in fault and "40" in fault for fault in verify(out).faults), one
        path.write_bytes(whole)


# ---------------------------------------------------------------- what a change costs


def test_adding_and_removing_a_size_redoes_only_the_videos_whose_size_changes(
    videos: Path, tmp_path: Path, model: Path, calls: Counter[str]
) -> None:
    out = tmp_path / "out"
    run_here(videos, out, model, replace(SIZES, sizes=(WIDE, TALL)))
    assert calls["read_shots"] == 3 and taken(out)["square.mp4"] == {WIDE}  # as far from both: the wider
    steps = [
        ((WIDE, TALL, SQUARE), 1, {"wide.mp4": {WIDE}, "tall.mp4": {TALL}, "square.mp4": {SQUARE}}),
        ((SQUARE, TALL, WIDE), 0, {"wide.mp4": {WIDE}, "tall.mp4": {TALL}, "square.mp4": {SQUARE}}),
        ((WIDE, SQUARE), 1, {"wide.mp4": {WIDE}, "tall.mp4": {SQUARE}, "square.mp4": {SQUARE}}),
        ((WIDE, SQUARE, SMALL), 0, {"wide.mp4": {WIDE}, "tall.mp4": {SQUARE}, "square.mp4": {SQUARE}}),
        ((), 1, {"wide.mp4": {SQUARE}, "tall.mp4": {SQUARE}, "square.mp4": {SQUARE}}),  # the model's size
        ((TALL, SQUARE), 1, {"wide.mp4": {SQUARE}, "tall.mp4": {TALL}, "square.mp4": {SQUARE}}),
    ]
    for sizes, expected, end in steps:
        calls.clear()
        settings = replace(SIZES, sizes=sizes)
        assert run_here(videos, out, model, settings)[1] == expected, sizes
        assert taken(out) == end, sizes
        once = {"read_shots": 1, "find_bars": 1, "encode_shots": 3, "encode_texts": 1} if expected else {}
        assert {name: count for name, count in calls.items() if name != "encode"} == once, sizes
        assert bool(calls["encode"]) == bool(expected), "no call of the VAE for what stays"
        assert json.loads((out / "dataset.json").read_text())["settings"]["sizes"] == [list(size) for size in sizes]
        assert verify(out).faults == []
        calls.clear()
        work, todo = run_here(videos, out, model, settings)
        assert todo == 0 and not calls and work.unchanged(SHARD_BYTES)
    fresh = tmp_path / "fresh"
    run_here(videos, fresh, model, replace(SIZES, sizes=(TALL, SQUARE)))
    for name in ("shards/scenes-000000.tar", "index.parquet", "manifest.parquet", "sources.parquet"):
        assert (out / name).read_bytes() == (fresh / name).read_bytes(), f"{name}: as a run from nothing"


def test_other_captions_and_sizes_at_once(videos: Path, tmp_path: Path, model: Path, calls: Counter[str]) -> None:
    """Pictures are recalled where the size stays; a predictor is asked anew only where pictures are others."""
    out = tmp_path / "out"
    run_here(videos, out, model, replace(SIZES, sizes=(WIDE, TALL)))
    calls.clear()
    assert run_here(videos, out, model, replace(SIZES, captions="describe"))[1] == 3
    assert calls["read_shots"] == 1 and calls["encode_shots"] == 3 and calls["encode_texts"] == 3
    assert taken(out) == {"wide.mp4": {WIDE}, "tall.mp4": {TALL}, "square.mp4": {SQUARE}}
    rows = {row["name"]: row for row in table(out, "sources")}
    assert (rows["wide.mp4"]["picture_height"], rows["wide.mp4"]["encoded_height"]) == (48, 32)  # recalled
    predictor = Predictor(1)
    run_here(videos, out, model, replace(SIZES, captions="describe", states_key=predictor.key), states=predictor)
    asked = predictor.calls
    assert asked == 9
    calls.clear()
    apart = replace(SIZES, captions="describe", states_key=predictor.key, texts_apart=True)
    assert run_here(videos, out, model, apart, states=predictor)[1] == 3
    assert calls == {"encode_texts": 3} and predictor.calls == asked, "recorded answers are found by the size"
    fewer = replace(SIZES, captions="describe", states_key=predictor.key, sizes=(WIDE, SQUARE))
    run_here(videos, out, model, fewer, states=predictor)
    assert predictor.calls == asked + 3, "of the one video whose pictures are others"


def test_a_dataset_that_does_not_say_its_pictures_is_made_again_for_sizes(
    videos: Path, tmp_path: Path, model: Path, calls: Counter[str]
) -> None:
    """One of an earlier version: it still holds for one size; which of several its videos take is not known."""
    out = tmp_path / "out"
    run_here(videos, out, model, ONE)
    new = ("picture_height", "picture_width", "encoded_height", "encoded_width")
    for name in ("sources", "manifest"):
        kept = pq.read_table(out / f"{name}.parquet")
        old = kept.drop_columns([column for column in new if column in kept.column_names])
        pq.write_table(old, out / f"{name}.parquet")
    facts = json.loads((out / "dataset.json").read_text())
    for key in ("sizes", "tile_over"):
        del facts["settings"][key]
    (out / "dataset.json").write_text(json.dumps(facts))
    assert verify(out).faults == []
    calls.clear()
    work, todo = run_here(videos, out, model, ONE)
    assert todo == 0 and not calls
    assert run_here(videos, out, model, SIZES)[1] == 3 and calls["read_shots"] == 3
    assert verify(out).faults == []


def test_what_if_wants_the_sizes_that_were_measured(videos: Path, tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    run_here(videos, out, model, SIZES)
    assert replay(out, SIZES).shots == 9
    with pytest.raises(ValueError, match=r"sizes=\[32x64, 64x32\], but .* sizes=\[64x32, 32x64, 48x48\]"):
        replay(out, replace(SIZES, sizes=(TALL, WIDE)))
    assert replay(out, replace(SIZES, sizes=(SQUARE, TALL, WIDE))).shots == 9, "in any order"
