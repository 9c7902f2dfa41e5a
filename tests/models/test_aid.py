"""AID: the start is the base model, every module sees what it should, and the tasks train and sample.

n = 4 tokens per latent frame: latents are 4 x 4, patches 2 x 2. Float64 where equality is claimed to rounding.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from models.backbones.wan import WanBackbone
from models.folder import load_model, save_model
from models.methods import get_method
from models.modules.aid import AIDModules
from models.modules.dual_query import latent_tokens
from models.noise import base_levels
from models.process import FlowMatching
from models.text import TextContext
from models.tiny import TEXT_DIM, build_tiny_folder, tiny_transformer
from sample.guidance import Guidance
from sample.sampler import sample
from tests.draw import open_zeros, randn

B, F, L, S, W, Q = 2, 5, 24, 3, 16, 2
SMALL = {"query_tokens": Q, "width": W, "heads": 4, "num_states": S, "max_frames": 6}
ADAPTERS = ("spatial_adapter", "short_term_adapter", "long_term_adapter")


def padded(*shape: int, valid: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Text embeddings [...,L,D] whose first `valid` tokens are not padding."""
    text = randn(*shape, seed=seed, dtype=dtype)
    text[..., valid:, :] = 0
    return text


def base(dtype: torch.dtype = torch.float64) -> WanBackbone:
    return WanBackbone(nn.Module.to(tiny_transformer(3), dtype)).eval()


def adapted(dtype: torch.dtype = torch.float64, opened: bool = True, **params):
    """A backbone with AID's modules, whose last layers (zero at the start) are opened, and its method."""
    backbone, method = base(dtype), get_method("aid", **SMALL | params)
    method.attach(backbone, seed=1)
    backbone.conditioner.to(dtype)
    if opened:
        open_zeros(backbone.conditioner, 0.5)
    return backbone, method


def inputs(dtype: torch.dtype = torch.float64, given: int = 1):
    x = randn(B, 4, F, 4, 4, seed=1, dtype=dtype)
    text = padded(B, L, TEXT_DIM, valid=7, seed=2, dtype=dtype)
    states = padded(B, S, 6, TEXT_DIM, valid=4, seed=3, dtype=dtype)
    return x, text, {"given": given_clip(dtype, given), "states": states}


def given_clip(dtype: torch.dtype = torch.float64, frames: int = 1) -> Tensor:
    return torch.cat([randn(B, 4, frames, 4, 4, seed=4, dtype=dtype), torch.ones(B, 1, frames, 4, 4, dtype=dtype)], 1)


def run(backbone, method, x, levels, text, conditions) -> Tensor:
    layout = method.layout_for_training([F])
    prepared = {"text": text} | method.prepare(backbone, layout, text, conditions)
    return backbone(x, levels, **prepared, **method.backbone_kwargs(layout))


LEVELS = torch.tensor([0.3, 0.8])


# --- the start is the base model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("image", ["held", "concat"])
@torch.no_grad()
def test_the_start_is_the_base_bit_for_bit(dtype, image):
    backbone, method = adapted(dtype, opened=False, image=image)
    plain = base(dtype)
    x, text, conditions = inputs(dtype)
    levels = LEVELS[:, None] * torch.tensor([0.0, 1, 1, 1, 1]) if image == "held" else LEVELS
    per_frame = TextContext(text[:, None].expand(-1, F, -1, -1), torch.arange(F))
    assert torch.equal(run(backbone, method, x, levels, text, conditions), plain(x, levels, per_frame))
    assert (run(backbone, method, x, levels, text, conditions) - plain(x, levels, text)).abs().max() < (
        1e-12 if dtype == torch.float64 else 1e-5
    ), "one context per frame and one for all differ by the order of sums only"


@pytest.mark.parametrize(
    "params", [{"reading": "global"}, {"condition": "multimodal"}, {"condition": "none"}], ids=lambda p: str(p)
)
@torch.no_grad()
def test_with_one_context_the_start_is_the_plain_model_bit_for_bit(params):
    backbone, method = adapted(torch.float32, opened=False, **params)
    x, text, conditions = inputs(torch.float32)
    plain = tiny_transformer(3).eval()
    layout = method.layout_for_training([F])
    out = run(backbone, method, x, LEVELS, text, conditions)
    assert torch.equal(out, plain(x, 1000 * LEVELS, text).sample)
    assert layout.roles == ["condition"] + ["target"] * 4


def test_the_keys_of_the_diffusers_model_stay():
    backbone, _ = adapted()
    assert list(backbone.transformer.state_dict()) == list(tiny_transformer().state_dict())


@torch.no_grad()
def test_opened_modules_change_the_output():
    for params in ({}, {"condition": "none"}, dict.fromkeys(ADAPTERS, False)):
        (backbone, method), (x, text, conditions) = adapted(**params), inputs()
        assert (run(backbone, method, x, LEVELS, text, conditions) - base()(x, LEVELS, text)).abs().max() > 1e-3


