"""LCT's causal stage in the loop: it trains, goes on where it was, and is another run than the stage before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.backbones.latte import LatteBackbone
from models.methods import get_method
from models.tiny import TEXT_DIM
from models.tiny_latte import tiny_latte
from tests.models.processes import PROCESSES
from tests.train.tiny import TEXT_LENGTH, tensors, tiny_backbone
from train.loop import LoopResult, LoopSettings, run_loop
from train.parallel import Parallel, prepare
from train.scenes import ShardDataset
from train.text_drop import TextDrop

CAUSAL = get_method("lct", shift=3.0, attention_rule="group_causal", context_level=0.3, single_frame_prob=0.3)
SETTINGS = LoopSettings(steps=30, learning_rate=3e-3, warmup_steps=3, checkpoint_every=10, log_every=5)


class Killed(Exception):
    pass


def train(folder: Path, run_dir: Path, method=CAUSAL, kill_at: int = 0, lines: list | None = None) -> LoopResult:
    source = ShardDataset(
        folder, batch_size=4, text_length=TEXT_LENGTH, null_text=torch.zeros(TEXT_LENGTH, TEXT_DIM),
        layout_for=method.layout_for_training, normalize=lambda latents: latents / 10, made_with=("vae", "text"),
        single_frame_prob=method.single_frame_share(), text_drop=TextDrop(0.1),
    )  # fmt: skip

    def maybe_die(step: int, _: Path) -> None:
        if step == kill_at:
            raise Killed

    backbone = prepare(tiny_backbone(), Parallel())
    on_log = None if lines is None else lines.append
    return run_loop(backbone, method, source, SETTINGS, run_dir, on_checkpoint=maybe_die, on_log=on_log)


def test_it_learns_and_a_killed_run_ends_like_one_never_killed(dataset, tmp_path):
    folder, lines = dataset([[2, 2, 2]] * 3), []
    whole = train(folder, tmp_path / "whole", lines=lines)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    with pytest.raises(Killed):
        train(folder, tmp_path / "killed", kill_at=10)
    resumed = train(folder, tmp_path / "killed")
    ends = [tensors(result.checkpoint) for result in (whole, resumed)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_stage_before_does_not_go_on_as_this_one(dataset, tmp_path):
    folder = dataset([[2, 2]] * 2)
    train(folder, tmp_path / "run", get_method("lct", shift=3.0))
    with pytest.raises(ValueError, match="method_params"):
        train(folder, tmp_path / "run")


def test_a_backbone_without_a_cache_is_refused_before_the_first_batch(tmp_path):
    with pytest.raises(ValueError, match="no kv_cache: Latte joins frames in attention over time alone"):
        run_loop(LatteBackbone(tiny_latte(), PROCESSES["vp epsilon"]), CAUSAL, None, SETTINGS, tmp_path)
