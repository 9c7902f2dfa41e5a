"""Attention over text and video together, against a dense mask that is written token by token."""

from __future__ import annotations

import pytest
import torch

from models.attention import sdpa
from models.joint_attention import joint_attention, joint_plan
from tests.models.cogvideox_reference import text_copies, token_mask

B, L, N, HEADS, WIDTH = 2, 3, 2, 2, 4  # L tokens per text, N per frame
CLIPS = {
    "one shot": ([4], [0, 0, 0, 0]),
    "a text per shot": ([3, 1, 2], [0, 0, 0, 1, 2, 2]),
    "one text": ([3, 1, 2], [0] * 6),
    "a text read by two shots": ([2, 2, 2], [1, 1, 0, 0, 1, 1]),
    "two texts in a shot": ([4, 2], [0, 0, 2, 2, 1, 1]),
    "interleaved": ([3, 3], [0, 1, 0, 1, 0, 2]),
}


def qkv(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, tokens, HEADS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(3)]


def masked(q, k, v, mask):
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / WIDTH**0.5
    return torch.einsum("bhqk,bkhd->bqhd", logits.masked_fill(~mask, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("rule", ["full", "group_causal", "same_frame"])
@pytest.mark.parametrize("clip", CLIPS)
def test_joint_attention_is_the_masked_one(clip, rule, positions):
    shots, reads = CLIPS[clip]
    plan = joint_plan(shots, reads, rule, positions)
    copies = text_copies(shots, reads, rule)
    assert [(g, set(f)) for g, f in zip(plan.text_groups, plan.text_frames, strict=True)] == copies
    q, k, v = qkv(len(copies) * L + len(reads) * N)
    expected = masked(q, k, v, token_mask(shots, reads, rule, positions, L, N))
    assert torch.allclose(joint_attention(q, k, v, len(copies) * L, plan), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("positions", [False, True])
def test_later_shots_never_enter_the_arithmetic_of_earlier_ones(positions):
    shots, reads = CLIPS["a text per shot"]
    plan = joint_plan(shots, reads, "group_causal", positions)
    q, k, v = qkv(3 * L + 6 * N)
    before = joint_attention(q, k, v, 3 * L, plan)
    for x in (q, k, v):
        x[:, L : 3 * L] = x[:, 3 * L + 3 * N :] = float("nan")
    after = joint_attention(q, k, v, 3 * L, plan)
    assert torch.equal(after[:, :L], before[:, :L])
    assert torch.equal(after[:, 3 * L : 3 * L + 3 * N], before[:, 3 * L : 3 * L + 3 * N])


def test_calls_are_few():
    calls = []

    def counted(q, k, v):
        calls.append((q.shape[1], k.shape[1]))
        return sdpa(q, k, v)

    for clip, rule, expected in (
        ("one shot", "group_causal", [(L + 4 * N, L + 4 * N)]),
        ("one text", "full", [(L + 6 * N, L + 6 * N)]),
        ("a text per shot", "group_causal", [(L + 3 * N, L + 3 * N), (L + N, L + 4 * N), (L + 2 * N, L + 6 * N)]),
        ("a text per shot", "same_frame", [(L + N, L + N)]),
    ):
        calls.clear()
        plan = joint_plan(*CLIPS[clip], rule)
        tokens = len(plan.text_groups) * L
        joint_attention(*qkv(tokens + len(CLIPS[clip][1]) * N), tokens, plan, counted)
        assert calls == expected


def test_plans_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"3 frames read a text, the shots \[2, 2\] have 4"):
        joint_plan([2, 2], [0, 0, 0], "full")
    with pytest.raises(ValueError, match="unknown attention rule 'causal'"):
        joint_plan([2], [0, 0], "causal")  # type: ignore[arg-type]
