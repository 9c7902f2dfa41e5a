"""AID on Stable Video Diffusion, the paper's base: the start, what is trained, what a frame reads, what is refused.

References: the unmodified diffusers U-Net, and the U-Net with its adapters written out frame by frame and place by
place (`tests/models/svd_reference.py`). Texts are 32 wide, the U-Net's contexts 16. Float64 where equality is claimed
to rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch import Tensor, nn

from models.backbones.svd import ImageCondition, SVDBackbone
from models.methods import get_method
from models.modules.dual_query import latent_tokens
from models.noise import base_levels, sample_levels
from models.process import EDM
from models.text import TextContext
from models.tiny import TEXT_DIM
from models.tiny_svd import tiny_svd
from sample.guidance import Guidance
from sample.sampler import sample
from tests.draw import open_zeros, randn
from tests.models.svd_reference import naive_unet
from tests.models.test_aid import ADAPTERS, padded

B, F, L, S, Q, D = 2, 4, 9, 3, 2, 16
SIZE, SCALE, FPS = (4, 6), 0.5, 8.0
SMALL: dict[str, Any] = {
    "image": "concat", "density": "edm", "shift": 1.0, "query_tokens": Q, "width": 16, "heads": 4, "num_states": S,
    "max_frames": 6,
}  # fmt: skip
NO_ADAPTERS = dict.fromkeys(ADAPTERS, False)
PROCESS = EDM()
LEVELS = torch.tensor([0.3, 0.8])


def base(dtype: torch.dtype = torch.float64, **changes: Any) -> SVDBackbone:
    told: dict[str, Any] = {"text_width": TEXT_DIM, "latent_scale": SCALE, "fps": FPS}
    return SVDBackbone(plain_unet(dtype), PROCESS, **told | changes).eval()


def plain_unet(dtype: torch.dtype = torch.float64) -> UNetSpatioTemporalConditionModel:
    """Untouched; its cross-attentions alone require gradients, as with AID: torch sums otherwise where none do."""
    unet = nn.Module.to(tiny_svd(3), dtype).eval()
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".attn2." in name)
    return unet


def adapted(dtype: torch.dtype = torch.float64, opened: bool = True, **params: Any):
    """A backbone with AID's modules, whose last layers (zero at the start) are opened, and its method."""
    backbone, method = base(dtype), get_method("aid", **SMALL | params)
    method.attach(backbone, seed=1)
    backbone.conditioner.to(dtype)
    if opened:
        open_zeros(backbone.conditioner, 0.5)
    return backbone, method


def inputs(dtype: torch.dtype = torch.float64, given: int = 1):
    x = randn(B, 4, F, *SIZE, seed=1, dtype=dtype)
    text = padded(B, L, TEXT_DIM, valid=5, seed=2, dtype=dtype)
    latents = randn(B, 4, given, *SIZE, seed=4, dtype=dtype)
    conditions = {
        "given": torch.cat([latents, torch.ones(B, 1, given, *SIZE, dtype=dtype)], dim=1),
        "states": padded(B, S, 6, TEXT_DIM, valid=4, seed=3, dtype=dtype),
        "embedding": randn(B, 1, D, seed=5, dtype=dtype),
    }
    return x, text, conditions


def run(backbone, method, x, levels, text, conditions) -> Tensor:
    layout = method.layout_for_training([x.shape[2]])
    prepared = {"text": text} | method.prepare(backbone, layout, text, conditions)
    return backbone(x, levels, **prepared, **method.backbone_kwargs(layout))


def run_plain(plain, x: Tensor, levels: Tensor, context: Tensor, image: Tensor) -> Tensor:
    """The U-Net as StableVideoDiffusionPipeline calls it; image latents [B,C,1 or F,H,W], context [B,M,D]."""
    seen = torch.cat([x, image.expand(-1, -1, x.shape[2], -1, -1)], dim=1).transpose(1, 2)
    ids = torch.tensor([[FPS - 1, 127.0, 0.0]]).repeat(len(x), 1)
    return plain(seen, PROCESS.to_model_time(levels), context, added_time_ids=ids).sample.transpose(1, 2)


