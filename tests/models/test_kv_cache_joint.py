"""The KV cache of a backbone whose texts stand in the attention (CogVideoX 2B, 5B), against one forward over all.

That forward is compared with a reference written out in `test_cogvideox.py`. Shots of 3, 1 and 2 latent frames; LCT's
global prompt is a group of its own in front of them, one dummy token that every shot sees.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.kv_cache import KVCache
from models.layout import ClipLayout, Segment, shots_layout, with_story
from models.methods import get_method
from models.noise import base_levels
from models.text import TextContext
from models.tiny import TEXT_DIM
from sample.guidance import Guidance
from sample.rollout import RolloutShot, rollout
from sample.sampler import draw_noise
from tests.draw import randn
from tests.models.cogvideox_cases import B, L, make
from tests.models.processes import PROCESSES

SIZES = [3, 1, 2]
CASES = [("2b", "time_gap"), ("5b", "time_gap"), ("5b", "contiguous"), ("5b", "diagonal")]
CAUSAL = {"position_gap": 3, "attention_rule": "group_causal"}
STORY = 3  # its number among the texts


def scene(story: bool, dtype: torch.dtype = torch.float64) -> tuple[ClipLayout, Tensor, Tensor, Tensor]:
    """Layout, x, a level per shot [B,F], texts [B,4,L,D]; with the story's dummy frame, zeros at level 0, in front."""
    layout = shots_layout(SIZES)
    x, texts = randn(B, 4, 6, 4, 6, seed=1, dtype=dtype), randn(B, 4, L, TEXT_DIM, seed=2, dtype=dtype)
    levels = torch.rand(B, 3, generator=torch.Generator().manual_seed(5))[:, layout.text_ids]
    if not story:
        return layout, x, levels, texts
    zeros = torch.zeros_like
    return (
        with_story(layout),
        torch.cat([zeros(x[:, :, :1]), x], 2),
        torch.cat([zeros(levels[:, :1]), levels], 1),
        texts,
    )


def part(layout: ClipLayout, shots: list[int]) -> tuple[ClipLayout, list[int]]:
    """Some shots of a layout, counted with the story, as a layout of their own; and their frames."""
    frames = [f for shot in shots for f in range(layout.shot_slices[shot].start, layout.shot_slices[shot].stop)]
    return ClipLayout(tuple(layout.segments[shot] for shot in shots)), frames


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("version", "mode"), CASES)
@torch.no_grad()
def test_a_cached_pass_is_one_forward_over_history_and_shot(version, mode, dtype, tolerance):
    backbone, _ = make(version, dtype)
    layout, x, levels, texts = scene(mode == "diagonal", dtype)
    whole = backbone(x, levels, TextContext(texts, layout.text_ids), layout=layout, position_mode=mode, **CAUSAL)
    count = layout.num_shots
    for order in ([[i] for i in range(count)], [list(range(count - 1)), [count - 1]]):
        cache = KVCache()
        for shots in order:
            own, frames = part(layout, shots)
            numbers = own.text_ids.unique().tolist()
            reads = torch.tensor([numbers.index(t) for t in own.text_ids.tolist()])
            text = TextContext(texts[:, numbers], reads)
            out = backbone(
                x[:, :, frames], levels[:, frames], text, layout=own, position_mode=mode, cache=cache, append=True,
                **CAUSAL,
            )  # fmt: skip
            moving = [i for i, frame in enumerate(frames) if layout.roles[frame] != "dummy"]
            expected = whole[:, :, frames]
            assert torch.allclose(out[:, :, moving], expected[:, :, moving], rtol=0, atol=tolerance)
        assert cache.sizes == tuple(([1] if mode == "diagonal" else []) + SIZES)
    keys = cache.layers[0][0].shape[1]
    assert keys == sum(SIZES) * 6 + ((STORY + 1) * L + 1 if mode == "diagonal" else 0), "one token of the dummy frame"


