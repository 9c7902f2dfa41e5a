"""AID's condition: what an instruction, the states predicted from it and the given frames say of every frame.

The Dual Query Transformer of AID (2406.06465, section 3.3) has two branches. The upper one (multimodal) lets the words
of the instruction read the given frames; the lower one (decomposed) has learned queries for every frame, which read the
instruction and then the states. Their outputs together, MCondition, are what the backbone reads in cross-attention.
The paper gives the attentions; blocks with norms first, residuals and a feed-forward layer are this project's choice.

B batch, F latent frames, S states, L tokens of a text, V image tokens, Q query tokens per frame, W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COORDINATES = 24  # features of an image token's place: 3 axes, 4 frequencies, sine and cosine


class DualQueryTransformer(nn.Module):
    """Both branches start at zero (their last layer is zero), so that what they are added to is unchanged.

    Args:
        text_dim: width of the text embeddings that are read.
        image_dim: width of the image tokens.
        width: inner width, a multiple of `heads`.
        max_frames: most latent frames of a clip; each has queries of its own.
        max_states: most states of a clip; each has an embedding of its own, which tells their order.
        query_tokens: Q, queries per frame.
        multimodal, decomposed: which branches there are.
        out_dim: width of what is made; None: that of the text embeddings.
    """

    def __init__(
        self,
        text_dim: int,
        image_dim: int,
        width: int,
        *,
        max_frames: int,
        max_states: int,
        query_tokens: int = 8,
        blocks: int = 2,
        heads: int = 8,
        multimodal: bool = True,
        decomposed: bool = True,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        if not (multimodal or decomposed):
            raise ValueError("multimodal and decomposed are both off: there is nothing to build")
        self.max_frames, self.max_states, out_dim = max_frames, max_states, out_dim or text_dim
        self.read_text = nn.Linear(text_dim, width)
        self.multimodal = _Branch(width, out_dim, heads, blocks, ("own", "image")) if multimodal else None
        self.read_image = nn.Linear(image_dim, width) if multimodal else None
        self.decomposed = _Branch(width, out_dim, heads, blocks, ("instruction", "states")) if decomposed else None
        if decomposed:
            self.queries = nn.Parameter(torch.randn(max_frames, query_tokens, width) / math.sqrt(width))
            self.frame_position = nn.Parameter(0.02 * torch.randn(max_frames, 1, width))
            self.state_position = nn.Parameter(0.02 * torch.randn(max_states, 1, width))

    def forward(
        self,
        instruction: Tensor,  # [B,L,text_dim]; a token of zeros is padding, as in Wan's contexts
        states: Tensor,  # [B,S,L',text_dim], in order of time; padded alike
        image: Tensor,  # [B,V,image_dim]; zeros for no image
        frames: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """E_m [B,L,out_dim], zero on padding, and Q [B,F,Q,out_dim]; None for a branch that is not there.

        Raises ValueError for more frames or states than there are queries and embeddings for.
        """
        said, said_mask = self.read_text(instruction), key_mask(instruction)
        upper = lower = None
        if self.multimodal is not None and self.read_image is not None:
            sources = {"own": (None, said_mask), "image": (self.read_image(image), None)}
            upper = self.multimodal(said, sources) * is_token(instruction)[..., None]
        if self.decomposed is not None:
            if frames > self.max_frames or states.shape[1] > self.max_states:
                raise ValueError(
                    f"a clip of {frames} latent frames with {states.shape[1]} states; this model was made for at most "
                    f"max_frames={self.max_frames} and num_states={self.max_states}"
                )
            placed = self.read_text(states) + self.state_position[: states.shape[1]]
            sources = {
                "instruction": (said, said_mask),
                "states": (placed.flatten(1, 2), key_mask(states.flatten(1, 2))),
            }
            queries = (self.queries[:frames] + self.frame_position[:frames]).flatten(0, 1)  # [F*Q,W]
            lower = self.decomposed(queries.expand(len(said), -1, -1), sources).unflatten(1, (frames, -1))
        return upper, lower


class _Branch(nn.Module):
    """Blocks of attention to each source in turn and a feed-forward layer; then norm and a linear layer of zeros."""

    def __init__(self, width: int, out_dim: int, heads: int, blocks: int, sources: tuple[str, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(width, heads, sources) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.out = zero_linear(width, out_dim)

    def forward(self, x: Tensor, sources: dict[str, tuple[Tensor | None, Tensor | None]]) -> Tensor:
        for block in self.blocks:
            x = block(x, sources)
        return self.out(self.norm(x))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, sources: tuple[str, ...]) -> None:
        super().__init__()
        self.attend = nn.ModuleDict({name: _Attention(width, heads) for name in sources})
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, sources: dict[str, tuple[Tensor | None, Tensor | None]]) -> Tensor:
        for name, attention in self.attend.items():
            x = x + attention(x, *sources[name])
        return x + self.feed_forward(x)


class _Attention(nn.Module):
    """Multi-head attention of x to a context, or to itself, whatever is padding left out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.norm(x)
        source = x if context is None else context
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (
            self.to_q(x), self.to_k(source), self.to_v(source)
        ))  # fmt: skip
        out = F.scaled_dot_product_attention(q, k, v, mask)
        return self.to_out(out.transpose(1, 2).flatten(2))


def zero_linear(width: int, out_dim: int) -> nn.Linear:
    """A linear layer that starts as zero."""
    linear = nn.Linear(width, out_dim)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def is_token(text: Tensor) -> Tensor:
    """Bool [...,L] of embeddings [...,L,D]: false where a token is padding, that is all zeros."""
    return (text != 0).any(dim=-1)


def key_mask(text: Tensor) -> Tensor:
    """Bool [B,1,1,L], true where a token may be read; all of a text that is nothing but padding, as softmax must."""
    valid = is_token(text)
    return (valid | ~valid.any(dim=1, keepdim=True))[:, None, None]


def latent_tokens(given: Tensor, patch: int) -> Tensor:
    """Image tokens [B,K*(H/p)*(W/p), C*p*p + COORDINATES] of given latents [B,C+1,K,H,W].

    The last channel is 1 where something is given and 0 where nothing is: a frame that is dropped becomes tokens of
    zeros. To the latents of a patch come sines and cosines of where it is, because attention alone could not tell.
    """
    latents, mask = given[:, :-1], given[:, -1:]
    batch, _, frames, height, width = latents.shape
    rows, columns = height // patch, width // patch
    split = latents.reshape(batch, -1, frames, rows, patch, columns, patch)
    tokens = split.permute(0, 2, 3, 5, 1, 4, 6).flatten(4)  # [B,K,h,w,C*p*p]
    axes = [torch.arange(frames) / 8, torch.arange(rows) / rows, torch.arange(columns) / columns]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).to(tokens.device)  # [K,h,w,3]
    angles = grid[..., None] * torch.pi * 2.0 ** torch.arange(4, device=grid.device, dtype=grid.dtype)
    places = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(3).to(tokens)  # [K,h,w,COORDINATES]
    tokens = torch.cat([tokens, places.expand(batch, -1, -1, -1, -1)], dim=-1)
    known = mask[:, 0, :, ::patch, ::patch, None]  # [B,K,h,w,1]
    return (tokens * known).flatten(1, 3)
