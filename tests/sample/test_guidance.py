"""Guidance identities: scale 1 is the condition alone, scale 0 is without it, and branches that weigh nothing rest."""

from __future__ import annotations

import pytest
import torch

from sample.guidance import Guidance


def test_no_guidance_and_scale_one_are_one_conditional_branch() -> None:
    prediction = torch.randn(2, 3)
    for guidance in (Guidance(), Guidance([("text", 1.0)]), Guidance([("image", 1.0), ("text", 1.0)])):
        (branch,) = guidance.branches
        assert branch.dropped == frozenset() and branch.weight == 1.0
        assert guidance.combine([prediction]) is prediction


def test_scale_zero_drops_the_condition() -> None:
    (branch,) = Guidance([("text", 0.0)]).branches
    assert branch.dropped == {"text"} and branch.weight == 1.0
    (branch,) = Guidance([("image", 1.0), ("text", 0.0)]).branches
    assert branch.dropped == {"text"}


def test_classifier_free_guidance() -> None:
    guidance = Guidance([("text", 5.0)])
    assert [set(branch.dropped) for branch in guidance.branches] == [{"text"}, set()]
    e0, e1 = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(guidance.combine([e0, e1]), e0 + 5 * (e1 - e0))


def test_nested_conditions_follow_the_sum_of_differences() -> None:
    guidance = Guidance([("image", 2.0), ("text", 7.0)])
    assert [set(branch.dropped) for branch in guidance.branches] == [{"image", "text"}, {"text"}, set()]
    e0, e1, e2 = torch.randn(3, 4)
    torch.testing.assert_close(guidance.combine([e0, e1, e2]), e0 + 2 * (e1 - e0) + 7 * (e2 - e1))


def test_equal_scales_skip_the_branch_between() -> None:
    guidance = Guidance([("image", 3.0), ("text", 3.0)])
    assert [set(branch.dropped) for branch in guidance.branches] == [{"image", "text"}, set()]
    e0, e2 = torch.randn(2, 4)
    torch.testing.assert_close(guidance.combine([e0, e2]), e0 + 3 * (e2 - e0))


def test_a_ramp_is_a_scale_of_its_own_for_every_frame() -> None:
    """Frame f has the scale that a straight line from the first to the last frame has there (aid.md, section 5)."""
    predictions = list(torch.randn(3, 2, 4, 5, 3, 3))  # [B,C,F,H,W] each
    ramp = Guidance([("image", [1, 3]), ("text", 5.0)])
    made = ramp.combine(predictions)
    for frame, scale in enumerate((1.0, 1.5, 2.0, 2.5, 3.0)):
        plain = Guidance([("image", scale), ("text", 5.0)])
        kept = [p[:, :, frame] for p in predictions if len(plain.branches) == 3] or [
            p[:, :, frame] for p in predictions[1:]
        ]
        torch.testing.assert_close(made[:, :, frame], plain.combine(kept))
    assert [set(branch.dropped) for branch in ramp.branches] == [{"image", "text"}, {"text"}, set()]
    assert torch.equal(ramp.without("text").combine(predictions[:2])[:, :, 0], predictions[1][:, :, 0])


def test_a_ramp_of_equal_ends_is_the_plain_scale_bit_for_bit() -> None:
    predictions = list(torch.randn(3, 2, 4, 5, 3, 3))
    level, plain = Guidance([("image", [2.0, 2.0]), ("text", 7.0)]), Guidance([("image", 2.0), ("text", 7.0)])
    assert level.scales == plain.scales and level.branches == plain.branches
    assert torch.equal(level.combine(predictions), plain.combine(predictions))
    assert len(Guidance([("image", (1, 1)), ("text", 1.0)]).branches) == 1, "no guidance is one pass"


@pytest.mark.parametrize("scale", [[1.0], [1.0, 2.0, 3.0], [1.0, float("inf")], "3"])
def test_a_scale_that_is_neither_a_number_nor_a_ramp_is_refused(scale: object) -> None:
    with pytest.raises(ValueError, match=r"guidance scale of 'image' is .*first and .*last frame"):
        Guidance([("image", scale)])  # type: ignore[list-item]


@pytest.mark.parametrize("scales", [[("text", float("nan"))], [("text", 1.0), ("text", 2.0)]])
def test_senseless_scales_are_refused(scales: list[tuple[str, float]]) -> None:
    with pytest.raises(ValueError, match="text"):
        Guidance(scales)


def test_every_branch_needs_its_prediction() -> None:
    with pytest.raises(ValueError, match="1 predictions for 2"):
        Guidance([("text", 2.0)]).combine([torch.zeros(1)])


def test_a_condition_without_a_scale_is_kept_by_every_branch() -> None:
    both = Guidance([("text", 3.0), ("shots", 2.0)], {"text": ("text", "states")})
    left = both.without("shots")
    assert left.scales == (("text", 3.0),)
    assert [set(branch.dropped) for branch in left.branches] == [{"text", "states"}, set()]
    assert both.without("image").scales == both.scales
