"""CogVideoX written out slowly: every token has its own time, place and mask row. Reads a diffusers model's weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel

Place = tuple[float, float, float] | None


def text_copies(shots: list[int], reads: list[int], rule: str) -> list[tuple[int, set[int]]]:
    """Every text copy as (text group, frames that read it), by the definition: one copy per unit that reads it."""
    ends = [sum(shots[: i + 1]) for i in range(len(shots))]
    units: list[list[int]] = {
        "full": [list(range(len(reads)))],
        "group_causal": [list(range(end - size, end)) for end, size in zip(ends, shots, strict=True)],
        "same_frame": [[f] for f in range(len(reads))],
    }[rule]
    copies = []
    for unit in units:
        seen: list[int] = []
        for frame in unit:
            if reads[frame] not in seen:
                seen.append(reads[frame])
                copies.append((reads[frame], {f for f in unit if reads[f] == reads[frame]}))
    return copies


def token_mask(
    shots: list[int], reads: list[int], rule: str, texts_have_positions: bool, text_tokens: int, frame_tokens: int
) -> torch.Tensor:
    """May q attend to k? One entry of a list per token: (is text, number of its copy or frame)."""
    copies = text_copies(shots, reads, rule)
    shot_of = [s for s, size in enumerate(shots) for _ in range(size)]
    tokens = [("text", c) for c in range(len(copies)) for _ in range(text_tokens)]
    tokens += [("frame", f) for f in range(len(reads)) for _ in range(frame_tokens)]
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)

    def frames_of(token) -> set[int]:
        return copies[token[1]][1] if token[0] == "text" else {token[1]}

    def sees(a: int, b: int) -> bool:  # frame a, frame b
        return {"full": True, "group_causal": shot_of[b] <= shot_of[a], "same_frame": a == b}[rule]

    for i, q in enumerate(tokens):
        for j, k in enumerate(tokens):
            mask[i, j] = all(any(sees(a, b) for b in frames_of(k)) for a in frames_of(q))
            if k[0] == "text" and not texts_have_positions:
                own = q[1] if q[0] == "text" else next(c for c, (_, f) in enumerate(copies) if q[1] in f)
                mask[i, j] &= k[1] == own
    return mask


def rotate(x: torch.Tensor, places: list[Place]) -> torch.Tensor:
    """x [B,heads,S,d]: neighbouring pairs turned as complex numbers; a quarter of d for t, 3/8 each for y and x."""
    out = x.clone()
    dims = (x.shape[-1] // 4, x.shape[-1] // 8 * 3, x.shape[-1] // 8 * 3)
    for s, place in enumerate(places):
        if place is None:
            continue
        angles = [p * 10000.0 ** (-2 * i / dim) for p, dim in zip(place, dims, strict=True) for i in range(dim // 2)]
        turn = torch.exp(1j * torch.tensor(angles, dtype=torch.float64))
        pairs = torch.complex(x[:, :, s, 0::2], x[:, :, s, 1::2]) * turn
        out[:, :, s, 0::2], out[:, :, s, 1::2] = pairs.real, pairs.imag
    return out


def forward(
    model: CogVideoXTransformer3DModel,
    x: torch.Tensor,  # [B,C,F,H,W], float64
    texts: list[torch.Tensor],  # one [B,L,D] per text copy
    times: torch.Tensor,  # [B,S]: model time per token, texts first
    mask: torch.Tensor,  # [S,S] bool
    places: list[Place] | None = None,  # per token, where the model is rotary
    added: torch.Tensor | None = None,  # [N,D] to add to the video tokens, where it is not
    branches: list[torch.Tensor] | None = None,  # [B,N,D] per layer, added to the video tokens beside its attention
    seen: list[torch.Tensor] | None = None,  # gets what each layer's attention reads of the video, [B,N,D]
    mean_of: list[set[int]] | None = None,  # per text copy: its tokens' time embedding is the mean of these frames'
) -> torch.Tensor:
    pair = model.config.patch_size_t or 1
    batch, channels, frames, height, width = x.shape
    embed = model.patch_embed
    text = torch.cat([embed.text_proj(t) for t in texts], dim=1)
    tokens = []
    for f in range(0, frames, pair):
        for row in range(0, height, 2):
            for column in range(0, width, 2):
                patch = x[:, :, f : f + pair, row : row + 2, column : column + 2]  # [B,C,pair,2,2]
                if pair == 1:
                    tokens.append(F.conv2d(patch[:, :, 0], embed.proj.weight, embed.proj.bias).flatten(1))
                else:
                    tokens.append(embed.proj(patch.flatten(1)))
    video = torch.stack(tokens, dim=1)
    if added is not None:
        video = video + added
    hidden, split = torch.cat([text, video], dim=1), text.shape[1]
    is_text = (torch.arange(hidden.shape[1]) < split)[:, None]
    rows = [model.time_embedding(model.time_proj(times[:, s]).to(hidden)) for s in range(hidden.shape[1])]
    for copy, read_by in enumerate(mean_of or []):
        length, frame_tokens = split // len(texts), (len(rows) - split) // (frames // pair)
        total = sum(rows[split + f * frame_tokens] for f in read_by)
        rows[copy * length : (copy + 1) * length] = [total / len(read_by)] * length
    emb = F.silu(torch.stack(rows, dim=1))  # [B,S,E]

    def modulate(norm, hidden):
        parts = norm.linear(emb).chunk(6, dim=-1)
        shift, scale, gate = (torch.where(is_text, parts[i + 3], parts[i]) for i in range(3))
        return norm.norm(hidden) * (1 + scale) + shift, gate

    for layer, block in enumerate(model.transformer_blocks):
        normed, gate = modulate(block.norm1, hidden)
        if seen is not None:
            seen.append(normed[:, split:])
        attn = block.attn1
        q, k, v = (f(normed).unflatten(2, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if places is not None:
            q, k = rotate(q, places), rotate(k, places)
        logits = (q @ k.transpose(2, 3)) / q.shape[-1] ** 0.5
        out = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        hidden = hidden + gate * attn.to_out[0](out.transpose(1, 2).flatten(2))
        if branches is not None:
            hidden = torch.cat([hidden[:, :split], hidden[:, split:] + branches[layer]], dim=1)
        normed, gate = modulate(block.norm2, hidden)
        hidden = hidden + gate * block.ff(normed)

    shift, scale = model.norm_out.linear(emb[:, split:]).chunk(2, dim=-1)
    video = model.norm_out.norm(model.norm_final(hidden[:, split:])) * (1 + scale) + shift
    patches = iter(model.proj_out(video).unbind(1))
    result = torch.zeros_like(x)
    for f in range(0, frames, pair):
        for row in range(0, height, 2):
            for column in range(0, width, 2):
                patch = next(patches).unflatten(1, (channels, pair, 2, 2))
                result[:, :, f : f + pair, row : row + 2, column : column + 2] = patch
    return result