# --- the start is the base model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_the_start_is_the_diffusers_model_on_the_image_alone(dtype):
    """Without a condition the context is SVD's own single token; with one, every token of it is that token."""
    x, text, conditions = inputs(dtype)
    image, embedding = conditions["given"][:, :4] / SCALE, conditions["embedding"]
    alone = run_plain(plain_unet(dtype), x, LEVELS, embedding, image)
    backbone, method = adapted(dtype, opened=False, condition="none")
    assert torch.equal(run(backbone, method, x, LEVELS, text, conditions), alone), "adapters of zeros beside it"
    near = 1e-12 if dtype == torch.float64 else 1e-5
    for params, tokens in (({"reading": "global"}, L + F * Q), ({"condition": "multimodal"}, L)):
        backbone, method = adapted(dtype, opened=False, **params)
        out = run(backbone, method, x, LEVELS, text, conditions)
        same = run_plain(plain_unet(dtype), x, LEVELS, embedding.expand(-1, tokens, -1), image)
        assert torch.equal(out, same) and (out - alone).abs().max() < near


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_with_a_context_per_frame_the_start_is_the_base(dtype):
    """Bit for bit the backbone reading the same contexts; the diffusers model to the order of sums."""
    x, text, conditions = inputs(dtype)
    backbone, method = adapted(dtype, opened=False)
    out = run(backbone, method, x, LEVELS, text, conditions)
    image, embedding = conditions["given"][:, :4] / SCALE, conditions["embedding"]
    tokens = embedding.expand(-1, L + Q, -1)
    alike = TextContext(tokens[:, None].expand(-1, F, -1, -1), torch.arange(F))
    told = ImageCondition(image, FPS, 127.0, 0.0)
    assert torch.equal(out, base(dtype)(x, LEVELS, alike, image=told, temporal_text=tokens))
    near = 1e-12 if dtype == torch.float64 else 1e-5
    assert (out - run_plain(plain_unet(dtype), x, LEVELS, embedding, image)).abs().max() < near


@torch.no_grad()
def test_several_given_frames_stand_beside_their_own_and_start_without_a_mask():
    backbone, method = adapted(opened=False, condition="none", given_frames=2)
    x, text, conditions = inputs(given=2)
    image = torch.zeros_like(x)
    image[:, :, :2] = conditions["given"][:, :4] / SCALE
    expected = run_plain(plain_unet(), x, LEVELS, conditions["embedding"], image)
    assert torch.equal(run(backbone, method, x, LEVELS, text, conditions), expected)


@pytest.mark.parametrize("given", [1, 2])
@torch.no_grad()
def test_the_mask_of_given_frames_is_a_widened_input_convolution(given):
    backbone, method = adapted(condition="none", given_frames=given, **NO_ADAPTERS)
    x, text, conditions = inputs(given=given)
    wide = nn.Module.to(tiny_svd(3, in_channels=9), torch.float64).eval()
    mask_weight = backbone.conditioner.embed_mask.weight
    wide.load_state_dict(
        plain_unet().state_dict() | {"conv_in.weight": torch.cat([backbone.unet.conv_in.weight, mask_weight], dim=1)}
    )
    beside = torch.zeros(B, 5, F, *SIZE, dtype=x.dtype)
    latents = conditions["given"][:, :4] / SCALE
    beside[:, :4, : F if given == 1 else given] = latents
    beside[:, 4, :given] = 1
    expected = run_plain(wide, x, LEVELS, conditions["embedding"], beside)
    assert torch.allclose(run(backbone, method, x, LEVELS, text, conditions), expected, rtol=0, atol=1e-12)


def test_the_keys_of_the_diffusers_model_stay():
    assert list(adapted()[0].unet.state_dict()) == list(tiny_svd().state_dict())


