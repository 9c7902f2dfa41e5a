"""HunyuanVideo written out from its weights for one sample: every token has a modulation and a set of keys of its own.

Slow and plain on purpose, and independent of the diffusers classes and of ours: no padding, no rows, a dense mask.
M tokens in one list (those of all texts, then those of all frames), D width, d width of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Text:
    tokens: torch.Tensor  # [L,text width], valid ones only
    pooled: torch.Tensor  # [P]
    level: float
    mean_of: list[int] | None = None  # the frames whose conditioning vectors its own is the mean of


class Reference:
    def __init__(self, state: dict[str, torch.Tensor], heads: int, axes: tuple[int, ...], guidance: float | None):
        self.state, self.heads, self.axes, self.guidance = state, heads, axes, guidance

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.linear(f"{name}.linear_2", F.silu(self.linear(f"{name}.linear_1", x)))

    def feed_forward(self, name: str, x: torch.Tensor, activation) -> torch.Tensor:
        return self.linear(f"{name}.net.2", activation(self.linear(f"{name}.net.0.proj", x)))

    def conditioning(self, level: float, pooled: torch.Tensor) -> torch.Tensor:
        vector = self.mlp("time_text_embed.timestep_embedder", sinusoid(1000 * level))
        vector = vector + self.mlp("time_text_embed.text_embedder", pooled)
        if self.guidance is not None:
            vector = vector + self.mlp("time_text_embed.guidance_embedder", sinusoid(1000 * self.guidance))
        return vector

    def refine(self, text: Text) -> torch.Tensor:
        """[L,D]"""
        name = "context_embedder"
        vector = self.mlp(f"{name}.time_text_embed.timestep_embedder", sinusoid(1000 * text.level))
        vector = vector + self.mlp(f"{name}.time_text_embed.text_embedder", text.tokens.mean(dim=0))
        x = self.linear(f"{name}.proj_in", text.tokens)
        everyone = torch.ones(len(x), len(x), dtype=torch.bool)
        for block in self.blocks(f"{name}.token_refiner.refiner_blocks"):
            gates = self.linear(f"{block}.norm_out.linear", F.silu(vector)).chunk(2)
            normed = norm(x) * self.state[f"{block}.norm1.weight"] + self.state[f"{block}.norm1.bias"]
            q, k, v = (self.split(self.linear(f"{block}.attn.to_{part}", normed)) for part in "qkv")
            x = x + gates[0] * self.linear(f"{block}.attn.to_out.0", attention(q, k, v, everyone))
            normed = norm(x) * self.state[f"{block}.norm2.weight"] + self.state[f"{block}.norm2.bias"]
            x = x + gates[1] * self.feed_forward(f"{block}.ff", normed, F.silu)
        return x

    def __call__(
        self,
        x: torch.Tensor,  # [C,F,H,W]
        levels: torch.Tensor,  # [F]
        frame_pooled: torch.Tensor,  # [F,P]
        texts: list[Text],
        positions: torch.Tensor,  # [M,3]; -1 where a token has none
        mask: torch.Tensor,  # [M,M]: may the row's token see the column's?
        added: list[torch.Tensor] | None = None,  # [N,D] per layer, added to the video tokens beside its attention
        seen: list[torch.Tensor] | None = None,  # gets what each layer's attention reads of the video, [N,D]
    ) -> torch.Tensor:
        channels, frames, height, width = x.shape
        patches = x.reshape(channels, frames, height // 2, 2, width // 2, 2).permute(1, 2, 4, 0, 3, 5).flatten(3)
        kernel = self.state["x_embedder.proj.weight"].flatten(1)
        video = (patches @ kernel.T + self.state["x_embedder.proj.bias"]).flatten(0, 2)  # [N,D]
        per_frame = len(video) // frames
        of_frames = [self.conditioning(float(levels[f]), frame_pooled[f]) for f in range(frames)]
        vectors = []
        for text in texts:
            own = self.conditioning(text.level, text.pooled)
            if text.mean_of is not None:
                own = sum(of_frames[f] for f in text.mean_of) / len(text.mean_of)
            vectors += [own] * len(text.tokens)
        vectors += [of_frames[f] for f in range(frames) for _ in range(per_frame)]
        vectors = torch.stack(vectors)  # [M,D]
        tokens = torch.cat([*(self.refine(text) for text in texts), video])
        is_text = torch.arange(len(tokens)) < len(tokens) - len(video)

        beside = iter(added or [])

        def branch(normed: torch.Tensor) -> torch.Tensor:
            """What is added to all tokens, [M,D]."""
            if seen is not None:
                seen.append(normed[~is_text])
            out = torch.zeros_like(normed)
            if added is not None:
                out[~is_text] = next(beside)
            return out

        for block in self.blocks("transformer_blocks"):

            def both(own: str, added: str, values, apply, block=block) -> torch.Tensor:
                streams = apply(f"{block}.{added}", values), apply(f"{block}.{own}", values)
                return torch.where(is_text.view(-1, *[1] * (streams[0].ndim - 1)), *streams)

            shift, scale, gate, shift_ff, scale_ff, gate_ff = both(
                "norm1.linear", "norm1_context.linear", F.silu(vectors), self.linear
            ).chunk(6, dim=1)
            normed = norm(tokens) * (1 + scale) + shift
            q, k, v = (both(f"attn.to_{p}", f"attn.add_{p}_proj", normed, self.linear) for p in "qkv")
            q = both("attn.norm_q", "attn.norm_added_q", self.split(q), self.rms)
            k = both("attn.norm_k", "attn.norm_added_k", self.split(k), self.rms)
            out = attention(self.rotate(q, positions), self.rotate(k, positions), self.split(v), mask)
            tokens = tokens + gate * both("attn.to_out.0", "attn.to_add_out", out, self.linear) + branch(normed)
            normed = norm(tokens) * (1 + scale_ff) + shift_ff
            tokens = tokens + gate_ff * both(
                "ff", "ff_context", normed, lambda name, x: self.feed_forward(name, x, gelu)
            )

        for block in self.blocks("single_transformer_blocks"):
            shift, scale, gate = self.linear(f"{block}.norm.linear", F.silu(vectors)).chunk(3, dim=1)
            normed = norm(tokens) * (1 + scale) + shift
            q, k, v = (self.split(self.linear(f"{block}.attn.to_{part}", normed)) for part in "qkv")
            q, k = self.rms(f"{block}.attn.norm_q", q), self.rms(f"{block}.attn.norm_k", k)
            out = attention(self.rotate(q, positions), self.rotate(k, positions), v, mask)
            inner = gelu(self.linear(f"{block}.proj_mlp", normed))
            tokens = tokens + gate * self.linear(f"{block}.proj_out", torch.cat([out, inner], dim=1)) + branch(normed)

        scale, shift = self.linear("norm_out.linear", F.silu(vectors)).chunk(2, dim=1)
        pixels = self.linear("proj_out", norm(tokens) * (1 + scale) + shift)[~is_text]
        pixels = pixels.reshape(frames, height // 2, width // 2, -1, 2, 2)
        return pixels.permute(3, 0, 1, 4, 2, 5).reshape(-1, frames, height, width)

    def blocks(self, prefix: str) -> list[str]:
        depth = prefix.count(".") + 1
        numbers = {int(name.split(".")[depth]) for name in self.state if name.startswith(f"{prefix}.")}
        return [f"{prefix}.{i}" for i in sorted(numbers)]

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (self.heads, -1))

    def rms(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * self.state[f"{name}.weight"]

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [M,heads,d]; each pair of numbers turned by its axis' position times its frequency, theta 256."""
        angles = torch.cat(
            [
                positions[:, axis, None].double() * 256.0 ** (-torch.arange(0, dim, 2).double() / dim)
                for axis, dim in enumerate(self.axes)
            ],
            dim=1,
        )
        angles[positions[:, 0] < 0] = 0.0
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)


def sinusoid(time: float) -> torch.Tensor:
    """Cosines, then sines, of the time at 128 frequencies from 1 to nearly 1/10000; angles in float32."""
    time = torch.tensor(time, dtype=torch.float32)
    angles = time * torch.exp(torch.arange(128, dtype=torch.float32) * (-math.log(10000.0) / 128))
    return torch.cat([angles.cos(), angles.sin()]).double()


def norm(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, correction=0, keepdim=True) + 1e-6).sqrt()


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[M,heads,d] -> [M,heads*d], soft-max over the keys that the mask allows."""
    logits = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", logits.masked_fill(~mask, -torch.inf).softmax(dim=-1), v).flatten(1)
