"""The media a scene refers to, as clips at training size: condition images, the source of a style pair, an action."""

from __future__ import annotations

import io
import json
import os
import posixpath
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from models.records import decode
from models.scene import IMAGE_ROLES, Reference, ReferenceRole
from preprocess.captions import read_sidecar
from preprocess.filters import NO_FILTERS
from preprocess.letterbox import NO_BARS, find_bars
from preprocess.outcome import Failed, SetAside, short
from preprocess.probe import probe
from preprocess.remote import bare, beside, copy_here, info_at, is_address, sha256_at, stamp
from preprocess.settings import PrepareSettings
from preprocess.sources import SourceFile, readable
from preprocess.spans import read_shots
from preprocess.tars import find_member

STILL_FRAMES = 17  # an image is encoded as a still clip of so many frames; a method takes the head it needs


@dataclass
class SeenReference:
    """A reference of a video, where it lies, and its file as it is, so that another one later is noticed."""

    role: ReferenceRole
    path: str  # as the captions or the list have it
    place: str = ""  # a path, an address, or the tar that `member` lies in
    member: str = ""
    span: list[int] | None = None  # of the member; None: not there
    stamp: int = 0  # of the file or tar; 0: not there, or its store tells nothing
    sha256: str = ""  # "": not there, or at an address
    error: str = ""  # why it can lie nowhere


def see_references(file: SourceFile, captions: str | None) -> list[SeenReference]:
    """What the list or the caption file of a video refers to, in order; `captions` is its local path.

    What cannot be found is said when it is read. Raises Failed where the captions cannot be read, or both refer.
    """
    told = read_sidecar(captions, words=False).references if captions else []
    if told and file.references:
        name = Path(file.captions or "").name if not file.captions_span else PurePosixPath(file.member).stem + ".json"
        raise Failed("captions", f"{name} and the list both name references; give them in one of the two")
    seen = [SeenReference(one.role, readable(one.path), one.place) for one in file.references]
    for one in told:
        try:
            seen.append(SeenReference(one.role, readable(one.path), *_place(one, file)))
        except ValueError as error:
            seen.append(SeenReference(one.role, readable(one.path), error=str(error)))
    for reference in seen:
        reference.stamp = _stamp(reference.place)
        reference.span, reference.error = _find(reference)
        reference.sha256 = _sha256(reference)
    return seen


def references_text(seen: Sequence[SeenReference]) -> str:
    """As JSON, for tables; "" where there are none."""
    return json.dumps([asdict(one) for one in seen]) if seen else ""


def references_hold(row: dict[str, Any]) -> bool:
    """Whether the files that a row of sources.parquet refers to are what they were when it was made.

    Those at addresses are looked at where the row failed only: a store would be asked for each.
    """
    for value in json.loads(row.get("references") or "[]"):
        was = decode(SeenReference, value, "references")
        if is_address(was.place) and row["status"] != "failed":
            continue
        if _stamp(was.place) != was.stamp:
            was.error = ""
            was.span, was.error = _find(was)
            if not was.sha256 or _sha256(was) != was.sha256:
                return False
    return True


def _place(reference: Reference, file: SourceFile) -> tuple[str, str]:
    """(path, address or tar; member of the tar): what captions in a tar or a store name lies there, too.

    Raises ValueError where it does not.
    """
    captions = file.captions or ""
    if file.captions_span is not None:
        return captions, posixpath.normpath(posixpath.join(posixpath.dirname(file.member), reference.path))
    if is_address(captions):
        return beside(captions, reference.path), ""
    return os.path.join(os.path.dirname(captions), reference.path), ""


def _stamp(place: str) -> int:
    if is_address(place):
        return stamp(info_at(place))
    try:
        return os.stat(place).st_mtime_ns if place else 0
    except (OSError, ValueError):
        return 0


def _find(reference: SeenReference) -> tuple[list[int] | None, str]:
    """(offset and size in a tar, why there are none)."""
    if reference.error or not reference.member:
        return None, reference.error
    try:
        span = find_member(reference.place, reference.member)
    except Exception as error:  # damaged, gone, or what a driver raises
        return None, f"its tar cannot be read ({short(error)})"
    return span, "" if span else f"no file {reference.member!r} in its tar"


def _sha256(reference: SeenReference) -> str:
    if reference.error or not reference.place or is_address(reference.place):
        return ""
    try:
        return sha256_at(reference.place, reference.span)
    except (OSError, EOFError, ValueError):
        return ""


def read_reference(reference: SeenReference, scratch: Path, settings: PrepareSettings) -> np.ndarray:
    """uint8 [n,H,W,3], as many frames as the VAE takes; a file that lies elsewhere is copied to `scratch`.

    A clip is read as a source is: at the training rate, and the same frames of it. Raises Failed naming the reference.
    """
    try:
        path = _here(reference, scratch)
        if reference.role in IMAGE_ROLES:
            return np.repeat(_read_image(path, settings)[None], STILL_FRAMES, axis=0)
        return _read_clip(path, settings)
    except SetAside as end:  # of the reference: the video itself is not to blame
        raise Failed("encode", f"reference {reference.path}: {end.reason}") from end


def _here(reference: SeenReference, scratch: Path) -> Path:
    if reference.error:
        raise Failed("encode", reference.error)
    if not reference.member and not is_address(reference.place):
        if not Path(reference.place).is_file():
            raise Failed("encode", "no such file beside the captions or the list")
        return Path(reference.place)
    copy = scratch / PurePosixPath(bare(reference.path)).name
    copy_here(reference.place, reference.span, copy)
    return copy


def _read_clip(path: Path, settings: PrepareSettings) -> np.ndarray:
    scratch = io.BytesIO()
    # what a shot refers to is given, not chosen: no filter but its length
    info = probe(str(path))
    bars = find_bars(str(path), info, settings.max_seconds)[0] if settings.crop_bars else NO_BARS
    shots, _ = read_shots(str(path), info, replace(settings, filters=NO_FILTERS), scratch, bars=bars)
    encoded = [shot for shot in shots if shot.span_pts]
    if len(encoded) != 1:
        raise Failed("encode", f"has {len(encoded)} shots that can be encoded, needs one")
    shape = (len(encoded[0].span_pts), settings.height, settings.width, 3)
    size = settings.height * settings.width * 3
    data = scratch.getvalue()[encoded[0].offset * size :][: int(np.prod(shape))]
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_image(path: Path, settings: PrepareSettings) -> np.ndarray:
    """Upright RGB, scaled to cover the training size and cropped to its middle, as in sampling: uint8 [H,W,3]."""
    height, width = settings.height, settings.width
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Failed("encode", f"no readable image ({short(error)})") from error
    scale = max(height / upright.height, width / upright.width)
    size = (max(width, round(upright.width * scale)), max(height, round(upright.height * scale)))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    if size != upright.size:
        upright = upright.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(upright)[top : top + height, left : left + width]
