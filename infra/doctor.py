"""What this machine has, what is wrong with it, and how to fix each thing; behind `shotloom doctor`."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from infra.machine import available_memory, total_memory, usable_cores

GIB = 2**30
REINSTALL = "run `make setup`; if that changes nothing, `make clean setup`"


@dataclass(frozen=True)
class Check:
    """One finding. `needed`: Shotloom does not work without it; a check that is not needed only warns."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
    needed: bool = True


def run_checks(model: Path | None = None) -> list[Check]:
    """Every check, in reading order; about 10 s, most of it starting Ray. `model`: folder of the shipped model."""
    with ThreadPoolExecutor(2) as pool:
        ray = pool.submit(_guarded, "ray", check_ray)  # in processes of their own, beside the others
        torch = pool.submit(_guarded, "torch", check_torch)
        found = [_guarded(*named) for named in _IN_PROCESS]
        if model is not None:
            found.append(_guarded("model", lambda: check_model(model)))
        return [*found, torch.result(), ray.result()]


def report(model: Path | None = None, as_json: bool = False) -> int:
    """Prints the checks, problems last with their fix. Returns the exit status: 1 if something needed is broken."""
    checks = run_checks(model)
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            print(f"{_mark(check)}  {check.name:<9} {check.detail}")
        problems = [check for check in checks if not check.ok]
        for check in problems:
            print(f"\n{check.name}: {check.detail}\n  fix: {check.fix}")
        print("\nAll well." if not problems else "")
    return int(any(check.needed and not check.ok for check in checks))


def _mark(check: Check) -> str:
    return "ok  " if check.ok else "FAIL" if check.needed else "warn"


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that itself breaks is a finding, not the end of the report."""
    try:
        found = check()
        return replace(found, fix="") if found.ok else found
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {error}", REINSTALL)


def check_python() -> Check:
    """Python 3.11 or newer, and the processor's kind."""
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    return Check("python", sys.version_info >= (3, 11), detail, "install Python 3.11, then `make clean setup`")


def check_packages() -> Check:
    """Each declared dependency is installed in a version that pyproject.toml allows."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(text) for text in importlib.metadata.requires("shotloom") or []]
    except importlib.metadata.PackageNotFoundError:
        return Check("packages", False, "shotloom itself is not installed here", REINSTALL)
    wrong = []
    for requirement in declared:
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    shown = ("ray", "torch", "diffusers", "transformers", "webdataset")
    versions = ", ".join(f"{name} {_version(name)}" for name in shown)
    return Check("packages", not wrong, "; ".join(wrong) or versions, REINSTALL)


def check_cores() -> Check:
    """At least two cores: one is enough to work, but not in the times the documentation gives."""
    cores = usable_cores()
    fix = "give this container or job a second core; everything works on one, at half the speed"
    return Check("cores", cores >= 2, f"{cores} usable of {os.cpu_count()}", fix, needed=False)


def check_memory() -> Check:
    """6 GiB free: the demo's largest moment is Ray with two actor pools, each with its own torch."""
    free, total = available_memory() / GIB, total_memory() / GIB
    return Check(
        "memory",
        free >= 6,
        f"{free:.1f} GiB free of {total:.1f}",
        "close other programs, or raise the container's limit; the demo needs 6 GiB free",
        needed=free < 3,
    )


def check_disk() -> Check:
    """5 GiB free in the current folder and in the temporary folder, where Ray keeps its session files."""
    free = {str(folder): shutil.disk_usage(folder).free / GIB for folder in (Path.cwd(), Path(tempfile.gettempdir()))}
    detail = ", ".join(f"{size:.0f} GiB free in {folder}" for folder, size in free.items())
    return Check("disk", min(free.values()) >= 5, detail, "free space; Ray stops working on a disk 95 % full")


def check_shared_memory() -> Check:
    """Ray's object store lies in /dev/shm; a container's default of 64 MB makes it fall back to slow files."""
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return Check("shm", True, "no /dev/shm on this system; Ray uses files", needed=False)
    free = shutil.disk_usage(shm).free / GIB
    fix = "start the container with --shm-size=2g or more"
    return Check("shm", free >= 1, f"{free:.1f} GiB free in /dev/shm", fix, needed=False)


