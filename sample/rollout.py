"""A scene shot by shot: each is made behind a KV cache of the earlier shots it sees (LCT, 2503.10589).

History is not fed in as the last denoising step left it: it was made at falling levels, and training knows earlier
shots at one level. So a finished shot is noised once to the history level (t_c) and run through the model once, in a
pass that keeps its keys and values; the noise of a shot's history stays the same to the end of the scene. A shot whose
history goes on from that of the shot before adds what is new; any other history is run anew, because kept keys know
what stood before them.

B batch, F latent frames, C channels, H W latent size, K steps, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.backbones.base import Backbone, require
from models.layout import ClipLayout, Segment
from models.solvers import SolverName
from models.text import TextContext
from sample.apart import OTHER_SHOTS
from sample.guidance import Guidance
from sample.sampler import Callback, draw_noise, sample

if TYPE_CHECKING:
    from models.methods.base import Method


@dataclass(frozen=True)
class RolloutShot:
    """One shot of B scenes, made by itself."""

    frames: int  # latent frames
    text: Tensor  # [B,L,D]
    null: Tensor  # [B,L,D], in place of a dropped text
    generators: Sequence[torch.Generator]  # one per scene: the shot's start noise, then that of its history
    history: tuple[int, ...] = ()  # the earlier shots that it sees, in order
    given: Tensor | None = None  # [B,C,F,H,W] normalised latents of a shot that is known and not made


def rollout(
    backbone: Backbone,
    method: Method,
    task: str,
    shots: Sequence[RolloutShot],
    levels: Tensor,  # [K+1] base levels
    *,
    size: tuple[int, int, int],  # (C, H, W) of the latents
    guidance: Guidance | None = None,
    solver: SolverName = "euler",
    callback: Callback | None = None,  # steps over all shots that are made
    story: Tensor | None = None,  # [B,L,D], the text of a group in front of all shots (`models.layout.with_story`)
    null_story: Tensor | None = None,  # [B,L,D], in its place in passes without text; None: it stays in all
    plan_options: Mapping[str, Any] | None = None,  # of `Method.plan`
) -> Iterator[Tensor]:
    """Latents [B,C,F,H,W] (fp32, normalised) of one shot after another, given ones as they were given.

    The story's group, its text and one dummy token at level 0, stands in the cache before whatever history a shot sees.

    Only the current shot loses its text in guidance; history keeps its own, so that one cache serves all branches but
    those that drop the other shots (`sample.apart`), which see no history. With a `null_story` the cache holds the
    history of each branch, which has seen that branch's story: as many times the memory and the work of keeping it.
    Held at a time: keys and values of one shot's history, and the latents of shots that a later one still sees.
    Raises ValueError, before the first step, for a backbone that keeps no keys, for a history that is not earlier, for
    options that the plan does not take, and for guidance over the other shots beside a story, which a pass without the
    cache would lose.
    """
    require(backbone.capabilities, attention_rule="group_causal", kv_cache=True)
    guidance = guidance or Guidance()
    if story is not None and OTHER_SHOTS in guidance.conditions:
        raise ValueError(
            "scene_guidance with a story that is a text group of its own: shots made in turn keep it in the cache of "
            "the others; leave scene_guidance out, or make all shots at once (task auto)"
        )
    layouts, plans = [], []
    for index, shot in enumerate(shots):
        if len(set(shot.history)) != len(shot.history) or not set(shot.history) <= set(range(index)):
            raise ValueError(f"shot {index}: history is {list(shot.history)}, expected earlier shots, each once")
        layout = method.layout_for_task(task, [*(shots[j].frames for j in shot.history), shot.frames])
        layouts.append(layout)
        plans.append(method.plan(layout, levels, task, **(plan_options or {})))
    stories = _stories(story, null_story, guidance)
    return _run(backbone, method, shots, layouts, plans, size, guidance, solver, callback, stories)


def _run(
    backbone: Backbone,
    method: Method,
    shots: Sequence[RolloutShot],
    layouts: Sequence[ClipLayout],  # each shot's history and itself
    plans: Sequence[Tensor],  # [K+1,F] of these
    size: tuple[int, int, int],
    guidance: Guidance,
    solver: SolverName,
    callback: Callback | None,
    stories: Sequence[Tensor],  # [B,L,D] each, see `_stories`
) -> Iterator[Tensor]:
    done, steps = 0, len(plans[0]) - 1 if plans else 0
    total = steps * sum(shot.given is None for shot in shots)
    last_reader = {j: index for index, shot in enumerate(shots) if shot.given is None for j in shot.history}
    pool: dict[int, tuple[Tensor, Tensor]] = {}  # finished shots that are still seen: latents, and noise as history
    cache = backbone.new_cache()
    cached: tuple[int, ...] = ()  # the shots in it, behind the story
    told = False  # whether the story is in it
    for index, (shot, layout, plan) in enumerate(zip(shots, layouts, plans, strict=True)):
        if shot.given is not None:
            latents = shot.given
        else:
            plan = plan.to(shot.text.device)
            options = method.backbone_kwargs(layout) | {"cache": cache}
            if shot.history[: len(cached)] != cached:
                cache.reset()
                cached, told = (), False
            if stories and not told:
                _append_story(backbone, method, torch.cat([*stories]), size, options)
                told = True
            for position in range(len(cached), len(shot.history)):
                j, frames = shot.history[position], layout.shot_slices[position]
                _append(backbone, method, shots[j], *pool[j], plan[0, frames], max(1, len(stories)), options)
            cached = shot.history
            own = _one_shot(shot.frames)
            latents = sample(
                backbone,
                own,
                plan[:, layout.shot_slices[-1]],
                _context(shot.text, shot.frames),
                shape=(len(shot.text), size[0], shot.frames, *size[1:]),
                generator=shot.generators,
                guidance=guidance if shot.history else guidance.without(OTHER_SHOTS),
                null={"text": _context(shot.null, shot.frames)},
                model_levels=method.model_levels,
                apart=method.backbone_kwargs,
                solver=solver,
                callback=None if callback is None else _after(callback, done, total),
                **options | {"layout": own},
            )
            done += steps
        if index in last_reader:
            batch, channels, frames_made, height, width = latents.shape
            shape = (batch, channels, frames_made, height, width)
            pool[index] = latents, draw_noise(_one_shot(shot.frames), shape, shot.generators)
        pool = {j: known for j, known in pool.items() if last_reader[j] > index}
        yield latents


def _stories(story: Tensor | None, null_story: Tensor | None, guidance: Guidance) -> list[Tensor]:
    """The story's text in the cache: none, one that all branches share, or one for each, in their order."""
    if story is None:
        return []
    if null_story is None:
        return [story]
    return [null_story if "text" in branch.dropped else story for branch in guidance.branches]


