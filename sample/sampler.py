"""The denoising loop: follow a noise plan, one level per latent frame, from noise to a clip.

Shapes: B batch, F latent frames, C channels, H W latent size, K steps, G texts, L text tokens, D text width.
The plan decides everything a task is: a frame whose level does not change from one row to the next is held bit for
bit, a frame that starts below level 1 starts from its source, and a frame left above level 0 (history kept at t_c)
comes back as it was given. No noise is drawn after the start but by the ancestral solver, and none from the global
generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.backbones.base import Backbone
from models.layout import ClipLayout
from models.process import Process
from models.solvers import SolverName, make_solver
from models.text import TextContext, stack_samples
from sample.apart import OTHER_SHOTS, SeenAs, ShotsApart
from sample.guidance import Branch, Guidance

Text = TextContext | Tensor
# one generator for the batch, or one per sample, or one per sample and shot
Generators = torch.Generator | Sequence[torch.Generator] | Sequence[Sequence[torch.Generator]]
Callback = Callable[[int, int], None]  # (steps done, steps in all); whatever it raises ends the run


@torch.no_grad()
def sample(
    backbone: Backbone,
    layout: ClipLayout,
    plan: Tensor,  # [K+1, F] noise levels in [0, 1], non-increasing in k
    text: Text,  # contexts of the B samples, [B, G, L, D]
    /,  # `layout` may also be among the backbone's arguments
    *,
    shape: tuple[int, int, int, int, int],  # (B, C, F, H, W) of the latents
    generator: Generators,
    given: Tensor | None = None,  # [B, C, F, H, W] normalised latents, read where plan[0] < 1
    guidance: Guidance | None = None,
    null: Mapping[str, Text] | None = None,  # what stands in for a dropped condition
    process: Process | None = None,  # None: what the backbone was trained with, its `process`
    solver: SolverName = "euler",
    model_levels: Callable[[Tensor], Tensor] | None = None,  # what the backbone is told of levels [B, F]
    conditions: Mapping[str, Tensor] | None = None,  # besides the text, [B, ...] each; zeros stand in for a dropped one
    prepare: Callable[[Text, Mapping[str, Tensor]], Mapping[str, Any]] | None = None,  # `Method.prepare`
    apart: SeenAs | None = None,  # `Method.backbone_kwargs`, for guidance that drops the other shots
    callback: Callback | None = None,
    **backbone_kwargs: Any,
) -> Tensor:
    """Latents [B, C, F, H, W] (fp32, normalised) made by following `plan`, each frame by its own levels.

    `given` frames keep the one noise they are given at the start (LCT 2503.10589 keeps history noise fixed).
    Guidance branches run as one batch of B * branches samples; those without the condition `OTHER_SHOTS` see each shot
    by itself (`sample.apart`), in a batch of their own. The state stays in fp32; the backbone reads it scaled
    by the process and in the dtype of its text. `model_levels` is the method's (`Method.model_levels`); None tells the
    backbone every frame's level. `prepare` is called once with the text and the conditions of all rows, and says what
    else the backbone is passed in every step. Raises ValueError where shapes, plan, given frames, solver or guidance do
    not fit together; whatever `callback` raises passes through, which is how a run is cancelled.
    """
    process, guidance = process or backbone.process, guidance or Guidance()
    _check(layout, plan, shape, given)
    conditions = {"text": text, **(conditions or {})}
    null = {name: torch.zeros_like(value) for name, value in conditions.items() if name != "text"} | dict(null or {})
    _check_guidance(guidance, conditions, null, apart)

    def told(levels: Tensor) -> Tensor:
        return levels if model_levels is None else model_levels(levels)

    passes = _passes(backbone, layout, guidance, conditions, null, told, prepare, apart, backbone_kwargs)
    noise = draw_noise(layout, shape, generator).to(plan.device)
    source = torch.zeros_like(noise) if given is None else given.to(noise)
    source = source.masked_fill(layout.is_dummy.to(noise.device).view(-1, 1, 1), 0.0)
    from_nothing = (plan[0] == 1).view(-1, 1, 1)  # [F, 1, 1]
    x = torch.where(from_nothing, process.pure_noise(noise), process.add_noise(source, noise, plan[0]))
    stepper = make_solver(solver, process, lambda: draw_noise(layout, shape, generator))

    steps = len(plan) - 1
    dtype = text.dtype if isinstance(text, Tensor) else text.embeddings.dtype
    predictions: list[Any] = [None] * len(guidance.branches)
    for k in range(steps):
        scaled = process.precondition(x, plan[k]).to(dtype)
        for places, predict in passes:
            levels = plan[k].expand(len(places) * shape[0], -1)  # [branches * B, F]
            made = predict(torch.cat([scaled] * len(places)), levels).float().chunk(len(places))
            for place, prediction in zip(places, made, strict=True):
                predictions[place] = prediction
        prediction = guidance.combine(predictions)
        x = stepper.step(x, prediction, plan[k], plan[k + 1])
        if callback is not None:
            callback(k + 1, steps)

    left_noisy = (plan[-1] > 0).view(-1, 1, 1)  # [F, 1, 1]: history at t_c, whose prediction is discarded
    return torch.where(left_noisy, source, x)


def draw_noise(layout: ClipLayout, shape: tuple[int, int, int, int, int], generator: Generators) -> Tensor:
    """Start noise [B, C, F, H, W], drawn segment by segment.

    With a generator per sample no sample's noise depends on its batch neighbours; with one per sample and shot no
    shot's noise depends on the other shots either, so a shot alone and in its scene starts from the same noise. Dummy
    frames have none.
    """
    batch, channels, _, height, width = shape
    if not isinstance(generator, torch.Generator) and len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for a batch of {batch}; give one per sample")
    rows = []
    for b in range(batch):
        own = generator if isinstance(generator, torch.Generator) else generator[b]
        parts = []
        for segment in layout.segments:
            size = (channels, segment.num_frames, height, width)
            if segment.role == "dummy":
                device = (own if isinstance(own, torch.Generator) else own[0]).device
                parts.append(torch.zeros(size, device=device))
                continue
            source = own if isinstance(own, torch.Generator) else own[segment.shot_id]
            parts.append(torch.randn(size, generator=source, device=source.device, dtype=torch.float32))
        rows.append(torch.cat(parts, dim=1))
    return torch.stack(rows)


def _passes(
    backbone: Backbone,
    layout: ClipLayout,
    guidance: Guidance,
    conditions: Mapping[str, Text],
    null: Mapping[str, Text],
    told: Callable[[Tensor], Tensor],
    prepare: Callable[[Text, Mapping[str, Tensor]], Mapping[str, Any]] | None,
    apart: SeenAs | None,
    backbone_kwargs: Mapping[str, Any],
) -> list[tuple[list[int], Callable[[Tensor, Tensor], Tensor]]]:
    """The model's calls of a step: the places of the branches in each, and x and levels to their predictions.

    Branches that see the whole clip are one call, those that see each shot by itself another.
    """
    found: list[tuple[list[int], Callable[[Tensor, Tensor], Tensor]]] = []
    whole = [place for place, branch in enumerate(guidance.branches) if OTHER_SHOTS not in branch.dropped]
    if whole:
        stacked = _stack_branches([guidance.branches[place] for place in whole], conditions, null)
        rows = stacked.pop("text")
        seen: dict[str, Any] = {"text": rows, **backbone_kwargs}
        if prepare is not None:
            seen |= prepare(rows, stacked)  # type: ignore[arg-type]  # all others are tensors
        elif stacked:
            raise ValueError(
                f"conditions {sorted(stacked)} are given, but no `prepare` says what the backbone does of them"
            )
        found.append((whole, lambda x, levels: backbone(x, told(levels), **seen)))
    if lone := [place for place in range(len(guidance.branches)) if place not in whole]:
        rows = _stack_branches([guidance.branches[place] for place in lone], conditions, null)["text"]
        assert apart is not None and isinstance(rows, TextContext)  # _check_guidance
        found.append((lone, ShotsApart(backbone, layout, rows, apart, told)))
    return found


def _stack_branches(
    branches: Sequence[Branch], conditions: Mapping[str, Text], null: Mapping[str, Text]
) -> dict[str, Text]:
    """Each condition once per branch along the batch: the real one where it is kept, its null where it is dropped."""
    return {
        name: _concat([null[name] if name in branch.dropped else value for branch in branches])
        for name, value in conditions.items()
    }


def _check_guidance(
    guidance: Guidance, conditions: Mapping[str, Text], null: Mapping[str, Text], apart: SeenAs | None
) -> None:
    dropped = set().union(*(branch.dropped for branch in guidance.branches)) - {OTHER_SHOTS}
    if unknown := guidance.conditions - set(conditions) - {OTHER_SHOTS}:
        raise ValueError(f"guidance over unknown conditions {sorted(unknown)}; this run has {sorted(conditions)}")
    if missing := dropped - set(null):
        raise ValueError(f"guidance drops {sorted(missing)} but `null` holds no stand-in for it")
    if OTHER_SHOTS in guidance.conditions and (
        apart is None or not isinstance(conditions["text"], TextContext) or len(conditions) > 1
    ):
        raise ValueError(
            f"guidance over {OTHER_SHOTS!r} needs `apart` (how a shot is seen by itself) and a text of contexts, and "
            f"knows no further conditions; this run has {sorted(conditions)}"
        )


def _concat(values: list[Text]) -> Text:
    if isinstance(values[0], Tensor):
        return torch.cat(values)  # type: ignore[arg-type]
    return stack_samples(values)  # type: ignore[arg-type]


def _check(layout: ClipLayout, plan: Tensor, shape: tuple[int, ...], given: Tensor | None) -> None:
    if plan.ndim != 2 or plan.shape[0] < 2 or plan.shape[1] != layout.num_frames:
        raise ValueError(f"plan has shape {tuple(plan.shape)}; the layout needs [K+1, {layout.num_frames}] with K >= 1")
    if shape[2] != layout.num_frames:
        raise ValueError(f"shape {shape} has {shape[2]} latent frames, the layout {layout.num_frames}")
    if (plan[1:] > plan[:-1]).any() or plan.min() < 0 or plan.max() > 1:
        raise ValueError("plan levels must lie in [0, 1] and never rise from one row to the next")
    dummies = layout.is_dummy.tolist()
    needs_source = [f for f, level in enumerate(plan[0].tolist()) if level < 1 and not dummies[f]]
    if given is None and needs_source:
        raise ValueError(f"plan starts latent frames {needs_source} below level 1, so `given` must hold their latents")
    if given is not None and tuple(given.shape) != tuple(shape):
        raise ValueError(f"given has shape {tuple(given.shape)}, expected {tuple(shape)}")
