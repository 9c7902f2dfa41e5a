"""Training sizes as people write them, `832x480`, and whether a model can take them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from preprocess.sizes import Size, in_words


def read_sizes(texts: Sequence[str] | None) -> tuple[Size, ...]:
    """(height, width) of each WIDTHxHEIGHT. Raises ValueError naming the entry that is none, or that is there twice."""
    sizes: list[Size] = []
    for i, text in enumerate(texts or ()):
        match = re.fullmatch(r"\s*([1-9]\d*)\s*x\s*([1-9]\d*)\s*", text)
        if match is None:
            raise ValueError(f"sizes[{i}]={text}: expected WIDTHxHEIGHT in pixels, such as 832x480")
        size = int(match[2]), int(match[1])
        if size in sizes:
            raise ValueError(f"sizes[{i}]={text}: it is listed twice")
        sizes.append(size)
    return tuple(sizes)


def check_sizes(model: Path, height: int | None, width: int | None, sizes: Sequence[Size]) -> None:
    """Raises ValueError naming the field, its value and the nearest that the VAE and the patches of the model take."""
    from models.codecs import VideoCodec
    from models.folder import pixel_multiple

    if height is None and width is None and not sizes:
        return  # the model's own
    multiple, stride = pixel_multiple(model), VideoCodec.spatial_stride_of(model)

    def nearest(pixels: int) -> int:
        return max(1, round(pixels / multiple)) * multiple

    named = {"height": (height, nearest(height or 0)), "width": (width, nearest(width or 0))}
    found = [(name, str(one), str(near)) for name, (one, near) in named.items() if one is not None and one != near]
    for i, size in enumerate(sizes):
        near = nearest(size[0]), nearest(size[1])
        if near != size:
            found.append((f"sizes[{i}]", in_words(size), in_words(near)))
    if found:
        name, value, valid = found[0]
        raise ValueError(
            f"{name}={value}: {model} takes multiples of {multiple} pixels (of its VAE {stride}, of a patch "
            f"{multiple // stride} of these); nearest is {valid}"
        )
