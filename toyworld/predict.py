"""ToyWorld's grammar as a state predictor: the states of the action that an instruction names.

It sees what a multimodal language model would see, a frame and an instruction; in ToyWorld the words alone decide the
states. Never the scene's truth, nor any later frame.
"""

from __future__ import annotations

from toyworld.parse import parse_sentence, parse_shot_prompt, parse_story
from toyworld.render import state_names
from toyworld.text import describe
from toyworld.words import MARKERS, STATE_WORDS, ShotAttributes

KEY = "toyworld-grammar-1"  # change it when the sentences change


def predict_states(instruction: str) -> list[str]:
    """The states in order, a sentence each; of a sentence, or of a story followed by a shot prompt.

    Raises ValueError for an instruction that is none of ToyWorld's.
    """
    shot = read_instruction(instruction)
    who = "The " + describe(shot.actor).split(" ", 1)[1]
    partner = "the " + describe(shot.partner).split(" ", 1)[1] if shot.partner else ""
    names = state_names(shot.action)
    return [f"{who} {STATE_WORDS[name].format(who=partner, what=shot.place.landmark)}." for name in names]


def read_instruction(instruction: str) -> ShotAttributes:
    """What an instruction asks for. Raises ValueError naming it."""
    for marker in MARKERS.values():
        if marker in instruction:
            story, prompt = instruction.split(marker, 1)
            shot = parse_shot_prompt(marker + prompt)
            if not story.strip():
                raise ValueError(f"shot prompt {instruction!r} needs its story, which says who Character 1 is")
            return shot.resolve(parse_story(story.strip()))
    return parse_sentence(instruction)
