"""What the FVDM cells give: as `shotloom sample` gives it, and knowing nothing of the frames that are to be made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from claim_cells import fvdm
from claim_cells.cell import TableConfig
from claim_cells.make import encode_given
from torch import Tensor

from models.folder import Model, load_model
from models.methods import get_method
from models.tiny import build_tiny_folder
from sample import given_frames
from sample.given import encode_media
from sample.shot import GivenFrames
from sample.storyboard import Storyboard, StoryboardShot


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("given") / "model"
    build_tiny_folder(folder, method="fvdm", text_length=300, frames_per_shot=17, height=64, width=64)
    return load_model(folder)


def test_first_and_last_are_what_sample_gives(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
    pieces = {"first.mp4": clip[:1], "last.mp4": clip[-4:]}
    monkeypatch.setattr(given_frames, "read_video", lambda path: (pieces[Path(path).name], 8.0))
    shot = StoryboardShot("A square.", given_frames=[GivenFrames("first.mp4", at=0), GivenFrames("last.mp4", at=-4)])
    board = Storyboard("b", shots=[shot])
    layout = get_method("fvdm").layout_for_task("interpolation", [5])
    expected = encode_media([None], [], layout, model, 1, given_frames.load_given_frames(board, 0, model))
    found = encode_given([clip], [0, 4], model)
    assert expected is not None and expected[:, :, [0, 4]].any()
    torch.testing.assert_close(found, expected)


def test_the_cell_gives_latents_that_do_not_know_what_is_made(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two truths that differ between first and last latent frame only give the same, frame by frame."""
    seen: dict[str, list[Tensor | None]] = {}

    def make_clips(model, task, boards, config, *, given, frames):
        seen.setdefault(task.name, []).append(given)
        return [np.zeros((17, 64, 64, 3), np.uint8)] * len(boards)

    monkeypatch.setattr(fvdm, "make_clips", make_clips)
    config = TableConfig(prompts=2, steps=1)
    truth = fvdm.rendered(fvdm.held_out_scenes("small", 2), model)
    for between in (0, 255):
        other = [clip.copy() for clip in truth]
        for clip in other:
            clip[1:13] = between
        monkeypatch.setattr(fvdm, "rendered", lambda *_, other=other: other)
        fvdm.judge(model, fvdm.PAPER.cells[0], config)
    assert seen["t2v"] == [None, None]
    for task, at in (("i2v", [0]), ("interpolation", [0, 4])):
        one, same = seen[task]
        assert one is not None and same is not None and one.shape[2] == 5
        torch.testing.assert_close(one[:, :, at], same[:, :, at])
