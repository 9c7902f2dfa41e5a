"""Prompts to frames for tasks that storyboards have no files for: given frames come as latents, batches as asked.

B batch, N prompts, C channels, F latent frames, H W latent size. Everything a method decides is asked of the method, as
`sample.generate` does; the start noise is a function of the prompt's number alone, the same for every cell and seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from claim_cells.cell import TableConfig
from models.codecs import to_frames, to_video
from models.folder import Model
from models.methods import get_method
from models.noise import base_levels
from pipelines.states import GrammarStates
from pipelines.toy_models.measure import PROMPT_SEED
from sample.contexts import encode_texts, say_states, states_of
from sample.given import latent_size
from sample.given_frames import placed_clip
from sample.guidance import Guidance
from sample.sampler import sample
from sample.storyboard import Storyboard, derive_seed
from toyworld.pairs import render_reference, sample_pair
from toyworld.render import render_shot
from toyworld.world import ToyScene

NOISE_SEED = 5


@dataclass(frozen=True)
class Task:
    """`givens` say what of the clip is known, per task; `lead` latent frames come before what is shown."""

    name: str
    text: str = "sentence"  # or "scene": story and prompt
    givens: Mapping[str, Any] | None = None
    lead: int = 0


def held_out_pairs(task: Any, count: int) -> list[Any]:
    return [sample_pair(task, "small", seed=PROMPT_SEED, index=n, split="test") for n in range(count)]


def rendered(scenes: Sequence[ToyScene], model: Model) -> list[np.ndarray]:
    """The true shots of scenes of one shot, uint8 [T,H,W,3]."""
    return [render_shot(scene, 0, model.settings.height) for scene in scenes]


def references_of(pairs: Sequence[Any], model: Model) -> list[np.ndarray]:
    """The first reference of each pair, uint8 [T,H,W,3]."""
    return [render_reference(pair.references[0], model.settings.height) for pair in pairs]


def encode(clips: Sequence[np.ndarray], model: Model, at_once: int = 16) -> Tensor:
    """Normalised posterior means [N,C,F,H,W] of clips of one length."""
    means = [
        model.codec.normalize(model.codec.encode(to_video(clips[begin : begin + at_once]))[0]).cpu()
        for begin in range(0, len(clips), at_once)
    ]
    return torch.cat(means)


def encode_given(clips: Sequence[np.ndarray], at: Sequence[int], model: Model) -> Tensor:
    """[N,C,F,H,W] of clips of one length: latent frames `at` as `shotloom sample` gives them; the others are zero.

    Each is encoded alone, by the pixels that it holds: cut out of the whole clip's it would know the frames before it,
    which are to be made.
    """
    codec, length = model.codec, len(clips[0])
    shape = (len(clips), codec.latent_channels, codec.num_latent_frames(length), *latent_size(model))
    given, stride = torch.zeros(shape), codec.temporal_stride
    for frame in at:
        pixels = slice(max(0, stride * (frame - 1) + 1), stride * frame + 1)
        alone = [placed_clip(clip[pixels], frame, codec) for clip in clips]
        given[:, :, frame] = encode([one.pixels for one in alone], model)[:, :, -1]
    return given


def make_clips(
    model: Model,
    task: Task,
    boards: Sequence[Storyboard],
    config: TableConfig,
    *,
    given: Tensor | None = None,  # [N,C,F,H,W], frames that the plan or the method reads; the others are ignored
    frames: int,  # latent frames of what is made, without the lead that is no part of the shot
) -> list[np.ndarray]:
    """uint8 [T,H,W,3] of every storyboard, each of one shot."""
    made: list[np.ndarray] = []
    for begin in range(0, len(boards), config.generate_at_once):
        rows = range(begin, min(begin + config.generate_at_once, len(boards)))
        own = None if given is None else given[rows.start : rows.stop].to(model.device)
        latents = _latents(model, task, boards, rows, config, own, frames)[:, :, task.lead :]
        made += list(to_frames(model.codec.decode(latents)))
    return made


@torch.no_grad()
def _latents(
    model: Model,
    task: Task,
    boards: Sequence[Storyboard],
    rows: range,
    config: TableConfig,
    given: Tensor | None,
    frames: int,
) -> Tensor:
    """Latents [B,C,F,H,W] of storyboards `rows`."""
    method = get_method(model.settings.method, **model.settings.method_params)
    layout = method.layout_for_task(task.name, [frames], **(task.givens or {}))
    plan = method.plan(layout, base_levels(config.sample_steps, shift=model.settings.level_shift), task.name)
    chosen = [boards[n] for n in rows]
    text, null = encode_texts(chosen, layout, model, task.text)
    # the grammar reads the words alone, so any picture will do
    picture: list[np.ndarray | None] = [np.zeros((1, 8, 8, 3), np.uint8)]
    states = states_of(say_states(chosen, picture, method, GrammarStates(method.most_states)), method, model)
    shape = (len(rows), model.codec.latent_channels, layout.num_frames, *latent_size(model))
    known = torch.zeros(shape, device=model.device) if given is None else given
    scales = {"text": config.guidance, "image": config.image_guidance if method.image_guidance != 1 else 1.0}
    latents = sample(
        model.backbone,
        layout,
        plan.to(model.device),
        text,
        shape=shape,
        generator=[torch.Generator().manual_seed(derive_seed(NOISE_SEED, n)) for n in rows],
        given=given,
        guidance=Guidance([(name, scales[name]) for name in method.guided], method.guided),
        null={"text": null} | {name: value for name, (_, value) in states.items()},
        model_levels=method.model_levels,
        conditions=method.conditions(known, layout) | {name: value for name, (value, _) in states.items()},
        prepare=partial(method.prepare, model.backbone, layout),
        **method.backbone_kwargs(layout),
    )
    if method.puts_given_back and given is not None:
        latents[:, :, : method.first_frames] = given[:, :, : method.first_frames].to(latents)
    return latents
