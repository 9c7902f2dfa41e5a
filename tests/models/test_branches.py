"""Modules beside the layers of every backbone that takes them: FCA and AID on CogVideoX, HunyuanVideo, Latte and Wan.

The branch itself is compared with references that are written out from the weights: what it adds must stand where the
specifications say, beside each layer's attention, ungated. Latents are 4 x 4 (CogVideoX: 4 x 6), patches 2 x 2.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from models.backbones.wan import WanBackbone
from models.methods import get_method
from models.text import TextContext
from models.tiny import TEXT_DIM, tiny_transformer
from models.tiny_hunyuan import POOLED_DIM
from tests.draw import open_zeros, randn
from tests.models import cogvideox_cases, cogvideox_reference, hunyuan_inputs, hunyuan_reference, latte_reference
from tests.models.test_aid import ADAPTERS
from tests.models.test_aid import SMALL as AID_SMALL
from tests.models.test_fca import SMALL as FCA_SMALL

B, F, L = 2, 4, 11
LEVELS = torch.tensor([0.3, 0.8])
NAMES = ("cogvideox-2b", "cogvideox-5b", "hunyuan", "latte")
SMALL = {"fca": FCA_SMALL, "aid": AID_SMALL | {"query_tokens": 2, "adapter_ratio": 2}}


def make(name: str, dtype: torch.dtype = torch.float64):
    """A backbone, and an untouched diffusers model with the same weights (none for Wan)."""
    if name == "wan":
        return WanBackbone(nn.Module.to(tiny_transformer(3), dtype)).eval(), None
    family, _, version = name.partition("-")
    if family == "cogvideox":
        return cogvideox_cases.make(version, dtype, max_text_seq_length=L)
    return (hunyuan_inputs if family == "hunyuan" else latte_reference).make(dtype)


def width_of(name: str) -> int:
    return 6 if name.startswith("cogvideox") else 4


def clip(name: str, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return randn(B, 4, F, 4, width_of(name), seed=seed, dtype=dtype)


def words(name: str, dtype: torch.dtype = torch.float64) -> TextContext:
    """Two texts, of 7 and 5 tokens: CogVideoX reads on behind them, Wan and Latte read zeros, HunyuanVideo stops."""
    embeddings, lengths = randn(B, 1, L, TEXT_DIM, seed=2, dtype=dtype), torch.tensor([[7], [5]])
    reads = torch.zeros(F, dtype=torch.long)
    if name == "hunyuan":
        return TextContext(embeddings, reads, lengths, randn(B, 1, POOLED_DIM, seed=4, dtype=dtype))
    if not name.startswith("cogvideox"):
        for sample, length in enumerate(lengths.flatten().tolist()):
            embeddings[sample, :, length:] = 0
    return TextContext(embeddings, reads)


def adapted(name: str, method: str, opened: bool = True, dtype: torch.dtype = torch.float64, **params):
    """A backbone with the method's modules, whose last layers (zero at the start) are opened, and the method."""
    (backbone, _), found = make(name, dtype), get_method(method, **SMALL[method] | params)
    found.attach(backbone, seed=1)
    backbone.conditioner.to(dtype).eval()
    if opened:
        open_zeros(backbone.conditioner, 0.3)
    return backbone, found


def told(name: str, method: str, dtype: torch.dtype = torch.float64, seed: int = 7) -> dict[str, Tensor]:
    given = clip(name, seed, dtype)[:, :, :1]
    if method == "fca":
        return {"given": given}
    states = randn(B, 3, 5, TEXT_DIM, seed=3, dtype=dtype)
    return {"given": torch.cat([given, torch.ones_like(given[:, :1])], dim=1), "states": states}


def predict(backbone, method, x: Tensor, levels: Tensor, text: TextContext, conditions: dict[str, Tensor]) -> Tensor:
    layout = method.layout_for_training([F])
    seen = {"text": text} | method.prepare(backbone, layout, text, conditions) | method.backbone_kwargs(layout)
    return backbone(x, levels, **seen)


def plain_forward(name: str, plain, x: Tensor, levels: Tensor, text: TextContext) -> Tensor:
    """The untouched diffusers model at one level per sample."""
    if name.startswith("cogvideox"):
        return cogvideox_cases.run_plain(plain, x, 999 * levels, text.embeddings[:, 0])
    if name == "latte":
        plain.temp_pos_embed = plain.temp_pos_embed[:, :F]  # its own length is 6 frames
        return plain(x, 999 * levels, text.embeddings[:, 0]).sample[:, :4]
    mask = torch.arange(L) < text.lengths
    return plain(x, 1000 * levels, text.embeddings[:, 0], mask, text.pooled[:, 0], torch.full((B,), 6000.0)).sample


