"""What holds for all methods at once: the checks of the specifications that belong to no single module.

Text to video is the plain sampler whatever modules are attached; the loss reaches the frames that are learnt and no
other; an oracle has none; guidance identities hold for a method with modules of its own.
"""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from models.backbones import wan
from models.backbones.wan import WanBackbone
from models.layout import ClipLayout, shots_layout
from models.methods import get_method
from models.modules.lora import inject_lora
from models.noise import base_levels
from models.process import FlowMatching
from models.text import TextContext
from models.tiny import TEXT_DIM, tiny_transformer
from sample.guidance import Guidance
from sample.sampler import sample
from tests.models.processes import PROCESSES, oracle
from tests.models.test_aid import SMALL as AID_SMALL
from tests.models.test_fca import SMALL as FCA_SMALL
from train.batches import SceneBatch
from train.loop import clip_losses

B, F, L = 2, 4, 16
SHAPE = (B, 4, F, 4, 4)
LEVELS = base_levels(3, shift=3.0)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def text() -> Tensor:
    found = randn(B, L, TEXT_DIM, seed=2)
    found[:, 7:] = 0
    return found


# --- 1: with any modules at the start, and any method, text to video is the base pipeline ----------------------------

T2V = {
    "fvdm": ("fvdm", "t2v", {}),
    "lct": ("lct", "joint", {}),
    "lct, diagonal": ("lct", "joint", {"position_mode": "diagonal"}),
    "lct, causal": ("lct", "joint", {"attention_rule": "group_causal"}),
    "fca": ("fca", "tvp", FCA_SMALL),
    "fca, no frame-wise text": ("fca", "tvp", FCA_SMALL | {"adapter": "no_frame_text"}),
    "aid": ("aid", "tvp", AID_SMALL | {"image": "concat", "reading": "global", "query_tokens": 1}),
    "aid, adapters alone": ("aid", "tvp", AID_SMALL | {"image": "concat", "condition": "none"}),
    "lora": ("fvdm", "t2v", {}),
}