# --- what is trained -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", ["held", "concat"])
def test_gradients_reach_modules_and_cross_attention_and_nothing_else(image):
    backbone, method = adapted(image=image)
    x, text, conditions = inputs()
    run(backbone, method, x, LEVELS, text, conditions).square().mean().backward()
    for name, parameter in backbone.named_parameters():
        trained = name.startswith("conditioner.") or ".attn2." in name
        assert parameter.requires_grad == trained, name
        if trained:
            assert parameter.grad is not None, name
            # the bias of keys moves all scores of a query alike, which softmax does not see
            assert parameter.grad.abs().max() > (0 if name.endswith("to_k.bias") else 1e-12), name
        else:
            assert parameter.grad is None, name


def test_at_the_start_the_last_layers_move_and_open_the_way():
    """With the down-projection zero as well, no gradient would ever come through."""
    backbone, method = adapted(opened=False)
    x, text, conditions = inputs()
    last = [n for n, _ in backbone.conditioner.named_parameters() if ".up." in n or ".out." in n]
    assert not any(backbone.conditioner.get_parameter(name).any() for name in last)
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=1.0)
    for step in range(2):
        optimizer.zero_grad()
        run(backbone, method, x, LEVELS, text, conditions).square().mean().backward()
        moved = {
            name for name, p in backbone.conditioner.named_parameters() if p.grad is not None and bool(p.grad.any())
        }
        if step == 0:
            assert moved == set(last)
        optimizer.step()
    assert len(moved) == len(list(backbone.conditioner.parameters()))


def test_cross_attention_learns_at_a_rate_of_its_own():
    backbone, method = adapted()
    rates = {name: method.rate_scale(name) for name, p in backbone.named_parameters() if p.requires_grad}
    assert {rates[n] for n in rates if ".attn2." in n} == {0.1}
    assert {rates[n] for n in rates if n.startswith("conditioner.")} == {1.0}


# --- adapters --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_adapters_stand_beside_attention_on_its_normalised_input():
    """Y = Attn(X) + branch(X), X after norm and modulation, in every layer."""
    backbone, method = adapted(condition="none")
    x, text, conditions = inputs()
    seen, added = [], []
    for block, adapters in zip(backbone.transformer.blocks, backbone.conditioner.adapters, strict=True):
        block.attn1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        adapters.register_forward_pre_hook(lambda m, args: added.append(args[0]))
    run(backbone, method, x, LEVELS, text, conditions)
    assert len(seen) == len(added) == 2
    for hidden, read in zip(seen, added, strict=True):
        assert read.shape == (B, F, 2, 2, 48)
        assert torch.equal(read.flatten(1, 3), hidden.reshape(B, F * 4, 48))


@pytest.mark.parametrize("missing", ADAPTERS)
def test_each_adapter_can_be_left_out(missing):
    backbone, _ = adapted(**{missing: False})
    names = {name.split(".")[2] for name, _ in backbone.conditioner.adapters.named_parameters(prefix="a")}
    assert names == {name.removesuffix("_adapter") for name in ADAPTERS if name != missing}


def test_what_does_not_fit_is_refused():
    backbone, method = adapted()
    x, text, conditions = inputs()
    full = padded(B, L, TEXT_DIM, valid=L - 1, seed=2)
    cases = [
        (full, conditions, "a text of 23 tokens in a context of 24 leaves no room for 2 query tokens"),
        (text, {"states": conditions["states"]}, "continues given frames"),
        (text, {"given": conditions["given"]}, "reads states"),
        (text, conditions | {"states": conditions["states"].repeat(1, 2, 1, 1)}, "with 6 states; .* num_states=3"),
        (text, conditions | {"given": given_clip(frames=F + 1)}, "given has shape"),
    ]
    for words_, conditions_, message in cases:
        with pytest.raises(ValueError, match=message):
            run(backbone, method, x, LEVELS, words_, conditions_)
    with pytest.raises(ValueError, match="no AID modules"):
        run(base(), method, x, LEVELS, text, conditions)
    for params, message in (
        ({"image": "pasted"}, "image is 'pasted'; choose one of held, concat"),
        ({"given_frames": 0}, "given_frames is 0"),
        ({"condition": "both"}, "choose one of none, multimodal, decomposed, full"),
    ):
        with pytest.raises(ValueError, match=message):
            get_method("aid", **params)
    with pytest.raises(ValueError, match="5 of 5 latent frames are given"):
        get_method("aid", given_frames=5).layout_for_training([5])
    with pytest.raises(ValueError, match="one shot at a time"):
        method.layout_for_training([3, 3])


