"""The report of a run: speeds beside what the workers could do, and the knob to turn next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preprocess.report import Pool, PrepareReport, StageReport, read_speeds

POOLS = [Pool(["probe", "decode", "captions"], 4, "decode_cpus"), Pool(["encode"], 1, "encoders")]


def a_report(decode: float, encode: float, shards: float = 0.0, seconds: float = 100.0) -> PrepareReport:
    stages = {
        "probe": StageReport(50, 10.0),
        "decode": StageReport(40, decode),
        "captions": StageReport(40, 0.0),
        "encode": StageReport(40, encode),
        "shards": StageReport(40, shards),
    }
    return PrepareReport(Path("out"), seconds=seconds, stages=stages, pools=POOLS)


def test_a_pool_is_measured_against_what_its_workers_could_do() -> None:
    decode, encode = a_report(decode=190.0, encode=80.0).speeds()
    # 200 seconds of work on 50 videos, by 4 at once
    assert (decode.each, decode.ceiling, decode.rate) == pytest.approx((4.0, 1.0, 0.5)) and decode.busy == 0.5
    assert (encode.each, encode.ceiling, encode.rate) == pytest.approx((2.0, 0.5, 0.4))
    assert encode.busy == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (a_report(190.0, 80.0), ("slowest: encode, at most a video in 2.0 s with 1 at once", "80% of", "encoders")),
        (a_report(390.0, 20.0), ("slowest: probe, decode, captions", "decode_cpus")),
        (a_report(10.0, 20.0), ("more videos in one run",)),
        (a_report(10.0, 20.0, shards=60.0), ("faster disk", "took 60% of the time")),
    ],
)
def test_the_slowest_pool_names_its_knob(report: PrepareReport, words: tuple[str, ...]) -> None:
    speeds, line = read_speeds(json.loads(json.dumps(report.to_dict())))  # as the card reads it
    assert speeds == report.speeds()
    for word in words:
        assert word in report.summary() and word in line


def test_a_run_without_work_and_a_report_of_an_earlier_version_have_no_speeds() -> None:
    assert PrepareReport(Path("out")).speeds() == [] and "next" not in PrepareReport(Path("out")).summary()
    assert read_speeds({"stages": {"probe": {"items": 1, "seconds": 1.0, "set_aside": 0}}, "seconds": 1.0}) == ([], "")
