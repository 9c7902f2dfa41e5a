"""Wan 2.1 and 2.2 with a noise level per latent frame, shot positions, attention rules and a text per shot.

The diffusers model itself runs, unchanged. Where the frames of a clip differ in level, its blocks see the frames as
rows of the batch, [B*F,n,D] with one time per row, so that its per-sample modulation *is* a per-frame modulation,
broadcast over the tokens of a frame and never expanded to tokens. Only what mixes frames needs to know of the clip: the
two attention processors bring the frames of a sample together and part them again. Gradient checkpointing, FSDP, LoRA,
`torch.compile` and saving therefore work as on the plain model, whose state-dict keys these are.

B batch, F latent frames, C channels, H W latent size, n tokens per frame, N = F*n tokens, D width, G text groups,
L text tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, get_args

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from models.attention import Attend, AttentionRule, group_sizes, grouped_attention
from models.backbones.base import Backbone, BranchSites, Capabilities, LayerBranch
from models.backbones.inputs import as_context, check_inputs, frame_groups, shared_levels
from models.experts import EXPERT_FOLDERS, Expert
from models.kv_cache import KeysValues, KVCache
from models.layout import ClipLayout, Segment, shots_layout
from models.positions import PositionMode, position_ids, rope_tables
from models.process import FlowMatching
from models.text import TextContext

__all__ = ["TextContext", "WanBackbone"]


_EXPERT_REASONS = {
    "layer_branch": "modules beside its layers belong to one model, and this Wan 2.2 has two experts; use a Wan of one "
    "model (2.1, or 2.2 TI2V-5B)"
}


class WanBackbone(Backbone):
    """`transformer` is a diffusers WanTransformer3DModel for text to video; its attention processors are replaced.

    `expert` says which of a Wan 2.2's two models it is; both together are `models.backbones.experts.WanExperts`.
    """

    capabilities = Capabilities(
        per_frame_levels=True,
        position_modes=frozenset(get_args(PositionMode)),
        attention_rules=frozenset(get_args(AttentionRule)),
        text_per_shot=True,
        reasons={},
        kv_cache=True,
        layer_branch=True,
    )
    # all linear layers of a block's two attentions and its feed-forward, as in Pusa
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def __init__(self, transformer: WanTransformer3DModel, expert: Expert | None = None) -> None:
        super().__init__()
        model: Any = transformer
        config = model.config
        time, self.patch, columns = config.patch_size
        if time != 1 or self.patch != columns:
            raise ValueError(
                f"patch_size is {config.patch_size}: a level per latent frame needs a temporal patch of 1, and patches "
                "must be square"
            )
        if config.image_dim is not None or config.added_kv_proj_dim is not None:
            raise ValueError(
                "this is an image-to-video Wan with image cross-attention; use a text-to-video one, which learns "
                "image conditions as clean frames (method fvdm)"
            )
        self.transformer = model
        self.expert = expert
        if expert is not None:
            self.capabilities = replace(self.capabilities, layer_branch=False, reasons=_EXPERT_REASONS)
        self.rope_dims = (model.rope.t_dim, model.rope.h_dim, model.rope.w_dim)
        self.process = FlowMatching()
        self.pixels_per_token = self.patch**2
        model.rope = _ClipInfo()
        model.condition_embedder.register_forward_hook(model.rope.keep_time)
        model.patch_embedding.register_forward_hook(model.rope.add_patches)
        model.blocks[0].register_forward_pre_hook(_frames_as_rows)
        for layer, block in enumerate(model.blocks):
            text_attention = _TextAttention()
            block.attn1.set_processor(_VideoAttention(text_attention, layer))
            block.attn2.set_processor(text_attention)

    @property
    def config(self) -> Any:
        return self.transformer.config

    @property
    def sites(self) -> BranchSites:
        layers = tuple(block.attn1 for block in self.transformer.blocks)
        width = self.config.num_attention_heads * self.config.attention_head_dim
        return BranchSites(
            layers, lambda layer: (layers[layer].to_out[0].weight, layers[layer].to_out[0].bias), width, width,
            self.config.text_dim, self.patch, "transformer.patch_embedding", (".attn2.",),
        )  # fmt: skip

    @property
    def models_by_folder(self) -> dict[str, Any]:
        return {"transformer" if self.expert is None else EXPERT_FOLDERS[self.expert.name]: self.transformer}

    def forward(
        self,
        x: Tensor,  # [B,C,F,H,W]
        levels: Tensor,  # [B] or [B,F], in [0, 1]
        text: TextContext | Tensor,  # or [B,L,D], one context for the whole clip
        *,
        layout: ClipLayout | None = None,  # None: one shot
        position_mode: PositionMode = "contiguous",
        position_gap: int = 4,
        attention_rule: AttentionRule = "full",
        cache: KVCache | None = None,  # shots that come before those of x
        append: bool = False,  # keep the shots of x, as they are here, in the cache
        branch: LayerBranch | None = None,  # what conditioning modules add to each layer
        patches: Tensor | None = None,  # what they add to the patch embedding, [B,D,F,h,w]
    ) -> Tensor:
        """The predicted velocity, [B,C,F,H,W].

        With equal levels, one text and no layout this is, bit for bit, the diffusers model at timestep 1000 * level.
        With a cache it is what the same model says of x behind the shots that the cache holds.
        Raises ValueError where x, levels, text, layout and cache do not fit together.
        """
        batch, _, frames, height, width = x.shape
        layout = layout or ClipLayout((Segment("target", frames),))
        text = as_context(text, frames)
        check_inputs(x, levels, text, layout, self.patch)

        grid = (height // self.patch, width // self.patch)
        sizes, seen = group_sizes(layout), layout
        if cache is None and append:
            raise ValueError("append=True without a cache to append to")
        if cache is not None:
            if attention_rule != "group_causal":
                raise ValueError(
                    f"attention_rule is {attention_rule!r} with a cache: only under group_causal do earlier shots stay "
                    "what they were when they were kept"
                )
            cache.check(batch, (position_mode, position_gap, grid))
            seen = shots_layout([*cache.sizes, *sizes])
        cos, sin = _tables(seen, grid, position_mode, position_gap, self.rope_dims, x.device)
        own = frames * grid[0] * grid[1]  # tokens
        clip = _Clip(
            batch, frames, (cos[:, -own:], sin[:, -own:]), sizes, attention_rule, frame_groups(text), cache, append
        )
        clip.branch, clip.patches = branch, patches
        times = self.process.to_model_time(shared_levels(levels)).flatten()  # [B] or [B*F]

        self.transformer.rope.clip = clip
        out = self.transformer(x, times, text.embeddings.flatten(0, 1), return_dict=False)[0]
        if cache is not None and append:
            kept = [clip.kept[layer] for layer in range(len(self.transformer.blocks))]
            cache.append(kept, sizes, (position_mode, position_gap, grid))
        return out


class _Clip:
    """What the attention processors must know of the clip; reaches them through the blocks' `rotary_emb` argument.

    As an argument it is replayed when gradient checkpointing runs a block again. Neither a tuple nor a dataclass:
    FSDP's mixed precision looks into those and would make the rotary tables bfloat16.
    """

    def __init__(
        self,
        batch: int,
        frames: int,
        rotary: tuple[Tensor, Tensor],  # [1,N,1,d] each
        groups: tuple[int, ...],  # frames of each
        rule: AttentionRule,
        text_frames: tuple[tuple[int, ...], ...],  # the frames that read each text group
        cache: KVCache | None = None,
        append: bool = False,
    ) -> None:
        self.batch, self.frames, self.rotary = batch, frames, rotary
        self.groups, self.rule, self.text_frames = groups, rule, text_frames
        self.cache, self.append = cache, append
        self.kept: dict[int, KeysValues] = {}  # per layer; the cache gets them when all layers have run
        self.branch: LayerBranch | None = None
        self.patches: Tensor | None = None  # [B,D,F,h,w]
        self.time: Tensor | None = None  # [B,D] or [B*F,D], embedded; known once the model has read its times

    def rotate(self, x: Tensor) -> Tensor:
        """x [B,M,heads,d] by the positions of the clip's first M tokens."""
        cos, sin = self.rotary
        return _rotate(x, (cos[:, : x.shape[1]], sin[:, : x.shape[1]]))

    def branch_of(self, layer: int, hidden: Tensor) -> Tensor | None:
        """What the branch adds to a layer whose self-attention reads `hidden` [B,N,D]: [B,N,D] or None."""
        if self.branch is None:
            return None
        assert self.time is not None
        added = self.branch(layer, hidden.unflatten(1, (self.frames, -1)), self.time, self.rotate)
        return None if added is None else added.flatten(1, 2)


