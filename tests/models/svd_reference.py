"""SVD's U-Net written out, one frame and one position at a time, and the tiny models and inputs to compare on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNetSpatioTemporalConditionModel
from torch import Tensor, nn

from models.backbones.svd import ImageCondition, SVDBackbone
from models.layout import shots_layout
from models.tiny_svd import tiny_svd
from tests.draw import randn

B, FRAMES, L, D = 2, 5, 3, 16
SCENE = shots_layout([2, 1, 2])
SIZE = (4, 6)


class Process:
    """Stands in for EDM: ln(sigma) / 4, sigma from 0.05 to 3.05."""

    def to_model_time(self, level: Tensor) -> Tensor:
        return 0.25 * (0.05 + 3 * level.float()).log()


def make(dtype: torch.dtype = torch.float64, **changes) -> tuple[SVDBackbone, UNetSpatioTemporalConditionModel]:
    """A backbone, and an untouched diffusers model with the same weights."""
    plain = nn.Module.to(tiny_svd(3, **changes), dtype).eval()
    return SVDBackbone(copy.deepcopy(plain), Process()).eval(), plain


def inputs(dtype: torch.dtype = torch.float64, groups: int = 3, batch: int = B, size: tuple[int, int] = SIZE):
    levels = torch.rand(batch, FRAMES, generator=torch.Generator().manual_seed(5))
    image = ImageCondition(randn(batch, 4, 1, *size, seed=4, dtype=dtype))
    x, text = randn(batch, 4, FRAMES, *size, seed=1, dtype=dtype), randn(batch, groups, L, D, seed=2, dtype=dtype)
    return x, levels, text, image


def run_plain(plain, x: Tensor, level: Tensor, text: Tensor, image: ImageCondition) -> Tensor:
    """As StableVideoDiffusionPipeline calls it: frames before channels, the image's latents after the noisy ones."""
    sample = torch.cat([x.transpose(1, 2), image.latents.repeat(1, 1, x.shape[2], 1, 1).transpose(1, 2)], dim=2)
    ids = torch.tensor([[6.0, 127.0, 0.02]]).repeat(len(x), 1)
    return plain(sample, Process().to_model_time(level), text, added_time_ids=ids).sample.transpose(1, 2)


# --- the U-Net, one frame and one position at a time ------------------------------------------------------------------


def attention(module, hidden: Tensor, context: Tensor) -> Tensor:
    """[N,D] reads [M,D]; softmax written out."""
    q, k, v = module.to_q(hidden), module.to_k(context), module.to_v(context)
    q, k, v = (t.reshape(len(t), module.heads, -1).permute(1, 0, 2) for t in (q, k, v))  # [heads,N,d]
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
    return module.to_out[0]((weights @ v).permute(1, 0, 2).flatten(1))


def mixed(mixer, spatial: Tensor, temporal: Tensor, image_only: bool) -> Tensor:
    share = torch.sigmoid(mixer.mix_factor)
    return spatial if image_only else share * spatial + (1 - share) * temporal


def naive_resnet(block, x: Tensor, times: Tensor, image_only: bool) -> Tensor:
    """x [F,C,H,W], times [F,E]: frame f is told times[f] in its spatial and in its temporal half."""

    def norm(module, z: Tensor) -> Tensor:  # over all frames
        return F.silu(
            F.group_norm(z.transpose(0, 1)[None], 32, module.weight, module.bias, module.eps)[0].transpose(0, 1)
        )

    def conv(module, z: Tensor) -> Tensor:
        frames = []
        for f in range(len(z)):
            taps = [k for k in range(3) if 0 <= f + k - 1 < len(z)]
            frames.append(sum(torch.einsum("oi,ihw->ohw", module.weight[:, :, k, 0, 0], z[f + k - 1]) for k in taps))
        return torch.stack(frames) + module.bias[:, None, None]

    spatial = torch.cat([block.spatial_res_block(x[f, None], times[f, None]) for f in range(len(x))])
    half = block.temporal_res_block
    hidden = conv(half.conv1, norm(half.norm1, spatial))
    hidden = hidden + torch.stack([half.time_emb_proj(F.silu(time)) for time in times])[:, :, None, None]
    temporal = spatial + conv(half.conv2, norm(half.norm2, hidden))
    return mixed(block.time_mixer, spatial, temporal, image_only)


def spatial_adapter(module, hidden: Tensor) -> Tensor:
    """[n,D] of one frame."""
    return module.up(F.gelu(module.down(hidden)))


def short_term_adapter(module, column: Tensor) -> Tensor:
    """[F,D] of one place: a depthwise convolution over a frame and its neighbours, tap by tap."""
    hidden, weight = module.down(column), module.conv.weight[:, 0, :, 0, 0]  # [F,d], [d,3]
    frames = []
    for f in range(len(hidden)):
        taps = [k for k in range(3) if 0 <= f + k - 1 < len(hidden)]
        frames.append(sum(weight[:, k] * hidden[f + k - 1] for k in taps) + module.conv.bias)
    return module.up(torch.stack(frames))


