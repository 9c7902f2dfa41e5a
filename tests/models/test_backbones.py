"""What all backbones have in common: what they declare, and how they are wrapped, wrongly paired and given texts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from models.backbones.base import Backbone, require
from models.backbones.cogvideox import CogVideoXBackbone
from models.backbones.hunyuan import HunyuanVideoBackbone
from models.backbones.latte import LatteBackbone
from models.backbones.svd import ImageCondition, SVDBackbone
from models.backbones.wan import WanBackbone
from models.layout import ClipLayout, Segment
from models.methods import get_method
from models.modules.lora import inject_lora, load_lora, save_lora
from models.text import TextContext, stack_samples
from models.tiny import tiny_transformer
from models.tiny_cogvideox import tiny_cogvideox
from models.tiny_hunyuan import tiny_hunyuan
from models.tiny_latte import tiny_latte
from models.tiny_svd import tiny_svd
from tests.models.processes import PROCESSES

LATTE, COGVIDEOX = PROCESSES["vp epsilon"], PROCESSES["vp v, no signal at 1"]
BACKBONES: dict[str, Callable[[], Backbone]] = {
    "wan": lambda: WanBackbone(tiny_transformer()),
    "hunyuan": lambda: HunyuanVideoBackbone(tiny_hunyuan()),
    "cogvideox-2b": lambda: CogVideoXBackbone(tiny_cogvideox(version="2b"), COGVIDEOX),
    "cogvideox-5b": lambda: CogVideoXBackbone(tiny_cogvideox(version="5b"), COGVIDEOX),
    "cogvideox-1.5": lambda: CogVideoXBackbone(tiny_cogvideox(version="1.5"), COGVIDEOX),
    "latte": lambda: LatteBackbone(tiny_latte(), LATTE),
    "svd": lambda: SVDBackbone(tiny_svd(), PROCESSES["edm"]),
}
PIXELS = {"wan": 4, "hunyuan": 4, "cogvideox-2b": 4, "cogvideox-5b": 4, "cogvideox-1.5": 8, "latte": 4, "svd": 1}


@pytest.mark.parametrize("name", BACKBONES)
def test_what_a_backbone_declares(name):
    backbone = BACKBONES[name]()
    assert backbone.pixels_per_token == PIXELS[name]
    assert backbone.dtype == torch.float32
    layers = [layer for layer, _ in backbone.named_modules()]
    assert all(any(layer.endswith(f".{target}") for layer in layers) for target in backbone.lora_targets)
    assert {"contiguous"} <= backbone.capabilities.position_modes and {"full"} <= backbone.capabilities.attention_rules


def test_the_type_of_texts_is_that_of_most_weights():
    """A Wan in bfloat16 keeps its time embedding in float32."""
    backbone = WanBackbone(tiny_transformer().to(torch.bfloat16))
    backbone.transformer.condition_embedder.time_embedder.float()
    assert backbone.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["latte", "svd"])
def test_a_lora_that_diffusers_cannot_read_is_refused(name, tmp_path):
    backbone = BACKBONES[name]()
    for attempt in (
        lambda: inject_lora(backbone, rank=2, alpha=2, targets=["to_q"]),
        lambda: save_lora(backbone, tmp_path),
        lambda: load_lora(backbone, tmp_path),
    ):
        with pytest.raises(ValueError, match="diffusers reads no LoRA for this model"):
            attempt()
    assert all(parameter.requires_grad for parameter in backbone.parameters()), "nothing is frozen"


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("method", ["fvdm", "lct", "tic_ft", "fca", "aid", "svd"])
def test_wrong_pairings_are_refused_with_the_reason(method, name):
    reasons = {
        ("tic_ft", "cogvideox-1.5"): "joins 2 latent frames into one token.*use a model of one latent frame per token",
        ("lct", "svd"): "position_mode is 'time_gap': SVD's temporal convolutions",
        ("fvdm", "svd"): "takes an image beside every noisy frame: set method_params.image_beside=true",
        ("tic_ft", "svd"): "tic_ft puts what is given on one time axis .* reads no text",
        ("lct", "latte"): "no joint_space_time: Latte attends inside a frame and, over time, between equal places",
        ("fca", "cogvideox-1.5"): "no layer_branch: CogVideoX 1.5 joins 2 latent frames into one token",
        ("aid", "cogvideox-1.5"): "no layer_branch: CogVideoX 1.5 joins 2 latent frames into one token",
        ("fca", "svd"): "no layer_branch: .* Stable Video Diffusion reads none.*put a text encoder into its folder",
        ("aid", "svd"): "no layer_branch: .* Stable Video Diffusion reads none.*put a text encoder into its folder",
        **{("svd", other): "no image_beside: only Stable Video Diffusion" for other in BACKBONES if other != "svd"},
    }
    capabilities = BACKBONES[name]().capabilities
    if reason := reasons.get((method, name)):
        with pytest.raises(ValueError, match=reason):
            get_method(method).check_backbone(capabilities)
    else:
        get_method(method).check_backbone(capabilities)


def test_a_methods_parameters_count_in_the_pairing():
    diagonal = get_method("lct", position_mode="diagonal")
    diagonal.check_backbone(BACKBONES["cogvideox-5b"]().capabilities)
    for name in ("cogvideox-2b", "latte"):
        with pytest.raises(ValueError, match="position_mode is 'diagonal'"):
            diagonal.check_backbone(BACKBONES[name]().capabilities)


def test_backbones_that_keep_keys_carry_the_causal_stage():
    causal = get_method("lct", attention_rule="group_causal", position_mode="contiguous")
    for name in ("wan", "cogvideox-2b", "cogvideox-5b"):
        causal.check_backbone(BACKBONES[name]().capabilities)
    grouped = {"attention_rule": "group_causal", "position_mode": "diagonal", "global_prompt": "group"}
    get_method("lct", **grouped).check_backbone(BACKBONES["cogvideox-5b"]().capabilities)
    reasons = {
        "hunyuan": "no kv_cache: HunyuanVideo joins text and frames",
        "cogvideox-1.5": "no kv_cache: CogVideoX 1.5 joins 2 latent frames into one token",
        "latte": "no kv_cache: Latte joins frames in attention over time",
        "svd": "attention_rule is 'group_causal': SVD's temporal convolutions",
    }
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=reason):
            causal.check_backbone(BACKBONES[name]().capabilities)
    with pytest.raises(ValueError, match="no kv_cache: what SVD makes of an earlier shot"):
        require(SVDBackbone.capabilities, kv_cache=True)


# --- texts ---------------------------------------------------------------------------------------------------------


def context(samples: int, **changes) -> TextContext:
    fields = {
        "embeddings": torch.randn(samples, 2, 5, 8),
        "frame_text": torch.tensor([0, 1, 1]),
        "lengths": torch.randint(1, 6, (samples, 2)),
        "pooled": torch.randn(samples, 2, 4),
    }
    return TextContext(**fields | changes)


def test_a_text_keeps_its_lengths_and_pooled_vectors():
    text = context(3)
    turned = text.samples([-1, 0, 1])
    for name in ("embeddings", "lengths", "pooled"):
        assert torch.equal(getattr(turned, name), getattr(text, name).roll(1, 0)), name
        halves = stack_samples([text.samples([0]), text.samples([1, 2])])
        assert torch.equal(getattr(halves, name), getattr(text, name)), name
    low = text.to(torch.device("cpu"), torch.bfloat16)
    assert low.embeddings.dtype == low.pooled.dtype == torch.bfloat16 and torch.equal(low.lengths, text.lengths)
    assert all(torch.equal(one.frame_text, text.frame_text) for one in (turned, halves, low))
    bare = context(2, lengths=None, pooled=None)
    for one in (bare.samples([1, 0]), bare.to(torch.device("cpu")), stack_samples([bare, bare])):
        assert one.lengths is None and one.pooled is None


def test_texts_with_and_without_pooled_vectors_do_not_stack():
    with pytest.raises(ValueError, match="some texts have pooled, some have not"):
        stack_samples([context(1), context(1, pooled=None)])


# --- what holds for all of them ------------------------------------------------------------------------------------


def call(name: str, backbone, order=slice(None), **options) -> torch.Tensor:
    """A forward over some rows of one batch of 3 samples of 4 frames, a level per frame, two texts."""
    generator = torch.Generator().manual_seed(0)
    width = {"svd": 16}.get(name, 32)
    x = torch.randn(3, 4, 4, 4, 4, generator=generator)
    levels = torch.rand(3, 2, generator=generator).repeat_interleave(2, dim=1)
    words = torch.randn(3, 2, 7, width, generator=generator)
    pooled = torch.randn(3, 2, 16, generator=generator) if name == "hunyuan" else None
    if name == "svd":
        options["image"] = ImageCondition(torch.randn(3, 4, 1, 4, 4, generator=generator)[order])
    text = TextContext(words[order], torch.tensor([0, 0, 1, 1]), None, pooled if pooled is None else pooled[order])
    return backbone(x[order], levels[order], text, **options)


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_rows_of_a_batch_go_with_their_levels(name):
    backbone = BACKBONES[name]().eval()
    order = [2, 0, 1]
    assert torch.allclose(call(name, backbone, order), call(name, backbone)[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", ["full", "group_causal"])
@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "svd"])
@torch.no_grad()
def test_lct_on_one_shot_is_the_base_bit_for_bit(name, rule):
    """Whatever the gap and the rule; the base without a layout is the diffusers model (each backbone's own test)."""
    backbone = BACKBONES[name]().eval()
    kwargs = get_method("lct", attention_rule=rule).backbone_kwargs(ClipLayout((Segment("target", 4),)))
    assert torch.equal(call(name, backbone, **kwargs), call(name, backbone))