# --- what a frame reads --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_frame_reads_its_own_queries_in_cross_attention():
    backbone, method = adapted(**dict.fromkeys(ADAPTERS, False))
    x, text, conditions = inputs()

    def texts_read() -> Tensor:
        read = []
        hook = backbone.transformer.blocks[0].attn2.register_forward_hook(lambda m, args, out: read.append(out))
        run(backbone, method, x, LEVELS, text, conditions)
        hook.remove()
        return read[0].reshape(B, F, 4, 48)

    before = texts_read()
    backbone.conditioner.dual_query.queries[3] += 1.0
    assert (before != texts_read()).flatten(2).any(dim=2).any(dim=0).tolist() == [False, False, False, True, False]


@torch.no_grad()
def test_global_reading_gives_every_frame_all_queries():
    backbone, method = adapted(reading="global")
    x, text, conditions = inputs()
    prepared = method.prepare(backbone, method.layout_for_training([F]), text, conditions)
    context = prepared["text"]
    said, queries = backbone.conditioner.dual_query(
        text, conditions["states"], latent_tokens(conditions["given"], 2), F
    )
    assert context.embeddings.shape == (B, 1, L, TEXT_DIM) and context.frame_text.tolist() == [0] * F
    assert torch.equal(context.embeddings[:, 0, L - F * Q :], queries.flatten(1, 2))
    assert torch.equal(context.embeddings[:, 0, :7], (text + said)[:, :7])


@torch.no_grad()
def test_without_states_the_instruction_is_read_twice():
    backbone, method = adapted(states=False)
    x, text, conditions = inputs()
    assert method.most_states == 0
    only = {"given": conditions["given"]}
    assert torch.equal(run(backbone, method, x, LEVELS, text, only), run(backbone, method, x, LEVELS, text, conditions))
    full = get_method("aid", **SMALL)
    reference, _ = adapted()
    reference.load_state_dict(backbone.state_dict())
    as_states = only | {"states": text[:, None]}
    assert torch.equal(run(reference, full, x, LEVELS, text, as_states), run(backbone, method, x, LEVELS, text, only))


@torch.no_grad()
def test_image_concat_is_a_widened_patch_embedding():
    backbone, method = adapted(image="concat", condition="none", **dict.fromkeys(ADAPTERS, False))
    x, text, conditions = inputs(given=1)
    wide = nn.Module.to(tiny_transformer(3, in_channels=9), torch.float64).eval()
    weights = backbone.transformer.state_dict() | {
        "patch_embedding.weight": torch.cat(
            [backbone.transformer.patch_embedding.weight, backbone.conditioner.embed_image.weight], dim=1
        )
    }
    wide.load_state_dict(weights)
    z = torch.zeros(B, 5, F, 4, 4, dtype=torch.float64)
    z[:, :, :1] = conditions["given"]
    expected = wide(torch.cat([x, z], dim=1), 1000 * LEVELS, text).sample
    assert torch.allclose(run(backbone, method, x, LEVELS, text, conditions), expected, atol=1e-12)


# --- method --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2])
def test_held_frames_are_clean_and_concat_frames_are_made(frames):
    generator = torch.Generator().manual_seed(0)
    held, concat = (get_method("aid", image=image, given_frames=frames, shift=3.0) for image in ("held", "concat"))
    layout = held.layout_for_training([F])
    levels = held.sample_levels(layout, 64, generator)
    assert not levels[:, :frames].any() and (levels[:, frames:] == levels[:, -1:]).all() and levels[:, -1].min() > 0
    assert held.loss_weights(layout).tolist() == pytest.approx([0] * frames + [1 / (F - frames)] * (F - frames))
    assert torch.equal(held.model_levels(levels), levels)
    plan = held.plan(layout, base_levels(4, 3.0), "tvp")
    assert not plan[:, :frames].any() and torch.equal(plan[:, -1], base_levels(4, 3.0))

    layout = concat.layout_for_training([F])
    levels = concat.sample_levels(layout, 64, generator)
    assert (levels == levels[:, :1]).all() and concat.model_levels(levels).shape == (64,)
    assert concat.loss_weights(layout).tolist() == pytest.approx([1 / F] * F)
    assert torch.equal(concat.plan(layout, base_levels(4), "tvp"), base_levels(4)[:, None].expand(-1, F))
    clean = randn(B, 4, F, 4, 4, seed=0)
    given = concat.conditions(clean, layout)["given"]
    assert torch.equal(given[:, :4], clean[:, :, :frames]) and (given[:, 4] == 1).all()


