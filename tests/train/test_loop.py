"""The loop: exact resume, learning, accumulation, precision, figures, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.layout import shots_layout
from models.methods import get_method
from models.noise import diffusion_loss
from tests.train.tiny import tensors, tiny_backbone
from train.batches import SceneBatch
from train.checkpoint import is_whole, latest
from train.evaluate import HeldOutLoss
from train.loop import LoopResult, LoopSettings, frame_weights, run_loop
from train.metrics import NUM_BANDS, Window, read
from train.parallel import Parallel, prepare

METHOD = get_method("fvdm", shift=3.0)
SETTINGS = LoopSettings(steps=12, learning_rate=3e-3, warmup_steps=3, checkpoint_every=5, log_every=2, grad_clip=0.5)


class Killed(Exception):
    pass


def train(
    cache, run_dir: Path, settings: LoopSettings = SETTINGS, kill_at: int = 0, method=METHOD, **options
) -> LoopResult:
    backbone = prepare(tiny_backbone(), Parallel())

    def maybe_die(step: int, _: Path) -> None:
        if step == kill_at:
            raise Killed

    batch_size = options.pop("batch_size", 4)
    source = cache(METHOD.layout_for_training, batch_size=batch_size)
    return run_loop(backbone, METHOD, source, settings, run_dir, on_checkpoint=maybe_die, **options)


def test_a_killed_run_ends_bit_for_bit_like_one_never_killed(cache, tmp_path):
    whole = train(cache, tmp_path / "whole")
    for step in (5, 10):
        with pytest.raises(Killed):
            train(cache, tmp_path / "killed", kill_at=step)
    resumed = train(cache, tmp_path / "killed")
    expected, found = tensors(whole.checkpoint), tensors(resumed.checkpoint)
    assert expected.keys() == found.keys() and len(expected) > 4 * 20
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    for name, average in whole.average.items():
        assert torch.equal(average, resumed.average[name]), name

    timings = {"step_s", "samples_per_s", "tokens_per_s", "data_wait", "memory_gb"}
    lines = [
        [{k: v for k, v in line.items() if k not in timings} for line in read(tmp_path / run / "metrics.jsonl")]
        for run in ("whole", "killed")
    ]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == [2, 4, 5, 6, 8, 10, 12]
    assert [p.name for p in sorted((tmp_path / "killed" / "checkpoints").iterdir())] == ["step-000010", "step-000012"]


def test_resume_passes_over_a_broken_checkpoint(cache, tmp_path):
    with pytest.raises(Killed):
        train(cache, tmp_path, kill_at=10)
    newest = tmp_path / "checkpoints" / "step-000010"
    shard = newest / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert not is_whole(newest)
    assert latest(tmp_path / "checkpoints") == (5, tmp_path / "checkpoints" / "step-000005")
    resumed = train(cache, tmp_path)
    whole = train(cache, tmp_path / "whole")
    assert all(torch.equal(whole.average[n], resumed.average[n]) for n in whole.average)


def test_another_seed_or_batch_is_refused_on_resume(cache, tmp_path):
    with pytest.raises(Killed):
        train(cache, tmp_path, kill_at=5)
    with pytest.raises(ValueError, match=r"step-000005: made with seed=0, asked for 1"):
        train(cache, tmp_path, replace(SETTINGS, seed=1))
    with pytest.raises(ValueError, match=r"made with batch_size=4, asked for 2"):
        train(cache, tmp_path, batch_size=2)
    assert train(cache, tmp_path, replace(SETTINGS, steps=6)).step == 6


def test_seed_changes_the_result_and_repeats_it(cache, tmp_path):
    short = replace(SETTINGS, steps=3)
    first, again, other = (
        train(cache, tmp_path / name, replace(short, seed=seed)).average
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_micro_batches_change_memory_not_the_result(cache, tmp_path):
    short = replace(SETTINGS, steps=4)
    whole = train(cache, tmp_path / "whole", short)
    parts = train(cache, tmp_path / "parts", replace(short, accumulate=4), batch_size=1)
    for name, average in whole.average.items():
        torch.testing.assert_close(average, parts.average[name], rtol=1e-4, atol=1e-6)


def test_training_learns_what_a_clip_looks_like_and_reads_the_text(cache, tmp_path):
    settings = replace(SETTINGS, steps=150, checkpoint_every=0, evaluate_every=75, ema_decay=0.9, log_every=50)
    held_out = cache(METHOD.layout_for_training, batch_size=16, text_drop_prob=0.0)
    evaluate = HeldOutLoss(held_out, METHOD, levels=(0.5, 0.95))
    before = evaluate(0, tiny_backbone())
    train(cache, tmp_path, settings, batch_size=16, evaluate=evaluate)
    lines = read(tmp_path / "metrics.jsonl")
    after = {k.removeprefix("eval/"): v for k, v in lines[-1].items() if k.startswith("eval/")}
    assert [line["step"] for line in lines if "eval/loss/0.5" in line] == [75, 150]
    assert after["loss/0.95"] < 0.5 * before["loss/0.95"]
    assert after["wrong_text/0.95"] > 1.1 * after["loss/0.95"]


def test_bf16_stays_near_fp32_with_fp32_master_weights(cache, tmp_path):
    short = replace(SETTINGS, steps=3)
    full = train(cache, tmp_path / "fp32", short)
    low = train(cache, tmp_path / "bf16", replace(short, precision="bf16"))
    losses = [read(tmp_path / name / "metrics.jsonl")[-1]["loss"] for name in ("fp32", "bf16")]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert {p.dtype for p in low.average.values()} == {torch.float32}
    assert any(not torch.equal(full.average[n], low.average[n]) for n in full.average)


def test_activation_checkpointing_keeps_names_and_numbers(cache, tmp_path):
    plain = prepare(tiny_backbone(), Parallel())
    checkpointed = prepare(tiny_backbone(), Parallel(), activation_checkpointing=True)
    source = cache(METHOD.layout_for_training)
    short = replace(SETTINGS, steps=2)
    a = run_loop(plain, METHOD, source, short, tmp_path / "a")
    b = run_loop(checkpointed, METHOD, source, short, tmp_path / "b")
    assert list(a.average) == list(b.average) == [n for n, _ in tiny_backbone().named_parameters()]
    assert all(torch.equal(a.average[n], b.average[n]) for n in a.average)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(cache, tmp_path):
    with pytest.raises(Killed):
        train(cache, tmp_path, kill_at=5)
    source = cache(METHOD.layout_for_training)
    source.latents[:] = float("nan")
    with pytest.raises(FloatingPointError, match=r"step 6; last good checkpoint: .*step-000005"):
        run_loop(tiny_backbone(), METHOD, source, SETTINGS, tmp_path)
    assert latest(tmp_path / "checkpoints")[0] == 5


def test_clean_frames_carry_no_loss_and_weights_sum_to_one():
    layout = shots_layout([2, 1])
    batch = SceneBatch(torch.zeros(2, 4, 3, 4, 4), layout, None, [])
    levels = torch.tensor([[0.0, 0.5, 0.5], [0.3, 0.3, 0.0]])
    assert frame_weights(get_method("fvdm"), batch, levels).tolist() == [[0.0, 0.5, 0.5], [0.5, 0.5, 0.0]]
    torch.testing.assert_close(frame_weights(get_method("fvdm"), batch, torch.ones(2, 3)).sum(dim=1), torch.ones(2))


def test_figures_are_means_over_the_window(cache, tmp_path):
    generator = torch.Generator().manual_seed(0)
    levels, errors = torch.rand(4, 3, generator=generator), torch.rand(4, 3, generator=generator)
    weights = torch.ones(4, 3)
    weights[0] = 0.0
    window = Window(Parallel())
    window.add_errors(levels, errors, weights)
    window.add_step(torch.tensor(2.0), torch.tensor(3.0), samples=4, tokens=40, waited=0.0)
    window.add_step(torch.tensor(4.0), torch.tensor(5.0), samples=4, tokens=40, waited=0.0)
    figures = window.close()
    assert figures["loss"] == 3.0 and figures["grad_norm"] == 4.0
    assert figures["tokens_per_s"] == pytest.approx(10 * figures["samples_per_s"])
    for band in range(NUM_BANDS):
        inside = (levels[1:] * NUM_BANDS).long() == band
        name = f"loss_level/{band / NUM_BANDS:.1f}"
        assert (name in figures) == bool(inside.any())
        if name in figures:
            assert figures[name] == pytest.approx(errors[1:][inside].mean().item())


def test_logged_loss_is_the_loss_of_the_models_package(cache, tmp_path):
    train(cache, tmp_path, replace(SETTINGS, steps=1, log_every=1))
    from models.process import FlowMatching
    from train.loop import draw

    batch, process = cache(METHOD.layout_for_training).batch(0), FlowMatching()
    levels, noise = draw(METHOD, batch, SETTINGS.seed, 0)
    noisy = process.add_noise(batch.latents, noise, levels)
    prediction = tiny_backbone()(noisy, levels, batch.text, **METHOD.backbone_kwargs(batch.layout))
    expected = diffusion_loss(
        prediction, process.target(batch.latents, noise, levels), frame_weights(METHOD, batch, levels)
    )
    logged = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert logged["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="lr_schedule='linear': choose one of constant, cosine"):
        LoopSettings(steps=1, lr_schedule="linear")
    with pytest.raises(ValueError, match="at least 1"):
        LoopSettings(steps=0)
