"""Colour: matrix and range as the file states them, HDR and wide primaries as SDR BT.709; all on known pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from av.filter import Graph

from preprocess.colour import Colour, to_sdr, tone_curve
from preprocess.decode import DecodeCount, frames
from preprocess.probe import VideoInfo, probe
from tests.preprocess.videos import CODES, to_yuv, write_planes

RGB = np.array([[200, 60, 40], [40, 180, 90], [30, 60, 190], [128, 128, 128], [250, 250, 250], [10, 10, 10]]) / 255
PQ, HLG = 16, 18
CELL = 16


def patches(colours: np.ndarray) -> np.ndarray:
    """Columns of flat colour: float [CELL*4, CELL*n, 3]."""
    return np.tile(np.repeat(colours, CELL, axis=0)[None], (4 * CELL, 1, 1))


def read(path: Path, decoder: str = "") -> tuple[np.ndarray, VideoInfo]:
    """(colour in the middle of each column, float [n,3]; facts) of the second frame, at the size of the file."""
    info = probe(str(path))
    asked = replace(info, decoder=decoder) if decoder else info
    got = list(frames(str(path), asked, info.height, info.width, count=DecodeCount()))
    return got[1].image[info.height // 2, CELL // 2 :: CELL].astype(float), info


@pytest.mark.parametrize("matrix", ["bt601", "bt709", "bt2020"])
@pytest.mark.parametrize("full_range", [False, True])
def test_matrix_and_range_are_those_of_the_file(tmp_path: Path, matrix: str, full_range: bool) -> None:
    planes = to_yuv(patches(RGB), matrix, full_range)
    path = write_planes(
        tmp_path / "a.mkv", planes, "yuv444p", matrix=CODES[matrix], primaries=1, transfer=1, color_range=1 + full_range
    )
    got, info = read(path)
    assert (info.colour.matrix, info.colour.full_range, info.colour.assumed) == (matrix, full_range, False)
    assert np.abs(got - 255 * RGB).max() <= 3


@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
@pytest.mark.parametrize("full_range", [False, True])
def test_both_decoders_keep_matrix_and_range(tmp_path: Path, matrix: str, full_range: bool) -> None:
    planes = [p[:: 1 + (i > 0), :: 1 + (i > 0)] for i, p in enumerate(to_yuv(patches(RGB), matrix, full_range))]
    path = write_planes(
        tmp_path / "a.mp4", planes, "yuv420p", "libx264", {"crf": "1", "preset": "ultrafast"},
        matrix=CODES[matrix], primaries=1, transfer=1, color_range=1 + full_range,
    )  # fmt: skip
    for decoder in ("decord", "pyav"):
        got, info = read(path, decoder)
        assert info.decoder == "decord"
        assert np.abs(got - 255 * RGB).max() <= 5, decoder


@pytest.mark.parametrize(("height", "matrix"), [(576, "bt601"), (720, "bt709")])
def test_a_matrix_that_is_not_stated_follows_from_the_size(tmp_path: Path, height: int, matrix: str) -> None:
    """swscale alone takes BT.601 for everything: colours of HD come out up to 20 levels wrong."""
    image = np.tile(patches(RGB), (height // 64 + 1, 8, 1))[:height]
    path = write_planes(tmp_path / "a.mkv", to_yuv(image, matrix), "yuv444p", count=2)
    got, info = read(path)
    assert info.colour.assumed and info.colour.matrix == matrix
    assert np.abs(got[: len(RGB)] - 255 * RGB).max() <= 3


def test_hd_that_states_no_matrix_is_not_for_decord(tmp_path: Path) -> None:
    planes = [np.full((720 // s, 1280 // s), 120, "u1") for s in (1, 2, 2)]
    info = probe(str(write_planes(tmp_path / "a.mp4", planes, "yuv420p", "libx264", {"preset": "ultrafast"})))
    assert info.decoder == "pyav" and info.decoder_reason == "HD that states no colour matrix"


# Independent of preprocess.colour: the recommendations once more, on single numbers


def pq(nits: float) -> float:
    """BT.2100 inverse EOTF."""
    y = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def from_pq(signal: float) -> float:
    root = signal ** (1 / 78.84375)
    return 10000 * (max(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)


def bt2390(nits: float, peak: float, target: float = 203.0) -> float:
    """Annex of BT.2390: E1 -> E2, black at 0."""
    e1, most = min(1.0, pq(nits) / pq(peak)), pq(target) / pq(peak)
    knee = 1.5 * most - 0.5
    if e1 < knee:
        return nits
    t = (e1 - knee) / (1 - knee)
    e2 = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    return from_pq(e2 * pq(peak))


def sdr(nits: float) -> float:
    """Code of a grey on a BT.1886 display whose white is 203 nits."""
    return 255 * min(1.0, nits / 203) ** (1 / 2.4)


# linear BT.709 to linear BT.2020: BT.2087
TO_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
GREYS = [0.0, 0.1, 1.0, 5.0, 20.0, 60.0, 100.0, 203.0, 400.0, 700.0, 1000.0]


def write_hdr(path: Path, signal: np.ndarray, transfer: int) -> Path:
    return write_planes(
        path, to_yuv(patches(signal), "bt2020", bits=10), "yuv444p10le",
        matrix=9, primaries=9, transfer=transfer, color_range=1,
    )  # fmt: skip


def test_pq_greys_follow_bt2390(tmp_path: Path) -> None:
    signal = np.array([[pq(nits)] * 3 for nits in GREYS])
    got, info = read(write_hdr(tmp_path / "a.mkv", signal, PQ))
    assert info.hdr and info.colour.transfer == "pq" and info.colour.peak_nits == 1000 and info.decoder == "pyav"
    true = np.array([sdr(bt2390(nits, 1000)) for nits in GREYS])
    assert np.abs(got - true[:, None]).max() <= 2
    assert np.abs(got - 255 * signal).max() > 40  # the bug: PQ codes shown as SDR
    assert (np.diff(got[:, 0]) >= 0).all() and got[-1, 0] == 255


def test_hdr_colours_below_the_knee_are_those_of_sdr(tmp_path: Path) -> None:
    """A BT.709 colour of a 60-nit picture: the same codes as on an SDR display of 203 nits; hues stay above it."""
    linear = np.array([[1, 0.2, 0.1], [0.1, 0.8, 0.3], [0.1, 0.2, 0.9], [0.5, 0.5, 0.1]])
    for scale, exact in ((60.0, True), (600.0, False)):
        light = linear * scale
        signal = np.vectorize(pq)(light @ TO_2020.T)
        got, _ = read(write_hdr(tmp_path / "a.mkv", signal, PQ))
        true = np.vectorize(sdr)(light)
        if exact:
            assert np.abs(got - true).max() <= 3
        else:  # brightness is compressed, the order of the channels is not
            assert (np.argsort(got, axis=1) == np.argsort(true, axis=1)).all() and (got < 255).any(axis=1).all()


def test_hlg_greys(tmp_path: Path) -> None:
    """BT.2408: 75 % HLG is 203 nits on a display of 1000; 50 % is 1/12 of scene light."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    levels = [0.0, 0.2, 0.38, 0.5, 0.75, 1.0]
    scene = [s * s / 3 if s <= 0.5 else (np.exp((s - c) / a) + b) / 12 for s in levels]
    nits = [1000 * e**1.2 for e in scene]
    assert nits[4] == pytest.approx(203, rel=0.02)
    got, info = read(write_hdr(tmp_path / "a.mkv", np.array(levels)[:, None].repeat(3, 1), HLG))
    assert info.colour.transfer == "hlg"
    assert np.abs(got - np.array([sdr(bt2390(n, 1000)) for n in nits])[:, None]).max() <= 2


