"""The runner of cells with a tiny model of random weights: data, training, judging, resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from claim_cells import runner
from claim_cells.cell import TableConfig
from claim_cells.data import LED_BY_IMAGE, STATES, dataset
from claim_cells.make import encode
from claim_cells.score import given_pixels, given_scores
from claims import PAPERS, main

from models.folder import load_model
from models.scene import reference_tensor_key, shot_tensor_key
from models.tiny import build_tiny_folder
from sample.generate import Clip
from toyworld.pairs import render_reference, sample_pair
from toyworld.render import render_shot
from toyworld.world import is_held_out, sample_scene
from train.shards import Record, read_shard

SMALL = {
    "steps": 2, "batch_size": 3, "clips": 3, "scenes": 1, "pairs": 2, "prompts": 2, "reference": 2, "sample_steps": 1,
    "seeds": [0], "scene_lengths": [2, 1],
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TableConfig:
    root = tmp_path_factory.mktemp("claims")
    build_tiny_folder(root / "base", method="fvdm", text_length=300, frames_per_shot=17, height=64, width=64)
    return TableConfig(model=root / "base", out=root / "out", results=root / "results", **SMALL)


def shards(config: TableConfig, kind: str, count: int) -> list[Record]:
    folder = dataset(config.out / "data", kind, count, config.model)
    return [record for shard in sorted((folder / "shards").glob("*.tar")) for record in read_shard(shard)]


def test_clips_are_training_clips_with_states(config: TableConfig) -> None:
    records = shards(config, "clips", 3)
    assert len(records) == 3
    for index, record in enumerate(records):
        scene = sample_scene("small", seed=11, index=index, split="train", num_shots=1)
        assert record.key == scene.scene_id and not is_held_out(scene.characters[0], scene.shots[0].action)
        mean = record.read(shot_tensor_key(0, "latent_mean")).float()
        again = load_model(config.model, ("codec",)).codec
        true = encode([render_shot(scene, 0, 64)], load_model(config.model))[0]
        assert torch.allclose(again.normalize(mean[None])[0], true, atol=1e-2)
        assert record.shape(shot_tensor_key(0, "states_text"))[0] == STATES


def test_a_leading_image_is_the_shots_first_latent_frame(config: TableConfig) -> None:
    """Encoded alone, so that no later latent knows it; the rest are those of the pair itself."""
    pairs, led = shards(config, "pairs-i2v_in_context", 2), shards(config, LED_BY_IMAGE, 2)
    for index, (pair, one) in enumerate(zip(pairs, led, strict=True)):
        mean, target = (r.read(shot_tensor_key(0, "latent_mean")) for r in (one, pair))
        reference = pair.read(reference_tensor_key(0))
        assert mean.shape[1] == target.shape[1] + 1
        assert torch.equal(mean[:, 1:], target)
        assert torch.allclose(mean[:, :1], reference[:, :1], atol=1e-2)
        portrait = render_reference(sample_pair("i2v_in_context", "small", seed=11, index=index).references[0], 64)
        assert portrait.shape == (1, 64, 64, 3)


def test_given_scores_of_the_truth_and_of_noise() -> None:
    truth = render_shot(sample_scene("small", seed=1, num_shots=1), 0, 64)
    known = given_pixels([0, 4], 17)
    assert known == [True, *[False] * 12, *[True] * 4]
    assert given_pixels([], 17) == [False] * 17
    best = given_scores(truth, truth, known)
    assert best["given_psnr"].value == best["made_psnr"].value == 60.0 and best["seam"].value < 1.0
    broken = truth.copy()
    broken[1:13] = np.random.default_rng(0).integers(0, 255, broken[1:13].shape)
    worse = given_scores(broken, truth, known)
    assert worse["given_psnr"].value == 60.0 and worse["made_psnr"].value < 15.0


def run(config: TableConfig, paper: str, cell: str, capsys: pytest.CaptureFixture[str], **changes: int) -> dict:
    keys = SMALL | changes | {"model": config.model, "out": config.out, "results": config.results}
    arguments = [f"{name}={value}" for name, value in keys.items()]
    main(["--only", paper, "--json", f"cells=[{cell}]", *arguments])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_cell_is_made_once_and_again_when_a_setting_changes(
    config: TableConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run(config, "fvdm", "p0.2", capsys)
    cells = record["papers"]["fvdm"]["cells"]
    assert cells["p0.2"]["seeds"] == [0] and cells["p0.2"]["missing_seeds"] == []
    assert cells["scalar"]["missing_seeds"] == [0] and "scalar seed 0" in record["papers"]["fvdm"]["missing"]
    file = config.results / "claims" / "fvdm" / "p0.2-0.json"
    made = json.loads(file.read_text())
    assert made["steps"] == 2 and made["settings"]["cell"]["stages"][0]["params"] == {"p": 0.2}
    assert made["command"].startswith("python benchmarks/claims.py --only fvdm cells=[p0.2]")
    assert np.array(made["scores"]["i2v.made_psnr"]).shape == (2, 1, 2)
    assert {len(made["features"][task]) for task in ("i2v", "interpolation", "t2v")} == {2}
    assert "interpolation.seam" in cells["p0.2"]["scores"]

    calls: list[int] = []
    original = runner.train_cell
    monkeypatch.setattr(runner, "train_cell", lambda *a: calls.append(1) or original(*a))
    before = file.read_bytes()
    run(config, "fvdm", "p0.2", capsys)
    assert not calls and file.read_bytes() == before  # resumed: nothing done

    changed = run(config, "fvdm", "p0.2", capsys, sample_steps=2)  # judged anew with the model that is there
    assert len(calls) == 1 and changed["papers"]["fvdm"]["cells"]["p0.2"]["seeds"] == [0]
    assert json.loads(file.read_text())["hash"] != made["hash"]
    assert len(list((config.out / "train").glob("fvdm-*"))) == 1

    compiled = run(config, "fvdm", "p0.2", capsys, run=False)  # with the first settings: another cell's file is none
    assert len(calls) == 1 and compiled["papers"]["fvdm"]["cells"]["p0.2"]["seeds"] == []
    assert "p0.2 seed 0" in compiled["papers"]["fvdm"]["missing"]
    assert json.loads((config.results / "claims.json").read_text())["papers"] == compiled["papers"]
    assert "missing" in (config.results / "claims.md").read_text()


def test_each_setting_that_matters_is_in_the_hash(config: TableConfig) -> None:
    paper = PAPERS["fca"]
    cell, other = paper.cell("full"), paper.cell("lora")

    def key(**changes) -> str:  # noqa: ANN003
        return runner.digest(runner.settings_of(paper, cell, changes.pop("seed", 0), replace(config, **changes)))

    base = key()
    assert base != runner.digest(runner.settings_of(paper, other, 0, config)) and base != key(seed=1)
    for name, value in {"steps": 3, "batch_size": 6, "clips": 4, "prompts": 3, "guidance": 2.0}.items():
        assert key(**{name: value}) != base, name
    for name, value in {"pairs": 9, "scenes": 9, "seeds": [0, 1, 2], "out": Path("x"), "generate_at_once": 2}.items():
        assert key(**{name: value}) == base, name


def test_causal_cells_share_their_training_and_add_up(config: TableConfig) -> None:
    cells = [cell for cell in PAPERS["lct"].cells if cell.name.startswith("causal")]
    keys = {runner.digest(runner.training_of(cell, 0, config, 2)) for cell in cells}
    assert len(cells) == 4 and len(keys) == 1
    config = replace(config, steps=503, batch_size=12)
    stages = [runner.train_config(cells[0], n, 0, config, Path("d"), Path("m"), Path("r")) for n in (0, 1)]
    assert sum(stage.steps for stage in stages) == 503 and {stage.batch_size for stage in stages} == {4}


@pytest.mark.parametrize("level", [0.0, 0.3])
def test_t_c_is_chosen_in_the_storyboards_not_in_the_model(
    config: TableConfig, level: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[dict, dict, str]] = []

    def generate(model, boards, settings, seeds, **options):
        made.extend((board.plan, dict(model.settings.method_params), settings.task) for board in boards)
        pixels = np.zeros((17 * len(boards[0].shots), 64, 64, 3), np.uint8)
        return [Clip(pixels, [17 * n for n in range(1, len(boards[0].shots))]) for _ in boards]

    monkeypatch.setattr("claim_cells.lct.generate_scenes", generate)
    (cell,) = [cell for cell in PAPERS["lct"].cells if cell.name == f"causal-tc{level:g}"]
    model = load_model(config.model, parts=())
    before = dict(model.settings.method_params)
    PAPERS["lct"].judge(model, cell, config)
    assert made == [({"context_level": level}, before, "autoregressive")] * config.prompts


@pytest.mark.parametrize(
    ("paper", "cell", "score"),
    [
        ("tic_ft", "v2v-buffer3", "v2v.style_error"),
        ("tic_ft", "i2v-channel-concat", "i2v.identity"),
        ("lct", "causal-tc0.3", "scene.identity_unsaid"),
        ("lct", "independent", "scene.attributes"),
        ("aid", "full", "tvp.state_order"),
        ("fca", "lora", "tvp.made_psnr"),
    ],
)
def test_a_cell_of_each_kind(
    config: TableConfig, paper: str, cell: str, score: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run(config, paper, cell, capsys)
    assert record["papers"][paper]["cells"][cell]["seeds"] == [0]
    made = json.loads((config.results / "claims" / paper / f"{cell}-0.json").read_text())
    assert len(made["scores"][score]) == 2 and np.isfinite(made["loss"]).all()
