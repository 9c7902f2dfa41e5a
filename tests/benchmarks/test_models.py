"""Speed benchmark: FLOPs against closed forms, turns and ratios, and every goal's figure at tiny sizes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from _common import RESULTS
from _measure import Cost, count_flops, in_turn, measure, ratio

from models.attention import grouped_attention

CPU = torch.device("cpu")
TINY = ["width=128", "layers=1", "text_tokens=3", "grid=2", "frames=3", "shots=[2,9]", "shot_frames=1", "steps=2",
        "scene_layers=2", "causal_shots=[4,8]", "causal_tokens=8", "guided_frames=[2]", "repetitions=1",
        "scene_repetitions=1", "device=cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The script; its name is that of the package `models`, so it is loaded by its path."""
    file = Path(__file__).resolve().parents[2] / "benchmarks" / "models.py"
    spec = importlib.util.spec_from_file_location("benchmark_models", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_models"] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def test_a_matrix_product_counts_two_per_multiply_add():
    a, b = leaves((3, 5), (5, 7))
    assert count_flops(lambda: (a @ b).sum())[1] == 2 * 3 * 5 * 7
    assert count_flops(lambda: (a @ b).sum().backward())[1] == 3 * 2 * 3 * 5 * 7, "backward: one product per side"


@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_a_cpu_counts(masked):
    q, k, v = leaves((2, 3, 16, 8), (2, 3, 24, 8), (2, 3, 24, 8))
    mask = torch.ones(16, 24, dtype=torch.bool) if masked else None
    one = 2 * 2 * 3 * 16 * 24 * 8  # scores, or their product with the values
    with torch.no_grad():
        _, forward = count_flops(lambda: F.scaled_dot_product_attention(q, k, v, mask))
    assert forward == 2 * one
    _, both = count_flops(lambda: F.scaled_dot_product_attention(q, k, v, mask).sum().backward())
    assert both == 2 * one + 5 * one, "the backward pass of flash attention makes the scores again"


@pytest.mark.parametrize("shots", [1, 4, 8])
def test_group_causal_attention_counts_the_prefixes(shots):
    q, k, v = (torch.randn(1, shots * 6, 2, 8) for _ in range(3))
    _, flops = count_flops(lambda: grouped_attention(q, k, v, (6,) * shots, "group_causal"))
    _, full = count_flops(lambda: grouped_attention(q, k, v, (6,) * shots, "full"))
    assert flops / full == pytest.approx((shots + 1) / (2 * shots))


def test_every_variant_stands_in_every_place_once():
    turns = [in_turn(["a", "b", "c"], turn) for turn in range(3)]
    assert turns == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    assert in_turn(["a", "b"], 4) == ["a", "b"]


def test_measure_runs_all_variants_in_each_repetition():
    order: list[str] = []
    costs, results = measure({name: lambda name=name: order.append(name) or name for name in "ab"}, 2, CPU)
    assert order == ["a", "b", "a", "b", "b", "a"], "counted, then timed in turn"
    assert results == {"a": "a", "b": "b"}
    assert all(isinstance(cost, Cost) and len(cost.cpu_s) == len(cost.wall_s) == 2 for cost in costs.values())


def test_cpu_seconds_leave_waiting_out():
    import time

    costs, _ = measure({"sleep": lambda: time.sleep(0.05)}, 1, CPU)
    assert costs["sleep"].wall_s[0] >= 0.05 > 0.02 > costs["sleep"].cpu_s[0]


def test_ratio_is_paired():
    theirs = [1.0, 10.0, 2.0, 5.0]  # the machine's speed changes tenfold; the ratio does not
    found = ratio([1.1 * x for x in theirs], theirs)
    assert (found.value, found.low, found.high) == pytest.approx((1.1, 1.1, 1.1))
    found = ratio([1.0, 2.0, 9.0], [1.0, 1.0, 1.0])
    assert found.value == 2.0 and found.low == 1.0 and found.high == 9.0
    for ours, others in (([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(ValueError, match="repetitions"):
            ratio(ours, others)


def test_a_whole_run_gives_every_goal_its_figure(bench, tmp_path, capsys):
    code = bench.main([*TINY, "--json", f"results={tmp_path}"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(record["parts"]) == {f"cpu.{name}" for name in bench.PARTS}
    for goal in record["goals"]:
        device, _, name = goal["name"].partition(".")
        figure = record["parts"][f"{device}.{name.split('.')[0]}"]["figures"][name]
        assert goal["value"] == pytest.approx(figure["value"], abs=1e-4) and goal["met"] is not None
    wanted = {goal["name"] for goal in record["goals"]}
    for name in (
        "cpu.per_frame.forward.scalar",
        "cpu.per_frame.train.scalar",
        "cpu.kv_cache.9.speedup",
        "cpu.kv_cache.9.shots.difference",
        *(f"cpu.group_causal.{n}.{mode}.full" for n in (4, 8) for mode in ("forward", "train")),
    ):
        assert name in wanted
    assert all(goal["met"] for goal in record["goals"] if goal["name"].endswith("difference"))
    assert code == (0 if all(goal["met"] for goal in record["goals"]) else 1)

    written = json.loads((tmp_path / "models.json").read_text())
    assert written["parts"] == record["parts"]
    text = (tmp_path / "models.md").read_text()
    assert all(name.partition(".")[2] in text for name in wanted)


def test_one_part_leaves_the_others_results(bench, tmp_path, capsys):
    (tmp_path / "models.json").write_text(json.dumps({"parts": {"cpu.kv_cache": EARLIER}}))
    bench.main([*TINY, "--only", "guidance", f"results={tmp_path}"])
    written = json.loads((tmp_path / "models.json").read_text())
    assert set(written["parts"]) == {"cpu.guidance", "cpu.kv_cache"} and written["parts"]["cpu.kv_cache"] == EARLIER


EARLIER = {"command": "c", "machine": {}, "dtype": "float32", "sizes": {}, "figures": {}, "medians": {}, "goals": []}


def test_counted_flops_of_a_scene(bench):
    """Linear layers: the cache runs a shot K times and once as history, recomputation all shots up to it K times."""
    shots, steps = 4, 3
    config = bench.Speed(width=128, text_tokens=3, grid=2, shot_frames=1, steps=steps)
    setup = bench.Setup(config, CPU)
    backbone = bench.WanBackbone(setup.transformer(1)).eval()
    texts, levels = setup.texts(1, shots), bench.base_levels(steps, shift=3.0)
    sizes: list[int] = []
    backbone.transformer.patch_embedding.register_forward_hook(lambda _, args, __: sizes.append(args[0].shape[2]))
    made = bench.cached(setup, backbone, texts, levels)
    assert sum(sizes) == shots * steps + shots - 1
    sizes.clear()
    again = bench.recomputed(setup, backbone, texts, levels)
    assert sum(sizes) == steps * shots * (shots + 1) // 2
    assert bench.difference(made, again) < 1e-5
    others = bench.recomputed(setup, backbone, texts.flip(1), levels)
    assert bench.difference(others, again) > 1e-3, "the comparison would see another history"


def test_levels_per_frame_are_not_one_level(bench):
    setup = bench.Setup(bench.Speed(width=128, layers=1, grid=2, frames=3), CPU)
    backbone = bench.WanBackbone(setup.transformer(1))
    x, text, levels = setup.latents(1, 3), setup.texts(1, 1)[:, 0], torch.tensor([[0.1, 0.5, 0.9]])
    with torch.no_grad():
        assert bench.difference(backbone(x, levels, text), backbone(x, levels[:, 0], text)) > 1e-4


def test_quick_runs_judge_no_speed(bench, tmp_path, capsys):
    bench.main(["--quick", "--only", "kv_cache", "grid=2", "shots=[9]", "shot_frames=1", f"results={tmp_path}"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    met = {goal["name"]: goal["met"] for goal in record["goals"] if goal["name"].startswith("cpu.")}
    assert met == {"cpu.kv_cache.9.speedup": None, "cpu.kv_cache.9.shots.difference": True}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("override", ["width=100", "device=tpu", "sizes=1"])
def test_refuses_what_it_cannot_measure(bench, override, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main([override])
    assert override.split("=")[0] in capsys.readouterr().err


def test_committed_results_name_no_machine():
    """Results hold what a reader needs to judge them: cores, versions, command; no host and no path."""
    parts = json.loads((RESULTS / "models.json").read_text())["parts"]
    for part in parts.values():
        assert part["machine"]["cores"] > 0 and part["machine"]["torch"]
        assert part["command"].startswith("python benchmarks/models.py") and "/" not in part["command"][28:]
        assert {goal["name"] for goal in part["goals"]} <= set(part["figures"])
