"""What a model of given settings makes, and why it does not make the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from models.methods import get_method
from sample.storyboard import FRAME_TASKS, Task

if TYPE_CHECKING:
    from models.folder import ModelSettings

MAX_SHOTS = 9  # LCT trains on scenes of up to nine shots


def largest_scene(described: ModelSettings) -> int:
    """Most shots that a model of these settings makes as one scene."""
    return MAX_SHOTS if "joint" in get_method(described.method, **described.method_params).tasks else 1


def starts_from_image(described: ModelSettings) -> bool:
    """Whether a shot can start from a given first frame."""
    return not {"i2v", "tvp"}.isdisjoint(get_method(described.method, **described.method_params).tasks)


def refused_tasks(described: ModelSettings) -> dict[str, str]:
    """The tasks of a storyboard that a model of these settings cannot do, each with the reason."""
    method, refused = get_method(described.method, **described.method_params), {}
    for task in get_args(Task):
        try:
            check_task(task, described)
        except ValueError as error:
            refused[task] = str(error)
    for task in FRAME_TASKS:
        try:
            method.check_task(task)
        except ValueError as error:
            refused[task] = f"task={task}: {error}"
    return refused


def refused_fields(described: ModelSettings) -> dict[str, str]:
    """The fields of a storyboard's shots that a model of these settings has no use for, each with the reason."""
    method = get_method(described.method, **described.method_params)
    kind = f"a model of method {method.name!r}"
    refused = {
        "given": (f"{kind} cannot see given shots", "shot_conditioned" in method.tasks),
        "first_frame": (f"{kind} cannot start from an image", starts_from_image(described)),
        "given_frames": (f"{kind} holds no frames of a shot", "any_frame" in method.tasks),
        "references": (f"{kind} reads no references", method.reads_references or "composition" in method.tasks),
        "states": (f"{kind} reads no states", method.most_states > 0),
        "label": (f"{kind} without method_params.labels knows no classes", method.classes is not None),
    }
    return {name: reason for name, (reason, has) in refused.items() if not has}


def check_task(task: Task, described: ModelSettings) -> None:
    """Raises ValueError, with the reason, where a model of these settings does not make shots as `task` says."""
    if task != "auto":
        try:
            get_method(described.method, **described.method_params).layout_for_task(task, [1])
        except ValueError as error:
            raise ValueError(f"task={task}: {error}") from error


def check_scene_guidance(scale: float | None, described: ModelSettings) -> None:
    """Raises ValueError where a scale for the other shots is set for a model that sees none."""
    if scale is not None and largest_scene(described) == 1:
        raise ValueError(
            f"scene_guidance={scale:g}: a model of method {described.method!r} makes one shot at a time and sees no "
            "others; leave it out"
        )


def check_noise_aug(strength: float, described: ModelSettings) -> None:
    """Raises ValueError where noise is to be put on the first frame of a model that would not be told of it."""
    told = described.backbone == "svd" and get_method(described.method, **described.method_params).tells_noise
    if strength and not told:
        raise ValueError(
            f"noise_aug={strength:g}: only a Stable Video Diffusion of method svd or aid knows noise on its image, and "
            f"this is a {described.backbone} of method {described.method!r}; leave it out"
        )