@torch.no_grad()
def test_guidance_branches_read_one_history():
    """A batch of two branches behind a cache of one: each as it is alone."""
    backbone, _ = make("5b")
    layout, x, levels, texts = scene(True)
    cache, options = KVCache(), {"position_mode": "diagonal", **CAUSAL}
    own, frames = part(layout, [0, 1])
    reads = TextContext(texts[:, [STORY, 0]], torch.tensor([0, 1, 1, 1]))
    backbone(x[:, :, frames], levels[:, frames], reads, layout=own, cache=cache, append=True, **options)
    own, frames = part(layout, [2])
    alone = [
        backbone(x[:, :, frames], levels[:, frames], TextContext(texts[:, [t]], torch.zeros(1, dtype=torch.long)),
                 layout=own, cache=cache, **options)
        for t in (1, 2)
    ]  # fmt: skip
    both = TextContext(torch.cat([texts[:, [1]], texts[:, [2]]]), torch.zeros(1, dtype=torch.long))
    out = backbone(
        x[:, :, frames].repeat(2, 1, 1, 1, 1), levels[:, frames].repeat(2, 1), both, layout=own, cache=cache, **options
    )
    assert torch.allclose(out, torch.cat(alone), rtol=0, atol=1e-12)


def test_what_a_cache_cannot_hold_is_refused():
    backbone, _ = make("5b")
    layout, x, levels, texts = scene(False)
    context = TextContext(texts, layout.text_ids)
    with pytest.raises(ValueError, match="it takes group_causal, under which earlier shots stay what they were"):
        backbone(x, levels, context, layout=layout, cache=KVCache(), append=True)
    two = TextContext(texts, torch.tensor([0, 0, 3, 1, 2, 2]))
    with pytest.raises(ValueError, match="4 texts for 3 shots"):
        backbone(x, levels, two, layout=layout, cache=KVCache(), append=True, **CAUSAL)
    with pytest.raises(ValueError, match="append=True without a cache"):
        backbone(x, levels, context, layout=layout, append=True, **CAUSAL)
    pairs, _ = make("1.5")
    with pytest.raises(ValueError, match="no kv_cache: CogVideoX 1.5 joins 2 latent frames"):
        pairs(x, levels[:, :1].expand(-1, 6), context, cache=KVCache(), **CAUSAL)


# --- shots in turn behind the story -----------------------------------------------------------------------------------

T_C, SCALE = 0.3, 2.5
METHOD = get_method(
    "lct", attention_rule="group_causal", position_mode="diagonal", global_prompt="group", context_level=T_C, shift=1.0
)
LEVELS = base_levels(3)
HISTORIES = {"all": [(), (0,), (0, 1)], "last": [(), (0,), (1,)], "none": [(), (), ()]}
NULL = randn(1, L, TEXT_DIM, seed=3).expand(B, -1, -1)


def seeds(shot: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(10 * b + shot) for b in range(B)]


def backbone_of_vp():
    backbone, _ = make("5b")
    backbone.process = PROCESSES["vp v, no signal at 1"]
    return backbone


def run(backbone, histories, texts: Tensor, story: Tensor | None, null_story: Tensor | None = None) -> list[Tensor]:
    shots = [RolloutShot(SIZES[i], texts[:, i], NULL, seeds(i), history) for i, history in enumerate(histories)]
    guidance = Guidance([("text", SCALE)])
    options = {"size": (4, 4, 6), "guidance": guidance, "story": story, "null_story": null_story}
    return list(rollout(backbone, METHOD, "autoregressive", shots, LEVELS, **options))


