"""Guidance on the other shots: the pass without them is every shot by itself, and what it costs and skips."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.layout import ClipLayout, Segment, shots_layout, with_story
from models.methods import get_method
from models.noise import base_levels
from models.text import TextContext
from models.tiny import TEXT_DIM
from sample.apart import ShotsApart
from sample.guidance import Guidance
from sample.sampler import sample
from tests.draw import randn
from tests.models.test_wan import make

B, C, H, W, L, STEPS = 2, 4, 4, 4, 7, 3
METHOD = get_method("lct", position_gap=3, context_level=0.3)
LEVELS = base_levels(STEPS, shift=3.0)


def texts(count: int, seed: int) -> Tensor:
    return randn(B, count, L, TEXT_DIM, seed=seed)


def generators(shots: int) -> list[list[torch.Generator]]:
    return [[torch.Generator().manual_seed(10 * b + s) for s in range(shots)] for b in range(B)]


def alone(backbone, x: Tensor, levels: Tensor, text: Tensor) -> Tensor:
    """The model on one shot and nothing else, as a user would call it."""
    layout = shots_layout([x.shape[2]])
    return backbone(x, levels, TextContext(text[:, None], layout.text_ids), **METHOD.backbone_kwargs(layout))


@pytest.mark.parametrize("sizes", [[2, 2, 2], [2, 1, 2], [3]])
def test_the_pass_apart_is_the_model_on_each_shot_by_itself(sizes: list[int]) -> None:
    backbone, _ = make(torch.float64)
    layout = shots_layout(sizes)
    x, levels = randn(B, C, sum(sizes), H, W, seed=1).double(), torch.rand(B, sum(sizes)).double()
    text = texts(len(sizes), 2).double()
    apart = ShotsApart(
        backbone, layout, TextContext(text, layout.text_ids), METHOD.backbone_kwargs, METHOD.model_levels
    )
    made = apart(x, levels)
    for shot, frames in enumerate(layout.shot_slices):
        expected = alone(backbone, x[:, :, frames], levels[:, frames], text[:, shot])
        torch.testing.assert_close(made[:, :, frames], expected, atol=1e-12, rtol=1e-9)


def test_shots_of_one_length_share_a_call_and_given_ones_need_none() -> None:
    calls = []

    def backbone(x: Tensor, levels: Tensor, text: TextContext, *, layout: ClipLayout, **_: object) -> Tensor:
        calls.append((tuple(x.shape), tuple(text.embeddings.shape), layout))
        return x

    layout = METHOD.layout_for_task("shot_conditioned", [2, 2, 1, 2], given_shots=[1])
    context = TextContext(texts(4, 1), layout.text_ids)
    x = randn(B, C, 7, H, W, seed=2)
    made = ShotsApart(backbone, layout, context, METHOD.backbone_kwargs, METHOD.model_levels)(x, torch.rand(B, 7))
    assert [(shape[0], shape[2]) for shape, _, _ in calls] == [(2 * B, 2), (B, 1)]
    assert all(words[1] == 1 and one.num_shots == 1 for _, words, one in calls)
    targets = layout.is_target
    assert torch.equal(made[:, :, targets], x[:, :, targets]) and not made[:, :, ~targets].any()


def test_the_story_stays_with_every_shot() -> None:
    seen = []

    def backbone(x: Tensor, levels: Tensor, text: TextContext, *, layout: ClipLayout, **_: object) -> Tensor:
        seen.append((x, text, layout))
        return x

    layout = with_story(shots_layout([2, 2]))
    embeddings = texts(3, 1)  # two prompts, then the story
    x = randn(B, C, 5, H, W, seed=2)
    ShotsApart(backbone, layout, TextContext(embeddings, layout.text_ids), METHOD.backbone_kwargs, METHOD.model_levels)(
        x, torch.rand(B, 5)
    )
    ((rows, text, own),) = seen
    assert own == with_story(shots_layout([2]))
    assert torch.equal(text.embeddings, torch.cat([embeddings[:, [0, 2]], embeddings[:, [1, 2]]]))
    assert torch.equal(text.frame_text, own.text_ids)
    assert torch.equal(rows, torch.cat([x[:, :, :3], x[:, :, [0, 3, 4]]]))


@pytest.mark.parametrize(("text_scale", "scale"), [(2.5, 2.5), (2.5, 1.5), (1.0, 2.0), (1.0, 1.0), (3.0, 0.0)])
def test_sampling_follows_the_nested_sum_of_differences(text_scale: float, scale: float) -> None:
    """e = null alone + s_t (text alone - null alone) + s_o (all together - text alone), in a plain loop, float64."""
    backbone, _ = make(torch.float64)
    layout = shots_layout([2, 2])
    text, null = texts(2, 3).double(), texts(1, 4).double().expand(-1, 2, -1, -1)
    made = sample(
        backbone, layout, METHOD.plan(layout, LEVELS, "joint"), TextContext(text, layout.text_ids),
        shape=(B, C, 4, H, W), generator=generators(2), null={"text": TextContext(null, layout.text_ids)},
        guidance=Guidance([("text", text_scale), ("shots", scale)]), model_levels=METHOD.model_levels,
        apart=METHOD.backbone_kwargs, **METHOD.backbone_kwargs(layout),
    )  # fmt: skip
    x = torch.cat(
        [torch.stack([torch.randn(C, 2, H, W, generator=own[s]) for own in generators(2)]) for s in range(2)], dim=2
    ).double()
    for now, after in zip(LEVELS.tolist(), LEVELS.tolist()[1:], strict=False):
        levels = torch.full((B, 4), now).double()
        together = backbone(x, levels, TextContext(text, layout.text_ids), **METHOD.backbone_kwargs(layout))
        by_itself = [
            torch.cat(
                [alone(backbone, x[:, :, f], levels[:, f], one[:, s]) for s, f in enumerate(layout.shot_slices)], 2
            )
            for one in (null, text)
        ]
        guided = by_itself[0] + text_scale * (by_itself[1] - by_itself[0]) + scale * (together - by_itself[1])
        x = x + (after - now) * guided
    torch.testing.assert_close(made.double(), x, atol=2e-5, rtol=1e-4)


def test_given_shots_are_held_bit_for_bit() -> None:
    backbone, _ = make()
    layout = METHOD.layout_for_task("shot_conditioned", [2, 2], given_shots=[0])
    given = randn(B, C, 4, H, W, seed=5)
    made = sample(
        backbone, layout, METHOD.plan(layout, LEVELS, "shot_conditioned"), TextContext(texts(2, 3), layout.text_ids),
        shape=(B, C, 4, H, W), generator=generators(2), given=given,
        null={"text": TextContext(texts(2, 4), layout.text_ids)},
        guidance=Guidance([("text", 2.0), ("shots", 3.0)]), model_levels=METHOD.model_levels,
        apart=METHOD.backbone_kwargs, **METHOD.backbone_kwargs(layout),
    )  # fmt: skip
    assert torch.equal(made[:, :, :2], given[:, :, :2].float()) and torch.isfinite(made).all()


def test_guidance_on_the_other_shots_needs_to_know_how_a_shot_is_seen_alone() -> None:
    backbone, _ = make()
    layout = shots_layout([2, 2])
    with pytest.raises(ValueError, match="apart"):
        sample(
            backbone, layout, METHOD.plan(layout, LEVELS, "joint"), TextContext(texts(2, 3), layout.text_ids),
            shape=(B, C, 4, H, W), generator=generators(2), guidance=Guidance([("shots", 2.0)]),
            **METHOD.backbone_kwargs(layout),
        )  # fmt: skip


def test_one_text_for_all_shots_is_told_to_each() -> None:
    """Frames of several shots may read one text (a composition's do)."""
    backbone, _ = make(torch.float64)
    layout = ClipLayout((Segment("target", 2, 0, 0), Segment("target", 2, 1, 0)))
    text, x = texts(1, 3).double(), randn(B, C, 4, H, W, seed=1).double()
    levels = torch.rand(B, 4).double()
    apart = ShotsApart(
        backbone, layout, TextContext(text, layout.text_ids), METHOD.backbone_kwargs, METHOD.model_levels
    )
    made = apart(x, levels)
    for frames in layout.shot_slices:
        torch.testing.assert_close(made[:, :, frames], alone(backbone, x[:, :, frames], levels[:, frames], text[:, 0]))
