"""What a storyboard says, as the model reads it: a context for every shot, and states where the method reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from models.codecs import to_video
from models.layout import ClipLayout
from models.states import StatePredictor, encode_states, fit_states, instruction_of
from models.text import TextContext, pack_text
from sample.given_frames import PlacedClip
from sample.storyboard import Storyboard, StoryboardError, StoryboardShot

if TYPE_CHECKING:
    from models.folder import Model
    from models.methods import Method


# what guidance drops of a made shot's text: its prompt, or the story, too
NullText = Literal["shot", "all"]


def encode_texts(
    storyboards: Sequence[Storyboard],
    layout: ClipLayout,
    model: Model,
    text: str,
    story_group: bool = False,
    null_text: NullText = "all",
) -> tuple[TextContext, TextContext]:
    """The contexts that a clip reads [B, G, L, D] and those of the null branch.

    First those of the shots, then one for each image that is a group of its own in front of a shot, which has no prompt
    and reads what a shot without its prompt would. `story_group`: the story is the last context, and in no other
    (`models.layout.with_story`).

    In the null branch the negative text stands for the prompts of what is made, with `null_text="all"` also for the
    story, with "shot" beside it. What is given keeps its text, as history behind a cache does.
    """
    images = int(layout.text_ids.max()) + 1 - len(storyboards[0].shots) - story_group
    made = set(layout.text_ids[~layout.is_given].tolist())
    rows, nulls = [], []
    for board in storyboards:
        own = []
        for index, shot in enumerate(board.shots):
            try:
                said = [shot.prompt or shot.sentence] if story_group else shot_texts(board, shot, text)
                own.append(encode_context(said, model))
            except ValueError as error:
                raise StoryboardError(f"{board.where(index)}: {error}", f"shots.{index}.prompt") from error
        try:
            if images:
                own += [encode_context(unprompted_texts(board, text, story_group), model)] * images
            if story_group:
                own.append(encode_context([board.story], model))
        except ValueError as error:
            raise StoryboardError(f"storyboard {board.name!r}: story: {error}", "story") from error
        try:
            kept = null_text == "shot"
            said = unprompted_texts(board, text, story_group, board.negative) if kept else [board.negative]
            null = encode_context(said, model)
        except ValueError as error:
            raise StoryboardError(f"storyboard {board.name!r}: negative: {error}", "negative") from error
        dropped = made - {len(own) - 1} if story_group and kept else made
        rows.append(torch.stack(own))
        nulls.append(torch.stack([null if group in dropped else one for group, one in enumerate(own)]))
    contexts, null_contexts = (TextContext(torch.stack(texts), layout.text_ids) for texts in (rows, nulls))
    to = model.device, model.backbone.dtype
    return contexts.to(*to), null_contexts.to(*to)


def image_contexts(
    storyboards: Sequence[Storyboard], media: list[np.ndarray | None], layout: ClipLayout, model: Model
) -> tuple[TextContext, TextContext]:
    """For a model that reads images: the first frame's embedding as the context of the one shot, and none."""
    found = TextContext(_embedding(storyboards, media[0], model)[:, None], layout.text_ids)
    to = model.device, model.backbone.dtype
    return found.to(*to), TextContext(torch.zeros_like(found.embeddings), layout.text_ids).to(*to)


def no_contexts(count: int, layout: ClipLayout, model: Model) -> tuple[TextContext, TextContext]:
    """For a model that no text reaches: contexts [count, G, 1, 1] that nobody reads."""
    empty = torch.zeros(count, int(layout.text_ids.max()) + 1, 1, 1)
    context = TextContext(empty, layout.text_ids).to(model.device, model.backbone.dtype)
    return context, context


def embeddings_of(
    storyboards: Sequence[Storyboard],
    media: list[np.ndarray | None],
    method: Method,
    model: Model,
    placed: Sequence[PlacedClip] = (),
) -> dict[str, tuple[Tensor, Tensor]]:
    """The first frame's embedding, which a model that reads images is told besides text, and that of none, [B, 1, D]
    each; {} where none is read.

    The first frame is that of `media`, or of a clip that is placed at the start; zeros where a method needs none.
    """
    if method.reads_image != "with_text" or not model.reads_images:
        return {}
    first = media[0]
    if first is None:
        first = next((clip.pixels for clip in placed if clip.start == 0), None)
    if first is None and "t2v" in method.tasks:
        found = torch.zeros(len(storyboards), 1, model.image_encoder.width)
    else:
        found = _embedding(storyboards, first, model)
    found = found.to(model.device, model.backbone.dtype)
    return {"embedding": (found, torch.zeros_like(found))}