def recomputed(backbone, histories, texts: Tensor, story: Tensor, null_story: Tensor | None = None) -> list[Tensor]:
    """LCT's recipe without a cache: story, history and shot run whole in every step."""
    process, made, noised = backbone.process, [], []
    for index, history in enumerate(histories):
        generators, shots = seeds(index), [*history, index]
        layout = with_story(shots_layout([SIZES[j] for j in shots]))
        own = layout.shot_slices[-1]
        x = process.pure_noise(
            draw_noise(ClipLayout((Segment("target", SIZES[index]),)), (B, 4, SIZES[index], 4, 6), generators)
        )
        for s, after in zip(LEVELS, LEVELS[1:], strict=False):
            clip = torch.zeros(B, 4, layout.num_frames, 4, 6, dtype=torch.float64)
            levels = torch.full((B, layout.num_frames), T_C)
            levels[:, 0], levels[:, own] = 0, s
            for position, j in enumerate(history):
                clip[:, :, layout.shot_slices[1 + position]] = noised[j]
            clip[:, :, own] = process.precondition(x, s.expand(SIZES[index]))
            predictions = []
            for words, told in ((texts[:, index], story), (NULL, story if null_story is None else null_story)):
                said = torch.stack([*(texts[:, j] for j in history), words, told], dim=1)
                out = backbone(clip, levels, TextContext(said, layout.text_ids), **METHOD.backbone_kwargs(layout))
                predictions.append(out[:, :, own])
            found = predictions[1] + SCALE * (predictions[0] - predictions[1])
            x = process.step(x, found.float(), s.expand(SIZES[index]), after.expand(SIZES[index]))
        made.append(x)
        level = torch.full((SIZES[index],), T_C)
        noise = draw_noise(ClipLayout((Segment("target", SIZES[index]),)), (B, 4, SIZES[index], 4, 6), generators)
        noised.append(process.precondition(process.add_noise(x, noise, level), level).double())
    return made


@pytest.mark.parametrize("name", HISTORIES)
@torch.no_grad()
def test_the_story_stands_in_front_of_every_history(name):
    """Also where a history is run anew: a cache that is reset and not told the story would be the buggy form."""
    backbone, texts = backbone_of_vp(), randn(B, 3, L, TEXT_DIM, seed=2)
    story, other = randn(B, L, TEXT_DIM, seed=8), randn(B, L, TEXT_DIM, seed=9)
    made = run(backbone, HISTORIES[name], texts, story)
    for one, expected in zip(made, recomputed(backbone, HISTORIES[name], texts, story), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-4)
    for changed in (other, None):
        for one, two in zip(made, run(backbone, HISTORIES[name], texts, changed), strict=True):
            assert (one - two).abs().max() > 1e-3, "each shot sees the story, not only the first"


@pytest.mark.parametrize("name", HISTORIES)
@torch.no_grad()
def test_guidance_may_go_without_the_story_too(name):
    """The cache then holds what each branch makes of the history: one that all share would know the story."""
    backbone, texts = backbone_of_vp(), randn(B, 3, L, TEXT_DIM, seed=2)
    story, null = randn(B, L, TEXT_DIM, seed=8), randn(B, L, TEXT_DIM, seed=9)
    made = run(backbone, HISTORIES[name], texts, story, null)
    for one, expected in zip(made, recomputed(backbone, HISTORIES[name], texts, story, null), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-4)
    for one, kept in zip(made, run(backbone, HISTORIES[name], texts, story), strict=True):
        assert (one - kept).abs().max() > 1e-3


@torch.no_grad()
def test_the_story_is_run_once_per_history():
    backbone, texts, seen = backbone_of_vp(), randn(B, 3, L, TEXT_DIM, seed=2), []

    def note(_, args, kwargs):
        seen.append((kwargs["layout"].roles, kwargs["cache"].sizes, args[1].tolist()))

    backbone.register_forward_pre_hook(note, with_kwargs=True)
    for name, stories in (("all", 1), ("last", 2), ("none", 1)):
        seen.clear()
        run(backbone, HISTORIES[name], texts, randn(B, L, TEXT_DIM, seed=8))
        told = [(sizes, levels) for roles, sizes, levels in seen if roles == ["dummy"]]
        assert told == [((), [[0.0]] * B)] * stories, name
        assert all(sizes[0] == 1 for roles, sizes, _ in seen if roles != ["dummy"])
