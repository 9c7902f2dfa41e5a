"""Latte with a noise level and a text per latent frame, shot positions and attention rules: the home of FVDM.

The diffusers model itself runs, unchanged. Its spatial blocks see the frames as rows of the batch, [B*F,n,D], its
temporal blocks the positions of a frame, [B*n,F,D]. Where the frames of a clip differ in level, its temporal blocks
see the frames as rows, too, so that in both the per-row modulation *is* a per-frame modulation (FVDM 2410.03160,
section 3), broadcast over the tokens of a frame and never expanded to tokens. Only the temporal attention brings the
frames of a position together and parts them again. Gradient checkpointing, FSDP, LoRA and saving work as on the plain
model, whose state-dict keys these are.

B batch, F latent frames, C channels, H W latent size, n tokens per frame, D width, G text groups, L text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import LatteTransformer3DModel
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from torch import Tensor, nn

from models.attention import AttentionRule, group_sizes, grouped_attention
from models.backbones.base import Backbone, BranchSites, Capabilities, LayerBranch, require
from models.backbones.inputs import as_context, check_inputs, shared_levels
from models.backbones.processors import Processor, merge, project
from models.layout import ClipLayout, Segment
from models.positions import PositionMode, position_ids
from models.process import Process
from models.text import TextContext

CAPABILITIES = Capabilities(
    per_frame_levels=True,
    position_modes=frozenset({"contiguous", "time_gap"}),
    attention_rules=frozenset({"full", "group_causal", "same_frame"}),
    text_per_shot=True,
    layer_branch=True,
    joint_space_time=False,
    reasons={
        "diagonal": "Latte adds one absolute table to the patch grid of all frames, which was never trained off its "
        "place, and its temporal attention joins equal places only, so shots cannot move apart in space",
        "joint_space_time": "Latte attends inside a frame and, over time, between equal places only, so the tokens of "
        "a shot do not meet those of the others, and its table of times was trained for clips of one length; use Wan, "
        "CogVideoX or HunyuanVideo",
        "kv_cache": "Latte joins frames in attention over time alone, whose keys Shotloom does not keep; use Wan",
    },
)


class LatteBackbone(Backbone):
    """`transformer` is a diffusers LatteTransformer3DModel; its attention processors are replaced.

    `process` is what it was trained for, VPDiffusion for the published ones. A model that also predicts a variance
    (twice the channels out) gives its prediction half; the variance half is not used. A class-conditional model reads a
    label as a context of one token (`models.modules.labels`), an unconditional one its null.
    """

    capabilities = CAPABILITIES
    lora_targets = ()

    def __init__(self, transformer: LatteTransformer3DModel, process: Process) -> None:
        super().__init__()
        model: Any = transformer
        config = model.config
        if config.norm_type != "ada_norm_single":
            raise ValueError(f"norm_type is {config.norm_type!r}: a level per latent frame needs 'ada_norm_single'")
        if model.out_channels not in (config.in_channels, 2 * config.in_channels):
            raise ValueError(
                f"out_channels is {model.out_channels} with in_channels {config.in_channels}: expected as many (a "
                "prediction) or twice as many (a prediction and a variance)"
            )
        self.transformer = model
        self.process = process
        self.pixels_per_token = config.patch_size**2
        model._no_split_modules = ["BasicTransformerBlock"]  # what to checkpoint and to shard; the class names none
        self._rows = _FrameRows()
        model.adaln_single.register_forward_hook(self._rows.modulation)
        model.caption_projection.register_forward_hook(self._rows.text)
        model.pos_embed.register_forward_hook(self._rows.add_patches)
        for layer, block in enumerate(model.transformer_blocks):
            text_attention = _SpatialTextAttention()
            block.attn1.set_processor(_SpatialAttention(text_attention, layer))
            block.attn2.set_processor(text_attention)
            block.register_forward_pre_hook(_tell_branch)
            block.register_forward_pre_hook(_unwrap_modulation)
        for block in model.temporal_transformer_blocks:
            block.attn1.set_processor(_TemporalAttention())
            block.register_forward_pre_hook(_frames_as_rows)
            block.register_forward_hook(_positions_as_rows)

    @property
    def config(self) -> Any:
        return self.transformer.config

    @property
    def sites(self) -> BranchSites:
        """Beside the spatial attention of each layer; the temporal one follows it."""
        layers = tuple(block.attn1 for block in self.transformer.transformer_blocks)
        return BranchSites(
            layers, lambda layer: (layers[layer].to_out[0].weight, layers[layer].to_out[0].bias), self._width,
            self._width, self.config.caption_channels, self.config.patch_size, "transformer.pos_embed", (".attn2.",),
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,  # [B,C,F,H,W]
        levels: Tensor,  # [B] or [B,F], in [0, 1]
        text: TextContext | Tensor,  # or [B,L,D], one context for the whole clip
        *,
        layout: ClipLayout | None = None,  # None: one shot
        position_mode: PositionMode = "contiguous",
        position_gap: int = 4,
        attention_rule: AttentionRule = "full",  # of the temporal attention; "same_frame": each frame to itself
        branch: LayerBranch | None = None,  # what conditioning modules add to each spatial block
        patches: Tensor | None = None,  # what they add to the patch embedding, [B,D,F,h,w]
    ) -> Tensor:
        """What the process has the model predict, [B,C,F,H,W].

        With equal levels, one text, no layout and as many frames as the model's `video_length` this is, bit for bit,
        the diffusers model at the process's time. Raises ValueError where x, levels, text and layout do not fit
        together, and for what Latte cannot do.
        """
        batch, channels, frames, _, _ = x.shape
        layout = layout or ClipLayout((Segment("target", frames),))
        text = as_context(text, frames)
        check_inputs(x, levels, text, layout, self.config.patch_size)
        require(CAPABILITIES, position_mode=position_mode, attention_rule=attention_rule)

        groups = group_sizes(layout)
        levels = shared_levels(levels)
        plain_rule = attention_rule == "full" or (attention_rule == "group_causal" and len(groups) == 1)
        if levels.ndim == 1 and plain_rule and branch is None:
            self._rows.clip = None  # one time per sample and all frames: the plain model's own arithmetic
        else:
            levels = levels if levels.ndim == 2 else levels[:, None].expand(batch, frames)
            self._rows.clip = _Clip(batch, frames, groups, attention_rule, branch)
        self._rows.patches = patches
        self._rows.context = text if text.embeddings.shape[1] > 1 else None
        self.transformer.temp_pos_embed = _table(layout, position_mode, position_gap, self._width, x.device)

        times = self.process.to_model_time(levels).flatten()  # [B] or [B*F]
        out = self.transformer(x, times, text.embeddings.flatten(0, 1), return_dict=False)[0]
        return out[:, :channels].contiguous()

    @property
    def _width(self) -> int:
        return self.config.num_attention_heads * self.config.attention_head_dim


@dataclass(eq=False)
class _Clip:
    """What the blocks must know of the clip."""

    batch: int
    frames: int
    groups: tuple[int, ...]  # frames of each
    rule: AttentionRule
    branch: LayerBranch | None = None
    time: Tensor | None = None  # [B*F,D], embedded; known once the model has read its times


class _PerFrame:
    """Rows [B*F,...], one per frame, where the model holds one per sample and repeats it for the frames."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.shape = rows.shape

    def repeat_interleave(self, repeats: int, dim: int, output_size: int) -> _PerFrame:
        return self

    def view(self, *shape: int) -> Any:
        return self.rows


