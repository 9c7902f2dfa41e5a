"""The doctor finds what is broken, says how to fix it, and survives checks that break."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra import doctor
from infra.doctor import Check


def test_this_environment_is_sound() -> None:
    for check in (doctor.check_python, doctor.check_packages, doctor.check_pyav, doctor.check_av1, doctor.check_decord):
        found = check()
        assert found.ok, found


def test_torch_and_torchvision_fit() -> None:
    found = doctor.check_torch()
    assert found.ok or not found.needed, found


def test_a_missing_or_wrong_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=99", "no-such-package>=1", "numpy>=1", "other; python_version < '3'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: wanted)
    found = doctor.check_packages()
    assert not found.ok and "is not >=99" in found.detail and "no-such-package is missing" in found.detail
    assert "numpy" not in found.detail and "make setup" in found.fix


def test_little_memory_warns_and_very_little_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, ok, needed in ((8, True, False), (4, False, False), (1, False, True)):
        monkeypatch.setattr(doctor, "available_memory", lambda free=free: free * doctor.GIB)
        found = doctor.check_memory()
        assert (found.ok, found.needed) == (ok, needed)


def test_model_folder(tmp_path: Path) -> None:
    missing = doctor.check_model(tmp_path)
    assert not missing.ok and "model_index.json" in missing.detail and "transformer/" in missing.detail
    for name in ("model_index.json", "shotloom.json", "transformer/a.safetensors", "vae/a.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert "text_encoder/" in doctor.check_model(tmp_path).detail
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "a.safetensors").write_text("{}")
    assert doctor.check_model(tmp_path).ok


def test_code_that_fails_or_hangs_is_reported() -> None:
    with pytest.raises(RuntimeError, match="ValueError: broken here"):
        doctor._run_python("raise ValueError('broken here')", timeout=60)
    with pytest.raises(RuntimeError, match="no answer within 0 s"):
        doctor._run_python("import time; time.sleep(60)", timeout=0.2)


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """Lets the report show these findings only."""
    found: list[Check] = []
    monkeypatch.setattr(doctor, "run_checks", lambda _: found)
    return found


def test_report_lists_problems_with_their_fix(findings: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    findings += [Check("python", True, "3.11"), Check("shm", False, "64 MB", "use --shm-size", needed=False)]
    assert doctor.report() == 0
    out = capsys.readouterr().out
    assert "ok    python" in out and "warn  shm" in out and "shm: 64 MB\n  fix: use --shm-size" in out
    findings.append(Check("ray", False, "does not start", "do this"))
    assert doctor.report() == 1
    assert "FAIL  ray" in capsys.readouterr().out


def test_report_when_all_is_well(findings: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    findings.append(Check("python", True, "3.11"))
    assert doctor.report() == 0
    assert capsys.readouterr().out.endswith("All well.\n")


def test_report_as_json(findings: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    findings.append(Check("ray", False, "does not start", "do this"))
    assert doctor.report(as_json=True) == 1
    assert json.loads(capsys.readouterr().out) == [
        {"name": "ray", "ok": False, "detail": "does not start", "fix": "do this", "needed": True}
    ]


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> Check:
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "_IN_PROCESS", (("h264", broken), ("python", doctor.check_python)))
    monkeypatch.setattr(doctor, "check_torch", lambda: Check("torch", True, "", "not shown"))
    monkeypatch.setattr(doctor, "check_ray", broken)
    found = {check.name: check for check in doctor.run_checks(tmp_path)}
    assert list(found) == ["h264", "python", "model", "torch", "ray"]
    assert found["h264"].detail == found["ray"].detail == "OSError: no such thing"
    assert found["h264"].needed and found["h264"].fix and found["torch"].fix == ""


@pytest.mark.slow
def test_ray_check_starts_ray() -> None:
    found = doctor.check_ray()
    assert found.ok and "ran a task" in found.detail
