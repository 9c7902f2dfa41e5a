"""How prediction is judged (fca, aid): what follows the first frame of a held-out shot, as its sentence says."""

from __future__ import annotations

from claim_cells.cell import Cell, Judged, Metric, TableConfig
from claim_cells.make import Task, encode, make_clips, rendered
from claim_cells.score import add_shot, given_pixels, given_scores
from models.folder import Model
from pipelines.toy_models.measure import held_out_scenes
from sample.storyboard import Storyboard, StoryboardShot
from toyworld.text import sentence

METRICS = (
    Metric("tvp.action"),
    Metric("tvp.state_order"),
    Metric("tvp.frechet", -1, 0.1),
    Metric("tvp.attributes"),
    Metric("tvp.made_psnr", margin=0.5),
    Metric("tvp.seam", -1),
)


def judge(model: Model, cell: Cell, config: TableConfig) -> Judged:
    """The first latent frame is given: one picture."""
    scenes = held_out_scenes("small", config.prompts)
    truth = rendered(scenes, model)
    latents = encode(truth, model)
    boards = [Storyboard(f"p{n}", "", [StoryboardShot("", sentence(scene, 0))]) for n, scene in enumerate(scenes)]
    clips = make_clips(model, Task("tvp"), boards, config, given=latents, frames=latents.shape[2])
    known = given_pixels([0], len(truth[0]), model.codec.temporal_stride)
    judged = Judged()
    for made, true, scene in zip(clips, truth, scenes, strict=True):
        add_shot(judged, "tvp", made, scene, given_scores(made, true, known))
    return judged
