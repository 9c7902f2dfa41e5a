"""Storyboards to frames: words and given media in, uint8 videos out, for any method a model folder names.

A scene is made as one clip whose shots see one another, or shot by shot behind a cache of earlier ones (LCT,
2503.10589); a shot with references as one clip that begins with them and ends with what is kept (TIC-FT, 2506.00996;
LCT's compositions); a shot longer than a clip as overlapping clips (FVDM, 2410.03160); or with `independent=True` shot
by shot from the same texts and the same start noise, which is the baseline that a scene model has to beat. Every shot
is decoded alone, as it was encoded in training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from infra.log import get_logger
from models.backbones.base import require
from models.codecs import to_frames
from models.layout import ClipLayout, drop_frames, shots_layout, with_story
from models.methods import get_method
from models.noise import base_levels
from models.patches import own_places, padded_frames, take_frames
from models.scene import MAX_HISTORY
from models.solvers import SolverName
from models.states import StatePredictor
from sample.abilities import check_noise_aug, check_scene_guidance, check_task
from sample.apart import OTHER_SHOTS
from sample.contexts import (
    NullText,
    embeddings_of,
    encode_texts,
    image_contexts,
    labels_of,
    no_contexts,
    say_states,
    states_of,
)
from sample.frame_tasks import (
    check_given_frames,
    check_tokens,
    layout_of_frame_task,
    layout_of_given_frames,
    plan_of,
    sample_long_video,
)
from sample.given import encode_media, encode_noised, latent_size, load_media, load_references, num_latent_frames
from sample.given_frames import PlacedClip, load_given_frames
from sample.guidance import Guidance, Scale, check_guidance, read_scale
from sample.rollout import RolloutShot, rollout
from sample.sampler import Callback, sample
from sample.storyboard import FRAME_TASKS, Storyboard, StoryboardError, Task, derive_seed

if TYPE_CHECKING:
    from models.folder import Model, ModelSettings
    from models.methods import Method


@dataclass(frozen=True)
class GenerateSettings:
    """How to sample; what to sample is the storyboard's."""

    steps: int = 30
    guidance: float = 5.0  # classifier-free guidance scale of the text; 1 is none
    text: Literal["scene", "sentence"] = "scene"  # a shot reads [story; prompt], or its self-contained sentence
    solver: SolverName = "euler"
    task: Task = "auto"  # of storyboards that name none
    history: int = MAX_HISTORY  # how many earlier shots a shot sees that is made after them, where nothing else is said
    # of the given frames, where the method guides by them (aid, fca, svd), or that of the first and that of the last
    # frame; 1 is none; None: the method's own (`Method.image_guidance`)
    image_guidance: Scale | None = None
    # of the other shots of a scene (lct); None: every pass of guidance sees them, so that only the text is amplified
    scene_guidance: float | None = None
    null_text: NullText = "all"  # what the pass of guidance without text goes without: the prompt, or the story, too
    noise_aug: float = 0.0  # of a Stable Video Diffusion: deviation of noise on the first frame before it is encoded
    given_pixels: bool = False  # frames that a shot starts from are shown as given, not as the model shows them

    def __post_init__(self) -> None:
        if self.image_guidance is not None:
            read_scale("image_guidance", self.image_guidance)
        if not 0 <= self.noise_aug < math.inf:
            raise ValueError(f"noise_aug={self.noise_aug}; give 0 or a positive number")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}; give at least 1")
        if not 1 <= self.history <= MAX_HISTORY:
            raise ValueError(f"history={self.history}; a shot sees 1 to {MAX_HISTORY} earlier shots")
        if self.null_text not in get_args(NullText):
            raise ValueError(f"null_text={self.null_text!r}; choose shot or all")

    @property
    def over_other_shots(self) -> list[tuple[str, float]]:
        """The scale of `Guidance` for the other shots, if one is set."""
        return [] if self.scene_guidance is None else [(OTHER_SHOTS, self.scene_guidance)]


@dataclass(frozen=True)
class Clip:
    """A finished video: uint8 frames [T, H, W, 3] and the first frame of every shot but the first."""

    frames: np.ndarray
    cuts: list[int]
    states: list[list[str]] = field(default_factory=list)  # of each shot, as the model read them; [] if it reads none


