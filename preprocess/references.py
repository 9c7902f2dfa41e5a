"""The media a scene refers to, as clips at training size: condition images, the source of a style pair, an action."""

from __future__ import annotations

import io
import posixpath
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from models.scene import IMAGE_ROLES, Reference
from preprocess.filters import NO_FILTERS
from preprocess.letterbox import NO_BARS, find_bars
from preprocess.outcome import Failed, short
from preprocess.probe import probe
from preprocess.remote import beside, copy_here, is_direct
from preprocess.settings import PrepareSettings
from preprocess.sources import SourceFile
from preprocess.spans import read_shots
from preprocess.tars import find_member

STILL_FRAMES = 17  # an image is encoded as a still clip of so many frames; a method takes the head it needs


def reference_here(reference: Reference, file: SourceFile, folder: Path) -> tuple[Reference, Path]:
    """A reference, and the local folder that its path is relative to.

    One that a caption file in a tar or at an address names lies in the same tar or store, and is copied to `folder`.
    Raises Failed naming it.
    """
    captions = file.captions or ""
    if is_direct(captions, file.captions_span):
        return reference, Path(captions).parent
    copy = folder / PurePosixPath(reference.path).name
    try:
        path, span = captions, None
        if file.captions_span is None:
            path = beside(captions, reference.path)
        else:
            member = posixpath.normpath(posixpath.join(posixpath.dirname(file.member), reference.path))
            span = find_member(captions, member)
            if span is None:
                raise ValueError(f"no file {member!r} in its tar")
        copy_here(path, span, copy)
    except ValueError as error:
        raise Failed("encode", f"reference {reference.path}: {error}") from error
    except Failed as error:
        raise Failed("encode", f"reference {reference.path}: {error.reason}") from error
    return replace(reference, path=copy.name), folder


def read_reference(reference: Reference, folder: Path, settings: PrepareSettings) -> np.ndarray:
    """uint8 [n,H,W,3], as many frames as the VAE takes, of a file whose path is relative to `folder`.

    A clip is read as a source is: at the training rate, and the same frames of it. Raises Failed naming the file.
    """
    path = folder / reference.path
    if not path.is_file():
        raise Failed("encode", f"reference {reference.path}: no such file beside the captions")
    if reference.role in IMAGE_ROLES:
        return np.repeat(_read_image(path, reference, settings)[None], STILL_FRAMES, axis=0)
    scratch = io.BytesIO()
    # what a shot refers to is given, not chosen: no filter but its length
    info = probe(str(path))
    bars = find_bars(str(path), info, settings.max_seconds)[0] if settings.crop_bars else NO_BARS
    shots, _ = read_shots(str(path), info, replace(settings, filters=NO_FILTERS), scratch, bars=bars)
    encoded = [shot for shot in shots if shot.span_pts]
    if len(encoded) != 1:
        raise Failed("encode", f"reference {reference.path} has {len(encoded)} shots that can be encoded, needs one")
    shape = (len(encoded[0].span_pts), settings.height, settings.width, 3)
    size = settings.height * settings.width * 3
    data = scratch.getvalue()[encoded[0].offset * size :][: int(np.prod(shape))]
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_image(path: Path, reference: Reference, settings: PrepareSettings) -> np.ndarray:
    """Upright RGB, scaled to cover the training size and cropped to its middle, as in sampling: uint8 [H,W,3]."""
    height, width = settings.height, settings.width
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise Failed("encode", f"reference {reference.path} is no readable image: {short(error)}") from error
    scale = max(height / upright.height, width / upright.width)
    size = (max(width, round(upright.width * scale)), max(height, round(upright.height * scale)))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    if size != upright.size:
        upright = upright.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(upright)[top : top + height, left : left + width]
