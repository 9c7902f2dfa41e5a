"""FCA blocks: beside every layer of a frozen video model, a trained cross-attention to the given frames and to
frame-wise text (Frame-wise Conditioning Adaptation for text-video prediction, TMLR 2025).

In layer d, with h what the layer's frozen self-attention reads (normalised and modulated hidden states),

    u = h (1 + alpha_d) + beta_d,   a = softmax(W_q u [W_k c]^T) W_v c,   x <- x + gamma_d W_o a,
    c of a token of frame f = [x_init^(d) ; y_f^(d)],   (alpha, beta, gamma)_d = Linear_d(SiLU(time)), 0 at first.

x_init^(d) are the given frames as that same layer reads them in a pass of the frozen model over them alone, clean, with
the same text; y_f^(d) are the tokens that the layer's own text module makes for frame f. All tokens read all of x_init,
but of the text only that of their frame. W start as those of the layer's self-attention, gamma at zero: the start is
the frozen model, bit for bit, and what training opens first is the layer's own attention to the given frames.

The paper's equations were not at hand; this form satisfies its figures and text. Its ViT is here the frozen model
itself: x_init^(d) are also the image tokens of the text module.

B batch, F latent frames, n tokens per frame, D width, M tokens of the given frames, q text tokens per frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.base import Backbone, LayerBranch
from models.layout import ClipLayout, Segment
from models.modules.frame_text import FrameTextQFormer
from models.text import TextContext

InitFeatures = Literal["layers", "patches"]


class FCABlock(nn.Module):
    """The adapter of one layer.

    Args:
        attention: the layer's self-attention, of diffusers, whose projections are copied.
        output: weight and bias of its output projection, copied, too; a missing bias is zero.
        time_dim: width of the embedded model time.
        width: of the attention, a multiple of its head size, with fresh projections; 0 = the layer's own.
    """

    def __init__(self, attention: Any, output: tuple[Tensor, Tensor | None], time_dim: int, width: int = 0) -> None:
        super().__init__()
        dim, head = attention.to_q.in_features, attention.to_q.out_features // attention.heads
        if width % head:
            raise ValueError(f"fca: width is {width}, expected 0 or a multiple of the head size, {head}")
        inner = width or attention.to_q.out_features
        self.head = head
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner) for _ in range(3))
        self.to_out = nn.Linear(inner, dim)
        self.norm_q, self.norm_k = (_norm_like(norm, inner, head) for norm in (attention.norm_q, attention.norm_k))
        self.modulation = nn.Linear(time_dim, 3 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        if not width:
            for name in ("to_q", "to_k", "to_v"):
                source = getattr(attention, name)
                _copy(self.get_submodule(name), source.weight, source.bias)
            for name in ("norm_q", "norm_k"):
                if (norm := getattr(attention, name)) is not None:
                    self.get_submodule(name).load_state_dict(norm.state_dict())
            _copy(self.to_out, *output)

    def forward(
        self,
        hidden: Tensor,  # [B,F,n,D]
        time: Tensor,  # [B,D] or [B*F,D]
        given: Tensor,  # [B,M,D], tokens of the clip's first frames
        text: Tensor | None,  # [B,F,q,D]
        rotate: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """What the layer's hidden states gain, [B,F,n,D]. Frame-wise keys by frames as a batch, not by a mask."""
        batch, frames = hidden.shape[:2]
        modulation = self.modulation(F.silu(time)).reshape(batch, -1, 1, 3 * hidden.shape[-1])
        scale, shift, gate = modulation.chunk(3, dim=-1)  # [B,F or 1,1,D]
        query = self._normed(self.norm_q, self.to_q(hidden * (1 + scale) + shift))  # [B,F,n,heads,d]
        query = rotate(query.flatten(1, 2)).reshape(query.shape)
        key, value = rotate(self._normed(self.norm_k, self.to_k(given))), self._heads(self.to_v(given))
        key, value = (x[:, None].expand(-1, frames, -1, -1, -1) for x in (key, value))  # [B,F,M,heads,d]
        if text is not None:
            key = torch.cat([key, self._normed(self.norm_k, self.to_k(text))], dim=2)
            value = torch.cat([value, self._heads(self.to_v(text))], dim=2)
        q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (query, key, value))  # [B*F,heads,n or M+q,d]
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2)
        return gate * self.to_out(out).unflatten(0, (batch, frames))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head))

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        """[...,D] -> [...,heads,d], normalised over all heads together (Wan) or in each (CogVideoX, HunyuanVideo)."""
        whole = isinstance(norm, nn.RMSNorm) and norm.normalized_shape != (self.head,)
        return self._heads(norm(x)) if whole else norm(self._heads(x))


