"""The KV cache of the Wan backbone against one masked forward of the unmodified diffusers model over everything.

n = 4 tokens per latent frame: latents are 4 x 4, patches 2 x 2. Shots of 3, 1 and 2 latent frames.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from models.attention import block_mask, group_ids, grouped_attention, sdpa
from models.backbones.wan import TextContext, WanBackbone
from models.kv_cache import KVCache
from models.layout import shots_layout
from models.positions import position_ids, rope_tables
from tests.models.test_wan import FixedRope, MaskedProcessor, inputs, make

B, N_PER_FRAME = 2, 4
SIZES = [3, 1, 2]
CAUSAL = {"position_mode": "time_gap", "position_gap": 3, "attention_rule": "group_causal"}


def frames_of(shot: int, sizes: list[int] = SIZES) -> slice:
    return slice(sum(sizes[:shot]), sum(sizes[: shot + 1]))


def scene(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x [B,4,6,4,4]; a level per shot, as [B,6]; a text per shot."""
    x, levels, text = inputs(dtype)
    return x, levels[:, group_ids(shots_layout(SIZES))], text


def run(backbone: WanBackbone, clip, shots: list[int], cache: KVCache | None = None, append: bool = False, **options):
    """A forward over some shots of the clip, one after another."""
    x, levels, text = clip
    frames = [f for shot in shots for f in range(*frames_of(shot).indices(6))]
    layout = shots_layout([SIZES[shot] for shot in shots])
    context = TextContext(text[:, shots], layout.text_ids)
    options = CAUSAL | options
    return backbone(x[:, :, frames], levels[:, frames], context, layout=layout, cache=cache, append=append, **options)


def masked(plain, clip, shots: list[int], mode: str = "time_gap") -> Tensor:
    """The diffusers model over some shots at once, with a dense mask and one text per token."""
    x, levels, text = clip
    plain = copy.deepcopy(plain)
    sizes = [SIZES[shot] for shot in shots]
    frames = [f for shot in shots for f in range(*frames_of(shot).indices(6))]
    layout = shots_layout(sizes)
    plain.rope = FixedRope(*rope_tables(position_ids(layout, (2, 2), mode, gap=3), (4, 4, 4)))
    mask = block_mask(group_ids(layout).repeat_interleave(N_PER_FRAME), "group_causal")
    reads = group_ids(layout).repeat_interleave(N_PER_FRAME)[:, None] == torch.arange(len(shots))
    for block in plain.blocks:
        block.attn1.set_processor(MaskedProcessor(mask))
        block.attn2.set_processor(MaskedProcessor(reads.repeat_interleave(text.shape[2], dim=1)))
    times = (1000 * levels[:, frames]).repeat_interleave(N_PER_FRAME, dim=1)
    return plain(x[:, :, frames], times, text[:, shots].flatten(1, 2)).sample


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("mode", ["contiguous", "time_gap", "diagonal"])
@pytest.mark.parametrize("one_by_one", [True, False])
@torch.no_grad()
def test_a_cached_pass_is_one_masked_forward_over_history_and_shot(dtype, tolerance, mode, one_by_one):
    backbone, plain = make(dtype)
    clip, cache = scene(dtype), KVCache()
    expected = masked(plain, clip, [0, 1, 2], mode)
    for shots in [[0], [1]] if one_by_one else [[0, 1]]:
        out = run(backbone, clip, shots, cache, append=True, position_mode=mode)
        seen = slice(frames_of(shots[0]).start, frames_of(shots[-1]).stop)
        assert torch.allclose(out, expected[:, :, seen], rtol=0, atol=tolerance), "history is what it is in the forward"
    assert cache.sizes == (3, 1)
    out = run(backbone, clip, [2], cache, position_mode=mode)
    assert torch.allclose(out, expected[:, :, frames_of(2)], rtol=0, atol=tolerance)
    assert cache.sizes == (3, 1), "a pass that is not appended leaves the cache alone"


@torch.no_grad()
def test_an_empty_cache_is_no_cache():
    backbone, _ = make()
    clip = scene()
    assert torch.equal(run(backbone, clip, [0, 1], KVCache()), run(backbone, clip, [0, 1]))


@torch.no_grad()
def test_history_never_hears_of_the_present():
    """Nor does it change under it: what is kept is bit for bit the same whatever is made behind it."""
    backbone, _ = make(torch.float32)
    clip, cache = scene(torch.float32), KVCache()
    run(backbone, clip, [0, 1], cache, append=True)
    before = [(k.clone(), v.clone()) for k, v in cache.layers]
    out = run(backbone, clip, [2], cache)
    x, levels, text = clip
    wild = (x.index_add(2, torch.arange(4, 6), torch.full((B, 4, 2, 4, 4), 9.0)), levels * 0.5, text + 3.0)
    assert not torch.equal(run(backbone, wild, [2], cache), out)
    for (k, v), (kept_k, kept_v) in zip(before, cache.layers, strict=True):
        assert torch.equal(k, kept_k) and torch.equal(v, kept_v)
    assert torch.equal(run(backbone, clip, [2], cache), out)
    # while the present hears of every part of its history
    for shot in (0, 1):
        other = x.clone()
        other[:, :, frames_of(shot)] += 1.0
        changed = KVCache()
        run(backbone, (other, levels, text), [0, 1], changed, append=True)
        assert (run(backbone, clip, [2], changed) - out).abs().amax(dim=(0, 1, 3, 4)).gt(1e-5).all()


