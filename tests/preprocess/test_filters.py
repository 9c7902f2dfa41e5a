"""Every filter keeps a clip that it must keep and takes one that it must take; all scores are recorded for both."""

from __future__ import annotations

import io
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from preprocess.duplicates import find_duplicates
from preprocess.filters import NO_FILTERS, RULES, SCORES, FilterSettings, check_shots, judge, rule_of, thresholds
from preprocess.letterbox import bars_of, find_bars
from preprocess.outcome import Filtered
from preprocess.overlay import text_share
from preprocess.parts import Part
from preprocess.probe import probe
from preprocess.quality import blur_effect, phase_shift
from preprocess.settings import PrepareSettings
from preprocess.signature import make_signature
from preprocess.sources import list_sources
from preprocess.spans import RawShot, read_shots
from preprocess.unit import Unit, decode_stage, probe_stage, run_stage
from preprocess.workplace import Workplace
from tests.preprocess.videos import pan, texture, write
from toyworld.render import render_shot
from toyworld.video import write_video
from toyworld.world import sample_scene

SETTINGS = PrepareSettings(height=128, width=128)


def shots_of(path: Path, settings: PrepareSettings = SETTINGS) -> tuple[list[RawShot], np.ndarray]:
    """The shots, and all encoded frames one after another."""
    info, scratch = probe(str(path)), io.BytesIO()
    shots, _ = read_shots(str(path), info, settings, scratch, bars=find_bars(str(path), info)[0])
    frames = np.frombuffer(scratch.getvalue(), np.uint8).reshape(-1, settings.height, settings.width, 3)
    return shots, frames


def static() -> list[np.ndarray]:
    return [pan()[0]] * 17


def frozen() -> list[np.ndarray]:
    return [*pan(count=3), *[pan(count=3)[-1]] * 14]


def black() -> list[np.ndarray]:
    return [np.full((128, 128, 3), 4 + i % 3, np.uint8) for i in range(17)]


def shaky() -> list[np.ndarray]:
    picture, rng = texture(0), np.random.default_rng(1)
    places = rng.integers(0, 17, (17, 2)) + 20
    return [picture[y : y + 128, x : x + 128] for y, x in places]


def spots(ground: int, spot: int) -> list[np.ndarray]:
    """Small squares that move over a flat ground: 4 % of the picture."""
    frames = []
    for i in range(17):
        image = np.full((128, 128, 3), ground, np.uint8)
        for k in range(6):
            image[18 * k + 8 : 18 * k + 18, 12 * k + 2 * i : 12 * k + 2 * i + 10] = spot
        frames.append(image)
    return frames


def clipped() -> list[np.ndarray]:
    return [np.repeat(np.where(image[..., :1] > 128, 255, 0).astype(np.uint8), 3, axis=2) for image in pan()]


def blurred() -> list[np.ndarray]:
    contrasty = [image // 255 * 200 + 20 for image in clipped()]  # so that the steps of 8 bits do not count
    return [
        np.asarray(Image.fromarray(image.astype(np.uint8)).filter(ImageFilter.GaussianBlur(7))) for image in contrasty
    ]


def titled(height: int = 20, lines: int = 1) -> list[np.ndarray]:
    frames = []
    for image in pan():
        picture = Image.fromarray(np.ascontiguousarray(image))
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=height)
        for k in range(lines):
            place = (64, 118 - 1.3 * height * k)
            draw.text(place, "Meanwhile", font=font, fill="white", anchor="ms", stroke_width=1, stroke_fill="black")
        frames.append(np.asarray(picture))
    return frames