def _norm_like(norm: Any, inner: int, head: int) -> nn.Module:
    """A fresh norm of queries or keys, of the kind that the layer has; over all heads or each as the layer does."""
    if norm is None:  # Latte has none
        return nn.Identity()
    size = head if len(norm.weight) == head else inner
    return nn.LayerNorm(size, norm.eps) if isinstance(norm, nn.LayerNorm) else nn.RMSNorm(size, norm.eps)


@torch.no_grad()
def _copy(linear: Any, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(torch.zeros_like(linear.bias) if bias is None else bias)


class FrameConditionAdapter(nn.Module):
    """An `FCABlock` and, with `frame_text`, a `FrameTextQFormer` for every layer of a backbone with `sites`.

    Made for a backbone, whose weights it copies; it holds no reference to it. `width`: see `FCABlock`.
    """

    _no_split_modules = ["FCABlock", "FrameTextQFormer"]  # what sharding takes as units, as in diffusers' models

    def __init__(
        self,
        backbone: Backbone,
        *,
        frame_text: bool = True,
        init_features: InitFeatures = "layers",
        width: int = 0,
        queries: int = 8,
        text_width: int = 768,
        text_heads: int = 12,
        max_frames: int = 21,
    ) -> None:
        super().__init__()
        if init_features not in get_args(InitFeatures):
            raise ValueError(f"init_features is {init_features!r}; choose one of {', '.join(get_args(InitFeatures))}")
        sites = backbone.sites
        dim, layers = sites.width, sites.attentions
        self.init_features = init_features
        self.blocks = nn.ModuleList(
            [FCABlock(layer, sites.output(i), sites.time_width, width) for i, layer in enumerate(layers)]
        )
        self.texts = nn.ModuleList(
            FrameTextQFormer(
                sites.text_width, dim, dim, width=text_width, heads=text_heads, queries=queries, frames=max_frames
            )
            for _ in (layers if frame_text else ())
        )

    def prepare(self, backbone: Backbone, given: Tensor, text: TextContext | Tensor, frames: int) -> LayerBranch:
        """The branch for a clip of `frames` latent frames that begins with `given` [B,C,F_c,H,W], clean latents.

        What it adds depends on the noise only through the queries: x_init and the frame-wise text are made here, once.
        Raises ValueError for a clip whose frames do not all read one text.
        """
        context = backbone.read_text(text, frames)
        if context.embeddings.shape[1] != 1:
            raise ValueError(f"fca reads one text per clip, got {context.embeddings.shape[1]}")
        features = given_features(backbone, given, context, self.init_features)
        words = context.embeddings[:, 0]
        valid = _valid(context)
        texts = [module(words, valid, image, frames) for module, image in zip(self.texts, features, strict=False)] or [
            None
        ] * len(features)

        def branch(layer: int, hidden: Tensor, time: Tensor, rotate: Callable[[Tensor], Tensor]) -> Tensor:
            return self.blocks[layer](hidden, time, features[layer], texts[layer], rotate)

        return branch


@torch.no_grad()
def given_features(backbone: Backbone, given: Tensor, text: TextContext, kind: InitFeatures) -> list[Tensor]:
    """The given frames as every layer of the frozen model reads them, [B,F_c*n,D] each; "patches": as its first tokens.

    One pass over the given frames alone, at level 0 and with their text.
    """
    batch, _, frames = given.shape[:3]
    found: list[Tensor] = []

    def collect(layer: int, hidden: Tensor, time: Tensor, rotate: Callable[[Tensor], Tensor]) -> None:
        found.append(hidden.flatten(1, 2))

    alone = TextContext(text.embeddings, text.frame_text[:frames], text.lengths, text.pooled)
    patches: list[Tensor] = []
    embedding = backbone.get_submodule(backbone.sites.patch_embedding)
    hook = embedding.register_forward_hook(lambda module, args, output: patches.append(output))
    try:
        backbone(
            given.to(text.embeddings.dtype),
            torch.zeros(batch, device=given.device),
            alone,
            layout=ClipLayout((Segment("condition", frames),)),
            branch=collect,
        )
    finally:
        hook.remove()
    if kind == "patches":
        first = patches[0].flatten(2).transpose(1, 2) if patches[0].ndim == 5 else patches[0]  # [B,D,F,h,w] or tokens
        tokens = first.reshape(batch, -1, first.shape[-1])[:, -found[0].shape[1] :]  # [B,F_c*n,D], without text
        return [F.layer_norm(tokens, tokens.shape[-1:])] * len(found)
    return found


def _valid(text: TextContext) -> Tensor:
    """Which text tokens are no padding, bool [B,L]: the first `lengths`, else those that are not zero (Wan)."""
    if text.lengths is None:
        return (text.embeddings[:, 0] != 0).any(dim=-1)
    places = torch.arange(text.embeddings.shape[2])
    return (places < text.lengths[:, :1]).to(text.embeddings.device)
