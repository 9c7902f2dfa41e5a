"""`shotloom plan METHOD TASK`: the noise plan of a task as a table, and with `--plot FILE` as an image.

A plan has one row per denoising step and one column per latent frame. The image shows steps downwards and frames to the
right; the colour is the level, from clean (light) to pure noise (dark), and the bar on top what each frame is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.knobs import knob

if TYPE_CHECKING:
    from torch import Tensor

    from models.layout import ClipLayout

# Latent frames of the shots, and what a task is given, where the command is not told.
SHOTS: dict[tuple[str, str], list[int]] = {
    ("lct", task): [3, 3, 3] for task in ("joint", "shot_conditioned", "autoregressive", "extension")
} | {("fvdm", "long_video"): [11]}
GIVENS: dict[tuple[str, str], dict[str, Any]] = {
    ("fvdm", "extension"): {"head": 2},
    ("fvdm", "transition"): {"head": 2, "tail": 2},
    ("fvdm", "any_frame"): {"frames": [0, 4]},
    ("fvdm", "tvp"): {"head": 1},
    ("fvdm", "noisy_frames"): {"frames": [0]},
    ("fvdm", "edit"): {"frames": [2, 3, 4]},
    ("lct", "shot_conditioned"): {"given_shots": [0]},
    ("lct", "composition"): {"condition_frames": [1, 1]},
    ("tic_ft", "i2v_in_context"): {"condition_frames": [4]},
    ("tic_ft", "multi_image"): {"condition_frames": [1, 4]},
    ("tic_ft", "keyframes"): {"condition_frames": [1, 4]},
    ("tic_ft", "v2v_style"): {"condition_frames": [5]},
    ("tic_ft", "action_transfer"): {"condition_frames": [5, 4]},
}
# Options of a task's plan where the command is not told any.
OPTIONS: dict[tuple[str, str], dict[str, Any]] = {("fvdm", "long_video"): {"clip": 5, "overlap": 2}}
# What a method must be for a task, in the place of its defaults.
PARAMS: dict[tuple[str, str], dict[str, Any]] = {
    ("lct", task): {"attention_rule": "group_causal"} for task in ("autoregressive", "extension")
}


@dataclass(kw_only=True)
class PlanConfig:
    """What of a plan can be chosen besides its method and task."""

    shots: list[int] = knob([], "latent frames of each shot; empty = an example")
    steps: int = knob(10, "denoising steps")
    shift: float = knob(3.0, "timestep shift of the levels")
    givens: dict[str, Any] = knob({}, "what the task is given, such as {head: 2}; empty = an example")
    options: dict[str, Any] = knob({}, "options of the task's plan, such as {lag: 2}; empty = an example")
    method_params: dict[str, Any] = knob({}, "parameters of the method, besides those that the task needs")


def make_plan(method: str, task: str, config: PlanConfig) -> tuple[ClipLayout, Tensor]:
    """The layout and the plan [rows,F] of a task. Raises ValueError for what the method does not know or take."""
    from models.layout import with_story
    from models.methods import get_method
    from models.noise import base_levels

    made = get_method(method, **PARAMS.get((method, task), {}) | config.method_params)
    made.check_task(task)
    givens = config.givens or GIVENS.get((method, task), {})
    options = config.options or ({} if config.shots else OPTIONS.get((method, task), {}))
    try:
        layout = made.layout_for_task(task, config.shots or SHOTS.get((method, task), [7]), **givens)
        layout = with_story(layout) if made.story_group else layout
        return layout, made.plan(layout, base_levels(config.steps, config.shift), task, **options)
    except TypeError as error:  # an argument that this method's task does not have
        raise ValueError(f"{method} {task} with givens {givens} and options {options}: {error}") from error


def plan_table(layout: ClipLayout, plan: Tensor) -> str:
    """Text: a line per row of the plan, a column per frame under its number and the letter of its role."""
    count = len(plan)
    lines = [
        "frame " + " ".join(f"{frame:>5}" for frame in range(layout.num_frames)),
        "role  " + " ".join(f"{role[:4]:>5}" for role in layout.roles),
        "shot  " + " ".join(f"{shot:>5}" for shot in layout.shot_ids.tolist()),
    ]
    for row, levels in enumerate(plan.tolist()):
        name = f"{row:>4}  " if row < count - 1 else " end  "
        lines.append(name + " ".join(f"{level:5.3f}" for level in levels))
    return "\n".join(lines)


def plot_plan(layout: ClipLayout, plan: Tensor, file: Path, title: str = "") -> None:
    """Draw the plan to an image file, whose suffix says its format (.png, .svg, .pdf)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    roles = {"condition": "#2a9d8f", "history": "#457b9d", "buffer": "#e9c46a", "target": "#e76f51", "dummy": "#adb5bd"}
    rows, frames = plan.shape
    figure = Figure(figsize=(2.2 + 0.45 * frames, 1.8 + 0.28 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    bar, axes = figure.subplots(2, 1, sharex=True, height_ratios=[1, max(rows, 2)])
    bar.imshow([[to_rgb(roles[role]) for role in layout.roles]], aspect="auto", interpolation="nearest")
    bar.set_yticks([])
    bar.tick_params(bottom=False)
    bar.set_title(title)
    image = axes.imshow(plan.tolist(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for frames_of_shot in layout.shot_slices[1:]:  # where a new shot begins
        for part in (bar, axes):
            part.axvline(frames_of_shot.start - 0.5, color="black", linewidth=1.5)
    axes.set_xlabel("latent frame")
    axes.set_ylabel("step")
    axes.set_xticks(range(frames))
    figure.colorbar(image, ax=axes, label="noise level")
    present = [role for role in roles if role in layout.roles]
    handles = [bar.plot([], [], "s", color=roles[role], label=role)[0] for role in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(present), frameon=False)
    try:
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    except ValueError as error:  # a suffix that names no format
        raise ValueError(f"{file}: {error}") from error


def run_plan(method: str, task: str, config: PlanConfig, plot: Path | None = None) -> str:
    """What the command prints; draws the plan to `plot`, too."""
    layout, plan = make_plan(method, task, config)
    if plot is not None:
        plot_plan(layout, plan, plot, f"{method} {task}")
    size = f"{len(plan) - 1} steps x {layout.num_frames} latent frames, levels before each step"
    return f"{method} {task}: {size}\n{plan_table(layout, plan)}" + (f"\n{plot}" if plot else "")