def long_term_adapter(module, column: Tensor) -> Tensor:
    """[F,D] of one place: self-attention over the frames, softmax written out."""
    hidden = module.down(column) + module.position[: len(column)]
    q, k, v = (t.reshape(len(t), module.heads, -1).permute(1, 0, 2) for t in module.to_qkv(hidden).chunk(3, dim=1))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
    return module.up((weights @ v).permute(1, 0, 2).flatten(1))


def naive_transformer(
    module, x: Tensor, contexts: Tensor, temporal_contexts: Tensor, image_only: bool, adapters=None
) -> Tensor:
    """x [F,C,H,W], contexts [F,L,D]: frame f reads its own, in space and in time. `adapters` are AID's of the place."""
    frames, _, height, width = x.shape
    [block], [temporal] = module.transformer_blocks, module.temporal_transformer_blocks
    spatial, moved = [], []
    for f in range(frames):
        hidden = module.proj_in(module.norm(x[f, None])[0].flatten(1).T)  # [n,D]
        normed = block.norm1(hidden)
        hidden = hidden + attention(block.attn1, normed, normed)
        if adapters is not None:
            hidden = hidden + spatial_adapter(adapters[0].spatial, normed)
        hidden = hidden + attention(block.attn2, block.norm2(hidden), contexts[f])
        hidden = hidden + block.ff(block.norm3(hidden))
        spatial.append(hidden)
        moved.append(hidden + module.time_pos_embed(module.time_proj(torch.tensor([f])).to(x.dtype)))
    columns = []
    for hidden in torch.stack(moved, dim=1):  # [F,D]
        hidden = hidden + temporal.ff_in(temporal.norm_in(hidden))
        normed = temporal.norm1(hidden)
        hidden = hidden + attention(temporal.attn1, normed, normed)
        if adapters is not None:
            short_term, long_term = adapters[1].short_term, adapters[1].long_term
            hidden = hidden + short_term_adapter(short_term, normed) + long_term_adapter(long_term, normed)
        normed = temporal.norm2(hidden)
        rows = [attention(temporal.attn2, normed[f, None], temporal_contexts[f]) for f in range(frames)]
        hidden = hidden + torch.cat(rows)
        columns.append(hidden + temporal.ff(temporal.norm3(hidden)))
    hidden = mixed(module.time_mixer, torch.stack(spatial), torch.stack(columns, dim=1), image_only)
    return x + module.proj_out(hidden).mT.reshape(x.shape)


def naive_unet(
    plain: UNetSpatioTemporalConditionModel,
    x: Tensor,  # [B,C,F,H,W]
    levels: Tensor,  # [B,F]
    contexts: Tensor,  # [B,F,L,D]
    image: ImageCondition,
    temporal_contexts: Tensor | None = None,  # [B,F,L,D]
    image_only: bool = False,
    adapters: Sequence[Any] = (),  # AID's, of every place with attention in the order of computation
    process: Any = None,
) -> Tensor:
    samples, process = [], process or Process()
    for b in range(len(x)):
        context = contexts[b]
        temporal = context if temporal_contexts is None else temporal_contexts[b]
        numbers = torch.tensor([image.fps - 1, image.motion_bucket, image.noise_aug])
        ids = plain.add_time_proj(numbers).flatten().to(x.dtype)
        times = torch.stack([
            plain.time_embedding(plain.time_proj(process.to_model_time(level[None])).to(x.dtype))[0]
            + plain.add_embedding(ids)
            for level in levels[b]
        ])  # fmt: skip

        beside = iter(adapters)

        def transform(module, h: Tensor) -> Tensor:
            return naive_transformer(module, h, context, temporal, image_only, next(beside, None))  # noqa: B023

        def through(block, i: int, h: Tensor) -> Tensor:
            h = naive_resnet(block.resnets[i], h, times, image_only)  # noqa: B023
            return transform(block.attentions[i], h) if hasattr(block, "attentions") else h  # noqa: B023

        latents = image.latents[b].expand(-1, x.shape[2], -1, -1)
        h = torch.cat([plain.conv_in(torch.cat([x[b, :, f], latents[:, f]])[None]) for f in range(x.shape[2])])
        skips = [h]
        for block in plain.down_blocks:
            for i in range(len(block.resnets)):
                h = through(block, i, h)
                skips.append(h)
            for sampler in block.downsamplers or ():
                h = sampler(h)
                skips.append(h)
        h = naive_resnet(plain.mid_block.resnets[0], h, times, image_only)
        h = transform(plain.mid_block.attentions[0], h)
        h = naive_resnet(plain.mid_block.resnets[1], h, times, image_only)
        for block in plain.up_blocks:
            for i in range(len(block.resnets)):
                h = through(block, i, torch.cat([h, skips.pop()], dim=1))
            for sampler in block.upsamplers or ():
                h = sampler(h, skips[-1].shape[2:])
        out = torch.cat([plain.conv_out(F.silu(plain.conv_norm_out(frame[None]))) for frame in h])
        samples.append(out.transpose(0, 1))
    return torch.stack(samples)
