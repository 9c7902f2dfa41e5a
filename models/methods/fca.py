"""FCA: text-video prediction (TVP), the frames that follow given ones and a sentence.

Frame-wise Conditioning Adaptation for Fine-Tuning Diffusion Models in Text-to-Video Prediction, TMLR 2025. The base
model is frozen; in every layer an attention module (`models/modules/fca.py`) reads the given frames, clean and encoded
alone, and text made for each frame. The whole clip is denoised at one level, the given frames with it: they come out
as the model remakes them, and the loss is on them, too (`loss_on_given`).

Where the paper does not say: the given frames are dropped in a share `drop_given` of the training samples (their
latents are zero), the text, or both, in shares that the data decide. Guidance is over the text, beside given frames
that every pass keeps; a second scale, nested as AID's and 1 unless it is set, is that of the given frames.
`adapter` holds the ablations: "no_frame_text" is without the frame-wise text modules; "none" has no modules, for low
rank updates, and knows the given frames by their being held clean in the clip, without loss.

F latent frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from models.backbones.base import Backbone, Capabilities, require
from models.layout import ClipLayout
from models.methods.prediction import Prediction
from models.modules.fca import FrameConditionAdapter, InitFeatures
from models.noise import Density, loss_weights
from models.text import TextContext

Adapter = Literal["full", "no_frame_text", "none"]


@dataclass(frozen=True)
class FCA(Prediction):
    name: ClassVar[str] = "fca"
    per_frame_levels: ClassVar[bool] = False
    image_guidance: ClassVar[float] = 1.0

    density: Density | None = None
    adapter: Adapter = "full"
    init_features: InitFeatures = "layers"  # given frames as each layer reads them, or as patches, alike for all layers
    loss_on_given: bool = True
    drop_given: float = 0.1
    width: int = 0  # of the adapter's attention; 0 = that of the model, started from its weights
    frame_queries: int = 8  # text tokens per latent frame
    text_width: int = 768  # inside the frame-wise text modules
    text_heads: int = 12
    max_frames: int = 21  # most latent frames of a clip

    def __post_init__(self) -> None:
        if self.adapter not in get_args(Adapter):
            raise ValueError(f"fca: adapter is {self.adapter!r}; choose one of {', '.join(get_args(Adapter))}")
        if self.given_frames < 1 or self.frame_queries < 1:
            raise ValueError(
                f"fca: given_frames is {self.given_frames}, frame_queries is {self.frame_queries}; give at least 1"
            )
        if not 0 <= self.drop_given <= 1:
            raise ValueError(f"fca: drop_given is {self.drop_given}, expected a probability")

    @property
    def holds_given(self) -> bool:
        """Without modules, which would be told of them."""
        return self.adapter == "none"

    @property
    def guided(self) -> Mapping[str, tuple[str, ...]]:
        """Held frames are in every pass."""
        return {"text": ("text",)} if self.adapter == "none" else {"image": ("given",), "text": ("text",)}

    @property
    def drops(self) -> Mapping[str, float]:
        return {} if self.adapter == "none" else {"given": self.drop_given}

    def model_levels(self, levels: Tensor) -> Tensor:
        """One per sample: the highest, which is that of all frames that are not held."""
        return levels.amax(dim=1)

    def loss_weights(self, layout: ClipLayout) -> Tensor:
        weights = loss_weights(layout, "frame")
        if self.loss_on_given or self.adapter == "none":
            return weights
        weights[: self.given_frames] = 0
        return weights / weights.sum()

    def check_backbone(self, capabilities: Capabilities) -> None:
        modules = self.adapter != "none"
        require(capabilities, layer_branch=modules, one_grid=modules, position_mode="contiguous", attention_rule="full")
        self.check_tokens(capabilities.frames_per_token)

    def attach(self, backbone: Backbone, seed: int = 0) -> None:
        """Freeze the backbone and give it the adapter, which alone is trained. ValueError beside low-rank updates."""
        if self.adapter == "none":
            return super().attach(backbone, seed)
        self.check_backbone(backbone.capabilities)
        if any("lora_" in name for name, _ in backbone.named_parameters()):
            raise ValueError(
                f"fca trains modules of its own: set lora.rank=0, or adapter=none instead of {self.adapter}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapter = FrameConditionAdapter(
                backbone,
                frame_text=self.adapter == "full",
                init_features=self.init_features,
                width=self.width,
                queries=self.frame_queries,
                text_width=self.text_width,
                text_heads=self.text_heads,
                max_frames=self.max_frames,
            )
        if backbone.conditioner is not None:  # training goes on where it was
            adapter = _same(backbone.conditioner, adapter)
        backbone.requires_grad_(False)
        backbone.conditioner = adapter.to(next(backbone.parameters()).device).requires_grad_(True)

    def conditions(self, clean: Tensor, layout: ClipLayout, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {} if self.adapter == "none" else {"given": clean[:, :, : self.given_frames]}

    def prepare(
        self,
        backbone: Backbone,
        layout: ClipLayout,
        text: TextContext | Tensor,
        conditions: Mapping[str, Tensor],
    ) -> dict[str, Any]:
        if self.adapter == "none":
            return {}
        adapter = backbone.conditioner
        if not isinstance(adapter, FrameConditionAdapter):
            raise ValueError("this backbone has no FCA modules: call FCA.attach, or load a folder that holds them")
        return {"branch": adapter.prepare(backbone, conditions["given"], text, layout.num_frames)}


def _same(old: torch.nn.Module, new: FrameConditionAdapter) -> FrameConditionAdapter:
    """The old adapter, to be used as the new one; ValueError if it is of another kind or size."""
    shapes = ({name: weight.shape for name, weight in module.state_dict().items()} for module in (old, new))
    if not isinstance(old, FrameConditionAdapter) or len({frozenset(one.items()) for one in shapes}) > 1:
        raise ValueError(
            "fca: the model already has conditioning modules, of another method or size; start from one without, or "
            "with the method_params it was trained with"
        )
    old.init_features = new.init_features
    return old
