"""Shots one after another: against a loop that runs the whole history in every step, with no cache and a dense mask."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.backbones.hunyuan import HunyuanVideoBackbone
from models.backbones.wan import WanBackbone
from models.methods import get_method
from models.noise import base_levels
from models.tiny import TEXT_DIM
from models.tiny_hunyuan import tiny_hunyuan
from sample.guidance import Guidance
from sample.rollout import RolloutShot, rollout
from sample.sampler import sample
from tests.draw import randn
from tests.models import test_kv_cache
from tests.models.test_wan import make

B, L, SCALE, T_C = 2, 7, 2.5, 0.3
SIZES = test_kv_cache.SIZES  # latent frames of three shots
METHOD = get_method("lct", attention_rule="group_causal", context_level=T_C, position_gap=3)
LEVELS = base_levels(3, shift=3.0)
SIZE = (4, 4, 4)
TEXTS = randn(B, 3, L, TEXT_DIM, seed=2)
NULL = randn(1, L, TEXT_DIM, seed=3).expand(B, -1, -1)
HISTORIES = {
    "all": [(), (0,), (0, 1)],
    "last": [(), (0,), (1,)],
    "selected": [(), (), (0,)],
    "in another order": [(), (0,), (1, 0)],
}


def seeds(shot: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(10 * b + shot) for b in range(B)]


def shots_of(histories, texts: Tensor = TEXTS, sizes=SIZES) -> list[RolloutShot]:
    return [
        RolloutShot(sizes[i], texts[:, i], NULL.to(texts), seeds(i), history) for i, history in enumerate(histories)
    ]


def run(backbone: WanBackbone, shots: list[RolloutShot], **options) -> list[Tensor]:
    options = {"size": SIZE, "guidance": Guidance([("text", SCALE)])} | options
    return list(rollout(backbone, METHOD, "autoregressive", shots, LEVELS, **options))


def reference(plain, histories, *, apart: bool = False) -> list[Tensor]:
    """LCT's recipe as it is written, on the diffusers model: no cache, float64.

    `apart`: the branch without text sees no history either, as where text and other shots have the same scale.
    """
    made: list[Tensor] = []
    noised: list[Tensor] = []
    for index, history in enumerate(histories):
        generators = seeds(index)
        frames = [f for j in history for f in range(*test_kv_cache.frames_of(j).indices(6))]
        x = torch.stack([torch.randn(4, SIZES[index], 4, 4, generator=g) for g in generators]).double()
        for s, after in zip(LEVELS.tolist(), LEVELS.tolist()[1:], strict=False):
            clip_x, levels = torch.zeros(B, 4, 6, 4, 4, dtype=torch.float64), torch.full((B, 6), T_C)
            for j in history:
                clip_x[:, :, test_kv_cache.frames_of(j)] = noised[j]
            own = test_kv_cache.frames_of(index)
            clip_x[:, :, own], levels[:, own] = x, s
            velocities = []
            for text, seen in ((TEXTS[:, index], history), (NULL, () if apart else history)):
                texts = TEXTS.clone()
                texts[:, index] = text  # history keeps its own text in both branches
                out = test_kv_cache.masked(plain, (clip_x, levels, texts), [*seen, index])
                velocities.append(out[:, :, len(frames) if seen else 0 :])
            plain_v, null_v = velocities
            x = x + (after - s) * (null_v + SCALE * (plain_v - null_v))
        made.append(x)
        noise = torch.stack([torch.randn(4, SIZES[index], 4, 4, generator=g) for g in generators]).double()
        noised.append((1 - T_C) * x + T_C * noise)
    return made


@pytest.mark.parametrize("name", HISTORIES)
@torch.no_grad()
def test_it_is_the_recipe_without_a_cache(name):
    backbone, plain = make()
    result = run(backbone, shots_of(HISTORIES[name]))
    for made, expected in zip(result, reference(plain, HISTORIES[name]), strict=True):
        assert made.dtype == torch.float32 and made.std() > 0.1
        torch.testing.assert_close(made.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["all", "selected"])
@torch.no_grad()
def test_guidance_over_the_other_shots_is_the_recipe_with_a_branch_that_sees_none(name):
    backbone, plain = make()
    scales = Guidance([("text", SCALE), ("shots", SCALE)])
    result = run(backbone, shots_of(HISTORIES[name]), guidance=scales)
    for made, expected in zip(result, reference(plain, HISTORIES[name], apart=True), strict=True):
        torch.testing.assert_close(made.double(), expected, rtol=0, atol=2e-5)
    without = run(backbone, shots_of(HISTORIES[name]))
    assert torch.equal(result[0], without[0]), "a shot that sees none has none to be guided by"
    assert not torch.allclose(result[2], without[2])


def test_histories_make_a_difference():
    backbone, _ = make()
    results = {name: run(backbone, shots_of(histories)) for name, histories in HISTORIES.items()}
    lasts = [shots[2] for shots in results.values()]
    for i, one in enumerate(lasts):
        assert all((one - other).abs().max() > 1e-4 for other in lasts[:i])
    assert torch.equal(results["all"][1], results["last"][1]), "of the same history comes the same shot"


def passes(backbone: WanBackbone, shots: list[RolloutShot]) -> list[dict]:
    """Each pass over the backbone: what it read, at which levels, and what the cache held before."""
    seen: list[dict] = []

    def note(_, args, kwargs):
        cached = kwargs["cache"].sizes
        seen.append({"x": args[0].clone(), "levels": args[1].clone(), "append": kwargs.get("append"), "cached": cached})

    hook = backbone.register_forward_pre_hook(note, with_kwargs=True)
    run(backbone, shots)
    hook.remove()
    return seen


def test_history_is_run_once_at_its_level():
    backbone, _ = make()
    seen = passes(backbone, shots_of(HISTORIES["all"]))
    assert [bool(p["append"]) for p in seen] == [False] * 3 + [True] + [False] * 3 + [True] + [False] * 3
    kept = [p for p in seen if p["append"]]
    assert [(p["x"].shape[0], p["x"].shape[2]) for p in kept] == [(B, 3), (B, 1)], "once for all branches"
    assert all((p["levels"] == torch.tensor(T_C)).all() for p in kept), "not the level of the last denoising step"
    assert [p["cached"] for p in seen] == [()] * 4 + [(3,)] * 4 + [(3, 1)] * 3


def test_history_keeps_its_noise_when_it_is_run_again():
    backbone, _ = make()
    shots = shots_of([(), (), (0,), (1, 0)], TEXTS[:, [0, 1, 2, 2]], [2, 2, 2, 2])
    seen = passes(backbone, shots)
    kept = [p for p in seen if p["append"]]
    assert [p["cached"] for p in kept] == [(), (), (2,)], "another history is run anew"
    assert torch.equal(kept[0]["x"], kept[2]["x"]) and not torch.equal(kept[0]["x"], kept[1]["x"])
    final = run(backbone, shots_of([(), (), (0,), (1, 0)], TEXTS[:, [0, 1, 2, 2]], [2, 2, 2, 2]))
    generators = seeds(0)
    for g in generators:  # the start noise comes first
        torch.randn(4, 2, 4, 4, generator=g)
    noise = torch.stack([torch.randn(4, 2, 4, 4, generator=g) for g in generators])
    assert torch.allclose(kept[0]["x"].float(), (1 - T_C) * final[0] + T_C * noise, atol=1e-6)


def test_later_shots_never_reach_back():
    backbone, _ = make(torch.float32)
    texts = TEXTS.float()
    other = texts.clone()
    other[:, 1] += 1.0
    first, second = (run(backbone, shots_of(HISTORIES["all"], t)) for t in (texts, other))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1]) and not torch.equal(first[2], second[2])


@torch.no_grad()
def test_the_first_shot_is_a_plain_single_shot():
    backbone, _ = make(torch.float32)
    (shot,) = shots_of([()], TEXTS.float())
    layout = METHOD.layout_for_task("joint", [3])
    text, null = shot.text, shot.null
    expected = sample(
        backbone, layout, METHOD.plan(layout, LEVELS, "joint"), text, shape=(B, 4, 3, 4, 4), generator=seeds(0),
        guidance=Guidance([("text", SCALE)]), null={"text": null}, **METHOD.backbone_kwargs(layout),
    )  # fmt: skip
    assert torch.equal(run(backbone, [shot])[0], expected)


def test_given_shots_are_history_as_they_are():
    backbone, plain = make()
    film = randn(B, 4, 3, 4, 4, seed=9)
    shots = shots_of(HISTORIES["last"])
    shots[0] = replace(shots[0], given=film)
    made = run(backbone, shots)
    assert made[0] is film
    noise = torch.stack([torch.randn(4, 3, 4, 4, generator=g) for g in seeds(0)]).double()
    shots = shots_of(HISTORIES["last"])
    shots[0] = replace(shots[0], given=film)
    kept = [p["x"] for p in passes(backbone, shots) if p["append"]]
    assert torch.allclose(kept[0], (1 - T_C) * film + T_C * noise, rtol=0, atol=1e-7)
    calls: list[tuple[int, int]] = []
    run(backbone, shots, callback=lambda done, total: calls.append((done, total)))
    assert calls == [(k, 6) for k in range(1, 7)], "given shots take no steps"


def test_it_holds_what_is_still_seen_and_no_more():
    backbone, _ = make(torch.float32)
    texts = TEXTS.float()[:, [0, 1, 2, 0, 1, 2]]
    histories = [() if i == 0 else (i - 1,) for i in range(6)]
    largest, alive = 0, []

    def note(_, args, kwargs):
        nonlocal largest
        largest = max(largest, sum(kwargs["cache"].sizes))

    hook = backbone.register_forward_pre_hook(note, with_kwargs=True)
    shots = rollout(
        backbone, METHOD, "extension", shots_of(histories, texts, [2] * 6), LEVELS, size=SIZE, guidance=Guidance()
    )
    for latents in shots:
        alive.append(weakref.ref(latents))
        del latents
        gc.collect()
        assert sum(one() is not None for one in alive) <= 2
    hook.remove()
    assert largest == 2 and len(alive) == 6


def test_cancelling_and_what_is_refused_before_the_first_step():
    backbone, _ = make(torch.float32)
    texts = TEXTS.float()

    class Cancelled(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(backbone, shots_of(HISTORIES["all"], texts), callback=stop)

    def ask(model, histories, method=METHOD):
        shots = shots_of(histories, texts[:, :1].expand(-1, len(histories), -1, -1), [1] * len(histories))
        return rollout(model, method, "autoregressive", shots, LEVELS, size=SIZE)

    with pytest.raises(ValueError, match=r"shot 1: history is \[1\], expected earlier shots"):
        ask(backbone, [(), (1,)])
    with pytest.raises(ValueError, match=r"shot 1: history is \[0, 0\], expected earlier shots, each once"):
        ask(backbone, [(), (0, 0)])
    with pytest.raises(ValueError, match="a history of 9 shots; a shot sees at most 8"):
        ask(backbone, [()] * 9 + [tuple(range(9))])
    with pytest.raises(ValueError, match="no kv_cache: HunyuanVideo joins text and frames"):
        ask(HunyuanVideoBackbone(tiny_hunyuan()), [()])
    with pytest.raises(ValueError, match="this one's is full"):
        ask(backbone, [()], get_method("lct"))