@torch.no_grad()
def test_opened_modules_change_the_output():
    for params in ({}, {"condition": "none"}, NO_ADAPTERS, {"reading": "global"}):
        (backbone, method), (x, text, conditions) = adapted(**params), inputs()
        plain = run_plain(plain_unet(), x, LEVELS, conditions["embedding"], conditions["given"][:, :4] / SCALE)
        assert (run(backbone, method, x, LEVELS, text, conditions) - plain).abs().max() > 1e-3


# --- what is trained -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", ["per_frame", "global"])
def test_gradients_reach_modules_and_cross_attentions_and_nothing_else(reading):
    backbone, method = adapted(reading=reading)
    x, text, conditions = inputs()
    run(backbone, method, x, LEVELS, text, conditions).square().mean().backward()
    for name, parameter in backbone.named_parameters():
        trained = name.startswith("conditioner.") or ".attn2." in name
        assert parameter.requires_grad == trained, name
        if not trained:
            assert parameter.grad is None, name
            continue
        unseen = name.endswith("to_k.bias")  # the bias of keys moves all scores of a query alike: softmax sees nothing
        assert parameter.grad is not None and parameter.grad.abs().max() > (0 if unseen else 1e-12), name
    cross = {n for n, p in backbone.unet.named_parameters() if p.requires_grad}
    assert {n.split(".attn2.")[0].rpartition(".")[0].rpartition(".")[2] for n in cross} == {
        "transformer_blocks", "temporal_transformer_blocks",
    }  # fmt: skip
    assert {method.rate_scale(f"unet.{n}") for n in cross} == {0.1}


def test_cross_attention_of_a_single_token_learns_no_choice_and_of_several_it_does():
    """Why SVD's cross-attentions have to be trained: with its own one token they never were (aid.md, section 3)."""
    grads = {}
    for condition in ("none", "full"):
        backbone, method = adapted(condition=condition)
        x, text, conditions = inputs()
        run(backbone, method, x, LEVELS, text, conditions).square().mean().backward()
        choose = [p.grad for n, p in backbone.unet.named_parameters() if ".attn2.to_q" in n or ".attn2.to_k" in n]
        grads[condition] = max(float(g.abs().max()) for g in choose)
    assert grads["none"] < 1e-12 < 1e-6 < grads["full"]


def test_at_the_start_the_last_layers_move_and_open_the_way():
    backbone, method = adapted(opened=False)
    x, text, conditions = inputs()
    names = [n for n, _ in backbone.conditioner.named_parameters()]
    last = [n for n in names if ".up." in n or ".out." in n or n == "embed_mask.weight"]
    assert not any(backbone.conditioner.get_parameter(name).any() for name in last)
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=1.0)
    for step in range(2):
        optimizer.zero_grad()
        run(backbone, method, x, LEVELS, text, conditions).square().mean().backward()
        grads = {n: p.grad for n, p in backbone.conditioner.named_parameters() if p.grad is not None}
        moved = {name for name, grad in grads.items() if bool(grad.abs().max() > 1e-14)}
        if step == 0:
            assert moved == set(last)
        optimizer.step()
    assert moved | {n for n in names if n.endswith("to_k.bias")} == set(names)