CAUGHT = {
    "static": static,
    "frozen": frozen,
    "black": black,
    "shaky": shaky,
    "dark": lambda: spots(0, 90),
    "bright": lambda: spots(254, 215),
    "clipped": clipped,
    "blurred": blurred,
    "text": lambda: titled(height=22, lines=3),
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> list[RawShot]:
    """An ordinary clip: textured, evenly moving, sharp."""
    return shots_of(write(tmp_path_factory.mktemp("clip") / "pan.mp4", pan()))[0]


@pytest.mark.parametrize("name", CAUGHT)
def test_every_filter_takes_what_it_names_and_keeps_the_ordinary(
    tmp_path: Path, clip: list[RawShot], name: str
) -> None:
    shots, frames = shots_of(write(tmp_path / "a.mp4", CAUGHT[name]()))
    # the trembling may look like a cut here and there, and leave a shot too short
    long = [shot for shot in shots if shot.scores["frames"] >= SETTINGS.min_shot_frames]
    assert {rule_of(shot.filtered) for shot in long} == {name}, [(s.filtered, s.scores) for s in shots]
    assert not shots[0].span_pts and len(frames) == 0  # taken before it costs anything
    rule = next(rule for rule in RULES if rule.name == name)
    limits = thresholds(SETTINGS)
    assert [shot.filtered for shot in clip] == [""] and clip[0].span_pts
    assert not rule.breaks(clip[0].scores, limits[rule.threshold])
    for shot in (*long, *clip):  # scores are there whatever became of the shot
        missing = set(SCORES) - set(shot.scores) - {"aesthetic", "hash_distance", "similarity"}
        assert not missing and shot.signature
    value = f"{shots[0].scores[rule.score]:g}"
    assert value in shots[0].filtered and f"{limits[rule.threshold]:g}" in shots[0].filtered
    # and with its threshold off, the filter takes nothing
    off = replace(SETTINGS, filters=replace(NO_FILTERS, **{rule.threshold: None}))
    assert judge(shots[0].scores, thresholds(off)) == ""


def test_defaults_keep_toyworld(tmp_path: Path) -> None:
    for level in ("small", "full"):
        scene = sample_scene(level, seed=9, index=0, num_shots=3)
        settings = PrepareSettings(height=64, width=64)
        shots, _ = shots_of(write_video(scene, tmp_path / f"{level}.mp4", size=64).video, settings)
        assert shots and not any(shot.filtered for shot in shots)


def test_shots_of_other_toyworld_scenes_are_no_duplicates() -> None:
    parts = []
    for i in range(40):
        scene = sample_scene("small", seed=12, index=i, num_shots=1)
        small = [
            np.asarray(Image.fromarray(one).resize((48, 27), Image.Resampling.BOX)) for one in render_shot(scene, 0)
        ]
        row = {"filtered": "", "shot_id": f"v{i}-0000/s000", "signature": make_signature(small[:17])}
        parts.append(Part({"sha256": str(i), "video_id": f"v{i}", "status": "written"}, [row]))
    found = find_duplicates(parts, FilterSettings())
    assert len(found) == 39 and not any(verdict.reason for verdict in found.values())


def test_a_subtitle_is_measured_but_kept(tmp_path: Path) -> None:
    shots, _ = shots_of(write(tmp_path / "a.mp4", titled(height=10)))
    assert 0.01 < shots[0].scores["text"] < 0.08 and shots[0].filtered == ""


def test_text_that_moves_with_the_picture_is_none_that_was_laid_over_it() -> None:
    sign = Image.fromarray(texture(0, size=160) // 2 + 60)
    font = ImageFont.load_default(size=24)
    ImageDraw.Draw(sign).text((128, 64), "Meanwhile", font=font, fill="white", anchor="mm")
    luma = np.asarray(sign.convert("L"), np.float32)
    moving = [luma[:128, 3 * i : 3 * i + 160] for i in range(5)]
    still = [luma[:128, :160]] * 5
    assert text_share(moving) == 0.0 < 0.03 < text_share(still)


@pytest.mark.parametrize("height", [10, 14, 20, 32, 48])
@pytest.mark.parametrize("ink", [("white", "black"), ("black", "white")])
def test_text_is_found_at_all_sizes_and_polarities(height: int, ink: tuple[str, str]) -> None:
    frames = []
    for image in pan(size=256, count=5, step=12):
        picture = Image.fromarray(np.ascontiguousarray(image))
        font = ImageFont.load_default(size=height)
        outline = max(1, height // 14)
        ImageDraw.Draw(picture).text(
            (128, 220), "Before dawn we", font=font, fill=ink[0], anchor="ms", stroke_width=outline, stroke_fill=ink[1]
        )
        frames.append(np.asarray(picture.convert("L"), np.float32))
    drawn = min(1.0, 7.5 * height / 256) * height / 256
    assert 0.3 * drawn < text_share(frames) < 4 * drawn + 0.01


def test_shift_is_measured_to_a_fraction_of_a_pixel() -> None:
    """Against shifts made by averaging a finer picture, so the truth is exact."""
    fine = np.asarray(Image.fromarray(texture(3, size=27 * 8, margin=48 * 8)).convert("L"), np.float32)
    cut = {
        (dy, dx): fine[64 + dy : 64 + dy + 216, 64 + dx : 64 + dx + 384].reshape(27, 8, 48, 8).mean((1, 3))
        for dy, dx in ((0, 0), (4, -20), (-12, 36), (0, 3))
    }
    for (dy, dx), moved in cut.items():
        shift = phase_shift(cut[0, 0], moved)
        assert shift is not None
        assert abs(shift[0] + dy / 8) < 0.35 and abs(shift[1] + dx / 8) < 0.35
    rng = np.random.default_rng(0)
    assert phase_shift(rng.normal(size=(27, 48)), rng.normal(size=(27, 48))) is None
    assert phase_shift(np.zeros((27, 48)), np.zeros((27, 48))) == (0.0, 0.0)


def test_blur_grows_with_the_filter_and_does_not_depend_on_contrast() -> None:
    picture = Image.fromarray(texture(5)).convert("L")
    values = [
        blur_effect(np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), np.float32)) for radius in (0, 1, 3, 8)
    ]
    assert values == sorted(values) and values[0] < 0.5 < 0.72 < values[-1]
    sharp = np.asarray(picture, np.float32)
    assert abs(blur_effect(0.2 * sharp + 100) - values[0]) < 1e-3
    assert blur_effect(np.full((64, 64), 90.0)) == 0.0


# ---------------------------------------------------------------- black bars


def barred(rows: int, columns: int, level: int = 0) -> list[np.ndarray]:
    """The pan with bars of so many pixels on both sides; 128x(128+2*columns) grows by the bars."""
    frames = []
    for image in pan():
        wide = np.full((128 + 2 * rows, 128 + 2 * columns, 3), level, np.uint8)
        wide[rows : rows + 128, columns : columns + 128] = image
        frames.append(wide)
    return frames


@pytest.mark.parametrize(("rows", "columns"), [(24, 0), (0, 32), (16, 16)])
def test_bars_are_cropped_not_dropped(tmp_path: Path, rows: int, columns: int) -> None:
    shots, frames = shots_of(write(tmp_path / "a.mp4", barred(rows, columns, level=6)))
    plain_shots, plain = shots_of(write(tmp_path / "b.mp4", pan()))
    assert [shot.filtered for shot in shots] == [""] and shots[0].span_frames == plain_shots[0].span_frames
    whole = (128 + 2 * rows) * (128 + 2 * columns)
    assert abs(shots[0].scores["bars"] - (1 - 128 * 128 / whole)) < 0.03
    assert plain_shots[0].scores["bars"] == 0.0
    edges = [frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]]
    assert min(float(edge.mean()) for edge in edges) > 60  # no bar is left
    # inside, it is the same picture at nearly the same scale
    seen, expected = (one.reshape(-1, 8, 16, 8, 16, 3).mean((2, 4)) for one in (frames, plain))
    assert np.abs(seen - expected).mean() < 5 < np.abs(expected[0] - expected[-1]).mean()


