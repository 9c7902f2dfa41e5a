"""How well a single-shot model obeys held-out prompts, read by the judge."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from models.folder import Model
from sample.generate import GenerateSettings, generate_scene, generate_scenes
from sample.storyboard import Storyboard, StoryboardShot
from toyworld.judge import Scores, score_clip, summarise
from toyworld.render import render_shot
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
    """{metric: {"value", "count"}} over `prompts` generated clips, each asked for by its canonical sentence.

    A model that reads images is asked by the first frame of the true clip; it is not told what will happen.
    """
    scenes = held_out_scenes(level, prompts)
    settings = GenerateSettings(steps=steps, guidance=guidance, image_guidance=guidance, text="sentence")
    if model.reads_images:
        return summarise(
            [_score_from_first_frame(model, scene, settings, seed * 100_003 + k) for k, scene in enumerate(scenes)]
        )
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


def _score_from_first_frame(model: Model, scene: ToyScene, settings: GenerateSettings, seed: int) -> Scores:
    with TemporaryDirectory() as folder:
        image = Path(folder) / "first.png"
        Image.fromarray(render_shot(scene, 0, model.settings.height)[0]).save(image)
        board = Storyboard(scene.scene_id, shots=[StoryboardShot(sentence(scene, 0), first_frame=str(image))])
        frames, _ = generate_scene(model, board, settings, seed)
    return score_clip(frames, scene, 0)
