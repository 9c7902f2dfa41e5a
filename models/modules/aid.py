"""AID's modules on a backbone: the condition in the place of its text, adapters beside its self-attention.

The backbone's own modules and state-dict keys stay as they are; what is added lies under `backbone.conditioner` and
reaches in as text, as branches of the layers and beside the patch embedding. Everything added ends in layers of zeros,
so that the backbone at first computes what it did.

The instruction's embeddings become t_1 + E_m. Where Q goes depends on what stands after a text, such that Q = 0 changes
nothing: Wan and Latte read zeros, whose place it takes; CogVideoX reads padding that its text encoder has seen, and
HunyuanVideo none at all, so there Q is added to the last tokens of the text, which pad or end it. A frame reads its own
Q ("per_frame") or all frames' ("global"). Where text stands in the video's attention, a frame with a Q of its own reads
a copy of the text of its own (`models.joint_attention`), F times as many text tokens.

Those of Stable Video Diffusion, which reads no text by itself, are `models.modules.aid_unet`.

B batch, F latent frames, K given ones, C channels, H W latent size, S states, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.backbones.base import Backbone
from models.modules.adapters import (
    LongTermTemporalAdapter,
    ShortTermKernel,
    ShortTermTemporalAdapter,
    SpatialAdapter,
)
from models.modules.dual_query import COORDINATES, DualQueryTransformer, is_token, latent_tokens
from models.text import TextContext

Condition = Literal["none", "multimodal", "decomposed", "full"]
Reading = Literal["per_frame", "global"]


@dataclass(frozen=True)
class AIDSettings:
    """What the modules are made of; see the fields of `models.methods.aid.AID`, which are these."""

    condition: Condition
    states: bool
    reading: Reading
    spatial_adapter: bool
    short_term_adapter: bool
    long_term_adapter: bool
    short_term_kernel: ShortTermKernel
    adapter_ratio: int
    width: int
    heads: int
    query_tokens: int
    num_states: int
    max_frames: int
    image_concat: bool


class Adapters(nn.Module):
    """Those adapters of one block that there are; their sum."""

    def __init__(self, dim: int, settings: AIDSettings) -> None:
        super().__init__()
        ratio = settings.adapter_ratio
        self.spatial = SpatialAdapter(dim, ratio) if settings.spatial_adapter else None
        self.short_term = (
            ShortTermTemporalAdapter(dim, ratio, settings.short_term_kernel) if settings.short_term_adapter else None
        )
        self.long_term = (
            LongTermTemporalAdapter(dim, settings.max_frames, ratio) if settings.long_term_adapter else None
        )

    @property
    def any(self) -> bool:
        return not (self.spatial is self.short_term is self.long_term is None)

    def forward(self, x: Tensor) -> Tensor | None:
        """[B,F,h,w,D] in and out; None where there is no adapter."""
        outs = [one(x) for one in (self.spatial, self.short_term, self.long_term) if one is not None]
        return sum(outs[1:], outs[0]) if outs else None


def make_dual_query(
    settings: AIDSettings, text_width: int, image_width: int, out_width: int | None = None
) -> DualQueryTransformer | None:
    """The Dual Query Transformer of these settings; None where no condition is made."""
    if settings.condition == "none":
        return None
    return DualQueryTransformer(
        text_width,
        image_width,
        settings.width,
        max_frames=settings.max_frames,
        max_states=settings.num_states,
        query_tokens=settings.query_tokens,
        heads=settings.heads,
        multimodal=settings.condition in ("multimodal", "full"),
        decomposed=settings.condition in ("decomposed", "full"),
        out_dim=out_width,
    )


def states_to_read(settings: AIDSettings, instruction: Tensor, states: Tensor | None) -> Tensor:
    """[B,S,L,D]; without states the ablation reads the instruction [B,L,D] once more, so that it has as many weights.

    Raises ValueError for a model that reads states and got none.
    """
    if not settings.states:
        return instruction[:, None]
    if states is None:
        raise ValueError("this model reads states, [B,S,L,D], and got none; a model of states=false needs none")
    return states.to(instruction)


def check_one_text(context: TextContext) -> None:
    """Raises ValueError for a context of several texts."""
    if context.embeddings.shape[1] != 1:
        raise ValueError(f"aid predicts one shot from one text, got {context.embeddings.shape[1]} texts")


def check_given(given: Tensor, batch: int, frames: int) -> None:
    """Raises ValueError unless `given` is [B,C+1,K,H,W] with 1 <= K <= frames."""
    if given.ndim != 5 or not 1 <= given.shape[2] <= frames or len(given) != batch:
        raise ValueError(
            f"given has shape {tuple(given.shape)}, expected [{batch},C+1,1 to {frames},H,W]: latents, "
            "and 1 where they are given"
        )


def of_clip(given: Tensor, frames: int) -> Tensor:
    """What is known of the first frames [B,C,K,H,W] with zeros for the others, [B,C,F,H,W]."""
    whole = given.new_zeros(*given.shape[:2], frames, *given.shape[3:])
    whole[:, :, : given.shape[2]] = given
    return whole


class GivenEmbedding(nn.Conv3d):
    """Patches of the given latents: a second patch embedding, which starts at zero."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__(channels, dim, (1, patch, patch), (1, patch, patch), bias=False)
        nn.init.zeros_(self.weight)