@pytest.mark.parametrize("crop", [True, False])
def test_the_stage_crops_and_counts_the_frames_it_looked_at(tmp_path: Path, crop: bool) -> None:
    place = Workplace(replace(SETTINGS, crop_bars=crop), tmp_path / "parts", tmp_path / "scratch", "key")
    unit = Unit(list_sources([write(tmp_path / "a.mp4", barred(24, 0))]).files[0])
    run_stage("probe", lambda one: probe_stage(one, place), unit)
    assert unit.info is not None
    before = unit.info.probe_frames
    run_stage("decode", lambda one: decode_stage(one, place), unit)
    assert unit.status == "", unit.reason
    assert (unit.shots[0].scores["bars"] > 0.2) == crop and unit.info.probe_frames - before == int(crop)


def test_dark_pictures_have_no_bars() -> None:
    rng = np.random.default_rng(0)
    night = np.clip(np.linspace(0, 120, 120)[:, None] - 30 + rng.normal(0, 6, (120, 200)), 0, 255)  # fades in
    subject = np.zeros((120, 200))
    subject[30:100, 70:120] = 160  # something on a black ground
    lamps = np.zeros((120, 200))
    lamps[40:44, 50:60] = lamps[70:74, 150:160] = 250
    for picture in (night, subject, lamps, np.zeros((120, 200))):
        assert bars_of([picture.astype(np.float32)] * 3).area == 0.0
    assert bars_of([]).area == 0.0


