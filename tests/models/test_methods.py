"""Methods: what a task gives, that its plan leads an oracle to the truth, that training has seen its levels."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from models.layout import ClipLayout, Segment, shots_layout
from models.methods import METHODS, get_method
from models.noise import base_levels, noise_plan
from models.process import FlowMatching

FVDM_TASKS = {
    "t2v": ({}, "TTTTT"),
    "i2v": ({}, "CTTTT"),
    "interpolation": ({}, "CTTTC"),
    "extension": ({"head": 2}, "CCTTT"),
    "transition": ({"head": 1, "tail": 2}, "CTTCC"),
    "next_frame": ({}, "CCCCT"),
    "any_frame": ({"frames": [3, 1]}, "TCTCT"),
    "tvp": ({"head": 2}, "CCTTT"),
    "noisy_frames": ({"frames": [0, 2]}, "BTBTT"),
    "edit": ({"frames": [1]}, "TBTTT"),
    "progressive": ({}, "CTTTT"),
    "progressive_min": ({}, "CTTTT"),
    "diagonal": ({"head": 1}, "CTTTT"),
    "long_video": ({"frames": [0]}, "CTTTT"),
}
LCT_TASKS = {
    "joint": ({}, "TTTTT"),
    "shot_conditioned": ({"given_shots": [1]}, "TTHTT"),
    "autoregressive": ({}, "HHHTT"),
    "extension": ({}, "HHHTT"),
}
LCT_COMPOSITION = "composition", {"condition_frames": [1, 1]}, "HHTTTTT"
CAUSAL = get_method("lct", attention_rule="group_causal")
TIC_FT_TASKS = {
    "i2v_in_context": ({"condition_frames": [4]}, "CBBBTTTTT"),
    "multi_image": ({"condition_frames": [1, 1, 4]}, "CCCBBBTTTTT"),
    "keyframes": ({"condition_frames": [1, 4]}, "CCBBBTTTTT"),
    "v2v_style": ({"condition_frames": [5]}, "CCBBBTTTTT"),
    "action_transfer": ({"condition_frames": [5, 4]}, "CCCCCCBBBTTTTT"),
}
FCA_TASKS = {"tvp": ({}, "TTTTT")}
AID_TASKS = {"tvp": ({}, "CTTTT")}
SVD_TASKS = {"i2v": ({}, "TTTTT")}
LETTERS = {"condition": "C", "buffer": "B", "target": "T", "history": "H"}


def rows():
    """Every (method, task, layout) of the table, with two shots or more where shots matter."""
    for task, (givens, _) in FVDM_TASKS.items():
        yield "fvdm", task, get_method("fvdm").layout_for_task(task, [5], **givens)
    for task, (givens, _) in FCA_TASKS.items():
        yield "fca", task, get_method("fca").layout_for_task(task, [5], **givens)
    for task, (givens, _) in AID_TASKS.items():
        yield "aid", task, get_method("aid").layout_for_task(task, [5], **givens)
    for task, (givens, _) in SVD_TASKS.items():
        yield "svd", task, get_method("svd").layout_for_task(task, [5], **givens)
    for task, (givens, _) in LCT_TASKS.items():
        yield "lct", task, CAUSAL.layout_for_task(task, [2, 1, 2], **givens)
    task, givens, _ = LCT_COMPOSITION
    yield "lct", task, get_method("lct").layout_for_task(task, [5], **givens)
    for task, (givens, _) in TIC_FT_TASKS.items():
        yield "tic_ft", task, get_method("tic_ft").layout_for_task(task, [5], **givens)


def test_every_task_of_every_method_is_in_the_table():
    lct = {*LCT_TASKS, LCT_COMPOSITION[0]}
    tables = {"fvdm": FVDM_TASKS, "lct": lct, "tic_ft": TIC_FT_TASKS, "fca": FCA_TASKS, "aid": AID_TASKS}
    tables["svd"] = SVD_TASKS
    assert {name: set(table) for name, table in tables.items()} == {n: set(m.tasks) for n, m in METHODS.items()}


@pytest.mark.parametrize("task", FVDM_TASKS)
@pytest.mark.parametrize("shots", [[5], [2, 3]])
def test_fvdm_gives_the_frames_of_its_task(task, shots):
    givens, roles = FVDM_TASKS[task]
    layout = get_method("fvdm").layout_for_task(task, shots, **givens)
    assert "".join(LETTERS[role] for role in layout.roles) == roles
    assert layout.shot_ids.tolist() == layout.text_ids.tolist() == [i for i, n in enumerate(shots) for _ in range(n)]


@pytest.mark.parametrize("task", LCT_TASKS)
def test_lct_gives_whole_shots(task):
    givens, roles = LCT_TASKS[task]
    layout = CAUSAL.layout_for_task(task, [2, 1, 2], **givens)
    assert "".join(LETTERS[role] for role in layout.roles) == roles
    assert layout.text_ids.tolist() == [0, 0, 1, 2, 2]
    if task in ("joint", "shot_conditioned"):
        assert get_method("lct").layout_for_task(task, [2, 1, 2], **givens) == layout


def test_a_composition_puts_each_image_in_a_group_of_its_own():
    task, givens, roles = LCT_COMPOSITION
    layout = get_method("lct").layout_for_task(task, [5], **givens)
    assert "".join(LETTERS[role] for role in layout.roles) == roles
    assert [frames.stop - frames.start for frames in layout.shot_slices] == [1, 1, 5]
    assert layout.text_ids.tolist() == layout.shot_ids.tolist() == [1, 2, 0, 0, 0, 0, 0], "as each shot in training"
    plan = get_method("lct", context_level=0.1).plan(layout, base_levels(3), task)
    assert plan[:, :2].unique().tolist() == pytest.approx([0.1]) and (plan[0, 2:] == 1).all()
    assert get_method("lct").task_of(["portrait", "place"]) == task
    assert get_method("lct").condition_frames(["place", "portrait", "portrait"], [None] * 3) == [1, 1, 1]


def test_shots_are_made_one_after_another_at_the_history_level():
    method = get_method("lct", attention_rule="group_causal", context_level=0.3)
    layout = method.layout_for_task("autoregressive", [2, 1, 2])
    plan = method.plan(layout, base_levels(4, shift=3.0), "autoregressive")
    assert plan[:, :3].unique().tolist() == pytest.approx([0.3])
    assert torch.equal(plan[:, 3], base_levels(4, shift=3.0)) and torch.equal(plan[:, 3], plan[:, 4])
    assert method.layout_for_task("extension", [3]) == shots_layout([3]), "the first shot has no history"
    assert method.backbone_kwargs(layout)["attention_rule"] == "group_causal"


@pytest.mark.parametrize("level", [0.0, 0.3, 1])
@pytest.mark.parametrize("task", ["shot_conditioned", "composition", "autoregressive"])
def test_the_level_of_what_is_given_can_be_chosen_for_sampling(task, level):
    method = get_method("lct", attention_rule="group_causal", clean_prob=0.1)
    givens = {"shot_conditioned": {"given_shots": [0]}, "composition": {"condition_frames": [1, 1]}}.get(task, {})
    layout = method.layout_for_task(task, [2] if task == "composition" else [2, 2], **givens)
    plan = method.plan(layout, base_levels(4), task, context_level=level)
    given = layout.is_given
    assert (plan[:, given] == level).all() and torch.equal(
        plan[:, ~given], method.plan(layout, base_levels(4), task)[:, ~given]
    )
    assert torch.equal(plan, get_method("lct", clean_prob=0.1, context_level=level).plan(layout, base_levels(4), task))


def test_a_level_that_means_nothing_to_the_model_is_refused():
    method = get_method("lct")
    layout = method.layout_for_task("shot_conditioned", [2, 2], given_shots=[0])

    def refuse(level, word: str, by=method, of=layout, task: str = "shot_conditioned"):
        with pytest.raises(ValueError, match=word):
            by.plan(of, base_levels(2), task, context_level=level)

    for level in (-0.1, 1.5, float("nan")):
        refuse(level, f"context_level is {level}, expected 0 to 1")
    refuse(0, "context_level is 0, but .* no clean shot in training .*context_level 0.1, clean_prob 0")
    for able in (get_method("lct", clean_prob=0.1), get_method("lct", context_level=0.0)):
        able.plan(layout, base_levels(2), "shot_conditioned", context_level=0)
    refuse(0, "no clean shot", get_method("lct", density="uniform"))
    refuse(0.2, "task 'joint' takes no context_level: nothing is given", of=shots_layout([2, 2]), task="joint")


@pytest.mark.parametrize("task", TIC_FT_TASKS)
def test_tic_ft_puts_conditions_and_buffer_before_the_target(task):
    givens, roles = TIC_FT_TASKS[task]
    layout = get_method("tic_ft").layout_for_task(task, [5], **givens)
    assert "".join(LETTERS[role] for role in layout.roles) == roles
    assert layout.num_shots == 1 and set(layout.text_ids.tolist()) == {0}


@pytest.mark.parametrize(
    ("method", "task", "shots", "givens", "message"),
    [
        ("fvdm", "joint", [5], {}, "no task 'joint'; it has t2v, i2v"),
        ("fvdm", "t2v", [5], {"frames": [0]}, "takes no givens, got"),
        ("fvdm", "extension", [5], {}, r"takes \['head'\], got none"),
        ("fvdm", "transition", [5], {"head": 1}, r"takes \['head', 'tail'\]"),
        ("fvdm", "transition", [3], {"head": 2, "tail": 1}, "nothing is left to generate"),
        ("fvdm", "extension", [3], {"head": 4}, r"latent frames 0\.\.2"),
        ("fvdm", "i2v", [1], {}, "nothing is left to generate"),
        ("fvdm", "noisy_frames", [3], {"frames": [0, 1, 2]}, "nothing is left to generate"),
        ("fvdm", "tvp", [3], {}, r"takes \['head'\], got none"),
        ("fvdm", "diagonal", [3], {"tail": 1}, r"takes \['head'\], got \['tail'\]"),
        ("fvdm", "any_frame", [3], {"frames": [-1]}, r"latent frames 0\.\.2"),
        ("lct", "i2v", [3], {}, "it has joint, shot_conditioned"),
        ("lct", "joint", [3, 3], {"given_shots": [0]}, "the others take none"),
        ("lct", "joint", [3], {"condition_frames": [1]}, "composition needs some, the others take none"),
        ("lct", "composition", [3], {}, "composition needs some"),
        ("lct", "composition", [3], {"condition_frames": [1, 2]}, "images of one frame each"),
        ("lct", "composition", [3, 3], {"condition_frames": [1]}, "one shot at a time, got 2"),
        ("lct", "autoregressive", [3, 3], {}, "attention_rule group_causal, this one's is full"),
        ("lct", "extension", [3], {}, "attention_rule group_causal, this one's is full"),
        ("lct", "shot_conditioned", [3, 3], {}, "needs some"),
        ("lct", "shot_conditioned", [3, 3], {"given_shots": [0, 1]}, "nothing is left to generate"),
        ("tic_ft", "i2v", [3], {"condition_frames": [4]}, "no task 'i2v'; it has i2v_in_context"),
        ("tic_ft", "keyframes", [3], {}, "needs condition_frames"),
        ("tic_ft", "v2v_style", [3], {"condition_frames": [3]}, "leave none clean beside a buffer of 3"),
        ("tic_ft", "v2v_style", [3, 3], {"condition_frames": [5]}, "one shot at a time"),
    ],
)
def test_what_does_not_fit_a_task_is_named(method, task, shots, givens, message):
    with pytest.raises(ValueError, match=message):
        get_method(method).layout_for_task(task, shots, **givens)


def test_what_a_causal_model_cannot_be_asked():
    with pytest.raises(ValueError, match="a history of 9 shots; a shot sees at most 8"):
        CAUSAL.layout_for_task("autoregressive", [1] * 10)
    assert CAUSAL.layout_for_task("autoregressive", [1] * 9).num_shots == 9
    with pytest.raises(ValueError, match=r"given_shots is \[0, 2\]: the last one comes after all that is made"):
        CAUSAL.layout_for_task("shot_conditioned", [1, 1, 1], given_shots=[0, 2])
    with pytest.raises(ValueError, match="the others take none"):
        CAUSAL.layout_for_task("autoregressive", [1, 1], given_shots=[0])
    with pytest.raises(ValueError, match="roles portrait and place, got .*'source'"):
        CAUSAL.task_of(["portrait", "source"])
    with pytest.raises(ValueError, match="9 images; a shot sees at most 8"):
        CAUSAL.condition_frames(["portrait"] * 9, [None] * 9)
    with pytest.raises(ValueError, match="attention_rule is 'causal'; choose full or group_causal"):
        get_method("lct", attention_rule="causal")
    with pytest.raises(ValueError, match="single_frame_prob is 2"):
        get_method("lct", single_frame_prob=2.0)


def test_methods_by_name():
    for name in METHODS:
        method = get_method(name)
        assert method.name == name and get_method(name, **method.config()) == method
    assert get_method("fvdm", p=0.5).config()["p"] == 0.5
    with pytest.raises(ValueError, match="unknown method 'fdvm'; choose one of fvdm, lct, tic_ft, fca"):
        get_method("fdvm")
    with pytest.raises(ValueError, match="no parameter 'shared_probs'; did you mean 'shared_prob'"):
        get_method("lct", shared_probs=0.1)
    with pytest.raises(ValueError, match="clean shots are never trained"):
        get_method("lct", context_level=0.0, context_prob=0.0)


def test_training_layouts_keep_shots_and_texts():
    for name in ("fvdm", "lct"):
        layout = get_method(name).layout_for_training([2, 1, 3])
        assert layout == shots_layout([2, 1, 3]) and layout.is_target.all()
    assert get_method("tic_ft").layout_for_training([3]) == shots_layout([3])


def test_only_tic_ft_reads_references_and_some_tell_the_backbone_one_level():
    levels = torch.rand(2, 3)
    for name, method in ((name, get_method(name)) for name in METHODS):
        assert method.reads_references == (name == "tic_ft")
        if not method.reads_references:
            assert torch.equal(method.model_levels(levels), levels.amax(dim=1) if name in ("fca", "svd") else levels)
            for ask in (lambda m=method: m.task_of(["image"]), lambda m=method: m.condition_frames(["image"], [None])):
                with pytest.raises(ValueError, match="composes a shot of" if name == "lct" else "reads no references"):
                    ask()
        assert method.single_frame_share() == 0.0
    assert get_method("lct", single_frame_prob=0.15).single_frame_share() == 0.15


def test_weights_of_the_methods():
    layout = shots_layout([1, 3])
    assert get_method("fvdm").loss_weights(layout).tolist() == pytest.approx([1 / 4] * 4)
    assert get_method("lct").loss_weights(layout).tolist() == pytest.approx([1 / 2] + [1 / 6] * 3)


def test_given_shots_get_no_gradient():
    layout = get_method("lct").layout_for_task("shot_conditioned", [2, 1, 2], given_shots=[0])
    assert get_method("lct").loss_weights(layout).tolist() == pytest.approx([0, 0, 1 / 2, 1 / 4, 1 / 4])


def test_how_the_backbone_sees_the_clip():
    layout = shots_layout([1, 3])
    assert get_method("fvdm").backbone_kwargs(layout) == {
        "layout": layout, "position_mode": "contiguous", "attention_rule": "full",
    }  # fmt: skip
    lct = get_method("lct", position_mode="diagonal", position_gap=7)
    assert lct.backbone_kwargs(layout) == {
        "layout": layout, "position_mode": "diagonal", "position_gap": 7, "attention_rule": "full",
    }  # fmt: skip


# --- sampling ------------------------------------------------------------------------------------------------------

MORE_PLANS = {
    "lag": (shots_layout([4]), {"mode": "lag", "lag": 3}),
    "lag behind history": (
        ClipLayout((Segment("history", 2), Segment("target", 3))),
        {"mode": "lag", "lag": 1, "context_level": 0.1},
    ),
    "ramp": (shots_layout([4]), {"mode": "scale", "multipliers": [0.1, 0.4, 0.7, 1.0]}),
    "buffer": (
        ClipLayout((Segment("condition", 1), Segment("buffer", 3), Segment("target", 2))),
        {"mode": "min", "caps": [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]},
    ),
}


def all_plans():
    levels = base_levels(9, shift=3.0)
    for method, task, layout in rows():
        yield f"{method} {task}", layout, get_method(method).plan(layout, levels, task)
    for name, (layout, options) in MORE_PLANS.items():
        yield name, layout, noise_plan(layout, levels, **options)


@pytest.mark.parametrize(("name", "layout", "plan"), [pytest.param(*row, id=row[0]) for row in all_plans()])
def test_an_oracle_recovers_the_truth_and_given_frames_are_held(name, layout, plan):
    assert (plan[1:] <= plan[:-1]).all() and (plan[-1, layout.is_target] == 0).all()
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, layout.num_frames, 2, 2)
    truth, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    flow = FlowMatching()
    # where sampling starts from pure noise the truth must come from the oracle alone
    source = torch.where((plan[0] == 1)[:, None, None], 77.0, truth)
    x = start = flow.add_noise(source, noise, plan[0])
    held = (plan == plan[0]).all(dim=0)
    assert held.tolist() == layout.is_given.tolist()
    for level, after in zip(plan, plan[1:], strict=False):
        u = level.double()[:, None, None]
        eps = (x - (1 - u) * truth) / u
        # for a held frame any prediction must do, also a wild one
        velocity = torch.where((level == after)[:, None, None], torch.inf, eps - truth)
        clean = flow.predict_clean(x, eps - truth, level)
        moving = (level > 0) & ~held
        assert torch.allclose(clean[:, :, moving], truth[:, :, moving], rtol=0, atol=1e-9)
        x = flow.step(x, velocity, level, after)
    assert torch.equal(x[:, :, held], start[:, :, held]), "held frames are bit-equal"
    ends = plan[-1] == 0
    assert torch.allclose(x[:, :, ends], truth[:, :, ends], rtol=0, atol=1e-9)
    if name.startswith("fvdm"):
        given = layout.is_given
        assert torch.equal(x[:, :, given], truth[:, :, given]), "and exactly what was given"


# --- support -------------------------------------------------------------------------------------------------------


def uncovered(method, layout: ClipLayout, task: str, draws: int = 240_000, tolerance: float = 0.08) -> list[int]:
    """Rows of the plan that training comes nowhere near: exact zeros must be met exactly, other levels closely.

    Where many shots are given, each is looked at beside what is made: LCT's draws are independent, so that training
    covers the product of what it covers of each, and a count of joint draws would only say how many shots there are.
    """
    plan = method.plan(layout, base_levels(6, shift=method.shift), task)[:-1]  # the model never sees the last row
    lengths = [s.stop - s.start for s in layout.shot_slices]
    training = layout if method.reads_references else method.layout_for_training(lengths)
    seen = method.sample_levels(training, draws, torch.Generator().manual_seed(0))
    given = [frames for frames in layout.shot_slices if layout.is_given[frames].all()]
    views = [list(range(layout.num_frames))]
    if len(given) > 1:
        made = layout.is_target.nonzero()[:, 0].tolist()
        views = [made + list(range(frames.start, frames.stop)) for frames in given]
    missing = set()
    for view in views:
        for k, row in enumerate(plan):
            same_zeros = ((seen == 0) == (row == 0))[:, view].all(dim=1)
            near = ((seen - row).abs() < tolerance)[:, view].all(dim=1)
            if not (same_zeros & near).any():
                missing.add(k)
    return sorted(missing)


def support_rows():
    """The rows, but three frames where each has a level of its own: draws rarely come near in five frames at once."""
    own = ("noisy_frames", "edit", "progressive", "progressive_min", "diagonal")
    for method, task, layout in rows():
        if task in own:
            layout = get_method(method).layout_for_task(task, [3], **FVDM_TASKS[task][0])
        yield pytest.param(method, task, layout, id=f"{method} {task}")


@pytest.mark.parametrize(("method", "task", "layout"), support_rows())
def test_training_covers_the_levels_that_sampling_visits(method, task, layout):
    assert not uncovered(get_method(method).for_model(FlowMatching(), 3.0), layout, task)


def test_without_clean_frames_the_given_ones_are_never_trained():
    method = get_method("fvdm", clean_prob=0.0, shift=3.0)
    assert len(uncovered(method, method.layout_for_task("i2v", [5]), "i2v")) == 6
    assert not uncovered(method, method.layout_for_task("t2v", [5]), "t2v")
    shots = get_method("lct", context_level=0.0, clean_prob=0.2, shift=3.0)
    layout = shots.layout_for_task("shot_conditioned", [2, 2], given_shots=[0])
    assert not uncovered(shots, layout, "shot_conditioned")


def test_plain_training_is_one_level_per_clip():
    plain = get_method("fvdm", p=0.0, clean_prob=0.0, shift=3.0)
    levels = plain.sample_levels(shots_layout([5]), 500, torch.Generator().manual_seed(0))
    assert (levels == levels[:, :1]).all()


def test_training_levels_follow_the_methods_own_shares():
    def levels(name: str, shots: list[int], **params) -> torch.Tensor:
        method = get_method(name, shift=3.0, **params)
        layout = method.layout_for_training(shots)
        return method.sample_levels(layout, 40, torch.Generator().manual_seed(0))

    lct, fvdm = partial(levels, "lct", [2, 1, 2]), partial(levels, "fvdm", [5])
    for found in (lct(shared_prob=1.0, context_prob=0.0), fvdm(p=0.0, clean_prob=0.0)):
        assert (found == found[:, :1]).all()
    apart = lct(shared_prob=0.0, context_prob=0.0)
    assert (apart[:, 0] == apart[:, 1]).all() and not (apart[:, [0, 0, 2]] == apart[:, [2, 3, 3]]).any()
    apart = fvdm(p=1.0, clean_prob=0.0)
    assert not (apart[:, 1:] == apart[:, :-1]).any() and (apart > 0).all()
    for found in (lct(clean_prob=1.0), fvdm(clean_prob=1.0)):
        assert (found == 0).any(dim=1).all() and (found > 0).any(dim=1).all()