class _Modulation(_PerFrame):
    """The blocks' modulation [B*F,6*D] and, for the temporal blocks, the clip.

    It reaches the blocks as an argument, which is replayed when gradient checkpointing runs a block again.
    """

    def __init__(self, rows: Tensor, clip: _Clip) -> None:
        super().__init__(rows)
        self.clip = clip

    def view(self, *shape: int) -> _Modulation:
        return self


class _FrameRows:
    """Hands the model per-frame rows of what is per sample in it, before its first block; set anew by every call."""

    clip: _Clip | None = None  # None: one time per sample
    context: TextContext | None = None  # None: one text per sample
    patches: Tensor | None = None  # [B,D,F,h,w]

    def modulation(self, module: nn.Module, args: Any, out: tuple[Tensor, Tensor]) -> Any:
        if self.clip is None:
            return out
        modulation, embedded_time = out
        self.clip.time = embedded_time
        return _Modulation(modulation, self.clip), _PerFrame(embedded_time)

    def add_patches(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:  # out [B*F,n,D]
        if self.patches is None:
            return out
        return out + self.patches.permute(0, 2, 3, 4, 1).reshape(out.shape).type_as(out)

    def text(self, module: nn.Module, args: Any, out: Tensor) -> Any:  # out [B*G,L,D]
        if self.context is None:
            return out
        contexts = out.unflatten(0, self.context.embeddings.shape[:2])
        return _PerFrame(contexts[:, self.context.frame_text.to(out.device)].flatten(0, 1))


class _SpatialTextAttention(Processor):
    """Cross-attention of each frame to its text; what a branch has for the layer is added to what comes out, because
    the block adds that without a gate."""

    added: Tensor | None = None  # [B,F,n,D]

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = super().__call__(attn, hidden_states, *args, **kwargs)
        added, self.added = self.added, None
        return out if added is None else out + added.flatten(0, 1).type_as(out)


class _SpatialAttention(Processor):
    """Attention inside each frame, [B*F,n,D]; calls the branch with what it reads."""

    clip: _Clip | None = None  # set before the block runs, also when it is recomputed; None: no branch

    def __init__(self, text_attention: _SpatialTextAttention, layer: int) -> None:
        self.text_attention, self.layer = text_attention, layer

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.clip is not None and self.clip.branch is not None:
            assert self.clip.time is not None
            frames = hidden_states.unflatten(0, (self.clip.batch, -1))  # [B,F,n,D]
            self.text_attention.added = self.clip.branch(self.layer, frames, self.clip.time, _as_it_is)
        return super().__call__(attn, hidden_states, *args, **kwargs)


def _as_it_is(x: Tensor) -> Tensor:
    """Latte turns no queries or keys: its positions are in the tokens."""
    return x


def _tell_branch(block: Any, args: tuple[Any, ...]) -> None:
    """Before a spatial block, also when it is recomputed: the clip whose branch stands beside it."""
    block.attn1.processor.clip = args[4].clip if isinstance(args[4], _Modulation) else None


class _TemporalAttention(Processor):
    """Attention over the frames of each position: [B*n,F,D], or [B*F,n,D] with a clip, in and out."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        clip: _Clip | None = None,
    ) -> Tensor:
        if clip is None:
            return super().__call__(attn, hidden_states)
        query, key, value = (_swap(x, clip.batch) for x in project(attn, hidden_states))  # [B*n,F,heads,d]
        out = grouped_attention(query, key, value, clip.groups, clip.rule, self.attend)
        return merge(attn, _swap(out, clip.batch).type_as(query))


def _swap(x: Tensor, batch: int) -> Tensor:
    """[B*F,n,...] <-> [B*n,F,...]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(0, 1)


def _unwrap_modulation(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before a spatial block."""
    hidden, *masks_and_text, modulation, options, labels = args
    if not isinstance(modulation, _Modulation):
        return args
    # in the hidden states' type, as mixed precision would have cast a plain argument
    return hidden, *masks_and_text, modulation.rows.type_as(hidden), options, labels


def _frames_as_rows(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before a temporal block: hidden states [B*n,F,D] as [B*F,n,D] when there is one time per frame."""
    hidden, *masks_and_text, modulation, options, labels = _unwrap_modulation(block, args)
    if not isinstance(args[4], _Modulation):
        return args
    clip = args[4].clip
    return _swap(hidden, clip.batch), *masks_and_text, modulation, {"clip": clip}, labels


def _positions_as_rows(block: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    """After a temporal block: back to [B*n,F,D]."""
    options = args[5]
    return _swap(out, options["clip"].batch) if options else out


@lru_cache(maxsize=4)  # the layout of a run rarely changes
@torch.inference_mode(False)  # tables first made while sampling must serve training, too
def _table(layout: ClipLayout, mode: PositionMode, gap: int, width: int, device: torch.device) -> Tensor:
    """Latte's temporal table at the clip's frames, float32 [1,F,D]; its sines go on past the trained `video_length`."""
    times = position_ids(layout, (1, 1), mode, gap)[:, 0]
    table = get_1d_sincos_pos_embed_from_grid(width, torch.arange(int(times.max()) + 1), output_type="pt")
    return table[times].float()[None].to(device)
