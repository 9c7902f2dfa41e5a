"""AID's modules on Stable Video Diffusion, the paper's own base (2406.06465, sections 3.3 and 3.4).

SVD reads one token, the image embedding of its first frame, in cross-attention. MCondition is that token in every
place, plus what the Dual Query Transformer makes, whose last layers are zero at the start: attention over equal tokens
is attention to one of them, so that the model computes at first what it did. In space frame f reads E_m and its own
queries Q_f ("per_frame") or those of all frames ("global"). In time, where SVD's blocks read one context for all
frames, it is E_m and the mean of the queries over the frames. Places that are padding in the text stay the image token.

The latents of a given first frame stand beside those of every frame, as SVD was trained. Several given frames stand
beside their own, with zeros beside the rest. Which frames are given, a mask says: a further input channel, whose
weights are zero at the start.

The spatial adapter stands beside the spatial self-attention, the others beside the temporal one, on what these read.

B batch, F latent frames, K given ones, C channels, H W latent size, S states, L text tokens, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.backbones.base import Backbone
from models.backbones.inputs import as_context
from models.backbones.svd import ImageCondition, SVDBackbone, Where
from models.modules.aid import (
    Adapters,
    AIDSettings,
    check_given,
    check_one_text,
    make_dual_query,
    of_clip,
    states_to_read,
)
from models.modules.dual_query import COORDINATES, latent_tokens
from models.text import TextContext

PATCH = 2  # latent pixels along a side of an image token: with SVD's VAE those of 16 pixels


class MaskEmbedding(nn.Conv2d):
    """What a further input channel adds to the U-Net's input convolution: the same as widening that by zeros."""

    def __init__(self, width: int) -> None:
        super().__init__(1, width, 3, padding=1, bias=False)
        nn.init.zeros_(self.weight)

    def forward(self, mask: Tensor) -> Tensor:
        """[B,1,F,H,W] -> [B,width,F,H,W]."""
        rows = super().forward(mask.transpose(1, 2).flatten(0, 1))
        return rows.unflatten(0, (len(mask), -1)).transpose(1, 2)


class AIDUNetModules(nn.Module):
    """DualQueryTransformer, adapters at every place with attention, and the mask of given frames."""

    # what sharding takes as units; the first and the last run before the backbone does
    _no_split_modules = ["DualQueryTransformer", "Adapters", "MaskEmbedding"]
    text_readers = (".attn2.",)

    def __init__(self, backbone: Backbone, settings: AIDSettings) -> None:
        super().__init__()
        assert isinstance(backbone, SVDBackbone) and backbone.text_width is not None  # AID.check_backbone
        config, self.settings = backbone.config, settings
        self.text_width, self.context_width = backbone.text_width, int(config.cross_attention_dim)
        image_width = config.out_channels * PATCH**2 + COORDINATES
        self.dual_query = make_dual_query(settings, self.text_width, image_width, self.context_width)
        over_time = replace(settings, spatial_adapter=False)
        in_space = replace(settings, short_term_adapter=False, long_term_adapter=False)
        self.spatial_adapters = nn.ModuleList(Adapters(width, in_space) for width in backbone.places)
        self.temporal_adapters = nn.ModuleList(Adapters(width, over_time) for width in backbone.places)
        self.embed_mask = MaskEmbedding(config.block_out_channels[0])

    def prepare(
        self,
        backbone: Backbone,
        text: TextContext | Tensor,  # one context for the clip, [B,1,L,D] or [B,L,D]; zeros are padding
        given: Tensor,  # [B,C+1,K,H,W]: normalised latents of the first K frames, and 1 where something is given
        states: Tensor | None,  # [B,S,L',D], in order of time; zeros are padding
        frames: int,
        embedding: Tensor | None = None,  # [B,1,D] of the first frame; not read where `given` says that none is given
        noise_aug: float | Tensor = 0.0,  # of the noise on the given frames before they were encoded; or [B]
    ) -> dict[str, Any]:
        """The arguments of the backbone's forward that carry the condition; none depends on the noise.

        Raises ValueError where they do not fit.
        """
        assert isinstance(backbone, SVDBackbone)
        context = as_context(text, frames)
        check_one_text(context)
        instruction = context.embeddings[:, 0]
        given = given.to(instruction)
        check_given(given, len(instruction), frames)
        if given.shape[3] % PATCH or given.shape[4] % PATCH:
            raise ValueError(f"latent size {given.shape[3]}x{given.shape[4]} is not a multiple of {PATCH}")
        if embedding is None:
            raise ValueError("this model reads the image embedding of the first frame, `embedding` [B,1,D]; got none")
        if embedding.shape != (len(instruction), 1, self.context_width):
            raise ValueError(
                f"embedding has shape {tuple(embedding.shape)}, expected [{len(instruction)},1,{self.context_width}]"
            )
        known = given[:, -1:]  # [B,1,K,H,W]
        token = embedding.to(instruction) * known.amax(dim=(2, 3, 4))[..., None]  # [B,1,D]
        latents = given[:, :-1] / backbone.latent_scale
        if given.shape[2] > 1:
            latents = of_clip(latents, frames)
        inputs: dict[str, Any] = {
            "image": ImageCondition(latents, backbone.fps, noise_aug=noise_aug),
            "patches": self.embed_mask(of_clip(known, frames)),
        }
        inputs |= self.contexts(instruction, states, given, token, frames)
        if any(one.any for one in (*self.spatial_adapters, *self.temporal_adapters)):
            inputs["branch"] = self._branch
        return inputs

    def contexts(
        self, instruction: Tensor, states: Tensor | None, given: Tensor, token: Tensor, frames: int
    ) -> dict[str, Any]:
        """MCondition: `text`, and with a context per frame `temporal_text`, what all frames read in time [B,L+Q,D]."""
        together = torch.zeros(frames, dtype=torch.long)
        if self.dual_query is None:
            return {"text": TextContext(token[:, None], together)}
        if instruction.shape[2] != self.text_width:
            raise ValueError(
                f"texts are {instruction.shape[2]} wide, this model's text encoder makes {self.text_width}: encode "
                "them with that of the model folder"
            )
        read = states_to_read(self.settings, instruction, states)
        said, queries = self.dual_query(instruction, read, latent_tokens(given, PATCH), frames)
        words = [] if said is None else [said]
        if queries is None:
            return {"text": TextContext((said + token)[:, None], together)}
        if self.settings.reading == "global":
            return {"text": TextContext((torch.cat([*words, queries.flatten(1, 2)], dim=1) + token)[:, None], together)}
        of_frames = [one[:, None].expand(-1, frames, -1, -1) for one in words]
        return {
            "text": TextContext(torch.cat([*of_frames, queries], dim=2) + token[:, None], torch.arange(frames)),
            "temporal_text": torch.cat([*words, queries.mean(dim=1)], dim=1) + token,
        }

    def _branch(self, place: int, where: Where, hidden: Tensor) -> Tensor | None:
        return (self.spatial_adapters if where == "space" else self.temporal_adapters)[place](hidden)
