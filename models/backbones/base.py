"""What all backbones have in common, and what each can do.

Capabilities are declared, so that a wrong pairing of method and backbone is refused before anything runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn

from models.attention import AttentionRule
from models.backbones.inputs import as_context
from models.experts import Expert
from models.kv_cache import KVCache
from models.layout import ClipLayout
from models.positions import PositionMode
from models.process import Process
from models.text import TextContext

# (layer, what its self-attention reads [B,F,n,D], embedded model time [B,D] or [B*F,D], rotate) -> [B,F,n,D] to add to
# the layer's hidden states, or None. rotate(x [B,M,heads,d]) turns x by the positions of the clip's first M tokens.
LayerBranch = Callable[[int, Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor | None]


@dataclass(frozen=True, eq=False)
class BranchSites:
    """Where a `LayerBranch` stands in a backbone, and what the modules that make one must know of it."""

    attentions: tuple[Any, ...]  # the self-attention of each layer that calls the branch, with to_q, to_k, to_v, norms
    output: Callable[[int], tuple[Tensor, Tensor | None]]  # weight [D,D] and bias [D] of a layer's output projection
    width: int  # D
    time_width: int  # of the embedded model time
    text_width: int
    patch: int  # latent pixels along a side of a token
    patch_embedding: str  # the module that makes the first tokens, by its name
    text_readers: tuple[str, ...]  # parts of the names of the parameters by which the layers read text
    text_padding: Literal["zeros", "read", "masked"] = "zeros"  # what stands after a text, see `models.modules.aid`


@dataclass(frozen=True)
class Capabilities:
    """`reasons` says why not, by what is missing: a position mode, an attention rule, or the name of a field."""

    per_frame_levels: bool  # any level for any latent frame
    position_modes: frozenset[str]
    attention_rules: frozenset[str]
    text_per_shot: bool
    reasons: dict[str, str]
    kv_cache: bool = False  # shots of the past can be kept (models/kv_cache.py) instead of run again
    layer_branch: bool = False  # takes a `LayerBranch`
    joint_text: bool = False  # text tokens stand in one attention with the video's, where they can have positions
    image_beside: bool = False  # takes `image`, an image's latents beside those of every frame; cannot do without
    one_grid: bool = True  # all its layers see the clip as the same tokens, of one width
    joint_space_time: bool = True  # in its attention any token meets any other of the clip
    frames_per_token: int = 1  # latent frames that a token joins, and that so have one level (`models.patches`)


_REASONS = {  # of a lack that the backbone gives no reason for
    "per_frame_levels": "not supported",
    "text_per_shot": "not supported",
    "kv_cache": "not supported",
    "layer_branch": "no modules stand beside its layers; use Wan, CogVideoX 2B or 5B, HunyuanVideo or Latte",
    "joint_text": "its text is read by cross-attention, where a group's text would reach no other shot; let every shot "
    "read the story and its own prompt (global_prompt=prefix)",
    "one_grid": "its layers differ in width and size, where these modules give all layers the same tokens",
    "joint_space_time": "its attention is parted into space and time, so the tokens of a shot do not meet those of the "
    "others; use Wan, CogVideoX or HunyuanVideo",
    "image_beside": "only Stable Video Diffusion reads an image beside its frames; use method fvdm",
}


def require(
    capabilities: Capabilities,
    *,
    per_frame_levels: bool = False,
    position_mode: str | None = None,
    attention_rule: str | None = None,
    text_per_shot: bool = False,
    kv_cache: bool = False,
    layer_branch: bool = False,
    joint_text: bool = False,
    image_beside: bool = False,
    one_grid: bool = False,
    joint_space_time: bool = False,
) -> None:
    """Raises ValueError with the reason when the backbone lacks something of what is asked for."""
    for field, asked in (
        ("per_frame_levels", per_frame_levels),
        ("text_per_shot", text_per_shot),
        ("kv_cache", kv_cache),
        ("layer_branch", layer_branch),
        ("joint_text", joint_text),
        ("image_beside", image_beside),
        ("one_grid", one_grid),
        ("joint_space_time", joint_space_time),
    ):
        if asked and not getattr(capabilities, field):
            raise ValueError(f"this backbone has no {field}: {capabilities.reasons.get(field, _REASONS[field])}")
    for field, choice, choices in (
        ("position_mode", position_mode, capabilities.position_modes),
        ("attention_rule", attention_rule, capabilities.attention_rules),
    ):
        if choice is not None and choice not in choices:
            reason = capabilities.reasons.get(choice, "unknown here")
            raise ValueError(f"{field} is {choice!r}: {reason}; this backbone has {', '.join(sorted(choices))}")


class Backbone(nn.Module, ABC):
    """A diffusers model, its parameters and state-dict keys unchanged, as training and sampling see it."""

    capabilities: Capabilities
    lora_targets: tuple[str, ...]  # names of the linear layers that low-rank updates are for; () = none
    process: Process  # what the weights were trained with
    pixels_per_token: int  # latent pixels, over time and space, that make one token
    conditioner: nn.Module | None  # a method's own modules, beside the diffusers model and not part of it
    embedded_guidance: float | None = None  # the scale that distilled weights take as an input, where they do
    expert: Expert | None = None  # it is one of two models, which share the noise levels
    packed_text: bool = False  # the first row of a context is a pooled text and no word (`TextStyle.pooled`)

    def __init__(self) -> None:
        super().__init__()
        self.register_module("conditioner", None)

    @property
    @abstractmethod
    def config(self) -> Any:
        """The configuration of the diffusers model."""

    @property
    def models_by_folder(self) -> dict[str, Any]:
        """The diffusers models, by the folder of a model folder that each lies in."""
        return {"transformer": self.transformer}

    @property
    def sites(self) -> BranchSites:
        """Of a backbone that has layer_branch."""
        raise ValueError(f"{type(self).__name__} takes no modules beside its layers")

    def read_text(self, text: TextContext | Tensor, frames: int) -> TextContext:
        """Text as `forward` reads it: the words alone, whatever else a context of this model holds taken out."""
        return as_context(text, frames)

    def new_cache(self) -> Any:
        """An empty cache for `forward`, of a backbone that has kv_cache."""
        return KVCache()

    def learns_at(self, levels: Tensor) -> Tensor:
        """bool [B]: whether samples told these levels, [B] or [B,F], are this model's to learn, no other expert's."""
        clock = levels if levels.ndim == 1 else levels.amax(dim=1)
        if self.expert is None:
            return torch.ones_like(clock, dtype=torch.bool)
        return self.expert.covers(self.process.to_model_time(clock))

    @property
    def dtype(self) -> torch.dtype:
        """What texts are given in: the smallest type among the weights, because some of them stay in float32."""
        return min({parameter.dtype for parameter in self.parameters()}, key=lambda dtype: dtype.itemsize)

    def set_attention_backend(self, backend: str) -> None:
        """Attend by a diffusers attention backend ("native", "_native_math", "flash", ...) in this backbone alone.

        The diffusers method of this name would also make it the default of every other model in the process.
        Raises ValueError for a name that diffusers does not know.
        """
        name = AttentionBackendName(backend)
        for module in self.modules():
            processor: Any = getattr(module, "processor", None)
            if hasattr(processor, "_attention_backend"):
                processor._attention_backend = name

    @abstractmethod
    def forward(
        self,
        x: Tensor,  # [B,C,F,H,W], noisy latents as `process.precondition` scales them
        levels: Tensor,  # [B] or [B,F], in [0, 1]
        text: TextContext | Tensor,  # or [B,L,D], one context for the whole clip
        *,
        layout: ClipLayout | None = None,  # None: one shot
        position_mode: PositionMode = "contiguous",
        position_gap: int = 4,  # latent frames
        attention_rule: AttentionRule = "full",
    ) -> Tensor:
        """What the process has the model predict, [B,C,F,H,W].

        Raises ValueError where x, levels, text and layout do not fit together, and for what the model cannot do.
        """