def test_bars_of_real_clips(shared_data: Path) -> None:
    """Those that were checked by eye: found where they are, to one percent of the side; none where it is only dark."""
    import json

    truth = json.loads((shared_data / "truth" / "attributes.json").read_text())
    checked = 0
    for name, sides in truth["black_borders_true"].items():
        if not (shared_data / name).is_file() or name == "clips/mdn/friday.mp4":  # 3 of 640 pixels: a dirty edge
            continue
        info = probe(str(shared_data / name))
        bars, looked_at = find_bars(str(shared_data / name), info)
        for side, size in (("top", info.height), ("bottom", info.height), ("left", info.width), ("right", info.width)):
            assert -1 <= getattr(bars, side) * size - sides[side] <= 0.01 * size + 1, (name, side)
        assert looked_at <= max(1, 0.05 * len(info.pts))
        assert find_bars(str(shared_data / name), info, max_seconds=2.0)[1] <= max(1, 0.05 * 2.0 * info.fps + 1)
        checked += 1
    assert checked >= 5
    for name in truth["dark_content_not_borders"]:
        if (shared_data / name).is_file():
            assert find_bars(str(shared_data / name), probe(str(shared_data / name)))[0].area == 0.0, name


@pytest.mark.slow
def test_real_clips_pass_and_stills_do_not(shared_data: Path) -> None:
    stills = {"custom_3DAnimation_1.mp4", "custom_Cartoon_1.mp4"}
    begin_still = {"Advertise_2-3.mp4", "MC-1.mp4", "example_train_videos_1.mp4"}  # a picture, then the clip made of it
    for path in sorted((shared_data / "clips" / "ticft").glob("*.mp4")):
        shots, _ = shots_of(path)
        long = [shot for shot in shots if shot.scores["frames"] >= SETTINGS.min_shot_frames]
        taken = [shot for shot in long if shot.filtered]
        assert {rule_of(shot.filtered) for shot in taken} <= {"static"}, (path.name, [s.filtered for s in taken])
        if path.name in stills:
            assert taken == long, path.name
        elif path.name in begin_still:
            assert taken == long[:1] != long, path.name
        else:
            assert not taken, path.name


# ---------------------------------------------------------------- verdicts


def test_the_first_broken_rule_names_the_reason() -> None:
    limits = thresholds(SETTINGS)
    scores = {"frames": 3.0, "black": 1.0, "blur": 0.9}
    assert judge(scores, limits) == "too_short: encoded frames 3, under 5"
    assert judge(scores | {"frames": 9.0}, limits) == "black: share of black frames 1, over 0.25"
    assert judge({"frames": 9.0}, limits) == ""  # what could not be measured is kept


def test_thresholds_are_known_by_name() -> None:
    named = {one.name for one in fields(FilterSettings)} - {"same_file"}
    assert {rule.threshold for rule in RULES} - {"min_shot_frames"} == named
    with pytest.raises(ValueError, match="max_blur=-1 is negative"):
        FilterSettings(max_blur=-1)


def test_a_source_without_a_shot_says_which_filters_took_them() -> None:
    shots = [
        RawShot(0, 5, 0, 5, "start", 1.0, filtered="static: movement 0.1, under 0.25"),
        RawShot(5, 9, 5, 9, "cut", 1.0, filtered="too_short: encoded frames 1, under 5"),
        RawShot(9, 20, 9, 20, "cut", 1.0, filtered="static: movement 0, under 0.25"),
    ]
    with pytest.raises(Filtered, match="no shot is left of 3: 2 static, 1 too_short"):
        check_shots(shots, SETTINGS)