@torch.no_grad()
def _append(
    backbone: Backbone,
    method: Method,
    shot: RolloutShot,
    latents: Tensor,  # [B,C,F,H,W]
    noise: Tensor,
    level: Tensor,  # [F], what the plan holds the shot at
    branches: int,  # for which the cache holds rows of their own
    options: dict[str, Any],  # of the backbone; the cache is among them
) -> None:
    """One pass over a finished shot at the history level, which keeps its keys and values."""
    latents, noise = latents.to(level.device), noise.to(level.device)
    noisy = backbone.process.precondition(backbone.process.add_noise(latents, noise, level), level)
    noisy, text = noisy.repeat(branches, 1, 1, 1, 1), shot.text.repeat(branches, 1, 1)
    told = method.model_levels(level.expand(len(noisy), -1))
    own = options | {"layout": _one_shot(shot.frames), "append": True}
    backbone(noisy.to(text.dtype), told, _context(text, shot.frames), **own)


@torch.no_grad()
def _append_story(
    backbone: Backbone, method: Method, story: Tensor, size: tuple[int, int, int], options: dict[str, Any]
) -> None:
    """One pass over the story's text and its dummy frame, zeros at level 0, which keeps their keys and values."""
    channels, height, width = size
    zeros = torch.zeros(len(story), channels, 1, height, width, dtype=story.dtype, device=story.device)
    told = method.model_levels(torch.zeros(len(story), 1, device=story.device))
    own = options | {"layout": ClipLayout((Segment("dummy", 1),)), "append": True}
    backbone(zeros, told, _context(story, 1), **own)


def _one_shot(frames: int) -> ClipLayout:
    return ClipLayout((Segment("target", frames),))


def _context(text: Tensor, frames: int) -> TextContext:
    """One text [B,L,D] that all frames read."""
    return TextContext(text[:, None], torch.zeros(frames, dtype=torch.long))


def _after(callback: Callback, before: int, total: int) -> Callback:
    return lambda done, _: callback(before + done, total)
