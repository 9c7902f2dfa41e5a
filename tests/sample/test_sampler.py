"""The denoising loop against an oracle: what it recovers, what it holds, and what decides its noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.layout import ClipLayout, Segment
from models.noise import base_levels, noise_plan
from models.process import FlowMatching, Process
from models.text import TextContext
from sample.guidance import Guidance
from sample.sampler import draw_noise, sample
from tests.models.processes import PROCESSES, oracle

B, C, H, W, D = 2, 3, 4, 6, 5
STEPS = 7


class Oracle:
    """Knows the clean clip, and so predicts exactly what a model of its process is to predict."""

    def __init__(self, clean: Tensor, process: Process | None = None) -> None:
        self.clean = clean
        self.process = process or FlowMatching()
        self.levels: list[Tensor] = []

    def __call__(self, x: Tensor, levels: Tensor, text: Tensor) -> Tensor:
        self.levels.append(levels)
        x = x / self.process.precondition(torch.ones_like(x), levels)  # undoes what the model's input was scaled by
        return oracle(self.process, x, self.clean.repeat(len(x) // len(self.clean), 1, 1, 1, 1), levels)


def layout_of(*parts: tuple[str, int]) -> ClipLayout:
    return ClipLayout(tuple(Segment(role, frames, shot_id=i) for i, (role, frames) in enumerate(parts)))  # type: ignore[arg-type]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


T2V = layout_of(("target", 5))
I2V = layout_of(("condition", 1), ("target", 4))
IN_CONTEXT = layout_of(("condition", 1), ("buffer", 2), ("target", 4))
PLANS: dict[str, tuple[ClipLayout, dict[str, Any]]] = {
    "uniform": (T2V, {}),
    "hold": (I2V, {}),
    "hold_at_t_c": (I2V, {"context_level": 0.3}),
    "scale": (T2V, {"multipliers": torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0])}),
    "min": (IN_CONTEXT, {"caps": torch.tensor([0.0, 0.25, 0.5, 1.0, 1.0, 1.0, 1.0])}),
    "lag": (T2V, {"lag": 2}),
}


def plan_of(name: str) -> tuple[ClipLayout, Tensor]:
    layout, options = PLANS[name]
    mode = "hold" if name.startswith("hold") else name
    return layout, noise_plan(layout, base_levels(STEPS, shift=3.0), mode, **options)


def run(layout: ClipLayout, plan: Tensor, clean: Tensor, **options: Any) -> Tensor:
    options = {"generator": generators(1, 2), "given": clean, **options}
    text = options.pop("text", torch.zeros(B, 1, 4, D))
    backbone = options.pop("backbone", None) or Oracle(clean, options.get("process"))
    if not hasattr(backbone, "process"):
        options.setdefault("process", FlowMatching())
    return sample(backbone, layout, plan, text, shape=tuple(clean.shape), **options)


@pytest.mark.parametrize("solver", ["euler", "second_order", "ancestral"])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("name", PLANS)
def test_an_oracle_recovers_its_targets_under_every_plan(name: str, process: Process, solver: str) -> None:
    layout, plan = plan_of(name)
    clean = torch.randn(B, C, layout.num_frames, H, W)
    # what `given` holds where frames start from pure noise must not matter
    given = torch.where((plan[0] == 1).view(-1, 1, 1), 77.0, clean)
    result = run(layout, plan, clean, backbone=Oracle(clean, process), given=given, solver=solver)
    torch.testing.assert_close(result, clean, atol=5e-4, rtol=1e-4)
    held = (plan == plan[0]).all(dim=0)
    assert torch.equal(result[:, :, held], clean[:, :, held])


def test_solvers_differ_where_the_model_is_not_perfect_and_the_seed_decides() -> None:
    layout, plan = plan_of("uniform")
    clean = torch.randn(B, C, layout.num_frames, H, W)

    def half(x: Tensor, levels: Tensor, text: Tensor) -> Tensor:
        return torch.tanh(x)

    made = {
        name: run(layout, plan, clean, backbone=half, solver=name) for name in ("euler", "second_order", "ancestral")
    }
    assert not torch.allclose(made["euler"], made["second_order"])
    assert not torch.allclose(made["euler"], made["ancestral"])
    state = torch.get_rng_state()
    again = run(layout, plan, clean, backbone=half, solver="ancestral")
    other = run(layout, plan, clean, backbone=half, solver="ancestral", generator=generators(1, 3))
    assert torch.equal(made["ancestral"], again) and torch.equal(state, torch.get_rng_state())
    assert torch.equal(other[0], again[0]) and not torch.equal(other[1], again[1])


@pytest.mark.parametrize("name", ["hold", "hold_at_t_c", "min"])
def test_held_frames_come_back_bit_for_bit(name: str) -> None:
    layout, plan = plan_of(name)
    clean = torch.randn(B, C, layout.num_frames, H, W)
    seen = []
    oracle = Oracle(clean)

    def backbone(x: Tensor, levels: Tensor, text: Tensor) -> Tensor:
        seen.append(x[:, :, 0].clone())
        return oracle(x, levels, text) * 1.7  # predictions of held frames must not matter

    result = run(layout, plan, clean, backbone=backbone)
    assert torch.equal(result[:, :, 0], clean[:, :, 0])
    assert all(torch.equal(frame, seen[0]) for frame in seen), "given frames keep the noise they got at the start"
    if name == "hold_at_t_c":
        noise = draw_noise(layout, tuple(clean.shape), generators(1, 2))
        noisy = FlowMatching().add_noise(clean, noise, plan[0])
        assert torch.equal(seen[0], noisy[:, :, 0]) and not torch.equal(seen[0], clean[:, :, 0])


def test_what_the_backbone_is_told_does_not_change_what_it_reads() -> None:
    """TIC-FT tells one time for all frames; the process scales every frame by its own level."""
    layout, plan = plan_of("min")
    clean = torch.randn(B, C, layout.num_frames, H, W)
    seen = []

    def backbone(x: Tensor, levels: Tensor, text: Tensor) -> Tensor:
        seen.append((x, levels))
        return x

    for model_levels in (None, lambda levels: levels.amax(dim=1)):
        run(layout, plan, clean, backbone=backbone, process=PROCESSES["edm"], model_levels=model_levels)
    for k in range(STEPS):
        (x, levels), (same_x, told) = seen[k], seen[k + STEPS]
        assert torch.equal(levels, plan[k].expand(B, -1)) and torch.equal(told, plan[k].max().expand(B))
        assert torch.equal(x, same_x), "what a frame is scaled by is its own level"


def test_lengths_and_pooled_vectors_reach_every_branch() -> None:
    layout, plan = plan_of("uniform")
    clean, seen = torch.randn(B, C, layout.num_frames, H, W), []

    def context(length: int) -> TextContext:
        pooled, lengths = torch.randn(B, 1, 3), torch.full((B, 1), length)
        return TextContext(torch.randn(B, 1, 4, D), torch.zeros(layout.num_frames, dtype=torch.long), lengths, pooled)

    def backbone(x: Tensor, levels: Tensor, text: TextContext) -> Tensor:
        seen.append(text)
        return x

    text, null = context(3), context(1)
    options = {"guidance": Guidance([("text", 3.0)]), "null": {"text": null}}
    run(layout, plan, clean, backbone=backbone, text=text, **options)
    for name in ("embeddings", "lengths", "pooled"):
        expected = torch.cat([getattr(null, name), getattr(text, name)])  # the branch that drops the text comes first
        assert torch.equal(getattr(seen[0], name), expected), name


def test_the_backbone_sees_the_plan_row_by_row() -> None:
    layout, plan = plan_of("hold")
    clean = torch.randn(B, C, layout.num_frames, H, W)
    oracle = Oracle(clean)
    run(layout, plan, clean, backbone=oracle)
    assert len(oracle.levels) == STEPS
    for k, levels in enumerate(oracle.levels):
        assert torch.equal(levels, plan[k].expand(B, -1))


def test_the_same_seed_repeats_and_another_differs() -> None:
    layout, plan = plan_of("uniform")
    clean = torch.randn(B, C, layout.num_frames, H, W)

    def half(x: Tensor, levels: Tensor, text: Tensor) -> Tensor:
        return x * 0.5  # keeps the noise visible in the result

    torch.manual_seed(0)
    first = run(layout, plan, clean, backbone=half)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(first, run(layout, plan, clean, backbone=half)), "the global generator must not matter"
    other = run(layout, plan, clean, backbone=half, generator=generators(1, 3))
    assert torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state()), "the global generator must not be used"


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    layout, plan = plan_of("uniform")
    clean = torch.randn(3, C, layout.num_frames, H, W)

    def mix(x: Tensor, levels: Tensor, text: Tensor) -> Tensor:
        return torch.tanh(x) + text.mean(dim=(1, 2, 3))[:, None, None, None, None]

    def options(*which: int) -> dict[str, Any]:
        text = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 4, D)
        seeds = (11, 12, 13)
        return {
            "backbone": mix,
            "text": text[list(which)],
            "null": {"text": torch.zeros(len(which), 1, 4, D)},
            "generator": generators(*(seeds[i] for i in which)),
            "guidance": Guidance([("text", 3.0)]),
        }

    together = run(layout, plan, clean, **options(0, 1, 2))
    for i in range(3):
        alone = run(layout, plan, clean[i : i + 1], **options(i))
        assert torch.equal(together[i : i + 1], alone)


def test_a_shot_starts_from_the_same_noise_alone_and_in_its_scene() -> None:
    scene = layout_of(("target", 3), ("target", 4))
    joint = draw_noise(scene, (1, C, 7, H, W), [generators(5, 6)])
    alone = draw_noise(layout_of(("target", 4)), (1, C, 4, H, W), [generators(6)])
    assert torch.equal(joint[:, :, 3:], alone)


def test_guidance_runs_as_one_batch_and_its_identities_hold() -> None:
    layout, plan = plan_of("uniform")
    clean = torch.randn(B, C, layout.num_frames, H, W)
    text, null = torch.ones(B, 1, 4, D), torch.zeros(B, 1, 4, D)
    batches: list[int] = []

    def backbone(x: Tensor, levels: Tensor, text: Tensor) -> Tensor:
        batches.append(len(x))
        assert levels.shape == (len(x), layout.num_frames) and len(text) == len(x)
        return 0.3 * x + text.mean(dim=(1, 2, 3))[:, None, None, None, None]

    def at(scale: float | None, text: Tensor = text) -> Tensor:
        batches.clear()
        guidance = None if scale is None else Guidance([("text", scale)])
        return run(layout, plan, clean, backbone=backbone, text=text, null={"text": null}, guidance=guidance)

    plain, dropped = at(None), at(None, text=null)
    assert torch.equal(at(1.0), plain) and set(batches) == {B}
    assert torch.equal(at(0.0), dropped) and set(batches) == {B}
    guided = at(4.0)
    assert set(batches) == {2 * B}
    torch.testing.assert_close(guided, dropped + 4 * (plain - dropped), atol=1e-4, rtol=1e-4)  # linear backbone


def test_the_callback_counts_steps_and_can_end_the_run() -> None:
    layout, plan = plan_of("uniform")
    clean = torch.randn(B, C, layout.num_frames, H, W)
    calls = []
    run(layout, plan, clean, callback=lambda k, total: calls.append((k, total)))
    assert calls == [(k, STEPS) for k in range(1, STEPS + 1)]

    class Enough(Exception):
        pass

    def stop(k: int, total: int) -> None:
        calls.append((k, total))
        if k == 2:
            raise Enough

    calls.clear()
    with pytest.raises(Enough):
        run(layout, plan, clean, callback=stop)
    assert len(calls) == 2


def test_what_does_not_fit_is_refused() -> None:
    layout, plan = plan_of("hold")
    clean = torch.randn(B, C, layout.num_frames, H, W)
    with pytest.raises(ValueError, match=r"\[0\] below level 1"):
        run(layout, plan, clean, given=None)
    with pytest.raises(ValueError, match="never rise"):
        run(layout, plan.flip(0), clean)
    with pytest.raises(ValueError, match=r"K\+1, 5"):
        run(layout, plan[:, :3], clean)
    with pytest.raises(ValueError, match="latent frames"):
        run(layout, plan, clean[:, :, :3])
    with pytest.raises(ValueError, match="given has shape"):
        run(layout, plan, clean, given=clean[:1])
    with pytest.raises(ValueError, match="1 generators for a batch of 2"):
        run(layout, plan, clean, generator=generators(1))
    with pytest.raises(ValueError, match="no stand-in"):
        run(layout, plan, clean, guidance=Guidance([("text", 2.0)]))
    with pytest.raises(ValueError, match="unknown conditions"):
        run(layout, plan, clean, guidance=Guidance([("image", 2.0)]), null={"image": clean})
