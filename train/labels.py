"""The class that a sample is told in place of text (FVDM with `labels`): that of its shots in the scene record."""

from __future__ import annotations

from models.scene import Scene
from train.shards import Record


def class_of(record: Record, scene: Scene, shots: range, classes: int | None) -> int | None:
    """The one class of neighbouring shots, 0 to `classes` - 1; None where the method is told none.

    Raises ValueError naming shard, shot, value and remedy for a class that is missing, unknown, or not one.
    """
    if not classes:
        return None
    labels = [scene.shots[i].label for i in shots]
    for shot, label in zip(shots, labels, strict=True):
        where = f"{record.shard}: {scene.scene_id} shot {shot}"
        if label is None:
            raise ValueError(
                f"{where}: label is missing, but a model of method_params.labels={classes} is told a class, 0 to "
                f'{classes - 1}: write "label" into the caption file of {scene.source.path!r} and prepare again, which '
                "costs no decode"
            )
        if label >= classes:
            raise ValueError(
                f"{where}: label is {label}, but method_params.labels={classes} means classes 0 to {classes - 1}: "
                f"correct the caption file of {scene.source.path!r} and prepare again, or set "
                f"method_params.labels={label + 1}"
            )
    if len(set(labels)) > 1:
        raise ValueError(
            f"{record.shard}: {scene.scene_id} shots {shots.start} to {shots.stop - 1}: label is {labels}, but a "
            "sample is told one class: set shots_per_scene=1"
        )
    return labels[0]