def generate_scene(
    model: Model,
    storyboard: Storyboard,
    settings: GenerateSettings,
    seed: int,
    *,
    independent: bool = False,
    states: StatePredictor | None = None,
    callback: Callback | None = None,
) -> tuple[np.ndarray, list[int]]:
    """Frames uint8 [T, H, W, 3] of one storyboard and its cuts (first frame of every shot but the first)."""
    (clip,) = generate_scenes(
        model, [storyboard], settings, [seed], independent=independent, states=states, callback=callback
    )
    return clip.frames, clip.cuts


def generate_scenes(
    model: Model,
    storyboards: Sequence[Storyboard],
    settings: GenerateSettings,
    seeds: Sequence[int],
    *,
    independent: bool = False,
    states: StatePredictor | None = None,
    callback: Callback | None = None,
) -> list[Clip]:
    """One clip per storyboard, made as one batch; all must have the same `scene_shape`.

    `states` predicts, for a method that reads states, those of the shots whose storyboard does not say them.
    A scene's noise comes from its own seed, so its neighbours in the batch do not change it. Raises StoryboardError
    for a storyboard that the model cannot make, naming the shot and the field.
    """
    for board in storyboards:
        board.validate(frame_step=model.codec.frame_step)
    if independent:
        return _generate_shots_alone(model, storyboards, settings, seeds, states, callback)
    shapes = {scene_shape(board, model.settings) for board in storyboards}
    if len(shapes) != 1:
        raise ValueError(f"a batch needs storyboards of one shape, got {len(shapes)}: {sorted(map(str, shapes))}")

    first = storyboards[0]  # stands for all where only the shape matters
    method = get_method(model.settings.method, **model.settings.method_params)
    sequence = first.task or settings.task
    for board in storyboards:
        board.check_sequence(sequence)
    labels = labels_of(storyboards, method)
    try:
        check_scene_guidance(settings.scene_guidance, model.settings)
    except ValueError as error:
        raise StoryboardError(f"storyboard {first.name!r}: {error}", "scene_guidance") from error
    try:
        check_noise_aug(settings.noise_aug, model.settings)
    except ValueError as error:
        raise StoryboardError(f"storyboard {first.name!r}: {error}", "noise_aug") from error
    if sequence in ("autoregressive", "extension"):
        return _generate_in_turn(model, storyboards, settings, seeds, sequence, callback)
    check_given_frames(method, first)
    try:
        check_guidance(settings.guidance, model.backbone.embedded_guidance is not None)
    except ValueError as error:
        raise StoryboardError(f"storyboard {storyboards[0].name!r}: {error}", "guidance") from error
    media = [load_media(first, index, model) for index in range(len(first.shots))]
    placed = [clip for index in range(len(first.shots)) for clip in load_given_frames(first, index, model)]
    references = load_references(first, method, model)
    _warn_of_images(method, first, media, model)
    layout, task = _layout(method, first, media, references, placed, model)
    if story_apart := method.story_group and settings.text == "scene" and bool(first.story):
        layout = with_story(layout)
    levels = base_levels(settings.steps, shift=model.settings.level_shift)
    places = padded_frames(layout, model.backbone.capabilities.frames_per_token)
    made = take_frames(layout, places)  # as the model makes it
    plan = None if task == "long_video" else plan_of(method, layout, levels, task, first)[:, places]
    check_tokens(plan, first, model)
    if method.reads_image == "alone":
        text, null = image_contexts(storyboards, media, made, model)
    elif not method.reads_text:
        text, null = no_contexts(len(storyboards), made, model)
    else:
        text, null = encode_texts(storyboards, made, model, settings.text, story_apart, settings.null_text)
    said = say_states(storyboards, media, method, states)
    read = states_of(said, method, model) | embeddings_of(storyboards, media, method, model, placed)
    shape = (len(storyboards), model.codec.latent_channels, made.num_frames, *latent_size(model))
    given = encode_media(media, references, layout, model, len(storyboards), placed)
    given = None if given is None else given[:, :, places]
    clean = (torch.zeros(shape) if given is None else given).to(text.embeddings)
    conditions = method.conditions(clean, made, labels)
    if settings.noise_aug and media[0] is not None:
        own_seeds = [shot_seeds(board, seed)[0] for board, seed in zip(storyboards, seeds, strict=True)]
        noised = encode_noised(media[0], settings.noise_aug, own_seeds, model).to(clean)
        seen = torch.cat([noised, clean[:, :, noised.shape[2] :]], dim=2)
        conditions = method.conditions(seen, made, labels)
        conditions["noise_aug"] = torch.full((len(storyboards),), settings.noise_aug, device=clean.device)
    image_scale = method.image_guidance if settings.image_guidance is None else settings.image_guidance
    scales: dict[str, Scale] = {"text": settings.guidance, "image": image_scale}
    guided = [(name, scales[name]) for name in method.guided]
    if layout.num_shots - story_apart > 1:
        guided += settings.over_other_shots
    options: dict[str, Any] = dict(
        shape=shape,
        generator=[
            shot_generators(board, seed, len(references)) for board, seed in zip(storyboards, seeds, strict=True)
        ],
        given=given,
        guidance=Guidance(guided, method.guided),
        null={"text": null} | {name: value for name, (_, value) in read.items()},
        conditions=conditions | {name: value for name, (value, _) in read.items()},
        solver=settings.solver,
        callback=callback,
    )
    if plan is None:
        latents = sample_long_video(method, layout, levels, text, first, model, options)
    else:
        latents = sample(
            model.backbone,
            made,
            plan.to(text.embeddings.device),
            text,
            model_levels=method.model_levels,
            prepare=partial(method.prepare, model.backbone, made),
            apart=method.backbone_kwargs,
            **options,
            **method.backbone_kwargs(made),
        )
    latents = latents[:, :, own_places(places)]
    if method.puts_given_back and given is not None:
        latents[:, :, : method.first_frames] = given[:, :, : method.first_frames].to(latents)
    seen_first = story_apart + sum(num_latent_frames(model, pixels) for pixels in references)
    starts: list[np.ndarray | None] = (
        media if settings.given_pixels and sequence not in FRAME_TASKS else [None] * len(media)
    )
    own = drop_frames(layout, seen_first)
    clips = [_to_clip(one[:, seen_first:], own, first, media, starts, model) for one in latents]
    return [replace(clip, states=[states]) for clip, states in zip(clips, said, strict=True)] if said else clips


