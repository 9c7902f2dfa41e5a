"""Stable Video Diffusion with a noise level and a context per frame.

The diffusers U-Net itself runs, unchanged. Where the frames of a clip differ in level or in context, it is called with
the frames as its batch, [B*F,1,...], one time and one context per row; only its blocks learn, from what stands in for
their `image_only_indicator`, that B clips of F frames are before them. Time embeddings therefore reach the spatial and
the temporal ResNets per frame. diffusers' temporal cross-attention reads the context of frame 0; where frames differ in
context each one here reads its own. Gradient checkpointing, FSDP and saving work as on the plain model, whose
state-dict keys these are.

B batch, F frames (SVD's VAE is per image: latent frames are video frames), C channels, H W latent size, G text groups,
L context tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch import Tensor, nn

from models.attention import AttentionRule
from models.backbones.base import Backbone, Capabilities, require
from models.backbones.inputs import as_context, check_inputs, frame_groups, shared_levels
from models.backbones.processors import Processor, merge
from models.backbones.wan import text_attention
from models.layout import ClipLayout, Segment
from models.positions import PositionMode
from models.process import Process
from models.text import TextContext

CAPABILITIES = Capabilities(
    per_frame_levels=True,
    position_modes=frozenset({"contiguous"}),
    attention_rules=frozenset({"full", "same_frame"}),
    text_per_shot=True,
    image_beside=True,
    one_grid=False,
    joint_space_time=False,
    reasons={
        "time_gap": "SVD's temporal convolutions take frames side by side for neighbours in time, whatever their "
        "number, so a gap would be half a gap",
        "diagonal": "SVD has no positions in space: its convolutions know neighbours only",
        "group_causal": "SVD's temporal convolutions and the group norms over all frames carry the future into the "
        "past, whatever its attention does",
        "layer_branch": "these modules make a condition of text, and Stable Video Diffusion reads none: it reads the "
        "image that it starts from; for method aid put a text encoder into its folder (text_encoder/ and tokenizer/, "
        "docs/methods/aid.md), or use Wan, CogVideoX 2B or 5B, HunyuanVideo or Latte",
        "one_grid": "the layers of Stable Video Diffusion differ in width and size, but these modules give all layers "
        "the same tokens of the given frames; use method aid, or Wan, CogVideoX 2B or 5B, HunyuanVideo or Latte",
        "kv_cache": "what SVD makes of an earlier shot depends on the later ones (see group_causal)",
    },
)


Where = Literal["space", "time"]
# (place, beside which self-attention of it, what that reads [B,F,h,w,D]) -> what to add to its output, alike, or None
UNetBranch = Callable[[int, Where, Tensor], Tensor | None]


@dataclass(frozen=True, eq=False)
class ImageCondition:
    """The given image and what else SVD is told about the clip. Numbers are for all samples, or tensors [B]."""

    latents: Tensor  # [B,C',1 or F,H,W], the VAE's mode NOT times its scaling factor; zeros where nothing is given
    fps: float | Tensor = 7.0  # frames per second; the model is told fps - 1, as it was trained
    motion_bucket: float | Tensor = 127.0  # more is more motion
    noise_aug: float | Tensor = 0.02  # standard deviation of the noise on the image before it was encoded


class SVDBackbone(Backbone):
    """`unet` is a diffusers UNetSpatioTemporalConditionModel; its attention processors are replaced.

    `process` is EDM (Karras et al., 2206.00364, table 1), which gives the model time c_noise. Its `precondition` has
    scaled what comes in, c_in x; what goes out is the network's own F, and c_skip x + c_out F is again the process's.

    Args:
        text_width: of the texts that a text encoder beside the image encoder makes; None: there is none. The U-Net
            reads no text; conditioning modules do.
        latent_scale: the VAE's scaling factor, which image latents are told without.
        fps: frames per second of the clips, as the model is told.
    """

    capabilities = CAPABILITIES
    lora_targets = ()
    pixels_per_token = 1  # a U-Net has no patches: a latent pixel is what its attention calls a token

    def __init__(
        self,
        unet: UNetSpatioTemporalConditionModel,
        process: Process,
        *,
        text_width: int | None = None,
        latent_scale: float = 0.18215,
        fps: float = 7.0,
    ) -> None:
        super().__init__()
        model: Any = unet
        config = model.config
        if config.in_channels <= config.out_channels:
            raise ValueError(
                f"in_channels is {config.in_channels} with out_channels {config.out_channels}: expected more, for the "
                "image latents beside the noisy ones"
            )
        if config.projection_class_embeddings_input_dim != 3 * config.addition_time_embed_dim:
            raise ValueError(
                f"projection_class_embeddings_input_dim is {config.projection_class_embeddings_input_dim}, expected "
                f"3 * addition_time_embed_dim = {3 * config.addition_time_embed_dim}: fps, motion bucket, noise level"
            )
        self.unet = model
        self.process = process
        self.text_width, self.latent_scale, self.fps = text_width, latent_scale, fps
        if text_width is not None:
            self.capabilities = replace(CAPABILITIES, layer_branch=True)
        # what to checkpoint and to shard; the class names none
        model._no_split_modules = ["SpatioTemporalResBlock", "TransformerSpatioTemporalModel"]
        self._clip_info = _ClipInfo()
        for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
            block.register_forward_pre_hook(self._clip_info, with_kwargs=True)
        self._added = _AddedPatches()
        model.conv_in.register_forward_hook(self._added)
        for place, module in enumerate(_places(model)):
            module.register_forward_pre_hook(_tell_attention, with_kwargs=True)
            for block in module.transformer_blocks:
                _set_processors(block, _SelfAttention(place, "space"), Processor())
            for block in module.temporal_transformer_blocks:
                _set_processors(block, _SelfAttention(place, "time"), _TemporalTextAttention())

    @property
    def places(self) -> tuple[int, ...]:
        """Width of every place with attention, spatial and temporal, in the order of computation."""
        return tuple(module.inner_dim for module in _places(self.unet))

    @property
    def config(self) -> Any:
        return self.unet.config

    @property
    def models_by_folder(self) -> dict[str, Any]:
        return {"unet": self.unet}

    def forward(
        self,
        x: Tensor,  # [B,C,F,H,W], noisy latents as `process.precondition` scales them
        levels: Tensor,  # [B] or [B,F], in [0, 1]
        text: TextContext | Tensor,  # or [B,L,D], one context for the whole clip; SVD's own is its image embedding, L=1
        *,
        image: ImageCondition | None = None,  # always needed; a dropped image is one of zeros
        temporal_text: TextContext | Tensor | None = None,  # for the temporal cross-attention; None: the frames' own
        layout: ClipLayout | None = None,  # None: one shot
        position_mode: PositionMode = "contiguous",
        position_gap: int = 4,  # no mode of SVD's reads it
        attention_rule: AttentionRule = "full",  # "same_frame": SVD's own image mode, no temporal layer at all
        branch: UNetBranch | None = None,  # what conditioning modules add to the self-attentions
        patches: Tensor | None = None,  # what they add to the input convolution, [B,D,F,H,W]
    ) -> Tensor:
        """The network output F, [B,C,F,H,W]: the process's target, EDM's v prediction.

        With equal levels, one context and nothing added this is, bit for bit, the diffusers model on [x; image] at the
        process's time.
        Raises ValueError where x, levels, contexts, image and layout do not fit together, and for what SVD cannot do.
        """
        batch, _, frames, height, width = x.shape
        layout = layout or ClipLayout((Segment("target", frames),))
        text = as_context(text, frames)
        temporal = None if temporal_text is None else as_context(temporal_text, frames)
        check_inputs(x, levels, text, layout, 1)
        if temporal is not None:
            check_inputs(x, levels, temporal, layout, 1)
        require(CAPABILITIES, position_mode=position_mode, attention_rule=attention_rule)
        image_latents, ids = self._image_inputs(x, image)

        sample = torch.cat([x, image_latents], dim=1).transpose(1, 2)  # [B,F,C+C',H,W]
        levels = shared_levels(levels)
        self._added.patches = patches
        if levels.ndim == 1 and text.embeddings.shape[1] == 1 and temporal is None and attention_rule == "full":
            # one time and one context per sample: the plain model's own arithmetic
            image_only = torch.zeros(batch, frames, dtype=torch.bool, device=x.device)
            self._clip_info.clip = None if branch is None else _Clip(image_only, branch=branch)
            times, contexts = self.process.to_model_time(levels), text.embeddings[:, 0]
            out = self.unet(sample, times, contexts, ids, return_dict=False)[0]
        else:
            temporal = temporal or text
            self._clip_info.clip = _Clip(
                image_only=torch.full((batch, frames), attention_rule == "same_frame", device=x.device),
                context=temporal.embeddings.flatten(0, 1),
                text_frames=frame_groups(temporal),
                branch=branch,
            )
            levels = levels if levels.ndim == 2 else levels[:, None].expand(batch, frames)
            times = self.process.to_model_time(levels).flatten()
            contexts = text.embeddings[:, text.frame_text.to(x.device)].flatten(0, 1)  # [B*F,L,D]
            rows = sample.flatten(0, 1)[:, None]  # [B*F,1,C+C',H,W]
            out = self.unet(rows, times, contexts, ids.repeat_interleave(frames, dim=0), return_dict=False)[0]
            out = out.reshape(batch, frames, -1, height, width)
        return out.transpose(1, 2).contiguous()

    def _image_inputs(self, x: Tensor, image: ImageCondition | None) -> tuple[Tensor, Tensor]:
        """Image latents [B,C',F,H,W] and added ids [B,3]."""
        batch, _, frames, height, width = x.shape
        channels = self.config.in_channels - self.config.out_channels
        if image is None:
            raise ValueError("SVD needs `image`, an ImageCondition; one whose latents are zeros for no image")
        given = image.latents
        if given.ndim != 5 or given.shape[2] not in (1, frames) or given.shape[:2] + given.shape[3:] != (
            batch, channels, height, width
        ):  # fmt: skip
            raise ValueError(
                f"image latents have shape {tuple(given.shape)}, expected "
                f"[{batch},{channels},1 or {frames},{height},{width}]"
            )
        numbers = (image.fps, image.motion_bucket, image.noise_aug)
        ids = [torch.as_tensor(number, dtype=torch.float32, device=x.device).expand(batch) for number in numbers]
        ids[0] = ids[0] - 1  # SVD was trained on one less than the rate of the clip
        return given.to(x).expand(-1, -1, frames, -1, -1), torch.stack(ids, dim=1)


class _Clip:
    """What the blocks must know of the clip, and in the place of their `image_only_indicator`.

    As an argument it is replayed when activation checkpointing runs a block again.
    """

    def __init__(
        self,
        image_only: Tensor,
        context: Tensor | None = None,
        text_frames: tuple[tuple[int, ...], ...] = (),
        branch: UNetBranch | None = None,
    ) -> None:
        self.image_only = image_only  # bool [B,F]
        self.context = context  # [B*G,L,D], for the temporal cross-attention; None: the plain model's
        self.text_frames = text_frames  # the frames that read each group
        self.branch = branch
        self.shape, self.device = image_only.shape, image_only.device

    def bool(self) -> Tensor:
        return self.image_only


class _ClipInfo:
    """Hands the clip at hand to a block of the U-Net; set anew by every call."""

    clip: _Clip | None = None  # None: the plain model

    def __call__(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return (args, kwargs) if self.clip is None else (args, {**kwargs, "image_only_indicator": self.clip})


class _AddedPatches:
    """Adds to what the input convolution makes; set anew by every call."""

    patches: Tensor | None = None  # [B,D,F,H,W]

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:  # out [B*F,D,H,W]
        return out if self.patches is None else out + self.patches.transpose(1, 2).flatten(0, 1).type_as(out)


def _places(model: Any) -> list[Any]:
    """The modules with attention, in the order of computation."""
    blocks = (*model.down_blocks, model.mid_block, *model.up_blocks)
    return [module for block in blocks for module in getattr(block, "attentions", ())]


def _set_processors(block: Any, self_attention: Processor, text_attention: Processor) -> None:
    block.attn1.set_processor(self_attention)
    block.attn2.set_processor(text_attention)


def _tell_attention(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Before the spatial and temporal blocks of one place, also when they are recomputed."""
    indicator, hidden = kwargs["image_only_indicator"], args[0] if args else kwargs["hidden_states"]
    clip = indicator if isinstance(indicator, _Clip) else None
    for block in (*module.transformer_blocks, *module.temporal_transformer_blocks):
        block.attn1.processor.clip, block.attn1.processor.size = clip, hidden.shape[2:]
    for block in module.temporal_transformer_blocks:
        block.attn2.processor.clip = clip


class _SelfAttention(Processor):
    """Attention inside each frame, [B*F,h*w,D], or over the frames of each place, [B*h*w,F,D], and a branch beside."""

    clip: _Clip | None = None
    size: tuple[int, int] = (0, 0)  # h and w

    def __init__(self, place: int, where: Where) -> None:
        self.place, self.where = place, where

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = super().__call__(attn, hidden_states, *args, **kwargs)
        if self.clip is None or self.clip.branch is None:
            return out
        if self.where == "space":
            frames = hidden_states.unflatten(0, self.clip.shape).unflatten(2, self.size)
            added = self.clip.branch(self.place, "space", frames)
            return out if added is None else out + added.flatten(2, 3).flatten(0, 1).type_as(out)
        places = hidden_states.unflatten(0, (-1, *self.size))  # [B,h,w,F,D]
        added = self.clip.branch(self.place, "time", places.permute(0, 3, 1, 2, 4))
        return out if added is None else out + added.permute(0, 2, 3, 1, 4).flatten(0, 2).type_as(out)


class _TemporalTextAttention(Processor):
    """Cross-attention in temporal order, [B*h*w,F,D]: each frame reads its own context, or all frame 0's (plain)."""

    clip: _Clip | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        clip = self.clip
        if clip is None or clip.context is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states)
        query = attn.to_q(hidden_states).unflatten(2, (attn.heads, -1))
        query = query.unflatten(0, (clip.shape[0], -1)).transpose(1, 2)  # [B,F,h*w,heads,d]
        context = clip.context.type_as(hidden_states)  # as mixed precision would have cast a plain argument
        key, value = (linear(context).unflatten(2, (attn.heads, -1)) for linear in (attn.to_k, attn.to_v))
        out = text_attention(query, key, value, clip.text_frames, self.attend)
        return merge(attn, out.transpose(1, 2).flatten(0, 1).type_as(query))