def test_wide_colours_of_sdr(tmp_path: Path) -> None:
    linear = np.array([[0.8, 0.2, 0.1], [0.1, 0.7, 0.3], [0.1, 0.2, 0.9], [0.4, 0.4, 0.4]])
    signal = (linear @ TO_2020.T) ** (1 / 2.4)
    got, info = read(write_hdr(tmp_path / "a.mkv", signal, 14))
    assert not info.hdr and info.colour.primaries == "bt2020"
    assert np.abs(got - 255 * linear ** (1 / 2.4)).max() <= 3
    assert np.abs(got - 255 * signal).max() > 15  # the bug: shown as if its primaries were those of BT.709


def test_the_peak_of_the_file_sets_the_tone_curve(tmp_path: Path) -> None:
    planes = [plane[:: 1 + (i > 0), :: 1 + (i > 0)] for i, plane in enumerate(to_yuv(patches(RGB), "bt2020", bits=10))]
    display = "log-level=none:master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(40000000,1)"
    for light, peak in (("", 4000.0), (":max-cll=1200,300", 1200.0)):
        path = write_planes(
            tmp_path / "a.mp4", planes, "yuv420p10le", "libx265", {"x265-params": display + light},
            matrix=9, primaries=9, transfer=PQ, color_range=1,
        )  # fmt: skip
        assert probe(str(path)).colour.peak_nits == peak


