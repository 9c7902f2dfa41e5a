"""FVDM's plans by hand, its classes in place of text, and what its tasks are not told."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from models.backbones.wan import WanBackbone
from models.layout import shots_layout
from models.methods import get_method
from models.modules.labels import LabelEmbedding
from models.noise import base_levels
from models.tiny import tiny_transformer
from sample.guidance import Guidance
from sample.sampler import sample

LEVELS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


def plan(task: str, frames: int = 3, givens: dict | None = None, **options) -> torch.Tensor:
    method = get_method("fvdm")
    return method.plan(method.layout_for_task(task, [frames], **givens or {}), LEVELS, task, **options)


@pytest.mark.parametrize(
    ("task", "givens", "options", "first", "third"),
    [
        ("tvp", {"head": 1}, {}, [0, 1, 1], [0, 0.5, 0.5]),
        ("noisy_frames", {"frames": [0]}, {}, [0.2, 1, 1], [0.1, 0.5, 0.5]),
        ("noisy_frames", {"frames": [0, 2]}, {"multipliers": [0.2, 0.4]}, [0.2, 1, 0.4], [0.1, 0.5, 0.2]),
        ("progressive", {}, {}, [0, 0.5, 1], [0, 0.25, 0.5]),
        ("progressive", {}, {"slope": 0.1}, [0, 0.1, 0.2], [0, 0.05, 0.1]),
        ("progressive_min", {}, {}, [0, 0.5, 1], [0, 0.5, 0.5]),
        ("progressive_min", {}, {"slope": 0.3}, [0, 0.3, 0.6], [0, 0.3, 0.5]),
        ("edit", {"frames": [1]}, {"edit_level": 0.6}, [1, 0.6, 1], [0.5, 0.5, 0.5]),
        ("diagonal", {}, {}, [1, 1, 1], [0.5, 0.75, 1]),
        ("diagonal", {"head": 1}, {"lag": 2}, [0, 1, 1], [0, 0.5, 1]),
    ],
)
def test_plans_are_those_of_the_table(task, givens, options, first, third):
    found = plan(task, givens=givens, **options)
    assert found[0].tolist() == pytest.approx(first) and found[2].tolist() == pytest.approx(third)
    assert (found[-1] == 0).all() and (found[1:] <= found[:-1]).all()


def test_long_clips_ramp_by_a_tenth_and_short_ones_so_that_the_last_frame_starts_from_noise():
    for task in ("progressive", "progressive_min"):
        assert plan(task, frames=21)[0].tolist() == pytest.approx([min(0.1 * i, 1) for i in range(21)])
        for frames in range(2, 11):
            assert plan(task, frames=frames)[0, -1] == 1


def test_the_diagonal_has_as_many_rows_as_its_formula_and_ends_frame_by_frame():
    found = plan("diagonal", frames=4, lag=3)
    assert len(found) == 4 + 3 * 3 + 1
    assert [int((found[:, f] > 0).sum()) for f in range(4)] == [4, 7, 10, 13]


def test_editing_leaves_out_rows_in_which_nothing_moves():
    whole = plan("edit", givens={"frames": [0, 1, 2]}, edit_level=0.5)
    assert whole.tolist() == [[0.5] * 3, [0.25] * 3, [0.0] * 3]
    part = plan("edit", givens={"frames": [0]}, edit_level=0.5)
    assert part[:, 0].tolist() == [0.5, 0.5, 0.5, 0.25, 0] and len(part) == 5
    assert plan("edit", givens={"frames": [0, 1, 2]}, edit_level=0.4)[0].tolist() == pytest.approx([0.4] * 3)


@pytest.mark.parametrize(
    ("task", "givens", "options", "message"),
    [
        ("t2v", {}, {"lag": 1}, "the plan of task 't2v' takes no lag"),
        ("progressive", {}, {"multipliers": [1.0]}, "takes no multipliers"),
        ("noisy_frames", {"frames": [0]}, {"multipliers": [0.1, 0.2]}, "expected one, or one for each of 1 frames"),
        ("edit", {"frames": [0]}, {"edit_level": 1.5}, "edit_level is 1.5; give a level above 0"),
        ("edit", {"frames": [0, 1, 2]}, {"edit_level": 0.0}, "at which nothing would change"),
        ("diagonal", {}, {"lag": -1}, "lag is -1, expected 0 or more"),
    ],
)
def test_options_of_other_tasks_and_wrong_ones_are_refused(task, givens, options, message):
    with pytest.raises(ValueError, match=message):
        plan(task, givens=givens, **options)


# --- classes -------------------------------------------------------------------------------------------------------

X = torch.randn(3, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
LAYOUT = shots_layout([2])
TEXT = torch.zeros(3, 5, 32)


def told(backbone, method, labels: list[int] | None, **options) -> torch.Tensor:
    conditions = method.conditions(X, LAYOUT, None if labels is None else torch.tensor(labels)) | options
    prepared = {"text": TEXT} | method.prepare(backbone, LAYOUT, TEXT, conditions)
    with torch.no_grad():
        return backbone(X, torch.full((3,), 0.7), prepared.pop("text"), **prepared, **method.backbone_kwargs(LAYOUT))


def test_a_model_is_told_classes_in_place_of_text():
    backbone, method = WanBackbone(tiny_transformer(0)), get_method("fvdm", labels=4)
    method.attach(backbone, seed=2)
    assert isinstance(backbone.conditioner, LabelEmbedding)
    assert all(parameter.requires_grad for parameter in backbone.parameters()), "trained with the whole model"
    backbone.conditioner.table.weight.data.mul_(100)
    out = told(backbone, method, [0, 1, 3])
    assert torch.allclose(told(backbone, method, [0, 2, 3])[[0, 2]], out[[0, 2]], atol=1e-6)
    assert not torch.equal(told(backbone, method, [0, 2, 3])[1], out[1])
    # by hand: the table's row is a context of one token
    rows = backbone.conditioner.table.weight[torch.tensor([0, 1, 3])][:, None]
    with torch.no_grad():
        assert torch.equal(backbone(X, torch.full((3,), 0.7), rows), out)
        null = backbone(X, torch.full((3,), 0.7), backbone.conditioner.null(3))
    assert torch.equal(told(backbone, method, [0, 1, 3], label=torch.zeros(3, dtype=torch.long)), null), (
        "zeros are no class"
    )
    assert method.drops == {"label": 0.1}
    with pytest.raises(ValueError, match="one of 4 classes, but these samples have none"):
        method.conditions(X, LAYOUT)
    with pytest.raises(ValueError, match=r"labels are \[4\], this table has 0\.\.3"):
        told(backbone, method, [4])


def test_an_unconditional_model_reads_nothing():
    backbone, method = WanBackbone(tiny_transformer(0)), get_method("fvdm", labels=0)
    method.attach(backbone)
    assert method.drops == {}
    out = told(backbone, method, None)
    assert torch.equal(told(backbone, method, [2, 0, 1]), out)
    assert not method.prepare(backbone, LAYOUT, TEXT + 1, method.conditions(X, LAYOUT))["text"].embeddings.equal(TEXT)


def test_classes_are_checked():
    with pytest.raises(ValueError, match="labels is -1"):
        get_method("fvdm", labels=-1)
    backbone = WanBackbone(tiny_transformer(0))
    get_method("fvdm", labels=3).attach(backbone)
    get_method("fvdm", labels=3).attach(backbone)
    with pytest.raises(ValueError, match="other conditioning modules"):
        get_method("fvdm", labels=4).attach(backbone)
    with pytest.raises(ValueError, match="has no table of classes"):
        told(WanBackbone(tiny_transformer(0)), get_method("fvdm", labels=3), [0, 1, 2])


def test_base_levels_make_a_plan_of_every_task():
    """Each row of the table at a real number of steps, shifted once."""
    method = get_method("fvdm")
    levels = base_levels(6, shift=3.0)
    layout = method.layout_for_task("noisy_frames", [4], frames=[0])
    assert torch.equal(method.plan(layout, levels, "noisy_frames")[:, 1], levels)
    assert torch.allclose(method.plan(layout, levels, "noisy_frames")[:, 0], 0.2 * levels), "no second shift"


def test_guidance_of_a_model_of_classes_is_over_the_class():
    """Over the text, which it does not read, both branches were the same and the scale did nothing."""
    assert get_method("fvdm").guided == {"text": ("text",)} and get_method("fvdm", labels=0).guided == {}
    backbone, method = WanBackbone(tiny_transformer(0)), get_method("fvdm", labels=4)
    method.attach(backbone, seed=2)
    backbone.conditioner.table.weight.data.mul_(100)
    layout = method.layout_for_task("t2v", [2])

    def made(scale: float) -> torch.Tensor:
        return sample(
            backbone, layout, method.plan(layout, LEVELS, "t2v"), TEXT, shape=(3, 4, 2, 4, 4), null={"text": TEXT},
            generator=torch.Generator().manual_seed(0), guidance=Guidance([("text", scale)], method.guided),
            conditions=method.conditions(X, LAYOUT, torch.tensor([0, 1, 3])),
            prepare=partial(method.prepare, backbone, layout), **method.backbone_kwargs(layout),
        )  # fmt: skip

    assert (made(4.0) - made(1.0)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("method", "params"),
    [("fvdm", {"labels": 3}), ("fca", {"width": 12, "frame_queries": 1, "text_width": 8, "text_heads": 1})],
)
def test_modules_come_to_the_device_of_the_backbone(method, params):
    backbone = WanBackbone(tiny_transformer(0)).to("meta")
    get_method(method, **params).attach(backbone)
    assert {p.device.type for p in backbone.parameters()} == {"meta"}
