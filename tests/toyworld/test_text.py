"""Every caption of the grammar parses back to what it was made from."""

import numpy as np
import pytest

from toyworld.render import states
from toyworld.text import (
    ACTION_WORDS,
    parse_sentence,
    parse_shot_prompt,
    parse_story,
    sentence,
    shot_attributes,
    shot_prompt,
    state_sentences,
    story,
    story_attributes,
)
from toyworld.vocabulary import ACTIONS
from toyworld.world import sample_scene

SCENES = 120


@pytest.mark.parametrize("level", ["small", "medium", "full"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_round_trip(level, split):
    for index in range(SCENES):
        scene = sample_scene(level, split=split, index=index)
        said = parse_story(story(scene))
        assert said == story_attributes(scene)
        for i in range(len(scene.shots)):
            truth = shot_attributes(scene, i)
            for rng in (None, np.random.default_rng(index)):
                text = sentence(scene, i, rng)
                assert parse_sentence(text) == truth, text
                prompt = shot_prompt(scene, i, rng)
                assert parse_shot_prompt(prompt).resolve(said) == truth, prompt
                assert (text + prompt + story(scene)).isascii()


def test_transition_is_said():
    scenes = [sample_scene("full", index=k, num_shots=4) for k in range(30)]
    for scene in scenes:
        for i, shot in enumerate(scene.shots):
            begins = parse_shot_prompt(shot_prompt(scene, i)).begins
            assert begins == ("cut" if shot.transition == "start" else shot.transition)


def test_small_texts_fit_a_short_encoder():
    for index in range(300):
        scene = sample_scene("small", index=index)
        longest = max(len(shot_prompt(scene, i)) for i in range(len(scene.shots)))
        assert len(story(scene)) <= 150
        assert longest <= 100
        assert len(story(scene)) + longest <= 250


def test_phrasings_differ_and_are_reproducible():
    scene = sample_scene("full", index=3)
    texts = {sentence(scene, 0, np.random.default_rng(k)) for k in range(40)}
    assert len(texts) > 10
    assert sentence(scene, 0, np.random.default_rng(5)) == sentence(scene, 0, np.random.default_rng(5))


def test_no_phrase_names_two_actions():
    phrases = [(name, phrase) for name, words in ACTION_WORDS.items() for phrase in words]
    assert {name for name, _ in phrases} == set(ACTIONS)
    for name, phrase in phrases:
        text = "A red circle " + phrase.format(who="a blue square", what="tree") + " in a meadow, filled style."
        assert parse_sentence(text).action == name


def test_state_sentences_follow_the_states():
    for index in range(60):
        scene = sample_scene("full", index=index)
        for i, shot in enumerate(scene.shots):
            said = state_sentences(scene, i)
            assert [frame for _, frame in said] == [frame for _, frame in states(shot)]
            assert all(shot_attributes(scene, i).actor.colour in text for text, _ in said)


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_sentence, "A cat sits in a meadow, filled style.", "names no character"),
        (parse_sentence, "A red circle sleeps in a meadow, filled style.", "must name one action"),
        (parse_sentence, "A red circle grows, filled style.", "names no place"),
        (parse_sentence, "A red circle grows in a meadow.", "names no style"),
        (parse_story, "A red circle.", "is not"),
        (parse_shot_prompt, "Wide shot. Character 1 grows.", "must begin with"),
        (parse_shot_prompt, "[SHOT CUT] Wide shot. Somebody grows.", "must begin with"),
    ],
)
def test_what_cannot_be_parsed_is_refused(parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_prompt_with_an_unknown_character_is_refused():
    said = parse_story(
        "[Character] Character 1: a red circle. [Environment] A meadow, filled style. [Story] In 1 shot."
    )
    with pytest.raises(ValueError, match="Character 2"):
        parse_shot_prompt("[SHOT CUT] Wide shot. Character 2 grows.").resolve(said)
