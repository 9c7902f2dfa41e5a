"""One model at several latent sizes, one after another, as a dataset of mixed sizes trains it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.backbones.cogvideox import CogVideoXBackbone
from models.backbones.hunyuan import HunyuanVideoBackbone
from models.backbones.latte import LatteBackbone
from models.backbones.wan import WanBackbone
from models.codecs import VideoCodec
from models.folder import load_model, pixel_multiple
from models.layout import shots_layout
from models.text import TextContext
from models.tiny import TEXT_DIM, build_tiny_folder, tiny_transformer
from models.tiny_cogvideox import build_tiny_cogvideox_folder, tiny_cogvideox
from models.tiny_hunyuan import POOLED_DIM, build_tiny_hunyuan_folder, tiny_hunyuan
from models.tiny_latte import build_tiny_latte_folder, tiny_latte
from models.tiny_svd import build_tiny_svd_folder
from models.tiny_wan22 import build_tiny_ti2v_folder
from tests.models.cogvideox_cases import Process

MODELS: dict[str, Callable[[], Any]] = {
    "wan": lambda: WanBackbone(copy.deepcopy(tiny_transformer(3))),
    "cogvideox-5b": lambda: CogVideoXBackbone(tiny_cogvideox(3, "5b"), Process()),
    "cogvideox-2b": lambda: CogVideoXBackbone(tiny_cogvideox(3, "2b"), Process()),
    "cogvideox-1.5": lambda: CogVideoXBackbone(tiny_cogvideox(3, "1.5"), Process()),
    "hunyuan": lambda: HunyuanVideoBackbone(tiny_hunyuan(3)),
    "latte": lambda: LatteBackbone(tiny_latte(3), Process()),
}
SIZES = ((4, 6), (6, 4), (4, 4), (8, 2), (4, 6))
SCENE = shots_layout([2, 4])


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(backbone: Any, size: tuple[int, int]) -> torch.Tensor:
    """A scene of two shots, a text and a level each, at a latent size."""
    pooled = randn(2, 2, POOLED_DIM, seed=3) if isinstance(backbone, HunyuanVideoBackbone) else None
    lengths = torch.tensor([[7, 5], [4, 7]]) if pooled is not None else None
    text = TextContext(randn(2, 2, 7, TEXT_DIM, seed=2), SCENE.text_ids, lengths, pooled)
    levels = torch.rand(2, 2, generator=torch.Generator().manual_seed(4))[:, SCENE.shot_ids]
    return backbone(randn(2, 4, 6, *size, seed=1), levels, text, layout=SCENE, position_mode="time_gap")


@pytest.mark.parametrize("name", MODELS)
def test_no_size_is_remembered(name: str) -> None:
    """Bit for bit what a model gives that has seen no other size, gradients too."""
    many = MODELS[name]().eval()
    for size in SIZES:
        fresh = MODELS[name]().eval()
        for model in (many, fresh):
            model.zero_grad()
            (out := run(model, size)).square().mean().backward()
            model.out = out.detach()
        assert fresh.out.shape == (2, 4, 6, *size) and torch.equal(many.out, fresh.out), size
        theirs = dict(fresh.named_parameters())
        for parameter, one in many.named_parameters():
            assert one.grad is None or torch.equal(one.grad, theirs[parameter].grad), parameter


@torch.no_grad()
def test_every_size_has_the_positions_of_the_plain_wan() -> None:
    plain, backbone = tiny_transformer(3).eval(), MODELS["wan"]().eval()
    text, level = randn(2, 7, TEXT_DIM, seed=2), torch.tensor([0.3, 0.8])
    for size in SIZES:
        x = randn(2, 4, 6, *size, seed=1)
        assert torch.equal(backbone(x, level, text), plain(x, 1000 * level, text).sample), size


BUILDERS: dict[str, tuple[Callable[..., Any], int]] = {
    "wan": (build_tiny_folder, 16),
    "ti2v": (build_tiny_ti2v_folder, 32),
    "cogvideox": (build_tiny_cogvideox_folder, 16),
    "latte": (build_tiny_latte_folder, 16),
    "hunyuan": (build_tiny_hunyuan_folder, 16),
    "svd": (build_tiny_svd_folder, 4),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_folder_says_which_pixels_its_model_takes(name: str, tmp_path: Path) -> None:
    build, expected = BUILDERS[name]
    build(tmp_path)
    assert pixel_multiple(tmp_path) == expected
    codec = load_model(tmp_path, parts=("codec",)).codec
    assert VideoCodec.spatial_stride_of(tmp_path) == codec.spatial_stride
    height, width = (json.loads((tmp_path / "shotloom.json").read_text())[side] for side in ("height", "width"))
    assert height % expected == width % expected == 0, "its own size is one of them"