def scene_shape(storyboard: Storyboard, described: ModelSettings) -> tuple[tuple[Any, ...], ...]:
    """What storyboards of one batch share: how they are made, the length of each shot and what it is given and sees."""
    method = get_method(described.method, **described.method_params)
    made = (storyboard.task, storyboard.history, repr(storyboard.plan), method.story_group and bool(storyboard.story))
    return made, *(
        (
            shot.frames or described.frames_per_shot,
            shot.given,
            shot.first_frame,
            None if shot.history is None else tuple(shot.history),
            *((one.role, one.path) for one in shot.references),
            *((one.path, one.at, one.start, one.frames) for one in shot.given_frames),
        )
        for shot in storyboard.shots
    )


def shot_seeds(storyboard: Storyboard, seed: int) -> list[int]:
    """Seed of each shot: its own, else from the storyboard's."""
    return [derive_seed(seed, i) if shot.seed is None else shot.seed for i, shot in enumerate(storyboard.shots)]


def shot_generators(storyboard: Storyboard, seed: int, references: int = 0) -> list[torch.Generator]:
    """One CPU generator per shot, so that a shot's noise depends on its seed and on nothing else in the run.

    Those of references that are groups of their own come after those of the shots.
    """
    seeds = shot_seeds(storyboard, seed) + [derive_seed(seed, "reference", i) for i in range(references)]
    return [torch.Generator().manual_seed(one) for one in seeds]


