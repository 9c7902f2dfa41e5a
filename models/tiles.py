"""Encoding large frames in overlapping tiles, by diffusers' own tiled encoders: memory follows the tile, not the frame.

A tile sees nothing beyond its edges, so its latents near an edge are others than those of the whole frame; where tiles
overlap, a quarter of their side, they are blended. Norms and attention of the VAE are over a tile, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

from diffusers import AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLWan

TILED = (AutoencoderKLWan, AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKL)
_PARTS = 4  # of a tile's side, one of which the next tile shares


def tile_multiple(spatial_stride: int) -> int:
    """Of which a tile's side must be, so that tiles and what they share are whole latent pixels."""
    return _PARTS * spatial_stride


def fitted_tile(length: int, most: int, multiple: int) -> int:
    """Side of the tiles along `length` pixels: as few as `most` allows, all of about the same size.

    Tiles begin every three quarters of a side, as long as there are pixels, so that the last one could be a sliver.
    """
    own = ceil(most * (_PARTS - 1) / _PARTS)  # pixels of a tile that the next one does not share
    count = 1 if length <= most else ceil(length / own)
    return ceil(length * _PARTS / (count * (_PARTS - 1) * multiple)) * multiple


@contextmanager
def tiled(vae: Any, height: int, width: int, tile: int, spatial_stride: int) -> Iterator[None]:
    """Let a VAE encode frames of this size in tiles of at most `tile` pixels a side; put back as it was afterwards.

    ValueError for a VAE that has no tiles, and for a side that its strides do not divide.
    """
    model: Any = vae  # diffusers' own types leave the tiling out
    check_tile(type(vae).__name__, tile, spatial_stride)
    before = {name: value for name, value in vars(vae).items() if name == "use_tiling" or name.startswith("tile_")}
    # Wan 2.2 counts the pixels of a tile after it has made one of each patch, in encoding
    patch = (model.config.patch_size or 1) if isinstance(vae, AutoencoderKLWan) else 1
    multiple = tile_multiple(spatial_stride) // patch
    high, wide = (fitted_tile(length // patch, tile // patch, multiple) for length in (height, width))
    try:
        if isinstance(vae, AutoencoderKL):  # its tiles are square, and of one size for all frames
            model.enable_tiling()
            model.tile_sample_min_size, model.tile_latent_min_size = tile, tile // spatial_stride
            model.tile_overlap_factor = 1 / _PARTS
        elif isinstance(vae, AutoencoderKLCogVideoX):
            model.enable_tiling(high, wide, 1 / _PARTS, 1 / _PARTS)
        else:
            model.enable_tiling(
                tile_sample_min_height=high,
                tile_sample_min_width=wide,
                tile_sample_stride_height=high // _PARTS * (_PARTS - 1),
                tile_sample_stride_width=wide // _PARTS * (_PARTS - 1),
            )
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def check_tile(kind: str, tile: int, spatial_stride: int) -> None:
    """ValueError unless VAEs of the class called `kind` can encode in tiles of this side."""
    if kind not in {c.__name__ for c in TILED}:
        raise ValueError(f"a tile of {tile} pixels, but a {kind} encodes whole frames only")
    multiple = tile_multiple(spatial_stride)
    if tile <= 0 or tile % multiple:
        nearest = max(1, round(tile / multiple)) * multiple
        raise ValueError(f"a tile of {tile} pixels: this VAE needs a multiple of {multiple}; nearest is {nearest}")