# --- the start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("fca", {}),
        ("fca", {"adapter": "no_frame_text", "init_features": "patches", "width": 8}),
        ("aid", {}),
        ("aid", {"image": "concat", "reading": "global", "query_tokens": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_start_is_the_unmodified_diffusers_model(name, method, params):
    if params.get("width"):
        params = params | {"width": 16 if name.startswith("cogvideox") else 12}
    backbone, found = adapted(name, method, opened=False, **params)
    _, plain = make(name)
    x, text = clip(name), words(name)
    out = predict(backbone, found, x, LEVELS, text, told(name, method))
    expected = plain_forward(name, plain, x, LEVELS, text)
    assert torch.allclose(out, expected, rtol=0, atol=2e-6 if name == "latte" else 1e-11), "to the rounding of times"
    assert list(backbone.transformer.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("method", ["fca", "aid"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_start_is_the_backbone_bit_for_bit_where_levels_differ(name, method):
    backbone, found = adapted(name, method, opened=False, dtype=torch.float32)
    x, text, levels = clip(name, dtype=torch.float32), words(name, torch.float32), torch.rand(B, F)
    plain, _ = make(name, torch.float32)
    if method == "aid":  # a text per frame, all alike
        copies = {
            k: None if (v := getattr(text, k)) is None else v.expand(-1, F, *v.shape[2:]) for k in ("lengths", "pooled")
        }
        alike = TextContext(text.embeddings.expand(-1, F, -1, -1), torch.arange(F), **copies)
    else:
        alike = text
    out = predict(backbone, found, x, levels, text, told(name, method, torch.float32))
    assert torch.equal(out, plain(x, levels, alike))
    opened, found = adapted(name, method, dtype=torch.float32)
    assert not torch.allclose(predict(opened, found, x, levels, text, told(name, method, torch.float32)), out)


# --- the branch, against references written out ----------------------------------------------------------------------


def fixed_branch(layers: int, tokens: int, width: int):
    """Adds numbers of its own to every layer, and remembers what it was called with."""
    added = [0.5 * randn(B, F, tokens, width, seed=200 + layer) for layer in range(layers)]
    seen: list[tuple[Tensor, Tensor]] = []

    def branch(layer: int, hidden: Tensor, time: Tensor, rotate) -> Tensor:
        assert layer == len(seen)
        seen.append((hidden, time))
        return added[layer]

    return branch, added, seen


def reference(name: str, plain, x: Tensor, levels: Tensor, text: TextContext, added: list[Tensor], seen: list[Tensor]):
    """One sample after another, every token on its own; `seen` gets what each layer's attention reads of the video."""
    if name.startswith("cogvideox"):
        per_frame, length = 6, text.embeddings.shape[2]
        clock = levels.amax(dim=1, keepdim=True).expand(-1, length)
        times = 999 * torch.cat([clock, levels.repeat_interleave(per_frame, dim=1)], dim=1)
        mask = torch.ones(length + F * per_frame, length + F * per_frame, dtype=torch.bool)
        places: list | None = None
        table = None
        if name.endswith("5b"):
            places = [None] * length + cogvideox_places(plain)
        else:
            table = plain.patch_embed._get_positional_embeddings(4, 6, 4 * F - 3)[0, L:].double()
        return cogvideox_reference.forward(
            plain, x, [text.embeddings[:, 0]], times, mask, places, table, [one.flatten(1, 2) for one in added], seen
        )
    if name == "latte":
        contexts = text.embeddings.expand(-1, F, -1, -1)
        return latte_reference.factorised_loop(plain, x, levels, contexts, added=added, seen=seen)
    state = {key: value.double() for key, value in plain.state_dict().items()}
    outs, reads = [], []
    for b in range(B):
        length = int(text.lengths[b, 0])
        one = hunyuan_reference.Text(text.embeddings[b, 0, :length], text.pooled[b, 0], float(levels[b].max()))
        tokens = length + F * 4
        places = torch.full((tokens, 3), -1)
        places[length:] = torch.cartesian_prod(torch.arange(F), torch.arange(2), torch.arange(2))
        own: list[Tensor] = []
        run = hunyuan_reference.Reference(state, 2, (4, 4, 4), 6.0 if plain.config.guidance_embeds else None)
        outs.append(
            run(
                x[b], levels[b], text.pooled[b].expand(F, -1), [one], places,
                torch.ones(tokens, tokens, dtype=torch.bool), [part[b].flatten(0, 1) for part in added], own,
            )
        )  # fmt: skip
        reads.append(own)
    seen += [torch.stack(layer) for layer in zip(*reads, strict=True)]
    return torch.stack(outs)


def cogvideox_places(plain) -> list:
    """Time, row and column of every token: the clip is as large as the model's own, so that nothing is stretched."""
    return [(float(t), float(y), float(x)) for t in range(F) for y in range(2) for x in range(3)]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_branch_stands_beside_the_attention_of_every_layer(name):
    backbone, plain = make(name)
    layers, tokens = len(backbone.sites.attentions), 6 if name.startswith("cogvideox") else 4
    branch, added, seen = fixed_branch(layers, tokens, backbone.sites.width)
    x, text, levels = clip(name), words(name), torch.rand(B, F, generator=torch.Generator().manual_seed(5))
    out = backbone(x, levels, text, branch=branch)
    read: list[Tensor] = []
    expected = reference(name, plain, x, levels, text, added, read)
    assert torch.allclose(out, expected, rtol=0, atol=2e-5 if name == "latte" else 1e-5)
    assert len(seen) == len(read) == layers
    for (hidden, time), attended in zip(seen, read, strict=True):
        assert torch.allclose(hidden.flatten(1, 2), attended.reshape(B, -1, hidden.shape[-1]), atol=2e-5)
        assert time.shape == (B * F, backbone.sites.time_width)
    assert not torch.allclose(backbone(x, levels, text), expected, atol=1e-3)


# --- FCA -------------------------------------------------------------------------------------------------------------


def turn(x: Tensor) -> Tensor:
    """A stand-in for the rotary embedding: token m turns by an angle of m in every plane."""
    angle = torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, 1, 1) / 5
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1).flatten(-2)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_opened_fca_block_is_the_layers_own_attention_over_given_tokens_and_its_frames_text(name):
    """Against one attention with a dense frame-wise mask, by the weights and norms of the diffusers layer itself."""
    backbone, _ = adapted(name, "fca", opened=False)
    sites, tokens, queries = backbone.sites, 6 if name.startswith("cogvideox") else 4, 3
    hidden, time = randn(B, F, tokens, sites.width, seed=1), randn(B, sites.time_width, seed=2)
    given, text = randn(B, tokens, sites.width, seed=3), randn(B, F, queries, sites.width, seed=4)
    frame_of_key = torch.tensor([-1] * tokens + [f for f in range(F) for _ in range(queries)])
    mask = (frame_of_key == -1) | (frame_of_key == torch.arange(F).repeat_interleave(tokens)[:, None])
    for layer, (block, attn) in enumerate(zip(backbone.conditioner.blocks, sites.attentions, strict=True)):
        weight, bias = sites.output(layer)
        block.modulation.bias[2 * sites.width :] = 1

        def heads(x: Tensor, project, norm=None, attn=attn) -> Tensor:
            split = project(x).unflatten(-1, (attn.heads, -1))
            return split if norm is None else norm(split)

        words = text.flatten(1, 2)
        query = turn(heads(hidden.flatten(1, 2), attn.to_q, attn.norm_q))
        key = torch.cat([turn(heads(given, attn.to_k, attn.norm_k)), heads(words, attn.to_k, attn.norm_k)], dim=1)
        value = torch.cat([heads(given, attn.to_v), heads(words, attn.to_v)], dim=1)
        logits = torch.einsum("bnhd,bmhd->bhnm", query, key) / query.shape[-1] ** 0.5
        attended = torch.einsum("bhnm,bmhd->bnhd", logits.masked_fill(~mask, -torch.inf).softmax(-1), value).flatten(2)
        expected = nnf.linear(attended, weight, bias)
        assert torch.allclose(block(hidden, time, given, text, turn).flatten(1, 2), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_given_frames_and_their_frame_wise_text_reach_the_clip_and_the_future_does_not(name):
    backbone, method = adapted(name, "fca")
    layout, text, clean = method.layout_for_training([F]), words(name), clip(name, seed=7)
    tokens = 6 if name.startswith("cogvideox") else 4
    hidden, time = randn(B, F, tokens, backbone.sites.width, seed=1), randn(B, backbone.sites.time_width, seed=2)

    def branch(video: Tensor, said: TextContext = text) -> Tensor:
        made = method.prepare(backbone, layout, said, method.conditions(video, layout))["branch"]
        return made(1, hidden, time, lambda x: x)

    first, later = clean.clone(), clean.clone()
    later[:, :, 1:] += 1
    first[:, :, 0] += 1
    before = branch(clean)
    assert torch.equal(branch(later), before)
    assert (branch(first) != before).flatten(2).any(dim=2).all()
    other = copy.deepcopy(text)
    other.embeddings[:, 0, 0] += 1
    assert (branch(clean, other) != before).flatten(2).any(dim=2).all()
    if name == "hunyuan":
        other = copy.deepcopy(text)
        other.embeddings[1, 0, 5:] += 1
        assert torch.allclose(branch(clean, other), before, rtol=0, atol=1e-12), "and padding reaches nothing"


# --- AID -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_frame_reads_its_own_queries(name):
    """Q of frame 2 moves the text that frame 2 reads, and in the first layer no other frame."""
    backbone, method = adapted(name, "aid", **dict.fromkeys(ADAPTERS, False))
    layout, conditions, text = method.layout_for_training([F]), told(name, "aid"), words(name)
    before = method.prepare(backbone, layout, text, conditions)["text"]
    assert before.embeddings.shape[:2] == (B, F) and before.frame_text.tolist() == list(range(F))
    seen: list[Tensor] = []

    def after_first_layer() -> Tensor:
        module = backbone.transformer.transformer_blocks[0]
        hook = module.register_forward_hook(
            lambda m, args, out: seen.append((out if isinstance(out, Tensor) else out[0]).reshape(B, F, -1))
        )
        levels = torch.tensor([[0.0, 0.4, 0.4, 0.4], [0.0, 0.7, 0.7, 0.7]])
        predict(backbone, method, clip(name), levels, text, conditions)
        hook.remove()
        return seen[-1]

    one = after_first_layer()
    backbone.conditioner.dual_query.queries[2] += 1.0
    after = method.prepare(backbone, layout, text, conditions)["text"]
    changed = (after.embeddings != before.embeddings).any(dim=3)  # [B,F,L]
    ends = [L, L] if name != "hunyuan" else [7, 5]
    for sample, end in enumerate(ends):
        assert changed[sample].nonzero().tolist() == [[2, end - 2], [2, end - 1]]
    assert (after_first_layer() != one).any(dim=2).any(dim=0).tolist() == [False, False, True, False]


@pytest.mark.parametrize("name", NAMES)
def test_modules_and_what_reads_text_learn_and_nothing_else(name):
    backbone, method = adapted(name, "aid")
    parts = {"cogvideox": [".attn1."], "latte": [".attn2."], "hunyuan": [".attn.add_", ".norm_added_", ".to_add_out."]}
    own = parts[name.partition("-")[0]]
    predict(backbone, method, clip(name), LEVELS, words(name), told(name, "aid")).square().mean().backward()
    found = 0
    for label, parameter in backbone.named_parameters():
        trained = label.startswith("conditioner.") or any(part in label for part in own)
        assert parameter.requires_grad == trained, label
        if not trained:
            assert parameter.grad is None, label
        elif ".to_add_out." not in label and ".add_q_proj." not in label and ".norm_added_q." not in label:
            found += 1  # the last layer's text stream goes nowhere
            assert parameter.grad is not None and parameter.grad.abs().max() > 0 or label.endswith("to_k.bias"), label
    assert found > 20


@torch.no_grad()
def test_hunyuans_pooled_text_is_no_word_and_states_lose_theirs():
    """Contexts as folders and datasets hold them: the pooled text first, zeros for padding."""
    backbone, method = adapted("hunyuan", "aid")
    text, conditions = words("hunyuan"), told("hunyuan", "aid")
    conditions["states"][:, 2] = 0  # states that were not said are zeros
    apart = predict(backbone, method, clip("hunyuan"), LEVELS, text, conditions)
    backbone.packed_text = True
    embeddings = text.embeddings.clone()
    embeddings[1, :, 5:], embeddings[0, :, 7:] = 0, 0
    pooled = nnf.pad(text.pooled, (0, TEXT_DIM - POOLED_DIM))[:, :, None]
    packed = TextContext(torch.cat([pooled, embeddings], dim=2), text.frame_text)
    states = torch.cat([randn(B, 3, 1, TEXT_DIM, seed=9), conditions["states"]], dim=2)
    states[:, 2] = 0
    out = predict(backbone, method, clip("hunyuan"), LEVELS, packed, conditions | {"states": states})
    assert torch.allclose(out, apart, rtol=0, atol=1e-12)


def test_a_text_too_short_for_its_queries_is_refused():
    backbone, method = adapted("hunyuan", "aid", query_tokens=6)
    with pytest.raises(ValueError, match="a text of 5 tokens is too short to carry 6 query tokens"):
        predict(backbone, method, clip("hunyuan"), LEVELS, words("hunyuan"), told("hunyuan", "aid"))


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fca", "aid"])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_layers_get_the_same_gradients(name, method):
    grads = []
    for checkpointing in (False, True):
        backbone, found = adapted(name, method)
        backbone.train()
        if checkpointing:
            backbone.transformer.enable_gradient_checkpointing()
        predict(backbone, found, clip(name), LEVELS, words(name), told(name, method)).square().sum().backward()
        grads.append([p.grad for p in backbone.conditioner.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 20
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-11) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_only_fcas_modules_learn(name):
    backbone, method = adapted(name, "fca")
    predict(backbone, method, clip(name), LEVELS, words(name), told(name, "fca")).square().mean().backward()
    assert all(p.grad is None for p in backbone.transformer.parameters())
    silent = [n for n, p in backbone.conditioner.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
