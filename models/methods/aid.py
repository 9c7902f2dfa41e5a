"""AID: text-guided video prediction (TVP), the frames that follow given ones as an instruction says.

Xing et al., "AID: Adapting Image2Video Diffusion Models for Instruction-guided Video Prediction", 2406.06465. A state
predictor (`models/states.py`) sees the given frames and the instruction, and says in which states the shot will be; a
Dual Query Transformer makes a condition for every frame from instruction, states and given frames; adapters beside the
attentions move the model to its new domain. Trained are these modules and what reads the new condition: the
cross-attentions (Wan, Latte), the attention of text and video together (CogVideoX), or the part of it that is the
text's own (HunyuanVideo). The rest of the backbone is frozen. Guidance has two scales, nested: image, then text with
the states.

How the given frames enter the clip is `image`. "held" is the way of a text-to-video base that knows a level per frame:
they are clean from the start, and neither made nor learned. "concat" is that of the paper's base: their latents come
beside the noisy ones, all frames are made at one level, and the given ones put back for display.

The paper's base is Stable Video Diffusion, an EDM: `image="concat"`, `density="edm"`, `shift=1`, and a folder that
holds a text encoder, too (`models/modules/aid_unet.py`).

The paper's base also knows noise on its image, put on in pixels. Training reads latents that were encoded without any,
so it tells the model 0; in sampling "noise_aug" says what was put on.

`condition`, `states` and the three adapter switches are the paper's ablations. Departures: sizes the paper does not
give (`query_tokens` to `adapter_ratio`); cross-attentions learn at a tenth of the rate.

F latent frames, K given ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from models.backbones.base import Backbone, Capabilities, require
from models.layout import ClipLayout
from models.methods.prediction import Prediction
from models.modules.adapters import ShortTermKernel
from models.modules.aid import AIDModules, AIDSettings, Condition, Reading
from models.modules.aid_unet import AIDUNetModules
from models.noise import check_edm_levels, loss_weights
from models.process import EDM, Process
from models.text import TextContext

Image = Literal["held", "concat"]


@dataclass(frozen=True)
class AID(Prediction):
    name: ClassVar[str] = "aid"
    reads_image: ClassVar[Literal["no", "alone", "with_text"]] = "with_text"
    tells_noise: ClassVar[bool] = True

    image: Image = "held"
    condition: Condition = "full"  # the branches of the Dual Query Transformer
    states: bool = True  # false: the instruction stands in for them
    reading: Reading = "per_frame"  # each frame its own queries, or all frames all of them
    spatial_adapter: bool = True
    short_term_adapter: bool = True
    long_term_adapter: bool = True
    short_term_kernel: ShortTermKernel = "temporal"  # 3x1x1; "spatiotemporal" is 3x3x3
    num_states: int = 4  # most states of a shot
    query_tokens: int = 8  # per latent frame
    width: int = 1024  # inside the Dual Query Transformer
    heads: int = 8
    adapter_ratio: int = 4  # adapters are this much narrower than the model
    max_frames: int = 32  # most latent frames of a clip
    cross_attention_rate: float = 0.1  # learning rate of the cross-attentions, times that of the modules

    def __post_init__(self) -> None:
        choices = {"image": Image, "condition": Condition, "reading": Reading, "short_term_kernel": ShortTermKernel}
        for field, allowed in choices.items():
            if (value := getattr(self, field)) not in get_args(allowed):
                raise ValueError(f"aid: {field} is {value!r}; choose one of {', '.join(get_args(allowed))}")
        for field in ("given_frames", "num_states", "query_tokens", "adapter_ratio", "max_frames"):
            if getattr(self, field) < 1:
                raise ValueError(f"aid: {field} is {getattr(self, field)}; give at least 1")
        if self.cross_attention_rate <= 0:
            raise ValueError(f"aid: cross_attention_rate is {self.cross_attention_rate}; give a positive number")

    @property
    def holds_given(self) -> bool:
        return self.image == "held"

    @property
    def most_states(self) -> int:
        return self.num_states if self.states and self.condition in ("decomposed", "full") else 0

    @property
    def guided(self) -> Mapping[str, tuple[str, ...]]:
        return {"image": ("given",), "text": ("text", "states") if self.most_states else ("text",)}

    @property
    def puts_given_back(self) -> bool:
        return self.image == "concat"

    def layout_for_training(self, shot_frames: list[int]) -> ClipLayout:
        layout = super().layout_for_training(shot_frames)
        if layout.num_frames > self.max_frames:
            raise ValueError(f"aid: a shot of {layout.num_frames} latent frames; max_frames is {self.max_frames}")
        return layout

    def model_levels(self, levels: Tensor) -> Tensor:
        """held: every frame's own. concat: one per sample."""
        return levels if self.image == "held" else levels.amax(dim=1)

    def loss_weights(self, layout: ClipLayout) -> Tensor:
        """All frames that are made; with concat that is all, the given ones with them."""
        return loss_weights(layout, "frame")

    def check_backbone(self, capabilities: Capabilities) -> None:
        require(
            capabilities,
            per_frame_levels=self.image == "held",
            text_per_shot=self.reading == "per_frame",
            layer_branch=True,
            position_mode="contiguous",
            attention_rule="full",
        )
        if capabilities.image_beside and self.image == "held":
            raise ValueError(
                "aid: image is 'held', but this model reads the given frames beside the noisy ones: set "
                "method_params.image=concat"
            )

    def attach(self, backbone: Backbone, seed: int = 0) -> None:
        """Give the backbone AID's modules; they and the cross-attentions are trained, all else is frozen.

        Raises ValueError for a backbone that cannot carry them, has other modules, or low-rank updates.
        """
        self.check_backbone(backbone.capabilities)
        if any("lora_" in name for name, _ in backbone.named_parameters()):
            raise ValueError("aid trains modules of its own and the cross-attentions: set lora.rank=0")
        self.check_process(backbone.process)
        settings = self.module_settings()
        if backbone.conditioner is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                kind = AIDUNetModules if backbone.capabilities.image_beside else AIDModules
                modules = kind(backbone, settings)
            backbone.conditioner = modules.to(next(backbone.parameters()).device)
        elif getattr(backbone.conditioner, "settings", None) != settings:
            raise ValueError(
                "aid: the model already has conditioning modules, of another method or size; start from one without, "
                "or with the method_params it was trained with"
            )
        readers: Any = backbone.conditioner.text_readers
        for name, parameter in backbone.named_parameters():
            reads_text = any(part in name for part in readers)
            parameter.requires_grad_(name.startswith("conditioner.") or reads_text)

    def check_process(self, process: Process) -> None:
        """An EDM is trained at the levels that it knows."""
        super().check_process(process)
        if isinstance(process, EDM):
            check_edm_levels(self.name, self.density, process)

    def module_settings(self) -> AIDSettings:
        """What the modules are made of."""
        shared = {field.name: getattr(self, field.name) for field in fields(AIDSettings) if hasattr(self, field.name)}
        return AIDSettings(**shared, image_concat=self.image == "concat")

    def rate_scale(self, parameter: str) -> float:
        return 1.0 if parameter.startswith("conditioner.") else self.cross_attention_rate

    def conditions(self, clean: Tensor, layout: ClipLayout, labels: Tensor | None = None) -> dict[str, Tensor]:
        """given [B,C+1,K,H,W]: latents, and a last channel of ones."""
        given = clean[:, :, : self.given_frames]
        return {"given": torch.cat([given, torch.ones_like(given[:, :1])], dim=1)}

    def prepare(
        self,
        backbone: Backbone,
        layout: ClipLayout,
        text: TextContext | Tensor,
        conditions: Mapping[str, Tensor],
    ) -> dict[str, Any]:
        modules = backbone.conditioner
        if not isinstance(modules, AIDModules | AIDUNetModules):
            raise ValueError("this backbone has no AID modules: call AID.attach, or load a folder that holds them")
        if "given" not in conditions:
            raise ValueError("aid continues given frames, and got none: give `first_frame`")
        told = (conditions["given"], conditions.get("states"), layout.num_frames)
        if isinstance(modules, AIDModules):
            return modules.prepare(backbone, text, *told)
        noise_aug = conditions.get("noise_aug", 0.0)
        return modules.prepare(backbone, text, *told, conditions.get("embedding"), noise_aug)