@pytest.mark.parametrize("name", T2V)
@torch.no_grad()
def test_text_to_video_is_the_plain_sampler_bit_for_bit(name):
    """Against a loop over the unmodified diffusers model: one shot, nothing held, one level per clip."""
    method_name, task, params = T2V[name]
    method, plain = get_method(method_name, **params), tiny_transformer(3).eval()
    backbone = WanBackbone(copy.deepcopy(plain)).eval()
    if name == "lora":
        inject_lora(backbone, 2, 2)
    method.attach(backbone, seed=1)
    layout, words = method.layout_for_task(task, [F]), text()
    told = {"given": randn(B, 4, F, 4, 4, seed=4), "states": randn(B, 3, 4, TEXT_DIM, seed=5)}
    conditions = method.conditions(told["given"], layout)
    conditions |= {"states": told["states"]} if method.most_states else {}
    made = sample(
        backbone, layout, method.plan(layout, LEVELS, task), words, shape=SHAPE,
        generator=torch.Generator().manual_seed(0), conditions=conditions, model_levels=method.model_levels,
        prepare=partial(method.prepare, backbone, layout), **method.backbone_kwargs(layout),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    x = torch.stack([torch.randn(SHAPE[1:], generator=generator) for _ in range(B)])
    for level, after in zip(LEVELS, LEVELS[1:], strict=False):
        x = x + (after - level) * plain(x, 1000 * level.expand(B), words).sample
    assert torch.equal(made, x)


# --- 5: where the loss is, and where it is not -----------------------------------------------------------------------


class Says(nn.Module):
    """A backbone whose prediction is a leaf tensor, to look at its gradient."""

    capabilities = SimpleNamespace(frames_per_token=1)

    def __init__(self, process, prediction: Tensor) -> None:
        super().__init__()
        self.process, self.prediction = process, prediction
        self.conditioner = None

    def forward(self, x: Tensor, levels: Tensor, **kwargs) -> Tensor:
        return self.prediction


def losses_of(method, layout: ClipLayout, levels: Tensor, prediction: Tensor, process, clean: Tensor, noise: Tensor):
    batch = SceneBatch(clean, layout, TextContext(torch.zeros(B, layout.num_shots, 4, 8), layout.text_ids), [])
    bare = SimpleNamespace(  # what a method answers without its modules
        loss_weights=method.loss_weights, learns=method.learns, model_levels=method.model_levels,
        backbone_kwargs=method.backbone_kwargs, prepare=lambda *args: {},
    )  # fmt: skip
    return clip_losses(Says(process, prediction), bare, batch, levels, noise, {})[0]


CLEAN = torch.tensor([[0.0, 0.4, 0.9, 0.0, 0.2], [0.7, 0.7, 0.7, 0.7, 0.7]])
BESIDE = torch.tensor([[0.1, 0.1, 0.6, 0.6, 0.8], [0.3, 0.3, 0.5, 0.5, 0.9]])  # LCT: shots of 2, 2 and 1 frames
ONE, HELD = torch.full((B, 5), 0.6), torch.tensor([0.0, 1, 1, 1, 1]) * 0.6
LEARNT = {
    "fvdm: every frame above level 0": ("fvdm", {}, [5], CLEAN, CLEAN > 0),
    "lct: all shots but those that stand for given ones": ("lct", {}, [2, 2, 1], BESIDE, BESIDE != 0.1),
    "fca: given frames, too": ("fca", {}, [5], ONE, ONE > 0),
    "fca: but where told": ("fca", {"loss_on_given": False}, [5], ONE, HELD.expand(B, -1) > 0),
    "fca: without modules they are held": ("fca", {"adapter": "none"}, [5], HELD.expand(B, -1), HELD.expand(B, -1) > 0),
    "aid: held": ("aid", {}, [5], HELD.expand(B, -1), HELD.expand(B, -1) > 0),
    "aid: beside": ("aid", {"image": "concat"}, [5], ONE, ONE > 0),
    "svd: all": ("svd", {}, [5], ONE, ONE > 0),
}


@pytest.mark.parametrize("name", LEARNT)
def test_the_gradient_is_zero_exactly_where_nothing_is_learnt(name):
    method_name, params, shots, levels, learnt = LEARNT[name]
    method = get_method(method_name, **params)
    process = PROCESSES["edm"] if method_name == "svd" else PROCESSES["flow"]
    layout = method.layout_for_training(shots)
    prediction = randn(B, 3, 5, 2, 2, seed=1).requires_grad_()
    clean, noise = randn(B, 3, 5, 2, 2, seed=2), randn(B, 3, 5, 2, 2, seed=3)
    losses_of(method, layout, levels, prediction, process, clean, noise).sum().backward()
    gradient = prediction.grad.transpose(1, 2).flatten(2)  # [B,F,.]
    assert ((gradient != 0).all(dim=2) == learnt).all() and (gradient[~learnt] == 0).all()


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_an_oracle_has_no_loss(process):
    """Of every process, with its weights (EDM: (sigma^2+1)/sigma^2), at levels down to a frame that is nearly clean."""
    method, layout = get_method("fvdm"), shots_layout([5])
    levels = torch.tensor([[1e-3, 0.25, 0.5, 0.75, 1.0], [0.9, 0.0, 0.1, 0.2, 0.3]])
    clean, noise = (randn(B, 3, 5, 2, 2, seed=seed, dtype=torch.float64) for seed in (2, 3))
    prediction = oracle(process, process.add_noise(clean, noise, levels), clean, levels).requires_grad_()
    losses = losses_of(method, layout, levels, prediction, process, clean, noise)
    assert losses.abs().max() < 1e-10
    wrong = losses_of(method, layout, levels, prediction + 0.1, process, clean, noise)
    assert (wrong > 1e-3).all()


# --- 8: guidance of a method with modules of its own -----------------------------------------------------------------


@torch.no_grad()
def test_fca_guidance_keeps_the_given_frames_and_its_identities_hold():
    """Scale 1 is the conditional pass, 0 the one without the text; what training loses of both is a pass without.

    The second scale (unify.md, "text (± init)"; fca.md, section 5) is off unless it is asked for.
    """
    backbone, method = WanBackbone(tiny_transformer(3)).eval(), get_method("fca", **FCA_SMALL)
    method.attach(backbone, seed=1)
    for i, block in enumerate(backbone.conditioner.blocks):
        block.modulation.bias += 0.5 * randn(len(block.modulation.bias), seed=60 + i)
    layout, words, null = method.layout_for_task("tvp", [F]), text(), torch.zeros(B, L, TEXT_DIM)
    null[:, 0] = randn(TEXT_DIM, seed=8)
    given = randn(B, 4, 1, 4, 4, seed=4)

    def made(scales: dict[str, float] | None, said: Tensor = words, known: Tensor = given) -> Tensor:
        return sample(
            backbone, layout, method.plan(layout, LEVELS, "tvp"), said, shape=SHAPE,
            generator=torch.Generator().manual_seed(0), conditions={"given": known}, null={"text": null},
            guidance=None if scales is None else Guidance(list(scales.items()), method.guided),
            model_levels=method.model_levels, prepare=partial(method.prepare, backbone, layout),
            **method.backbone_kwargs(layout),
        )  # fmt: skip

    assert torch.equal(made({"text": 1.0}), made(None)) and torch.equal(made({"text": 0.0}), made(None, null))
    assert not torch.allclose(made(None, null), made(None))
    lost = made(None, null, torch.zeros_like(given))
    assert not torch.allclose(lost, made({"text": 0.0})), "the null branch of guidance keeps the given frames"
    assert method.drops == {"given": 0.1}, "and training loses them beside a null text as often as beside another"

    # the second scale, nested: nothing, then the given frames, then text with them; a scale of 1 is as if it were none
    assert list(method.guided) == ["image", "text"] and method.image_guidance == 1
    for text_scale in (0.0, 1.0, 4.0):
        assert torch.equal(made({"image": 1.0, "text": text_scale}), made({"text": text_scale}))
    assert torch.equal(made({"image": 0.0, "text": 0.0}), lost)
    generator = torch.Generator().manual_seed(0)
    x = torch.stack([torch.randn(SHAPE[1:], generator=generator) for _ in range(B)])

    def predicted(said: Tensor, known: Tensor, level: Tensor) -> Tensor:
        told = method.prepare(backbone, layout, said, {"given": known})
        seen = {"text": said} | told | method.backbone_kwargs(layout)
        return backbone(x, level.expand(B), **seen)

    for level, after in zip(LEVELS, LEVELS[1:], strict=False):
        e00, e0v = predicted(null, torch.zeros_like(given), level), predicted(null, given, level)
        etv = predicted(words, given, level)
        x = x + (after - level) * (e00 + 2.0 * (e0v - e00) + 5.0 * (etv - e0v))
    torch.testing.assert_close(made({"image": 2.0, "text": 5.0}), x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made({"text": 5.0}), x)


# --- LCT: shots are told apart by their places alone -----------------------------------------------------------------


@torch.no_grad()
def test_shots_swap_places_only_if_their_positions_do(monkeypatch):
    backbone = WanBackbone(nn.Module.to(tiny_transformer(3), torch.float64)).eval()
    layout, x = shots_layout([2, 2]), randn(B, 4, 4, 4, 4, seed=1, dtype=torch.float64)
    words = randn(B, 2, L, TEXT_DIM, seed=2, dtype=torch.float64)
    levels = torch.tensor([[0.3, 0.3, 0.8, 0.8]]).expand(B, -1)
    kwargs = get_method("lct").backbone_kwargs(layout)
    order, texts = torch.tensor([2, 3, 0, 1]), torch.tensor([1, 0])

    def run(frames: Tensor | None = None) -> Tensor:
        if frames is None:
            return backbone(x, levels, TextContext(words, layout.text_ids), **kwargs)
        swapped = TextContext(words[:, texts], layout.text_ids)
        return backbone(x[:, :, frames], levels[:, frames], swapped, **kwargs)[:, :, frames]

    out = run()
    assert not torch.allclose(run(order), out), "positions stay: another clip"
    tables, tokens = wan._tables, order.repeat_interleave(4) * 4 + torch.arange(4).repeat(4)
    monkeypatch.setattr(wan, "_tables", lambda *args: tuple(table[:, tokens] for table in tables(*args)))
    assert torch.allclose(run(order), out, rtol=0, atol=1e-12), "positions go with the shots: the same scene"


# --- 7: every draw comes from the generator that is handed in --------------------------------------------------------


@pytest.mark.parametrize("name", ["fvdm", "lct", "tic_ft", "fca", "aid", "svd"])
def test_training_draws_come_from_the_generator_alone(name):
    method = get_method(name).for_model(FlowMatching(), 3.0)
    layout = method.layout_for_training([4], [2, 2]) if name == "tic_ft" else method.layout_for_training([4])
    state = torch.get_rng_state()
    one, again, other = (method.sample_levels(layout, 8, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())
