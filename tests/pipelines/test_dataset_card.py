"""The dataset card shows what the tables say, escapes what comes from outside, and loads nothing from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from models.tiny import build_tiny_folder
from pipelines.cli import main
from pipelines.dataset_card import histogram, write_card
from pipelines.report_media import frames_at, source_here
from preprocess.report import Pool, PrepareReport, StageReport
from preprocess.settings import PrepareSettings
from tests.preprocess.runs import run_here
from tests.preprocess.videos import pan, write


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    build_tiny_folder(folder / "model")
    write(folder / "videos" / "good.mp4", [*pan(1), *pan(2)])
    write(folder / "videos" / "<b>still & grey.mp4", [pan(3)[0]] * 17)
    write(folder / "videos" / "mixed.mp4", [*pan(4), *[pan(5)[0]] * 17])
    (folder / "videos" / "empty.mp4").touch()
    run_here(folder / "videos", folder / "out", folder / "model", PrepareSettings(height=32, width=32))
    return folder / "out"


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images, self.links = 0, []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.images += tag == "img"
        self.links += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in ("meta", "link", "img", "br", "rect", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line"):
            assert self.open.pop() == tag


def test_the_card_holds_what_the_tables_say(dataset: Path, tmp_path: Path) -> None:
    text = write_card(dataset, tmp_path / "card.html").read_text()
    page = Page(text)
    assert not page.open and all(link.startswith("data:") for link in page.links)
    assert "<script" not in text and "@import" not in text and "url(" not in text
    rows = pq.read_table(dataset / "manifest.parquet").to_pylist()
    shown = sum(3 if row["encoded_frames"] else 1 for row in rows)
    assert len(rows) == 5 and page.images == shown
    for row in rows:
        if row["filtered"]:
            assert row["filtered"] in text
        else:
            assert row["prompt"] in text
    assert "the file is empty (0 bytes)" in text and "&lt;b&gt;still &amp; grey.mp4" in text and "<b>still" not in text
    taken = re.search(r"<td>static</td><td class=\"n\">0.25</td><td class=\"n\">(\d)</td>", text)
    assert taken is not None and taken[1] == "2"
    assert text.count("<svg") >= 9


def test_the_card_says_how_fast_each_stage_could_be_and_which_knob_is_next(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "out")
    stages = {"probe": StageReport(4, 1.0), "decode": StageReport(4, 7.0), "encode": StageReport(4, 10.0)}
    pools = [Pool(["probe", "decode"], 2, "decode_cpus <less>"), Pool(["encode"], 1, "encoders, encoder_gpus")]
    report = PrepareReport(tmp_path / "out", seconds=12.5, stages=stages, pools=pools)
    (tmp_path / "out" / "report.json").write_text(json.dumps(report.to_dict()))
    text = write_card(tmp_path / "out", tmp_path / "card.html").read_text()
    assert not Page(text).open and "decode_cpus &lt;less&gt;" in text
    row = re.findall(r"<tr><td>encode</td>(.*?)</tr>", text)[-1]
    assert re.findall(r">([^<>]+)<", row) == [
        "1", "2.5", "0.4", "0.32", "80 %", "encoders, encoder_gpus",
    ]  # fmt: skip
    assert "slowest: encode, at most a video in 2.5 s with 1 at once" in text
    assert "next: encoders, encoder_gpus." in text
    (tmp_path / "out" / "report.json").write_text("{}")  # of an interrupted copy
    assert "slowest" not in write_card(tmp_path / "out", tmp_path / "card.html").read_text()


def test_each_video_of_a_tar_and_a_folder_of_images_show_their_own_pictures(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    build_tiny_folder(tmp_path / "model")
    for seed in (1, 2):
        write(tmp_path / f"{seed}.mp4", pan(seed))
    videos.mkdir()
    with tarfile.open(videos / "two.tar", "w") as tar:
        for seed in (1, 2):
            tar.add(tmp_path / f"{seed}.mp4", f"in/{seed}.mp4")
    for number, frame in enumerate(pan(3)):
        (videos / "images").mkdir(exist_ok=True)
        Image.fromarray(frame).save(videos / "images" / f"{number:04d}.png")
    settings = PrepareSettings(height=32, width=32)
    run_here(videos, tmp_path / "out", tmp_path / "model", settings, frames_fps=8.0)
    sources = {row["name"]: row for row in pq.read_table(tmp_path / "out" / "sources.parquet").to_pylist()}
    assert sorted(sources) == ["images", "two.tar/in/1.mp4", "two.tar/in/2.mp4"]
    for (_, row), seed in zip(sorted(sources.items()), (3, 1, 2), strict=True):
        with source_here(row) as path:
            assert path is not None
            (picture,) = frames_at(path, [0], row["frames_fps"] or None).values()
        true = np.asarray(Image.fromarray(pan(seed)[0]).resize(picture.shape[1::-1]), float)
        assert np.abs(picture - true).mean() < 8
    assert Page(write_card(tmp_path / "out", tmp_path / "card.html").read_text()).images == 9


def test_a_source_of_another_size_or_at_an_address_shows_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", pan(1))
    row = {"name": "a.mp4", "path": str(tmp_path / "a.mp4"), "bytes": 5}
    for one in (row, row | {"path": "memory://a.mp4"}, row | {"path": str(tmp_path / "gone.mp4")}):
        with source_here(one) as path:
            assert path is None


def test_sources_that_are_gone_leave_their_pictures_out(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "out")
    moved = dataset.parent / "videos"
    moved.rename(dataset.parent / "elsewhere")
    try:
        page = Page(write_card(tmp_path / "out", tmp_path / "card.html", max_scenes=2).read_text())
    finally:
        (dataset.parent / "elsewhere").rename(moved)
    assert page.images == 0


def test_histograms_count_every_shot() -> None:
    rows = [{"score_blur": value, "filtered": "" if value < 0.7 else "blurred: 1"} for value in (0.1, 0.1, 0.2, 0.9)]
    chart = histogram("blur", [*rows, {"score_blur": None, "filtered": ""}], {"max_blur": 0.72})
    assert chart is not None and "4 shots from 0.1 to 0.9" in chart.svg
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" fill="var\(--(?:after|bad)\)"', chart.svg)]
    assert heights == [90.0, 45.0, 45.0] and chart.svg.count("--bad") == 1 and "stroke-dasharray" in chart.svg
    assert histogram("blur", [{"score_blur": None, "filtered": ""}], {}) is None


def test_the_commands(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(dataset, copy)
    run = CliRunner().invoke
    result = run(main, ["inspect", str(copy)])
    assert result.exit_code == 0 and (copy / "card.html").is_file() and "card.html" in result.output
    assert run(main, ["verify", str(copy)]).exit_code == 0
    shard = copy / "shards" / "scenes-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 255
    shard.write_bytes(data)
    result = run(main, ["verify", str(copy)])
    assert result.exit_code == 1 and "scenes-000000.tar" in result.output
    assert run(main, ["inspect", str(tmp_path / "nothing")]).exit_code == 1
    keys = [f"sources={dataset.parent / 'videos'}", f"output={dataset}", f"model={dataset.parent / 'model'}"]
    size = ["height=32", "width=32", "fps=8", "shot_frames=17", "what_if=true"]
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    result = run(main, ["prepare", *keys, *size, "filters.min_movement=null", "filters.max_frozen=null"])
    assert result.exit_code == 0, result.output
    assert re.search(r"static +off +0 ", result.output) and "5 of 5 shots would be encoded" in result.output
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == before
    result = run(main, ["prepare", *keys, *size, "height=64"])
    assert result.exit_code == 1 and "height=64, but the scores" in result.output
