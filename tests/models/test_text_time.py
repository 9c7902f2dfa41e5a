"""The time of a text among the video's tokens, from FVDM's parameter to the backbone, and before there was one."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from models.folder import SETTINGS_FILE, load_model, load_settings, save_model
from models.layout import shots_layout
from models.methods import METHODS, get_method, trained_params
from models.methods.fvdm import FVDM
from models.tiny_cogvideox import build_tiny_cogvideox_folder
from tests.models.test_backbones import BACKBONES
from train.checkpoint import _check_identity

LAYOUT, TEXT = shots_layout([2]), torch.zeros(1, 3, 8)


def test_fvdm_takes_the_mean_of_embeddings_and_the_clock_by_name():
    assert FVDM().text_time == "mean" and get_method("fvdm", text_time="max").config()["text_time"] == "max"
    with pytest.raises(ValueError, match="text_time is 'clock'; choose mean or max"):
        get_method("fvdm", text_time="clock")


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "svd"])
def test_it_reaches_the_models_whose_text_has_a_time_and_no_other(name):
    backbone = BACKBONES[name]()
    joint = name == "hunyuan" or name.startswith("cogvideox")
    for text_time in ("mean", "max"):
        method = get_method("fvdm", text_time=text_time)
        told = method.prepare(backbone, LAYOUT, TEXT, method.conditions(torch.zeros(1, 4, 2, 4, 4), LAYOUT))
        assert told == ({"text_time": text_time} if joint else {})


def test_the_other_methods_leave_a_texts_time_at_the_clock():
    """LCT's shots have a level each, and those that tell one time per clip have no choice."""
    for name, method in METHODS.items():
        assert ("text_time" in method().config()) == (name == "fvdm")


def test_a_folder_names_it_and_an_older_one_keeps_the_clock(tmp_path):
    model = build_tiny_cogvideox_folder(tmp_path / "new", method="fvdm", method_params=get_method("fvdm").config())
    assert load_settings(tmp_path / "new").method_params["text_time"] == "mean"
    file = tmp_path / "new" / SETTINGS_FILE
    described = asdict(model.settings)
    del described["method_params"]["text_time"]
    file.write_text(json.dumps(described))
    old = load_model(tmp_path / "new", parts=("backbone",))
    assert old.settings.method_params == described["method_params"] | {"text_time": "max"}
    save_model(tmp_path / "again", old, old.settings, copy_parts_from=tmp_path / "new")
    assert load_settings(tmp_path / "again") == old.settings
    file.unlink()
    method = load_settings(tmp_path / "new")
    assert get_method(method.method, **method.method_params).text_time == "mean", "never trained with a level per frame"


def test_what_was_trained_before_a_parameter_keeps_what_it_had():
    assert trained_params("fvdm", {"p": 0.5}) == {"p": 0.5, "text_time": "max"}
    assert trained_params("fvdm", {"text_time": "mean"}) == {"text_time": "mean"}
    assert trained_params("lct", {"shift": 1.0}) == {"shift": 1.0}


def test_a_run_from_before_goes_on_only_as_it_was(tmp_path):
    before = get_method("fvdm", p=0.5).config()
    for later in ("text_time", "image_beside", "image_drop"):
        del before[later]

    def asked(text_time: str) -> dict:
        return {"method": "fvdm", "method_params": get_method("fvdm", p=0.5, text_time=text_time).config()}

    made_with = {"method": "fvdm", "method_params": before}
    _check_identity(tmp_path, made_with, asked("max"))
    with pytest.raises(ValueError, match="made with method_params=.*'text_time': 'max'.*set it back"):
        _check_identity(tmp_path, made_with, asked("mean"))