def _embedding(storyboards: Sequence[Storyboard], first: np.ndarray | None, model: Model) -> Tensor:
    """[B, 1, D], of the first frame [T, H, W, 3] that all of the batch start from."""
    if first is None:
        raise StoryboardError(f"{storyboards[0].where(0)}: this model starts from a first_frame", "shots.0.first_frame")
    image = to_video([first[:1]])[:, :, 0]  # [1, 3, H, W]
    return model.image_encoder.encode(image).expand(len(storyboards), -1, -1)


def say_states(
    storyboards: Sequence[Storyboard],
    media: list[np.ndarray | None],
    method: Method,
    predictor: StatePredictor | None,
) -> list[list[str]]:
    """The states that the method reads of every storyboard's one shot, its own or predicted; [] if none are read."""
    if not method.most_states or media[0] is None:
        return []
    found = []
    for board in storyboards:
        shot = board.shots[0]
        instruction = instruction_of(board.story, shot.prompt, shot.sentence)
        try:
            if not shot.states and predictor is None:
                raise ValueError("this model reads states: say them, or name a predictor (states.backend)")
            said = shot.states or (predictor(media[0], instruction) if predictor else [])
            if len(said) > method.most_states:
                raise ValueError(f"{len(said)} states; this model reads {method.most_states}")
        except (ValueError, RuntimeError) as error:
            raise StoryboardError(f"{board.where(0)}: states: {error}", "shots.0.states") from error
        found.append(fit_states(said, instruction, method.most_states))
    return found


def states_of(said: Sequence[Sequence[str]], method: Method, model: Model) -> dict[str, tuple[Tensor, Tensor]]:
    """States that are said and those of the null branch, [B, S, L, D] each; {} if none are read."""
    if not said:
        return {}
    rows = [encode_states(states, model.text) for states in said]
    rows.append(encode_states([""], model.text))
    shape = (method.most_states, max(row.shape[1] for row in rows))
    padded = [torch.nn.functional.pad(r, (0, 0, 0, shape[1] - r.shape[1], 0, shape[0] - len(r))) for r in rows]
    *found, null = (row.to(model.device, model.backbone.dtype) for row in padded)
    return {"states": (torch.stack(found), null.expand(len(found), -1, -1, -1))}


def labels_of(storyboards: Sequence[Storyboard], method: Method) -> Tensor | None:
    """The class of each storyboard's one shot, long [B], -1 where it has none; None of a model that is told none."""
    classes = method.classes
    for board in storyboards:
        for index, shot in enumerate(board.shots):
            problem = ""
            if classes is None:
                problem = "" if shot.label is None else f"label={shot.label}; this model reads words: write a prompt"
            elif not shot.given and (shot.label is None or shot.label >= classes):
                known = f"a class, 0 to {classes - 1}, or -1 for none" if classes else "-1, no class"
                problem = f"label={shot.label}; this model reads no words: give {known}"
            elif board.story or board.negative:
                problem = "this model reads no words; leave story and negative out"
            if problem:
                raise StoryboardError(f"{board.where(index)}: {problem}", f"shots.{index}.label")
    return None if classes is None else torch.tensor([board.shots[0].label for board in storyboards])


def encode_context(texts: list[str], model: Model) -> Tensor:
    """One context [L, D]. Raises ValueError for texts that do not fit, also for one that the encoder would cut."""
    before = model.text.truncated
    context = pack_text(model.text.encode(model.text.parts(texts)), model.settings.text_length)
    if model.text.truncated > before:
        raise ValueError(f"a text has more than the model's {model.settings.text_length} tokens; shorten it")
    return context


def unprompted_texts(storyboard: Storyboard, text: str, story_group: bool, instead: str = "") -> list[str]:
    """The texts of a shot's context with `instead` in the place of its prompt, which training leaves out whole."""
    in_front = [storyboard.story] if text == "scene" and storyboard.story and not story_group else []
    return [*in_front, instead] if instead or not in_front else in_front


def shot_texts(storyboard: Storyboard, shot: StoryboardShot, text: str) -> list[str]:
    """The texts of a shot's context: [story; prompt] in a scene, its lone sentence otherwise."""
    if text == "scene" and storyboard.story:
        return [storyboard.story, shot.prompt or shot.sentence]
    return [shot.sentence or shot.prompt]