def test_modules_come_from_their_seed_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    weights = [copy.deepcopy(adapted(opened=False)[0].conditioner.state_dict()) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    other = base()
    get_method("aid", **SMALL).attach(other, seed=2)
    assert not torch.equal(other.conditioner.dual_query.queries.double(), weights[0]["dual_query.queries"])


def test_a_folder_brings_the_modules_back(tmp_path):
    model = build_tiny_folder(tmp_path / "base", method="aid", method_params=SMALL)
    method = get_method("aid", **SMALL)
    method.attach(model.backbone, seed=3)
    with torch.no_grad():
        for parameter in model.backbone.conditioner.parameters():
            parameter.add_(0.1)
    save_model(tmp_path / "aid", model, model.settings)
    again = load_model(tmp_path / "aid")
    assert isinstance(again.backbone.conditioner, AIDModules)
    for (name, one), (_, other) in zip(
        model.backbone.state_dict().items(), again.backbone.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name
    method.attach(again.backbone)  # training goes on
    assert torch.equal(again.backbone.conditioner.dual_query.queries, model.backbone.conditioner.dual_query.queries)
    with pytest.raises(ValueError, match="another method or size"):
        get_method("aid", **SMALL | {"width": 32}).attach(again.backbone)
    with pytest.raises(ValueError, match="the model has some"):
        get_method("lct").attach(again.backbone)
    with pytest.raises(ValueError, match=r"model.safetensors does not fit the method_params"):
        wrong = tmp_path / "aid" / "shotloom.json"
        wrong.write_text(wrong.read_text().replace('"width": 16', '"width": 32'))
        load_model(tmp_path / "aid")


# --- guidance ------------------------------------------------------------------------------------------------------


def guided(image: float, text: float) -> Guidance:
    return Guidance([("image", image), ("text", text)], get_method("aid").guided)


def test_guidance_is_nested_image_then_text_with_states():
    branches = guided(2.0, 5.0).branches
    assert [branch.dropped for branch in branches] == [{"given", "text", "states"}, {"text", "states"}, frozenset()]
    assert [branch.weight for branch in branches] == [-1.0, -3.0, 5.0]
    e00, e0v, etv = (randn(2, seed=s) for s in range(3))
    assert torch.allclose(guided(2.0, 5.0).combine([e00, e0v, etv]), e00 + 2 * (e0v - e00) + 5 * (etv - e0v))
    assert [b.dropped for b in guided(1.0, 1.0).branches] == [frozenset()], "all scales 1: fully conditional"
    assert [b.dropped for b in guided(1.0, 0.0).branches] == [{"text", "states"}]
    assert [b.dropped for b in guided(0.0, 0.0).branches] == [{"given", "text", "states"}]
    with pytest.raises(ValueError, match="under two scales"):
        Guidance([("image", 1.0), ("text", 1.0)], {"image": ("given",), "text": ("text", "given")})


@pytest.mark.parametrize("image", ["held", "concat"])
@torch.no_grad()
def test_sampling_is_three_passes_on_the_modules(image):
    backbone, method = adapted(torch.float32, image=image)
    layout, plan = method.layout_for_task("tvp", [F]), None
    plan = method.plan(layout, base_levels(3, 3.0), "tvp")
    _, text, conditions = inputs(torch.float32)
    null_text, null_states = (
        padded(*t.shape, valid=1, seed=8, dtype=torch.float32) for t in (text, conditions["states"])
    )
    clean = torch.zeros(B, 4, F, 4, 4)
    clean[:, :, :1] = conditions["given"][:, :4]
    out = sample(
        backbone, layout, plan, text, shape=(B, 4, F, 4, 4), generator=torch.Generator().manual_seed(5), given=clean,
        guidance=guided(2.0, 5.0), null={"text": null_text, "states": null_states}, conditions=conditions,
        prepare=lambda t, c: method.prepare(backbone, layout, t, c), model_levels=method.model_levels,
        **method.backbone_kwargs(layout),
    )  # fmt: skip

    held, process = image == "held", FlowMatching()
    generator = torch.Generator().manual_seed(5)
    lengths = (1, 4) if held else (5,)
    noise = torch.stack(
        [torch.cat([torch.randn(4, n, 4, 4, generator=generator) for n in lengths], dim=1) for _ in range(B)]
    )
    x = noise.clone()
    if held:
        x[:, :, 0] = clean[:, :, 0]
    drop_text, keep = {"states": null_states}, conditions
    for k in range(3):
        levels = plan[k].expand(B, -1) if held else plan[k, 0].expand(B)
        e00 = run(backbone, method, x, levels, null_text, drop_text | {"given": torch.zeros_like(keep["given"])})
        e0v = run(backbone, method, x, levels, null_text, drop_text | {"given": keep["given"]})
        etv = run(backbone, method, x, levels, text, keep)
        guided_ = e00 + 2 * (e0v - e00) + 5 * (etv - e0v)
        x = process.step(x, guided_, plan[k], plan[k + 1])
    torch.testing.assert_close(out, x, atol=1e-4, rtol=1e-4)
    assert torch.equal(out[:, :, 0], clean[:, :, 0]) == held
