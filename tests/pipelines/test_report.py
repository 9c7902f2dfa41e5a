"""The report: complete, self-contained, nothing of a caption becomes markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipelines.report import (
    METRICS,
    Entry,
    GeneratedScene,
    Report,
    SceneSheet,
    SetAside,
    ShotSheet,
    StageRow,
    judge_rows,
    loss_curve,
    write_report,
)
from pipelines.report_media import image_uri, take
from sample.video_io import write_video

EVIL = '<script>alert("x")</script> & <img src=x onerror=alert(1)>'
ATTRIBUTES_THAT_LOAD = ("src", "href", "srcset", "poster", "data", "action")


class Page(HTMLParser):
    """Tags, ids, what is loaded from where, and the text between."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids |= {value or "" for name, value in attrs if name == "id"}
        self.loads += [value or "" for name, value in attrs if name in ATTRIBUTES_THAT_LOAD]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def report(tmp_path: Path) -> Report:
    frames = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    path = write_video(frames, tmp_path / "a.mp4", 8)
    scores = {name: {"value": 0.5, "count": 4} for name in METRICS}
    return Report(
        title="Demo",
        happened=EVIL,
        headline=[Entry("files in", "3")],
        flow=[Entry("prepare", "2 s"), Entry("train", "3 s")],
        compared="same storyboards",
        generated=[
            GeneratedScene(
                "Scene 1", EVIL, ["first", EVIL], [take(path, [3], "Before", "alone"), take(path, [3], "After", EVIL)]
            )
        ],
        judge=judge_rows(scores, {**scores, "colour": {"value": 0.75, "count": 4}}),
        no_judge="none",
        dataset=[Entry("scenes", "2")],
        num_sources=3,
        set_aside=[SetAside(f"{EVIL}.mp4", "failed", "probe", "no video stream")],
        num_scenes=9,
        sheets=[SceneSheet(EVIL, EVIL, [ShotSheet("cut", "1.0 s", EVIL, [image_uri(frames[0], 16)])])],
        training="600 steps",
        curve=loss_curve([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]),
        served=take(path, [], "64x64", EVIL),
        stages=[StageRow("prepare", EVIL, 3, 1, "2 s")],
        total_time="5 s",
        next_steps=[Entry("next", "make demo VIDEOS=mine")],
        notes=[EVIL],
    )


@pytest.fixture
def page(report: Report, tmp_path: Path) -> tuple[str, Page]:
    html = write_report(tmp_path / "report.html", report).read_text(encoding="utf-8")
    return html, Page(html)


def test_holds_every_section_and_figure(page: tuple[str, Page]) -> None:
    _, parsed = page
    assert parsed.ids == {"flow", "generated", "judge", "dataset", "training", "served", "time", "next"}
    for words in ("no video stream", "600 steps", "make demo VIDEOS=mine", "1 of 9 scenes", "75 %", "Before", "first"):
        assert words in parsed.text, words
    assert parsed.tags.count("video") == 3
    assert "polyline" in parsed.tags


def test_loads_nothing_from_elsewhere(page: tuple[str, Page]) -> None:
    html, parsed = page
    assert parsed.loads and all(load.startswith("data:") for load in parsed.loads)
    assert not re.search(r"url\(|@import", html)
    assert "script" not in parsed.tags and "link" in parsed.tags  # the link is the empty icon


def test_text_from_outside_is_escaped(page: tuple[str, Page]) -> None:
    html, parsed = page
    assert "<script" not in html and "<img src=x" not in html
    assert parsed.text.count(EVIL) == 11


def test_empty_parts_say_so(report: Report, tmp_path: Path) -> None:
    report.generated, report.judge, report.served, report.curve, report.set_aside = [], [], None, None, []
    parsed = Page(write_report(tmp_path / "empty.html", report).read_text(encoding="utf-8"))
    for words in (
        "Nothing was generated",
        "none",
        "No video was fetched",
        "No loss was logged",
        "No file was set aside",
    ):
        assert words in parsed.text


def test_judge_rows_know_which_way_is_better() -> None:
    before = {"identity_said": {"value": 0.4, "count": 6}, "identity_unsaid": {"value": 0.9, "count": 8}}
    after = {"identity_said": {"value": 0.6, "count": 6}, "identity_unsaid": {"value": 0.5, "count": 7}}
    said, unsaid = judge_rows(before, after)
    assert (said.before, said.after, said.count, said.trend) == ("40 %", "60 %", "6", "better")
    assert (unsaid.before, unsaid.after, unsaid.count, unsaid.trend) == ("0.90", "0.50", "8 / 7", "better")
    assert judge_rows(after, before)[1].trend == "worse"
    assert judge_rows(before, {}) == []


def test_loss_curve_stays_inside_its_frame() -> None:
    svg = loss_curve([{"step": s, "loss": 2.0 / s} for s in range(1, 50)])
    assert svg is not None
    points = re.search(r'points="([^"]+)"', svg)
    assert points is not None
    xy = np.array([[float(v) for v in point.split(",")] for point in points[1].split()])
    assert (xy >= 0).all() and xy[:, 0].max() <= 1000 and xy[:, 1].max() <= 300
    assert (np.diff(xy[:, 1]) >= 0).all()  # a falling loss goes down the page
    assert loss_curve([{"step": 1, "loss": 1.0}]) is None


def test_strip_has_three_frames_per_shot(tmp_path: Path) -> None:
    frames = np.zeros((10, 32, 32, 3), np.uint8)
    made = take(write_video(frames, tmp_path / "b.mp4", 8), [5], "l", "n")
    assert [len(shot) for shot in made.strip] == [3, 3] and made.width == 32
    assert made.video.startswith("data:video/mp4;base64,")