@torch.no_grad()
def test_history_counts_at_the_level_of_its_pass():
    """Keys of another level (the last denoising step's, say) are another history: LCT needs a pass at t_c."""
    backbone, plain = make()
    x, levels, text = scene()
    outs = []
    for level in (0.02, 0.3):
        levels = levels.clone()
        levels[:, :4] = level
        cache = KVCache()
        run(backbone, (x, levels, text), [0, 1], cache, append=True)
        outs.append(run(backbone, (x, levels, text), [2], cache))
        expected = masked(plain, (x, levels, text), [0, 1, 2])[:, :, frames_of(2)]
        assert torch.allclose(outs[-1], expected, rtol=0, atol=1e-12)
    assert (outs[0] - outs[1]).abs().max() > 1e-4


@torch.no_grad()
def test_another_choice_of_history_is_prefilled_anew():
    backbone, plain = make()
    clip, cache = scene(), KVCache()
    run(backbone, clip, [0, 1], cache, append=True)
    stale = [(k[:, 3 * N_PER_FRAME :], v[:, 3 * N_PER_FRAME :]) for k, v in cache.layers]
    expected = masked(plain, clip, [1, 2])[:, :, 1:]
    cache.reset()
    assert cache.sizes == () and cache.layers == ()
    run(backbone, clip, [1], cache, append=True)
    assert torch.allclose(run(backbone, clip, [2], cache), expected, rtol=0, atol=1e-12)
    # keys of shot 1 cut out of the old cache were made behind shot 0, and rotated to another place
    cut = KVCache()
    cut.append(stale, (1,), ("time_gap", 3, (2, 2)))
    assert (run(backbone, clip, [2], cut) - expected).abs().max() > 1e-4
    # the order is part of the history, too
    swapped = KVCache()
    run(backbone, clip, [1, 0], swapped, append=True)
    expected = masked(plain, clip, [1, 0, 2])[:, :, 4:]
    assert torch.allclose(run(backbone, clip, [2], swapped), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_one_cache_serves_all_guidance_branches():
    backbone, _ = make()
    (x, levels, text), cache = scene(), KVCache()
    run(backbone, (x, levels, text), [0, 1], cache, append=True)
    null = text + 1.0
    branches = run(backbone, tuple(torch.cat([a, b]) for a, b in ((x, x), (levels, levels), (text, null))), [2], cache)
    for part, own in zip(branches.chunk(2), (text, null), strict=True):
        assert torch.allclose(part, run(backbone, (x, levels, own), [2], cache), rtol=0, atol=1e-12)
    alone = KVCache()
    run(backbone, (x[1:], levels[1:], text[1:]), [0, 1], alone, append=True)
    sample = run(backbone, (x[1:], levels[1:], text[1:]), [2], alone)
    assert torch.allclose(branches[1:2], sample, rtol=0, atol=1e-12), "samples keep to their own history"


@torch.no_grad()
def test_a_pass_that_fails_leaves_the_cache_whole():
    backbone, _ = make()
    clip, cache = scene(), KVCache()
    run(backbone, clip, [0], cache, append=True)
    expected = run(backbone, clip, [2], cache)

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = backbone.transformer.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        run(backbone, clip, [1], cache, append=True)
    hook.remove()
    assert cache.sizes == (3,) and torch.equal(run(backbone, clip, [2], cache), expected)


@torch.no_grad()
def test_what_does_not_fit_the_cache_is_refused():
    backbone, _ = make()
    (x, levels, text), cache = clip, _ = scene(), KVCache()
    run(backbone, clip, [0], cache, append=True)
    one = x[:1], levels[:1], text[:1]
    for message, call in {
        "attention_rule is 'full' with a cache": lambda: run(backbone, clip, [1], cache, attention_rule="full"),
        "append=True without a cache": lambda: run(backbone, clip, [1], append=True),
        r"holds shots at .*'time_gap', 3, \(2, 2\).*this pass has .*'diagonal'": lambda: run(
            backbone, clip, [1], cache, position_mode="diagonal"
        ),
        "this pass has .*7": lambda: run(backbone, clip, [1], cache, position_gap=7),
        "the cache holds 2 samples, a batch of 1 is no multiple": lambda: run(backbone, one, [1], cache),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    more = tuple(torch.cat([a, a]) for a in clip)
    with pytest.raises(ValueError, match="the cache holds 2 samples, the shots to append have 4"):
        run(backbone, more, [1], cache, append=True)
    assert cache.sizes == (3,)
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 6, 2, 8)
    with pytest.raises(ValueError, match="'full' with 2 tokens of earlier groups"):
        grouped_attention(q, k, k, (4,), "full")


def test_earlier_groups_come_first_in_the_keys():
    q, k, v = (torch.randn(2, 12, 3, 8, dtype=torch.float64) for _ in range(3))
    groups = torch.tensor([0] * 4 + [1] * 2 + [2] * 6)
    whole = sdpa(q, k, v, block_mask(groups, "group_causal"))
    assert torch.allclose(grouped_attention(q[:, 4:], k, v, (2, 6), "group_causal"), whole[:, 4:], rtol=0, atol=1e-12)
