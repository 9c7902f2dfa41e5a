"""FSDP2 over two ranks does what one device does, and a checkpoint of either resumes on the other."""

from __future__ import annotations

import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from models.tiny import TEXT_DIM
from tests.train import two_ranks
from tests.train.tiny import tensors, tiny_backbone
from train.metrics import read
from train.parallel import Parallel, block_names, prepare, trainable


@pytest.fixture(scope="module")
def runs(cache_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    """Folder of the runs, and final weights by name: one, two, one-two, two-one, two-bf16."""
    folder, eight = tmp_path_factory.mktemp("runs"), replace(two_ranks.SETTINGS, steps=8)
    weights = {"one": two_ranks.train(cache_file, folder / "one", two_ranks.SETTINGS, sharded=False)}
    shutil.copytree(folder / "one", folder / "one-two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(two_ranks.rank_main, (port, cache_file, folder), nprocs=2)
    for name in ("two", "one-two", "two-bf16"):
        weights[name] = torch.load(folder / f"{name}.pt", weights_only=True)
    shutil.copytree(folder / "two", folder / "two-one")
    weights["two-one"] = two_ranks.train(cache_file, folder / "two-one", eight, sharded=False)
    weights["one-one"] = two_ranks.train(cache_file, folder / "one-one", eight, sharded=False)
    return folder, weights


def figures(folder: Path, run: str, name: str) -> list[float]:
    return [line[name] for line in read(folder / run / "metrics.jsonl")]


def test_loss_and_gradient_norm_equal_one_device(runs):
    folder, weights = runs
    for name in ("loss", "grad_norm"):
        assert len(figures(folder, "two", name)) == 4
        assert figures(folder, "two", name) == pytest.approx(figures(folder, "one", name), rel=1e-5)
    assert weights["two"].keys() == weights["one"].keys() == dict(tiny_backbone().named_parameters()).keys()
    for name, weight in weights["one"].items():
        torch.testing.assert_close(weights["two"][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("run", ["two-one", "one-two"])
def test_a_checkpoint_resumes_on_another_number_of_ranks(runs, run):
    folder, weights = runs
    assert figures(folder, run, "loss") == pytest.approx(figures(folder, "one-one", "loss"), rel=1e-5)
    for name, weight in weights["one-one"].items():
        torch.testing.assert_close(weights[run][name], weight, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_written_while_training_goes_on_holds_its_own_step(runs):
    folder, _ = runs
    one, two = (tensors(folder / run / "checkpoints" / "step-000002") for run in ("one", "two"))
    assert one.keys() == two.keys() and int(two["step"]) == 2
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)


def test_bf16_shards_stay_near_fp32(runs):
    folder, weights = runs
    assert figures(folder, "two-bf16", "loss") == pytest.approx(figures(folder, "one", "loss"), rel=0.02)
    assert {w.dtype for w in weights["two-bf16"].values()} == {torch.float32}


def test_blocks_are_found_and_wrapping_keeps_parameter_names():
    backbone = tiny_backbone()
    assert block_names(backbone) == ["transformer.blocks.0", "transformer.blocks.1"]
    names = list(trainable(backbone))
    prepare(backbone, Parallel(), activation_checkpointing=True)
    assert list(trainable(backbone)) == names


def test_impossible_splits_are_refused():
    assert [Parallel(rank=r, world=3).rows(6) for r in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    with pytest.raises(ValueError, match="4 samples cannot be split over 3 workers"):
        Parallel(world=3).rows(4)
    with pytest.raises(ValueError, match="2 workers need parallel=fsdp2"):
        prepare(tiny_backbone(), Parallel(world=2))


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_and_keep_parameter_names():
    plain, compiled = tiny_backbone(), prepare(tiny_backbone(), Parallel(), compile_blocks=True)
    x, levels = torch.randn(1, 4, 2, 4, 4), torch.rand(1, 2)
    text = torch.randn(1, 6, TEXT_DIM)
    torch.testing.assert_close(compiled(x, levels, text), plain(x, levels, text), rtol=1e-4, atol=1e-5)
    assert list(trainable(compiled)) == list(trainable(plain))