def _generate_in_turn(
    model: Model,
    storyboards: Sequence[Storyboard],
    settings: GenerateSettings,
    seeds: Sequence[int],
    task: Task,
    callback: Callback | None,
) -> list[Clip]:
    """Every shot behind those before it that it sees. Each is decoded as soon as it is made."""
    first = storyboards[0]
    try:
        check_task(task, model.settings)
        require(model.backbone.capabilities, kv_cache=True)
    except ValueError as error:
        raise StoryboardError(f"storyboard {first.name!r}: {error}", "task") from error
    media = [load_media(first, index, model) for index in range(len(first.shots))]
    frames = _shot_frames(first, media, model)
    layout = shots_layout(frames)
    method = get_method(model.settings.method, **model.settings.method_params)
    _warn_of_images(method, first, media, model)
    story_apart = method.story_group and settings.text == "scene" and bool(first.story)
    read_by = with_story(layout) if story_apart else layout
    text, null = encode_texts(storyboards, read_by, model, settings.text, story_apart, settings.null_text)
    known = encode_media(media, [], layout, model, len(storyboards))
    generators = [shot_generators(board, seed) for board, seed in zip(storyboards, seeds, strict=True)]
    shots = [
        RolloutShot(
            frames[index],
            text.embeddings[:, index],
            null.embeddings[:, index],
            [own[index] for own in generators],
            history,
            known[:, :, own_frames] if known is not None and media[index] is not None else None,
        )
        for index, (history, own_frames) in enumerate(
            zip(first.histories(settings.history), layout.shot_slices, strict=True)
        )
    ]
    levels = base_levels(settings.steps, shift=model.settings.level_shift)
    plan_of(method, layout, levels, task, first)  # refuses what does not fit
    made = rollout(
        model.backbone,
        method,
        task,
        shots,
        levels,
        size=(model.codec.latent_channels, *latent_size(model)),
        guidance=Guidance([("text", settings.guidance), *settings.over_other_shots]),
        solver=settings.solver,
        callback=callback,
        story=text.embeddings[:, -1] if story_apart else None,
        null_story=null.embeddings[:, -1] if story_apart and settings.null_text == "all" else None,
        plan_options=first.plan,
    )
    clips: list[list[np.ndarray]] = [[] for _ in storyboards]
    for pixels, latents in zip(media, made, strict=True):
        for clip, one in zip(clips, latents, strict=True):
            clip.append(_decode(one, model) if pixels is None else pixels)
    joined = [_join(clip) for clip in clips]
    return [replace(clip, cuts=[]) for clip in joined] if task == "extension" else joined


def _generate_shots_alone(
    model: Model,
    storyboards: Sequence[Storyboard],
    settings: GenerateSettings,
    seeds: Sequence[int],
    states: StatePredictor | None,
    callback: Callback | None,
) -> list[Clip]:
    """Every shot a clip of its own, with its scene's text and its own start noise; equal shapes share a batch."""
    boards = [
        replace(
            board,
            task=board.task if board.task in FRAME_TASKS else "auto",
            history=None,
            shots=[replace(shot, seed=derive_seed(seed, index) if shot.seed is None else shot.seed, history=None)],
        )
        for board, seed in zip(storyboards, seeds, strict=True)
        for index, shot in enumerate(board.shots)
    ]
    whole = [board for board in storyboards for _ in board.shots]
    boards = [
        lone if lone.takes_plan(lone.task or "auto") or not board.takes_plan(board.task or settings.task)
        else replace(lone, plan={})  # it was for history, or for another shot
        for lone, board in zip(boards, whole, strict=True)
    ]  # fmt: skip
    frames: list[np.ndarray] = [np.empty(0)] * len(boards)
    said: list[list[str]] = [[]] * len(boards)
    groups: dict[Any, list[int]] = {}
    for index, board in enumerate(boards):
        if (given := load_media(board, 0, model)) is not None and board.shots[0].given:
            frames[index] = given
        else:
            groups.setdefault(scene_shape(board, model.settings), []).append(index)
    for number, members in enumerate(groups.values()):
        on_step = None if callback is None else _part_of(callback, number, len(groups))
        alone = [boards[index] for index in members]
        clips = generate_scenes(model, alone, settings, [0] * len(alone), states=states, callback=on_step)
        for index, clip in zip(members, clips, strict=True):
            frames[index], said[index] = clip.frames, clip.states[0] if clip.states else []
    finished, read, clips = iter(frames), iter(said), []
    for board in storyboards:
        joined, of_shots = _join([next(finished) for _ in board.shots]), [next(read) for _ in board.shots]
        clips.append(replace(joined, states=of_shots if any(of_shots) else []))
    return clips


def _part_of(callback: Callback, number: int, parts: int) -> Callback:
    """The callback of part `number` of a run of `parts` equal parts."""
    return lambda done, total: callback(number * total + done, parts * total)