# --- what a frame reads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [1, 2])
@torch.no_grad()
def test_the_whole_is_the_loop_over_frames_and_places(given):
    """MCondition put together frame by frame, adapters beside each attention, the rest of the U-Net written out."""
    backbone, method = adapted(given_frames=given)
    backbone.conditioner.embed_mask.weight.zero_()  # a widened convolution: see above
    x, text, conditions = inputs(given=given)
    modules = backbone.conditioner
    tokens = latent_tokens(conditions["given"], 2)
    said, queries = modules.dual_query(text, conditions["states"], tokens, F)
    contexts, pooled = [], []
    for b in range(B):
        token = conditions["embedding"][b]
        contexts.append(torch.stack([torch.cat([said[b], queries[b, f]]) + token for f in range(F)]))
        mean = sum(queries[b, f] for f in range(F)) / F
        pooled.append((torch.cat([said[b], mean]) + token).expand(F, -1, -1))
    beside = torch.zeros_like(x)
    beside[:, :, : F if given == 1 else given] = conditions["given"][:, :4] / SCALE
    pairs = list(zip(modules.spatial_adapters, modules.temporal_adapters, strict=True))
    assert len(pairs) == 4
    expected = naive_unet(
        plain_unet(), x, LEVELS[:, None].expand(-1, F), torch.stack(contexts),
        ImageCondition(beside, FPS, 127.0, 0.0), torch.stack(pooled), adapters=pairs, process=PROCESS,
    )  # fmt: skip
    out = run(backbone, method, x, LEVELS, text, conditions)
    assert torch.allclose(out, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_frame_reads_its_own_queries_in_spatial_cross_attention():
    backbone, method = adapted(**NO_ADAPTERS)
    x, text, conditions = inputs()
    place = backbone.unet.down_blocks[0].attentions[0]

    def read() -> tuple[Tensor, Tensor]:
        seen: dict[str, Tensor] = {}
        blocks = {"spatial": place.transformer_blocks[0], "temporal": place.temporal_transformer_blocks[0]}
        hooks = [
            block.attn2.register_forward_hook(lambda m, args, out, kind=kind: seen.update({kind: out}))
            for kind, block in blocks.items()
        ]
        run(backbone, method, x, LEVELS, text, conditions)
        for hook in hooks:
            hook.remove()
        return seen["spatial"].unflatten(0, (B, F)), seen["temporal"].unflatten(0, (B, -1)).transpose(1, 2)

    spatial, temporal = read()
    backbone.conditioner.dual_query.queries[2] += 1.0
    pairs = zip((spatial, temporal), read(), strict=True)
    changed = [(a != b).flatten(2).any(dim=2).any(dim=0).tolist() for a, b in pairs]
    assert changed == [[False, False, True, False], [True] * F], "over time all frames read the mean of the queries"


@torch.no_grad()
def test_global_reading_gives_every_frame_all_queries():
    backbone, method = adapted(reading="global")
    x, text, conditions = inputs()
    prepared = method.prepare(backbone, method.layout_for_training([F]), text, conditions)
    said, queries = backbone.conditioner.dual_query(
        text, conditions["states"], latent_tokens(conditions["given"], 2), F
    )
    context = prepared["text"]
    assert context.embeddings.shape == (B, 1, L + F * Q, D) and context.frame_text.tolist() == [0] * F
    expected = torch.cat([said, queries.flatten(1, 2)], dim=1) + conditions["embedding"]
    assert torch.equal(context.embeddings[:, 0], expected) and prepared.get("temporal_text") is None
    assert torch.equal(context.embeddings[:, 0, 5:L], conditions["embedding"].expand(-1, L - 5, -1)), "padding: image"


@torch.no_grad()
def test_samples_do_not_mix():
    backbone, method = adapted()
    x, text, conditions = inputs()
    out = run(backbone, method, x, LEVELS, text, conditions)
    turned = {name: value.flip(0) for name, value in conditions.items()}
    assert torch.allclose(
        run(backbone, method, x.flip(0), LEVELS.flip(0), text.flip(0), turned).flip(0), out, atol=1e-11
    )


@torch.no_grad()
def test_what_is_lost_is_lost_everywhere():
    """A sample without its given frames has no latents beside it, no embedding, no mask and no image tokens."""
    backbone, method = adapted()
    x, text, conditions = inputs()
    layout = method.layout_for_training([F])
    lost = conditions | {"given": conditions["given"] * torch.tensor([0.0, 1.0]).view(-1, 1, 1, 1, 1)}
    prepared = method.prepare(backbone, layout, text, lost)
    image = prepared["image"]
    assert not image.latents[0].any() and torch.equal(image.latents[1:], conditions["given"][1:, :4] / SCALE)
    assert (image.fps, image.motion_bucket, image.noise_aug) == (FPS, 127.0, 0.0)
    assert not prepared["patches"][0].any() and prepared["patches"][1].any()
    other = method.prepare(backbone, layout, text, lost | {"embedding": conditions["embedding"] + 1})
    same = [torch.equal(a, b) for a, b in zip(prepared["text"].embeddings, other["text"].embeddings, strict=True)]
    assert same == [True, False]


@torch.no_grad()
def test_without_states_the_instruction_is_read_twice():
    backbone, method = adapted(states=False)
    x, text, conditions = inputs()
    assert method.most_states == 0
    only = {name: value for name, value in conditions.items() if name != "states"}
    out = run(backbone, method, x, LEVELS, text, only)
    assert torch.equal(out, run(backbone, method, x, LEVELS, text, conditions))
    reference, full = adapted()
    reference.load_state_dict(backbone.state_dict())
    assert torch.equal(run(reference, full, x, LEVELS, text, only | {"states": text[:, None]}), out)


@pytest.mark.parametrize("missing", ADAPTERS)
def test_each_adapter_can_be_left_out(missing):
    backbone, _ = adapted(**{missing: False})
    kinds = {n.split(".")[2] for n, _ in backbone.conditioner.named_parameters() if "_adapters." in n}
    assert kinds == {name.removesuffix("_adapter") for name in ADAPTERS if name != missing}


def test_the_published_model_has_sixteen_places():
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel()
    assert SVDBackbone(unet, PROCESS, text_width=768).places == (*[320] * 2, *[640] * 2, *[1280] * 3, *[1280] * 3,
                                                                  *[640] * 3, *[320] * 3)  # fmt: skip


# --- the process ---------------------------------------------------------------------------------------------------


def test_training_levels_are_svds():
    method = get_method("aid", **SMALL)
    layout = method.layout_for_training([F])
    levels = method.sample_levels(layout, 4000, torch.Generator().manual_seed(0))
    assert levels.shape == (4000, F) and bool((levels == levels[:, :1]).all()) and layout.roles == ["target"] * F
    _, sigma = PROCESS.signal_and_noise(levels[:, 0])
    assert sigma.log().mean() == pytest.approx(0.7, abs=0.08) and sigma.log().std() == pytest.approx(1.6, abs=0.06)
    with pytest.raises(ValueError, match="shift is 3.0, but density 'edm' says the sigmas themselves: set shift=1"):
        sample_levels(layout, 1, "shared", generator=torch.Generator(), shift=3.0, density="edm")


def guided(image: float, text: float) -> Guidance:
    return Guidance([("image", image), ("text", text)], get_method("aid").guided)


@pytest.mark.parametrize("scales", [(2.0, 5.0), (1.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
@torch.no_grad()
def test_sampling_is_edm_with_three_nested_passes(scales):
    backbone, method = adapted(torch.float32)
    layout = method.layout_for_task("tvp", [F])
    _, text, conditions = inputs(torch.float32)
    nothing = {
        "given": torch.zeros_like(conditions["given"]),
        "states": padded(B, S, 6, TEXT_DIM, valid=1, seed=8, dtype=torch.float32),
        "embedding": torch.zeros_like(conditions["embedding"]),
    }
    null_text = padded(B, L, TEXT_DIM, valid=1, seed=9, dtype=torch.float32)
    plan = method.plan(layout, base_levels(3), "tvp")
    out = sample(
        backbone, layout, plan, text, shape=(B, 4, F, *SIZE), generator=torch.Generator().manual_seed(5),
        guidance=guided(*scales), null={"text": null_text, "states": nothing["states"]}, conditions=conditions,
        prepare=lambda t, c: method.prepare(backbone, layout, t, c), model_levels=method.model_levels,
        **method.backbone_kwargs(layout),
    )  # fmt: skip

    generator = torch.Generator().manual_seed(5)
    noise = torch.stack([torch.randn(4, F, *SIZE, generator=generator) for _ in range(B)])
    x = PROCESS.pure_noise(noise)
    for k in range(3):
        levels, read = plan[k, 0].expand(B), PROCESS.precondition(x, plan[k])
        image_only = conditions | {"states": nothing["states"]}
        e00 = run(backbone, method, read, levels, null_text, nothing)
        e0v = run(backbone, method, read, levels, null_text, image_only)
        etv = run(backbone, method, read, levels, text, conditions)
        s_v, s_t = scales
        guided_ = {(1.0, 1.0): etv, (1.0, 0.0): e0v, (0.0, 0.0): e00}.get(
            scales, e00 + s_v * (e0v - e00) + s_t * (etv - e0v)
        )
        x = PROCESS.step(x, guided_, plan[k], plan[k + 1])
    torch.testing.assert_close(out, x, atol=1e-3, rtol=1e-3)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_what_it_cannot_carry_is_refused_before_training():
    method = get_method("aid", **SMALL)
    method.check_backbone(base().capabilities)
    with pytest.raises(ValueError, match="no layer_branch: .*text_encoder/ and tokenizer/"):
        method.check_backbone(base(text_width=None).capabilities)
    with pytest.raises(ValueError, match="image is 'held', but this model reads .* set method_params.image=concat"):
        get_method("aid", **SMALL | {"image": "held"}).attach(base())
    with pytest.raises(ValueError, match="density is 'uniform', but .* set method_params.density=edm"):
        get_method("aid", **SMALL | {"density": "uniform"}).attach(base())
    with pytest.raises(ValueError, match="no one_grid: .*differ in width and size"):
        get_method("fca").attach(base())
    with pytest.raises(ValueError, match="sigma_max is 80"):
        method.attach(SVDBackbone(tiny_svd(), EDM(0.002, 80.0), text_width=TEXT_DIM))
    with pytest.raises(ValueError, match="32 / 16 = 2 is not a multiple of 4 heads"):
        get_method("aid", **SMALL | {"adapter_ratio": 16}).attach(base())


def test_edm_levels_are_for_edm_models():
    from models.backbones.wan import WanBackbone
    from models.tiny import tiny_transformer

    with pytest.raises(ValueError, match="density is 'edm', but .* no EDM"):
        get_method("aid", **SMALL).attach(WanBackbone(tiny_transformer()))
    for name in ("lct", "fvdm"):
        with pytest.raises(ValueError, match=f"{name}: density is 'edm', but .* no EDM"):
            get_method(name, density="edm").check_process(WanBackbone(tiny_transformer()).process)
    get_method("lct").check_process(EDM())
    with pytest.raises(ValueError, match="fvdm: density is 'uniform', but this model is an EDM"):
        get_method("fvdm").check_process(EDM())


def test_what_does_not_fit_is_named():
    backbone, method = adapted()
    x, text, conditions = inputs()
    two = TextContext(text[:, None].expand(-1, 2, -1, -1), torch.tensor([0, 0, 1, 1]))
    odd = {"given": conditions["given"][..., :5]}
    cases: list[tuple[Any, dict[str, Tensor], str]] = [
        (two, conditions, "one shot from one text, got 2 texts"),
        (text, {k: v for k, v in conditions.items() if k != "given"}, "continues given frames"),
        (text, {k: v for k, v in conditions.items() if k != "embedding"}, "image embedding of the first frame"),
        (text, conditions | {"embedding": conditions["embedding"][:, :, :8]}, r"embedding has shape .*\[2,1,16\]"),
        (text, {k: v for k, v in conditions.items() if k != "states"}, "reads states"),
        (text[..., :16], conditions, "texts are 16 wide, this model's text encoder makes 32"),
        (text, conditions | odd, "latent size 4x5 is not a multiple of 2"),
        (text, conditions | {"given": inputs(given=F + 1)[2]["given"]}, "given has shape"),
    ]
    for words, told, message in cases:
        with pytest.raises(ValueError, match=message):
            run(backbone, method, x, LEVELS, words, told)
    with pytest.raises(ValueError, match="no AID modules"):
        run(base(), method, x, LEVELS, text, conditions)
