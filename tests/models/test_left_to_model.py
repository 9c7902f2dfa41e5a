"""What a method leaves to the model: shift and density of the training levels, and which frames can be shown clean."""

from __future__ import annotations

import pytest
import torch

from models.layout import shots_layout
from models.methods import METHODS, get_method
from models.noise import sample_levels
from models.process import EDM, FlowMatching
from tests.models.processes import PROCESSES

# by the papers and their code: FVDM uniform, FCA and TIC-FT uniform on CogVideoX, which is VP, LCT always logit-normal
DENSITIES = {
    "fvdm": {"flow": "uniform", "vp epsilon": "uniform"},
    "lct": {"flow": "logit_normal", "vp epsilon": "logit_normal"},
    "tic_ft": {"flow": "logit_normal", "vp epsilon": "uniform"},
    "fca": {"flow": "logit_normal", "vp epsilon": "uniform"},
    "aid": {"flow": "uniform", "vp epsilon": "uniform"},
}
UNSHIFTED = {"tic_ft": 1.0, "svd": 1.0}  # as their authors, whatever the model


@pytest.mark.parametrize("process", ["flow", "vp epsilon"])
@pytest.mark.parametrize("name", DENSITIES)
def test_levels_are_shifted_as_the_model_and_spread_as_the_paper_has_it(name, process):
    method = get_method(name).for_model(PROCESSES[process], 7.0)
    assert (method.shift, method.density) == (UNSHIFTED.get(name, 7.0), DENSITIES[name][process])
    assert get_method(name, **method.config()) == method, "written in full"
    asked = get_method(name, shift=2.0, density="logit_normal").for_model(PROCESSES[process], 7.0)
    assert (asked.shift, asked.density) == (2.0, "logit_normal"), "what is asked for stays"


def test_levels_that_are_sigmas_are_not_shifted():
    assert get_method("aid", image="concat", density="edm").for_model(EDM(), 7.0).shift == 1.0


def test_every_method_but_svd_has_a_row():
    assert set(DENSITIES) | {"svd"} == set(METHODS)
    assert get_method("svd").for_model(EDM(), 7.0) == get_method("svd")


def test_the_mean_level_of_training_is_that_of_an_unshifted_model():
    """With the shift of Wan at 480p it would be 0.68 on Latte and CogVideoX, whose sampling is not shifted."""
    method = get_method("fvdm", p=1.0, clean_prob=0.0).for_model(PROCESSES["vp epsilon"], 1.0)
    levels = method.sample_levels(shots_layout([4]), 20_000, torch.Generator().manual_seed(0))
    assert levels.mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"svd"}))
def test_levels_are_not_drawn_before_the_model_was_named(name):
    method = get_method(name)
    layout = method.layout_for_training([3])
    missing = "density" if name == "tic_ft" else "shift"
    with pytest.raises(ValueError, match=rf"{name}: {missing} is left to the model, .* take\s+method\.for_model\("):
        method.sample_levels(layout, 2, torch.Generator())


def test_with_a_vae_that_knows_later_frames_only_the_first_is_shown_clean():
    method = get_method("fvdm", clean_prob=0.3)
    anywhere, first = (method.for_model(FlowMatching(), 3.0, causal_vae=causal) for causal in (True, False))
    assert not anywhere.clean_first and first.clean_first and first.config()["clean_first"]
    assert get_method("fvdm", clean_first=True).for_model(FlowMatching(), 3.0).clean_first, "asked for"
    layout = shots_layout([3, 2])
    drawn, kept = (m.sample_levels(layout, 4000, torch.Generator().manual_seed(0)) for m in (anywhere, first))
    assert (drawn[:, 1:] == 0).any() and (kept[:, 1:] > 0).all()
    assert (kept[:, 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    same = (drawn > 0).all(dim=1) & (kept > 0).all(dim=1)
    assert torch.equal(drawn[same], kept[same]) and same.float().mean() > 0.65, "all else is drawn alike"
    assert (first.sample_levels(shots_layout([1]), 500, torch.Generator().manual_seed(0)) > 0).all(), "nothing is left"


def test_clean_first_moves_no_other_draw():
    options = {"dist": "mixed", "p": 0.5, "context_prob": 0.3, "context_level": 0.2}
    plain, first = (
        sample_levels(
            shots_layout([4]),
            500,
            generator=torch.Generator().manual_seed(1),
            clean_prob=0.4,
            clean_first=on,
            **options,
        )
        for on in (False, True)
    )
    both = (plain > 0) & (first > 0)
    assert torch.equal(plain[both], first[both]) and not torch.equal(plain, first)
