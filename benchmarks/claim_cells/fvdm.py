"""FVDM (2410.03160): levels per frame in training (PTSS) make one model do what gives it frames, at no cost to others.

Comparison: scalar training, one level per clip, against PTSS with p in 0.05, 0.2, 0.5, 1. PTSS cells have the method's
own `clean_prob`; scalar training has none, or it would not be scalar.
"""

from __future__ import annotations

from claim_cells.cell import Cell, Comparison, Judged, Metric, Paper, Stage, TableConfig
from claim_cells.make import Task, encode_given, make_clips, rendered
from claim_cells.score import add_shot, given_pixels, given_scores
from models.folder import Model
from pipelines.toy_models.measure import held_out_scenes
from sample.storyboard import Storyboard, StoryboardShot
from toyworld.text import sentence

SINGLE = {"shots_per_scene": 1, "single_shot_prob": 1.0, "learning_rate": 2e-4}
PROBABILITIES = (0.05, 0.2, 0.5, 1.0)
GIVEN = {"i2v": (0,), "interpolation": (0, -1), "t2v": ()}  # latent frames


def _cell(name: str, **params: float) -> Cell:
    return Cell(name, "clips", (Stage("fvdm", params, SINGLE),))


def judge(model: Model, cell: Cell, config: TableConfig) -> Judged:
    """Every prompt as i2v, interpolation and t2v. Given are latent frames of the true shot, each encoded alone."""
    scenes = held_out_scenes("small", config.prompts)
    truth = rendered(scenes, model)
    boards = [Storyboard(f"p{n}", "", [StoryboardShot("", sentence(scene, 0))]) for n, scene in enumerate(scenes)]
    judged, frames = Judged(), model.codec.num_latent_frames(len(truth[0]))
    for task, places in GIVEN.items():
        at = [place % frames for place in places]
        given = encode_given(truth, at, model) if at else None
        clips = make_clips(model, Task(task), boards, config, given=given, frames=frames)
        known = given_pixels(at, len(truth[0]), model.codec.temporal_stride)
        for made, true, scene in zip(clips, truth, scenes, strict=True):
            add_shot(judged, task, made, scene, given_scores(made, true, known) if at else None)
    return judged


_TASKS = [f"{task}.{name}" for task in ("i2v", "interpolation") for name in ("made_psnr", "seam", "frechet")]
EXPECTS = {
    **dict.fromkeys(_TASKS, "better"),
    **{f"{task}.given_psnr": "not worse" for task in ("i2v", "interpolation")},
    **{f"t2v.{name}": "not worse" for name in ("attributes", "action", "frechet")},
}

PAPER = Paper(
    name="fvdm",
    title="FVDM: levels per frame in training (PTSS p) against one level per clip",
    cells=(
        _cell("scalar", p=0.0, clean_prob=0.0),
        *(_cell(f"p{p:g}", p=p) for p in PROBABILITIES),
    ),
    metrics=(
        *(
            metric
            for task in ("i2v", "interpolation")
            for metric in (
                Metric(f"{task}.given_psnr", margin=0.5),
                Metric(f"{task}.made_psnr", margin=0.5),
                Metric(f"{task}.seam", -1),
                Metric(f"{task}.attributes"),
                Metric(f"{task}.action"),
                Metric(f"{task}.frechet", -1, 0.1),
            )
        ),
        Metric("t2v.attributes"),
        Metric("t2v.action"),
        Metric("t2v.frechet", -1, 0.1),
    ),
    comparisons=tuple(Comparison(f"p{p:g}", "scalar", EXPECTS) for p in PROBABILITIES),  # type: ignore[arg-type]
    judge=judge,
)
