"""How well a single-shot model obeys held-out prompts, read by the judge."""

from __future__ import annotations

from models.folder import Model
from sample.generate import GenerateSettings, generate_scenes
from sample.storyboard import Storyboard, StoryboardShot
from toyworld.judge import score_clip, summarise
from toyworld.text import sentence
from toyworld.vocabulary import LevelName
from toyworld.world import ToyScene, sample_scene

PROMPT_SEED = 90210  # held-out prompts are drawn here; no training world has this seed


def held_out_scenes(level: LevelName, count: int) -> list[ToyScene]:
    """Single shots whose actor's identity, or what it does, was never shown in training."""
    return [sample_scene(level, seed=PROMPT_SEED, index=index, split="test", num_shots=1) for index in range(count)]


def held_out_scores(
    model: Model, *, level: LevelName, seed: int, prompts: int, steps: int = 20, guidance: float = 3.0, batch: int = 16
) -> dict[str, dict[str, float]]:
    """{metric: {"value", "count"}} over `prompts` generated clips, each asked for by its canonical sentence."""
    scenes = held_out_scenes(level, prompts)
    settings = GenerateSettings(steps=steps, guidance=guidance, text="sentence")
    scores = []
    for begin in range(0, prompts, batch):
        group = scenes[begin : begin + batch]
        boards = [
            Storyboard(name=scene.scene_id, story="", shots=[StoryboardShot(prompt="", sentence=sentence(scene, 0))])
            for scene in group
        ]
        seeds = [seed * 100_003 + begin + k for k in range(len(group))]
        for scene, clip in zip(group, generate_scenes(model, boards, settings, seeds), strict=True):
            scores.append(score_clip(clip.frames, scene, 0))
    return summarise(scores)
