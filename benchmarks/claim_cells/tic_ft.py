"""TIC-FT (2506.00996): buffer frames between what is given and what is made let 20 pairs do.

Comparison, for a portrait (i2v) and for a change of style (v2v): buffers of 0, 1 and 3 frames, and a model told every
frame's level in place of one; for the portrait also image-to-video tuning by channel concatenation, for which method
aid without its text modules and adapters stands: the portrait is the clip's own first frame, its latents beside the
noisy ones. That cell trains the image's patch embedding and the cross-attentions in place of a LoRA.

Levels are drawn as the base model's were, with a shift of 3: shape is decided at high noise.
"""

from __future__ import annotations

from typing import Any

import torch

from claim_cells.cell import Cell, Comparison, Judged, Metric, Paper, Stage, TableConfig
from claim_cells.data import LED_BY_IMAGE, as_reference
from claim_cells.make import Task, encode, held_out_pairs, make_clips, references_of
from models.folder import Model
from models.methods import get_method
from sample.storyboard import Storyboard, StoryboardShot
from toyworld.judge import clip_features, read
from toyworld.judge_pairs import score_pair
from toyworld.pairs import pair_texts

TASKS = {"i2v": "i2v_in_context", "v2v": "v2v_style"}
LEVELS = {"shift": 3.0, "density": "uniform"}
TRAIN = {"shots_per_scene": 1, "single_shot_prob": 0.0, "learning_rate": 3e-4}
LORA = {"lora": {"rank": 16, "alpha": 16}}
KINDS: dict[str, dict[str, Any]] = {
    "buffer3": {"buffer_frames": 3},
    "buffer1": {"buffer_frames": 1},
    "buffer0": {"buffer_frames": 0},
    "buffer3-per-frame-time": {"buffer_frames": 3, "model_time": "per_frame"},
}
DROPS = {"text_drop": {"everything": 0.05, "given": 0.05, "both": 0.05}}  # both guidance scales need them
CONCAT = {
    "image": "concat", "condition": "none", "states": False, "spatial_adapter": False, "short_term_adapter": False,
    "long_term_adapter": False, "cross_attention_rate": 1.0, "max_frames": 8,
}  # fmt: skip


def judge(model: Model, cell: Cell, config: TableConfig) -> Judged:
    """The first reference of every pair is given; story and prompt say what it does not show."""
    (name,) = cell.prompts
    pairs = held_out_pairs(TASKS[name], config.prompts)
    texts = [pair_texts(pair) for pair in pairs]
    boards = [Storyboard(f"p{n}", story, [StoryboardShot(prompt)]) for n, (story, prompt) in enumerate(texts)]
    frames = model.codec.num_latent_frames(model.settings.frames_per_shot)
    method = get_method(model.settings.method, **model.settings.method_params)
    role, shown = pairs[0].references[0].role, references_of(pairs, model)
    if method.reads_references:
        latents = encode([as_reference(role, clip) for clip in shown], model)
        (lead,) = method.condition_frames([role], [None if name == "i2v" else latents.shape[2]])
        task = Task(TASKS[name], "scene", {"condition_frames": [lead]}, lead)
        given = torch.nn.functional.pad(latents[:, :, :lead], (0, 0, 0, 0, 0, frames))
    else:
        task, frames = Task("tvp", "scene", lead=1), frames + 1
        given = torch.nn.functional.pad(encode(shown, model), (0, 0, 0, 0, 0, frames - 1))
    judged = Judged()
    for made, pair in zip(make_clips(model, task, boards, config, given=given, frames=frames), pairs, strict=True):
        kept = ("condition_fidelity", "identity", "style_error", "attributes", "action", "motion_error")
        scores = score_pair(made, pair)
        judged.add(name, {key: scores[key] for key in kept if scores[key].count})
        judged.add_features(name, clip_features(read(made)))
    return judged


def _cell(task: str, kind: str) -> Cell:
    stage = Stage("tic_ft", LEVELS | KINDS[kind], TRAIN | LORA)
    return Cell(f"{task}-{kind}", f"pairs-{TASKS[task]}", (stage,), prompts=(task,))


_CLAIMED = {"i2v": ("condition_fidelity", "identity"), "v2v": ("condition_fidelity", "identity", "style_error")}
_OTHERS = {"i2v": ("buffer0", "buffer1", "buffer3-per-frame-time", "channel-concat")}
_OTHERS["v2v"] = _OTHERS["i2v"][:3]

PAPER = Paper(
    name="tic_ft",
    title="TIC-FT: buffer frames and one model time, from 20 pairs",
    cells=(
        *(_cell(task, kind) for task in TASKS for kind in KINDS),
        Cell("i2v-channel-concat", LED_BY_IMAGE, (Stage("aid", LEVELS | CONCAT, TRAIN | DROPS),), prompts=("i2v",)),
    ),
    metrics=(
        *(
            metric
            for task in TASKS
            for metric in (
                Metric(f"{task}.condition_fidelity"),
                Metric(f"{task}.identity"),
                Metric(f"{task}.style_error", -1),
                Metric(f"{task}.action"),
                Metric(f"{task}.frechet", -1, 0.1),
            )
        ),
        Metric("v2v.motion_error", -1),
    ),
    comparisons=tuple(
        Comparison(f"{task}-buffer3", f"{task}-{other}", {f"{task}.{name}": "better" for name in _CLAIMED[task]})
        for task in TASKS
        for other in _OTHERS[task]
    ),
    judge=judge,
    reference=lambda name, count: [pair.target for pair in held_out_pairs(TASKS[name], count)],
)