class AIDModules(nn.Module):
    """DualQueryTransformer, adapters and, for `image_concat`, a patch embedding for the given latents.

    That one is added to the model's own: the same as widening the model's by channels of zeros.
    """

    # what sharding takes as units; the first and the last run before the backbone does
    _no_split_modules = ["DualQueryTransformer", "Adapters", "GivenEmbedding"]

    def __init__(self, backbone: Backbone, settings: AIDSettings) -> None:
        super().__init__()
        sites, channels = backbone.sites, backbone.config.in_channels
        self.patch, self.padding, self.settings = sites.patch, sites.text_padding, settings
        self.text_readers = sites.text_readers
        self.dual_query = make_dual_query(settings, sites.text_width, channels * self.patch**2 + COORDINATES)
        self.adapters = nn.ModuleList(Adapters(sites.width, settings) for _ in sites.attentions)
        self.embed_image = GivenEmbedding(channels + 1, sites.width, self.patch) if settings.image_concat else None

    def prepare(
        self,
        backbone: Backbone,
        text: TextContext | Tensor,  # one context for the clip, [B,1,L,D] or [B,L,D]; zeros are padding
        given: Tensor,  # [B,C+1,K,H,W]: normalised latents of the first K frames, and 1 where something is given
        states: Tensor | None,  # [B,S,L',D], in order of time; zeros are padding
        frames: int,
    ) -> dict[str, Any]:
        """The arguments of the backbone's forward that carry the condition; none depends on the noise.

        Raises ValueError where they do not fit, and for a text that leaves no room for the queries.
        """
        context = backbone.read_text(text, frames)
        check_one_text(context)
        if context.lengths is not None:  # what is behind a text is no token here
            within = torch.arange(context.embeddings.shape[2]) < context.lengths[..., None]  # [B,1,L]
            context = replace(context, embeddings=context.embeddings * within[..., None].to(context.embeddings))
        instruction = context.embeddings[:, 0]  # [B,L,D]
        if states is not None and backbone.packed_text:
            states = states[:, :, 1:]
        given = given.to(instruction)
        check_given(given, len(instruction), frames)
        inputs: dict[str, Any] = {"text": self.context(context, given, states, frames)}
        grid = (given.shape[3] // self.patch, given.shape[4] // self.patch)
        if any(adapters.any for adapters in self.adapters):

            def branch(layer: int, hidden: Tensor, time: Tensor, rotate: Callable[[Tensor], Tensor]) -> Tensor | None:
                added = self.adapters[layer](hidden.unflatten(2, grid))
                return None if added is None else added.flatten(2, 3)

            inputs["branch"] = branch
        if self.embed_image is not None:
            inputs["patches"] = self.embed_image(of_clip(given, frames))
        return inputs

    def context(self, text: TextContext, given: Tensor, states: Tensor | None, frames: int) -> TextContext:
        """MCondition: one context per frame, or one for all ("global", and without queries)."""
        if self.dual_query is None:
            return text
        instruction = text.embeddings[:, 0]
        read = states_to_read(self.settings, instruction, states)
        said, queries = self.dual_query(instruction, read, latent_tokens(given, self.patch), frames)
        context = instruction if said is None else instruction + said
        if queries is None:
            return replace(text, embeddings=context[:, None])
        if self.settings.reading == "global":
            queries = queries.flatten(1, 2)[:, None]  # [B,1,F*Q,D]
        groups = queries.shape[1]
        added = self._placed(queries, instruction, text.lengths)  # [B,G,L,D]
        of_groups = {
            name: None if value is None else value.expand(-1, groups, *value.shape[2:])
            for name, value in (("lengths", text.lengths), ("pooled", text.pooled))
        }
        reads = torch.arange(frames) if self.settings.reading == "per_frame" else text.frame_text
        return TextContext(context[:, None] + added, reads, **of_groups)

    def _placed(self, queries: Tensor, instruction: Tensor, lengths: Tensor | None) -> Tensor:
        """Queries [B,G,Q,D] at their places in a context, zeros elsewhere: [B,G,L,D]."""
        room, length = queries.shape[2], instruction.shape[1]
        ends = torch.full((len(instruction),), length) if lengths is None else lengths[:, 0]  # of the text, [B]
        words = is_token(instruction).sum(dim=1)
        if self.padding == "zeros" and (room > length or bool(is_token(instruction[:, length - room :]).any())):
            raise ValueError(
                f"a text of {int(words.max())} tokens in a context of {length} leaves no room for {room} query tokens: "
                "shorten the text, or use a model with a larger text_length or fewer query_tokens"
            )
        if room > int(ends.min()):
            raise ValueError(
                f"a text of {int(ends.min())} tokens is too short to carry {room} query tokens: use fewer query_tokens "
                "or reading=per_frame"
            )
        places = (ends[:, None] - room + torch.arange(room)).to(queries.device)  # [B,Q]
        index = places[:, None, :, None].expand(queries.shape)
        return queries.new_zeros(*queries.shape[:2], length, queries.shape[3]).scatter(2, index, queries)