@pytest.mark.slow  # FFmpeg makes a table of the whole colour space first
@pytest.mark.timeout(900)
@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_below_the_knee_as_ffmpeg_maps_it(transfer: int) -> None:
    """FFmpeg's colour management (swscale, relative intent) leaves light below its white as it is, and so do we."""
    linear = np.array([[1, 1, 1], [1, 0.4, 0.3], [0.3, 0.8, 0.4], [0.2, 0.3, 0.9], [0.6, 0.6, 0.2]])
    light = np.concatenate([linear * scale for scale in (3.0, 20.0, 60.0)]) @ TO_2020.T
    if transfer == PQ:
        signal = np.vectorize(pq)(light)
    else:
        scene = light / 1000 * (light @ [0.2627, 0.6780, 0.0593] / 1000)[:, None] ** (1 / 1.2 - 1)
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        signal = np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)
    codes = np.rint(65535 * patches(signal)).astype(np.uint16)
    frame = av.VideoFrame.from_ndarray(codes, format="rgb48le")
    frame.color_trc, frame.color_primaries, frame.colorspace = transfer, 9, 0
    graph = Graph()
    size = f"{frame.width}x{frame.height}"
    source = graph.add("buffer", video_size=size, pix_fmt="rgb48le", time_base="1/24", colorspace="0", range="2")
    scale = graph.add("scale", "out_transfer=bt709:out_primaries=bt709:intent=relative_colorimetric")
    graph.link_nodes(source, scale, graph.add("format", "rgb24"), graph.add("buffersink")).configure()
    graph.vpush(frame)
    theirs = graph.vpull().to_ndarray().astype(int)
    ours = to_sdr(codes, Colour("rgb", False, True, "bt2020", "pq" if transfer == PQ else "hlg", 1000.0)).astype(int)
    assert np.abs(ours - theirs).max() <= 4


def test_tone_curve_ends() -> None:
    nits = np.linspace(0, 4000, 500)
    mapped = tone_curve(nits, 4000)
    assert (np.diff(mapped) > 0).all() and mapped[-1] == pytest.approx(203, rel=1e-3)
    assert tone_curve(np.array([5.0]), 4000)[0] == pytest.approx(5.0)
    assert np.allclose(tone_curve(nits, 203), np.minimum(nits, 203))  # nothing to compress


def test_real_hdr_clips(shared_data: Path) -> None:
    """Found where the catalogue says HDR, whatever the container says, and decoded to a picture."""
    for name, transfer in (
        ("hdr10-video-with-sdr-container.mp4", "pq"),  # the container says SDR, the stream is right
        ("hlg10-color-test.mp4", "hlg"),
        ("sample_with_color_info.mp4", "hlg"),
        ("dolbyVision-hdr.MOV", "hlg"),
        ("sample_with_colr_mdcv_and_clli.mp4", "pq"),
    ):
        path = shared_data / "broken" / "odd" / "exoplayer" / name
        info = probe(str(path))
        assert info.hdr and info.colour.transfer == transfer, name
        first = next(iter(frames(str(path), info, 64, 64, count=DecodeCount())))
        assert first.image.dtype == np.uint8 and first.image.std() > 5, name
