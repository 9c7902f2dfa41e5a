"""AID's modules alone: adapters and the Dual Query Transformer against their formulas, and what each of them sees."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.modules.adapters import LongTermTemporalAdapter, ShortTermTemporalAdapter, SpatialAdapter
from models.modules.dual_query import COORDINATES, DualQueryTransformer, latent_tokens
from models.tiny import TEXT_DIM
from tests.draw import open_zeros, randn
from tests.models.test_aid import B, F, L, Q, S, W, given_clip, inputs

# --- adapters ------------------------------------------------------------------------------------------------------


def reach(adapter: nn.Module, frame: int) -> tuple[list[int], bool]:
    """The frames whose output changes with `frame` of the input, and whether it stays in its place."""
    adapter = adapter.double()
    with torch.no_grad():
        for i, parameter in enumerate(adapter.parameters()):
            parameter.copy_(0.5 * randn(*parameter.shape, seed=i))
        x = randn(1, F, 2, 3, 16, seed=9)
        other = x.clone()
        other[:, frame, 1, 1] += 1.0
        changed = (adapter(x) - adapter(other)).abs().amax(dim=(0, 4)) > 1e-12  # [F,h,w]
    elsewhere = changed.clone()
    elsewhere[:, 1, 1] = False
    return changed.flatten(1).any(dim=1).nonzero()[:, 0].tolist(), not bool(elsewhere.any())


def test_each_adapter_sees_the_frames_it_should():
    assert reach(SpatialAdapter(16), 2) == ([2], True)
    assert reach(ShortTermTemporalAdapter(16), 2) == ([1, 2, 3], True)
    assert reach(ShortTermTemporalAdapter(16, kernel="spatiotemporal"), 2) == ([1, 2, 3], False)
    assert reach(LongTermTemporalAdapter(16, F), 2) == ([0, 1, 2, 3, 4], True)


def test_adapters_give_their_branch_alone_not_their_input_again():
    x = randn(1, F, 2, 2, 16, seed=0, dtype=torch.float32)
    for adapter in (SpatialAdapter(16), ShortTermTemporalAdapter(16), LongTermTemporalAdapter(16, F)):
        assert not adapter(x).any() and adapter.down.weight.any()


@torch.no_grad()
def test_adapters_against_their_formulas():
    x = randn(1, F, 2, 2, 16, seed=0)
    spatial, short, long = SpatialAdapter(16), ShortTermTemporalAdapter(16), LongTermTemporalAdapter(16, 8)
    for i, adapter in enumerate((spatial, short, long)):
        adapter.double()
        adapter.up.weight.copy_(randn(16, 4, seed=20 + i))
    linear = torch.nn.functional.linear
    h = linear(x, spatial.down.weight, spatial.down.bias)
    expected = linear(0.5 * h * (1 + torch.erf(h / math.sqrt(2))), spatial.up.weight)
    assert torch.allclose(spatial(x), expected)

    h = linear(x, short.down.weight, short.down.bias)
    taps = short.conv.weight[:, 0, :, 0, 0]  # [d,3]
    ends = torch.cat([torch.zeros_like(h[:, :1]), h, torch.zeros_like(h[:, :1])], dim=1)
    mixed = sum(ends[:, k : k + F] * taps[:, k] for k in range(3)) + short.conv.bias
    assert torch.allclose(short(x), linear(mixed, short.up.weight))

    h = linear(x, long.down.weight, long.down.bias) + long.position[:F, None, None]
    out = torch.empty_like(h)
    for i in range(2):
        for j in range(2):
            q, k, v = linear(h[0, :, i, j], long.to_qkv.weight, long.to_qkv.bias).chunk(3, dim=-1)  # heads of width 1
            for head in range(4):
                weights = (q[:, head, None] * k[None, :, head]).softmax(dim=1)
                out[0, :, i, j, head] = weights @ v[:, head]
    assert torch.allclose(long(x), linear(out, long.up.weight))


# --- the Dual Query Transformer ------------------------------------------------------------------------------------


def dual_query(**options) -> DualQueryTransformer:
    module = DualQueryTransformer(
        TEXT_DIM, 16 + COORDINATES, W, max_frames=6, max_states=S, query_tokens=Q, heads=4, **options
    ).double()
    open_zeros(module, seed=0)
    return module


def words(seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    _, text, conditions = inputs()
    return text, conditions["states"], latent_tokens(conditions["given"], 2)


@torch.no_grad()
def test_shapes_of_the_condition():
    said, queries = dual_query()(*words(), F)
    assert said.shape == (B, L, TEXT_DIM) and queries.shape == (B, F, Q, TEXT_DIM)
    assert not said[:, 7:].any(), "padding stays padding"


@torch.no_grad()
def test_queries_of_a_frame_are_its_own():
    module = dual_query()
    _, before = module(*words(), F)
    module.queries[3] += 1.0
    _, after = module(*words(), F)
    assert (before != after).flatten(2).any(dim=2).any(dim=0).tolist() == [False, False, False, True, False]


@torch.no_grad()
def test_states_reach_the_queries_through_the_second_attention_only():
    module = dual_query()
    text, states, image = words()
    said, queries = module(text, states, image, F)
    other_said, other_queries = module(text, states + 1.0 * (states != 0), image, F)
    assert torch.equal(said, other_said) and not torch.allclose(queries, other_queries)
    for block in module.decomposed.blocks:
        block.attend["states"].to_out.weight.zero_()
        block.attend["states"].to_out.bias.zero_()
    assert torch.equal(module(text, states, image, F)[1], module(text, 2 * states, image, F)[1])


@torch.no_grad()
def test_the_order_of_states_matters():
    module = dual_query()
    text, states, image = words()
    assert not torch.allclose(module(text, states, image, F)[1], module(text, states.flip(1), image, F)[1])


@torch.no_grad()
def test_the_image_reaches_the_words_only():
    module = dual_query()
    text, states, image = words()
    said, queries = module(text, states, image, F)
    other_said, other_queries = module(text, states, image + 1.0, F)
    assert not torch.allclose(said, other_said) and torch.equal(queries, other_queries)


@torch.no_grad()
def test_padding_is_not_read():
    module = dual_query()
    text, states, image = words()
    more_text = torch.cat([text, torch.zeros(B, 5, TEXT_DIM)], dim=1)
    more_states = torch.cat([states, torch.zeros(B, S, 2, TEXT_DIM)], dim=2)
    for one, other in zip(module(text, states, image, F), module(more_text, more_states, image, F), strict=True):
        assert torch.allclose(one, other[:, :L], atol=1e-12)
    nothing = module(torch.zeros_like(text), torch.zeros_like(states), torch.zeros_like(image), F)
    assert all(torch.isfinite(one).all() for one in nothing)


@torch.no_grad()
def test_queries_are_text_and_keys_are_image():
    """One block, one head by hand: softmax((W_q SelfAttn(t1)) (W_k v)^T / sqrt(d)) W_v v, not the other way round."""
    module = DualQueryTransformer(8, 6, 4, max_frames=1, max_states=1, blocks=1, heads=1, decomposed=False).double()
    module.multimodal.out.weight.copy_(randn(8, 4, seed=1))
    text, image = randn(1, 3, 8, seed=2), randn(1, 5, 6, seed=3)

    def attend(layer, x, context):
        q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
        return layer.to_out((q @ k.T / 2.0).softmax(dim=1) @ v)

    (block,) = module.multimodal.blocks
    x, v = module.read_text(text[0]), module.read_image(image[0])
    own, cross = block.attend["own"], block.attend["image"]
    x = x + attend(own, own.norm(x), own.norm(x))
    x = x + attend(cross, cross.norm(x), v)
    x = x + block.feed_forward(x)
    expected = module.multimodal.out(module.multimodal.norm(x))
    assert torch.allclose(module(text, text[:, None], image, 1)[0][0], expected)


def test_a_dropped_image_is_tokens_of_zeros_and_places_differ():
    given = given_clip(frames=2)
    tokens = latent_tokens(given, 2)
    assert tokens.shape == (B, 2 * 4, 16 + COORDINATES)
    assert torch.equal(tokens[0, 1, :4], given[0, 0, 0, :2, 2:].flatten()), "the first channel of the second patch"
    assert len({tuple(place.tolist()) for place in tokens[0, :, 16:]}) == 8
    assert not latent_tokens(torch.zeros_like(given), 2).any()


def test_places_are_told_apart_in_bfloat16_too():
    """Angles of many turns, rounded to 8 bits before their sine is taken, would be off by a tenth and more."""
    given = torch.ones(1, 5, 8, 30, 52)
    exact = latent_tokens(given, 2)[..., -COORDINATES:]
    low = latent_tokens(given.bfloat16(), 2)[..., -COORDINATES:]
    assert low.dtype == torch.bfloat16 and (low.float() - exact).abs().max() < 0.005
