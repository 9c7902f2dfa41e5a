"""What every shot, image and story of a clip is told, and what guidance goes without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.folder import Model
from models.layout import ClipLayout, shots_layout, with_story
from models.methods import get_method
from models.text import pack_text
from models.tiny import build_tiny_folder
from sample.contexts import encode_texts
from sample.generate import GenerateSettings
from sample.storyboard import Storyboard, StoryboardError, StoryboardShot

LENGTH = 64
BOARD = Storyboard("b", "A walk.", [StoryboardShot("One goes."), StoryboardShot("One comes.")], negative="Blur.")
SCENE = shots_layout([2, 1])
FIRST_GIVEN = get_method("lct").layout_for_task("shot_conditioned", [2, 1], given_shots=[0])
COMPOSITION = get_method("lct").layout_for_task("composition", [2], condition_frames=[1, 1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return build_tiny_folder(tmp_path_factory.mktemp("contexts") / "model", method="lct", text_length=LENGTH)


def packed(model: Model, *contexts: tuple[str, ...]) -> Tensor:
    """[1, G, L, D] of contexts of one or more texts each."""
    return torch.stack([pack_text(model.text.encode(list(texts)), LENGTH) for texts in contexts])[None]


@pytest.mark.parametrize(
    ("story_group", "null_text", "negative", "expected"),
    [
        (False, "all", "Blur.", [("Blur.",)] * 2),
        (False, "all", "", [("",)] * 2),
        (False, "shot", "Blur.", [("A walk.", "Blur.")] * 2),
        (False, "shot", "", [("A walk.",)] * 2),  # as training's text_drop.prompts has it
        (True, "all", "Blur.", [("Blur.",)] * 3),
        (True, "shot", "Blur.", [("Blur.",), ("Blur.",), ("A walk.",)]),
        (True, "shot", "", [("",), ("",), ("A walk.",)]),
    ],
)
def test_guidance_goes_without_the_prompts_or_without_the_story_too(
    model: Model, story_group: bool, null_text: str, negative: str, expected: list[tuple[str, ...]]
) -> None:
    layout = with_story(SCENE) if story_group else SCENE
    board = replace(BOARD, negative=negative)
    text, null = encode_texts([board], layout, model, "scene", story_group, null_text)  # type: ignore[arg-type]
    said = [("One goes.",), ("One comes.",), ("A walk.",)]
    said = said if story_group else [("A walk.", *shot) for shot in said[:2]]
    assert torch.equal(text.embeddings, packed(model, *said))
    assert torch.equal(null.embeddings, packed(model, *expected))
    assert torch.equal(text.frame_text, layout.text_ids) and torch.equal(null.frame_text, layout.text_ids)


@pytest.mark.parametrize("null_text", ["all", "shot"])
def test_what_is_given_keeps_its_text_in_every_pass(model: Model, null_text: str) -> None:
    text, null = encode_texts([BOARD], FIRST_GIVEN, model, "scene", False, null_text)  # type: ignore[arg-type]
    assert torch.equal(null.embeddings[:, 0], text.embeddings[:, 0])
    assert not torch.equal(null.embeddings[:, 1], text.embeddings[:, 1])


@pytest.mark.parametrize(
    ("text", "story_group", "image"), [("scene", False, "A walk."), ("scene", True, ""), ("sentence", False, "")]
)
def test_an_image_of_a_composition_reads_what_a_shot_without_its_prompt_does(
    model: Model, text: str, story_group: bool, image: str
) -> None:
    board = replace(BOARD, shots=BOARD.shots[:1])
    layout: ClipLayout = with_story(COMPOSITION) if story_group else COMPOSITION
    for null_text in ("all", "shot"):
        found, null = encode_texts([board, board], layout, model, text, story_group, null_text)  # type: ignore[arg-type]
        assert found.embeddings.shape[:2] == (2, 3 + story_group)
        own = layout.text_ids[layout.is_given]
        assert own.tolist() == [1, 2]
        for contexts in (found, null):
            assert torch.equal(contexts.embeddings[:1, own], packed(model, (image,), (image,)))
    if story_group:
        assert torch.equal(found.embeddings[:1, 3:], packed(model, ("A walk.",)))


def test_a_story_that_is_not_read_may_be_of_any_length(model: Model) -> None:
    board = replace(BOARD, story="walk " * LENGTH, shots=[replace(shot, sentence="One.") for shot in BOARD.shots])
    text, _ = encode_texts([board], SCENE, model, "sentence")
    assert torch.equal(text.embeddings, packed(model, ("One.",), ("One.",)))
    with pytest.raises(StoryboardError, match="story: ") as caught:
        encode_texts([board], with_story(SCENE), model, "scene", True)
    assert caught.value.param == "story"


def test_what_does_not_fit_or_is_unknown_is_named(model: Model) -> None:
    long = replace(BOARD, negative="blur " * LENGTH)
    with pytest.raises(StoryboardError, match="negative: ") as caught:
        encode_texts([long], SCENE, model, "scene")
    assert caught.value.param == "negative"
    with pytest.raises(ValueError, match="null_text='none'; choose shot or all"):
        GenerateSettings(null_text="none")  # type: ignore[arg-type]