def check_pyav() -> Check:
    """PyAV encodes and decodes H.264, the format of everything Shotloom writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "check.mp4"
        _write_clip(path)
        frames = _count_frames(path)
    fix = "the installed PyAV lacks H.264 (libx264): " + REINSTALL
    return Check("h264", frames == 8, f"PyAV {_version('av')} wrote 8 frames and read {frames}", fix)


def check_av1() -> Check:
    """PyAV decodes AV1, which newer web videos use."""
    import av

    with av.open(io.BytesIO(base64.b64decode(_AV1)), "r") as container:
        means = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    right = [round(mean) for mean in means] == [0, 60]
    detail = "PyAV reads it" if right else f"PyAV read {means}, not a black and a grey frame"
    return Check("av1", right, detail, REINSTALL, needed=False)


def check_decord() -> Check:
    """decord (from the package decord2) opens an H.264 file."""
    import decord

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "check.mp4"
        _write_clip(path)
        frames = len(decord.VideoReader(str(path)))
    return Check("decord", frames == 8, f"decord2 {_version('decord2')} read {frames} of 8 frames", REINSTALL)


def check_model(folder: Path) -> Check:
    """The small model that comes with the repository is there and whole."""
    missing = [name for name in ("model_index.json", "shotloom.json") if not (folder / name).is_file()]
    missing += [
        f"{part}/" for part in ("transformer", "vae", "text_encoder") if not any((folder / part).glob("*.safetensors"))
    ]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    detail = f"{folder} lacks {', '.join(missing)}" if missing else f"{folder}, {size:.1f} MB"
    return Check("model", not missing, detail, "restore it from git, or make it again with `make toy-models`")


_TORCH = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    p = torch.cuda.get_device_properties(i)
    found["gpus"].append(f"{p.name}, {p.total_memory / 2**30:.0f} GiB")
try:
    import torchvision
    from torchvision.ops import nms
    nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    found["torchvision"] = torchvision.__version__
except Exception as error:
    found["error"] = f"torchvision does not fit torch: {error}"
print(json.dumps(found))
"""


def check_torch() -> Check:
    """torch loads, torchvision is of the same build, and a GPU that the driver shows is one that torch can use."""
    found = json.loads(_run_python(_TORCH, timeout=120).splitlines()[-1])
    gpus, driver = found["gpus"], shutil.which("nvidia-smi") is not None and Path("/dev/nvidiactl").exists()
    detail = f"torch {found['torch']}, " + ("; ".join(gpus) if gpus else "no GPU: everything runs on the CPU")
    if "error" in found:
        return Check("torch", False, found["error"], "install both from the same lock: " + REINSTALL)
    if driver and not gpus:
        fix = f"torch was built for CUDA {found['cuda']}: update the NVIDIA driver, and check `nvidia-smi`"
        return Check("torch", False, detail + ", though an NVIDIA driver is present", fix, needed=False)
    return Check("torch", True, detail)


_RAY = """
from infra.ray_session import ray_session
with ray_session() as session:
    import ray
    assert ray.get(ray.remote(lambda: 41 + 1).remote(), timeout=60) == 42
    print(session.num_cpus, session.num_gpus, session.started)
"""


def check_ray() -> Check:
    """Ray starts (or RAY_ADDRESS can be joined) and runs a task."""
    before = time.monotonic()
    cpus, gpus, started = _run_python(_RAY, timeout=120).split()[-3:]
    took = time.monotonic() - before
    kind = "started here" if started == "True" else f"joined {os.environ.get('RAY_ADDRESS', 'a cluster')}"
    return Check("ray", True, f"{_version('ray')} {kind} and ran a task in {took:.0f} s; {cpus} CPUs, {gpus} GPUs")


# A black and a grey (60) frame of 64x64, written by SVT-AV1 into IVF.
_AV1 = (
    "REtJRgAAIABBVjAxQABAAAgAAAABAAAAAgAAAAAAAAAgAAAAAAAAAAAAAAASAAoKAAAAAq//jV8wCDIQEACtggUUIIEAAAgAlc4KoBcAAAABAAAA"
    "AAAAABIAMhMwAgQJJJI7GAAAAgAAAAAfTQSG"
)

_IN_PROCESS: tuple[tuple[str, Callable[[], Check]], ...] = (
    ("python", check_python),
    ("packages", check_packages),
    ("cores", check_cores),
    ("memory", check_memory),
    ("disk", check_disk),
    ("shm", check_shared_memory),
    ("h264", check_pyav),
    ("av1", check_av1),
    ("decord", check_decord),
)


def _run_python(code: str, timeout: float) -> str:
    """Runs code in a fresh process, so that a crash or a hang there is one finding. Returns its stdout."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer within {timeout:.0f} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout


def _write_clip(path: Path) -> None:
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 30 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _count_frames(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