def _layout(
    method: Method,
    storyboard: Storyboard,
    media: list[np.ndarray | None],
    references: list[np.ndarray],
    placed: list[PlacedClip],
    model: Model,
) -> tuple[ClipLayout, str]:
    """How the model's method lays out what the storyboard asks for, and the task's name."""
    shots = storyboard.shots
    if storyboard.task in FRAME_TASKS:
        return layout_of_frame_task(method, storyboard, media[0], placed, model), storyboard.task
    if placed:
        return layout_of_given_frames(method, storyboard, placed, model), "any_frame"
    if references:
        task = method.task_of([one.role for one in shots[0].references])
        target = model.codec.num_latent_frames(shots[0].frames or model.settings.frames_per_shot)
        condition_frames = [num_latent_frames(model, pixels) for pixels in references]
        return method.layout_for_task(task, [target], condition_frames=condition_frames), task
    given = [index for index, shot in enumerate(shots) if shot.given]
    started = [index for index, shot in enumerate(shots) if shot.first_frame]
    many = len(shots) > 1
    start = "tvp" if "tvp" in method.tasks and "i2v" not in method.tasks else "i2v"
    task = "shot_conditioned" if given else start if started else "joint" if "joint" in method.tasks else "t2v"
    if task not in method.tasks or (many and task in (start, "t2v")):
        index, field = (given[0], "given") if given else (started[0], "first_frame") if started else (0, "prompt")
        hint = "; independent=true makes every shot by itself" if many and not given else ""
        raise StoryboardError(
            f"{storyboard.where(index)}: a model of method {method.name!r} cannot make {len(shots)} shots in one "
            f"scene with {len(given)} given shots and {len(started)} given first frames (its tasks: "
            f"{', '.join(method.tasks)}){hint}",
            f"shots.{index}.{field}",
        )
    latent_frames = _shot_frames(storyboard, media, model)
    try:
        return method.layout_for_task(task, latent_frames, **({"given_shots": given} if given else {})), task
    except ValueError as error:
        index = given[-1] if given else 0
        raise StoryboardError(f"{storyboard.where(index)}: {error}", f"shots.{index}.given") from error


def _warn_of_images(method: Method, storyboard: Storyboard, media: list[np.ndarray | None], model: Model) -> None:
    """Says in the log where images are to be seen as shots by a model that met none in training."""
    if "composition" not in method.tasks or method.single_frame_share():
        return
    for index, (shot, pixels) in enumerate(zip(storyboard.shots, media, strict=True)):
        if shot.references or (shot.given and pixels is not None and num_latent_frames(model, pixels) == 1):
            get_logger("sample").warning(
                "%s: an image as a shot, which this model never met in training (method_params.single_frame_prob=0): "
                "what is made may not follow it; train with method_params.single_frame_prob=0.1 to 0.2",
                storyboard.where(index),
            )


def _shot_frames(storyboard: Storyboard, media: list[np.ndarray | None], model: Model) -> list[int]:
    """Latent frames of each shot; a given one is as long as its file."""
    lengths = [
        len(pixels) if shot.given and pixels is not None else shot.frames or model.settings.frames_per_shot
        for shot, pixels in zip(storyboard.shots, media, strict=True)
    ]
    return [model.codec.num_latent_frames(length) for length in lengths]


def _to_clip(
    latents: Tensor,
    layout: ClipLayout,
    storyboard: Storyboard,
    media: list[np.ndarray | None],
    starts: Sequence[np.ndarray | None],  # frames to show in the place of a shot's first ones
    model: Model,
) -> Clip:
    """Pixels of one scene's latents [C, F, H, W]: each shot decoded alone, given shots as they were given."""
    shots = []
    for shot, pixels, start, frames in zip(storyboard.shots, media, starts, layout.shot_slices, strict=True):
        if shot.given and pixels is not None:
            shots.append(pixels)
            continue
        decoded = _decode(latents[:, frames], model)
        shots.append(decoded if start is None else np.concatenate([start, decoded[len(start) :]]))
    return _join(shots)


def _decode(latents: Tensor, model: Model) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] of one shot's latents [C, F, H, W]."""
    return to_frames(model.codec.decode(latents[None]))[0]


def _join(shots: list[np.ndarray]) -> Clip:
    starts = np.cumsum([len(shot) for shot in shots])[:-1]
    return Clip(np.concatenate(shots), [int(start) for start in starts])
