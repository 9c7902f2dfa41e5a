"""Ray Train around the loop: a worker that dies costs time and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.train import two_ranks
from train.job import TrainJob
from train.metrics import read
from train.trainer import fit

SETTINGS = replace(two_ranks.SETTINGS, steps=10, checkpoint_every=3, keep_checkpoints=2)


@pytest.mark.slow
def test_a_run_whose_worker_died_ends_like_one_never_killed(ray_module, cache_file, tmp_path):
    whole = two_ranks.train(cache_file, tmp_path / "whole", SETTINGS, sharded=False)
    run_dir = tmp_path / "killed"
    job = TrainJob(
        model=tmp_path,
        dataset=cache_file,
        run_dir=run_dir,
        loop=SETTINGS,
        method="fvdm",
        parallel="fsdp2",
        null_text=torch.zeros(1),
        text_hash="",
    )
    step, checkpoint = fit(job, 2, two_ranks.ray_worker)
    assert (run_dir / "died").exists(), "the worker was to die once"
    assert (step, checkpoint) == (10, run_dir / "checkpoints" / "step-000010")
    assert sorted(p.name for p in (run_dir / "checkpoints").glob("step-*")) == ["step-000009", "step-000010"]

    killed = torch.load(run_dir / "weights.pt", weights_only=True)
    for name, weight in whole.items():
        torch.testing.assert_close(killed[name], weight, rtol=1e-4, atol=1e-6)
    lines, expected = read(run_dir / "metrics.jsonl"), read(tmp_path / "whole" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-4)