class _ClipInfo(nn.Module):
    """Stands in for the model's rotary embedding and hands the clip at hand to its blocks. Holds no parameters."""

    clip: _Clip

    def forward(self, hidden_states: Tensor) -> _Clip:
        return self.clip

    def keep_time(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """After the model has embedded its times: the embedding, for the branches of this clip."""
        self.clip.time = output[0]

    def add_patches(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """After the patch embedding [B,D,F,h,w]: what conditioning modules add to it."""
        return output if self.clip.patches is None else output + self.clip.patches.type_as(output)


def _frames_as_rows(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before the first block: hidden states [B,N,D] as [B*F,n,D] when there is one time per frame."""
    hidden, text, modulation, clip = args
    return hidden.reshape(len(modulation), -1, hidden.shape[-1]), text, modulation, clip


class _Processor:
    # read by diffusers' set_attention_backend and context parallelism
    _attention_backend = None
    _parallel_config = None


class _VideoAttention(_Processor):
    """Self-attention over the clip: [B,N,D] or [B*F,n,D], in and out."""

    def __init__(self, text_attention: _TextAttention, layer: int) -> None:
        self.text_attention, self.layer = text_attention, layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: _Clip | None = None,
    ) -> Tensor:
        clip = rotary_emb
        assert clip is not None, "the block was called without its clip: call it through WanBackbone"
        # a block runs its self-attention first, also when it is recomputed: its text attention sees the same clip
        self.text_attention.clip = clip
        hidden = hidden_states.reshape(clip.batch, -1, hidden_states.shape[-1])  # [B,N,D]
        # a branch beside self-attention is added by text attention, whose output the block adds without a gate
        self.text_attention.added = clip.branch_of(self.layer, hidden)
        query = _rotate(attn.norm_q(attn.to_q(hidden)).unflatten(2, (attn.heads, -1)), clip.rotary)
        key = _rotate(attn.norm_k(attn.to_k(hidden)).unflatten(2, (attn.heads, -1)), clip.rotary)
        value = attn.to_v(hidden).unflatten(2, (attn.heads, -1))
        if clip.append:
            clip.kept[self.layer] = key.detach(), value.detach()
        if clip.cache is not None:
            key, value = clip.cache.prepend(self.layer, key, value)
        attend = partial(dispatch_attention_fn, backend=self._attention_backend, parallel_config=self._parallel_config)
        out = grouped_attention(query, key, value, clip.groups, clip.rule, attend).flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out)).reshape(hidden_states.shape)


class _TextAttention(_Processor):
    """Cross-attention of each frame to its own text: [B,N,D] or [B*F,n,D] reads [B*G,L,D]."""

    clip: _Clip
    added: Tensor | None = None  # [B,N,D]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> Tensor:
        clip = self.clip
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1))  # [B*G,L,heads,d]
        value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1))
        query = query.reshape(clip.batch, clip.frames, -1, *query.shape[2:])  # [B,F,n,heads,d]

        attend = partial(dispatch_attention_fn, backend=self._attention_backend)
        out = text_attention(query, key, value, clip.text_frames, attend)
        out = out.reshape(hidden_states.shape).type_as(query)
        out = attn.to_out[1](attn.to_out[0](out))
        added, self.added = self.added, None
        return out if added is None else out + added.reshape(out.shape).type_as(out)


def text_attention(
    query: Tensor, key: Tensor, value: Tensor, text_frames: tuple[tuple[int, ...], ...], attend: Attend
) -> Tensor:
    """Queries [B,F,n,heads,d] of frames `text_frames[g]` read keys and values [B*G,L,heads,d] of group g.

    One call for all groups when they have equally many frames, else one per group that is read.
    """
    batch, groups = query.shape[0], len(text_frames)
    order = [frame for frames in text_frames for frame in frames]
    moved = order != list(range(len(order)))
    if moved:
        query = query[:, torch.tensor(order, device=query.device)]
    if len({len(frames) for frames in text_frames}) == 1:
        folded = query.unflatten(1, (groups, -1)).flatten(2, 3).flatten(0, 1)  # [B*G,(F/G)*n,heads,d]
        out = attend(folded, key, value).reshape(query.shape)
    else:
        key, value = key.unflatten(0, (batch, groups)), value.unflatten(0, (batch, groups))
        parts = query.split([len(frames) for frames in text_frames], dim=1)
        outs = [
            attend(part.flatten(1, 2), key[:, g], value[:, g]).reshape(part.shape)
            for g, part in enumerate(parts)
            if part.shape[1]
        ]
        out = torch.cat(outs, dim=1)
    return out[:, torch.tensor(order, device=out.device).argsort()] if moved else out


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding as WanAttnProcessor does it; x [B,N,heads,d]."""
    cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out


@lru_cache(maxsize=4)  # the layout of a run rarely changes, and the tables of a long scene are large
@torch.inference_mode(False)  # tables first made while sampling must serve training, too
def _tables(
    layout: ClipLayout,
    grid: tuple[int, int],
    mode: PositionMode,
    gap: int,
    dims: tuple[int, int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    cos, sin = rope_tables(position_ids(layout, grid, mode, gap), dims)
    return cos[None, :, None].to(device), sin[None, :, None].to(device)
