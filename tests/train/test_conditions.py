"""What a method tells the model besides text: dropped per sample, trained with classes, the same when sharded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributed import destroy_process_group, init_process_group

from models.methods import get_method
from tests.train.tiny import tiny_backbone
from train.batches import SceneBatch
from train.loop import LoopSettings, given_conditions, run_loop
from train.metrics import read
from train.parallel import Parallel, prepare, trainable

FCA = get_method("fca", drop_given=0.4, frame_queries=2, text_width=16, text_heads=2, max_frames=3)
AID = {"query_tokens": 2, "width": 16, "heads": 4, "num_states": 2, "max_frames": 3}


def test_each_sample_keeps_or_loses_its_given_frames_however_the_step_is_split(cache):
    batch = cache(FCA.layout_for_training, batch_size=40).batch(0)
    whole = given_conditions(FCA, batch, 3, 120)["given"]
    halves = []
    for rows in (slice(0, 15), slice(15, 40)):
        part = SceneBatch(batch.latents[rows], batch.layout, batch.text.samples(range(40)[rows]), batch.keys[rows])
        halves.append(given_conditions(FCA, part, 3, 120 + rows.start)["given"])
    assert torch.equal(whole, torch.cat(halves))
    kept = whole.flatten(1).any(dim=1)
    assert 8 <= int((~kept).sum()) <= 24, "about four in ten are lost"
    assert torch.equal(whole[kept], batch.latents[kept, :, :1]), "the others are whole"
    assert not torch.equal(kept, given_conditions(FCA, batch, 4, 120)["given"].flatten(1).any(dim=1))


def test_given_frames_and_states_reach_the_method_but_where_the_sample_lost_them(cache):
    method = get_method("aid", **AID)
    batch = cache(method.layout_for_training).batch(0)
    batch = replace(batch, given_lost=torch.tensor([False, True, False, True]), states=batch.text.embeddings[:, :, :5])
    found = given_conditions(method, batch, 0, 0)
    assert torch.equal(found["states"], batch.states)
    assert torch.equal(found["given"][::2, :-1], batch.latents[::2, :, :1]) and (found["given"][::2, -1] == 1).all()
    assert not found["given"][1::2].any(), "no latents, and nothing that says there are some"


@pytest.mark.parametrize("labels", [5, 0])
def test_a_model_of_classes_trains_without_reading_text(cache, tmp_path, labels):
    method, backbone = get_method("fvdm", labels=labels, shift=3.0), tiny_backbone()
    method.attach(backbone)
    source = cache(method.layout_for_training)
    assert int(source.batch(0).labels.max()) < 5
    before = backbone.conditioner.table.weight.detach().clone()
    run_loop(backbone, method, source, LoopSettings(steps=6, learning_rate=1e-2, log_every=6), tmp_path / "a")
    changed = (backbone.conditioner.table.weight != before).any(dim=1)
    assert changed.all() if labels == 0 else changed[:5].sum() >= 3

    class OtherTexts:
        batch_size, identity = source.batch_size, source.identity

        def batch(self, index: int, rows: slice = slice(None)) -> SceneBatch:
            batch = source.batch(index, rows)
            text = replace(batch.text, embeddings=batch.text.embeddings + 1)
            return replace(batch, text=text)

    again = tiny_backbone()
    method.attach(again)
    run_loop(again, method, OtherTexts(), LoopSettings(steps=6, learning_rate=1e-2, log_every=6), tmp_path / "b")
    losses = [read(tmp_path / name / "metrics.jsonl")[-1]["loss"] for name in ("a", "b")]
    assert losses[0] == losses[1]


def test_classes_are_needed_where_the_method_reads_them(cache, tmp_path):
    batch = replace(cache(get_method("fvdm").layout_for_training).batch(0), labels=None)
    with pytest.raises(ValueError, match="one of 5 classes, but these samples have none"):
        given_conditions(get_method("fvdm", labels=5), batch, 0, 0)


SHARDED = {
    "fca": FCA,
    "aid": get_method("aid", **AID),
    "aid, image beside": get_method("aid", **AID, image="concat"),
    "aid, no states": get_method("aid", **AID, states=False, long_term_adapter=False),
    "classes": get_method("fvdm", labels=5),
    "no classes": get_method("fvdm", labels=0),
}


def opened(method):
    """A tiny backbone with the method's modules, none of whose weights is zero."""
    backbone = tiny_backbone()
    method.attach(backbone)
    for i, weight in enumerate(backbone.conditioner.parameters()):
        if not weight.any():
            weight.data = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    return backbone


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", SHARDED.values(), ids=SHARDED)
def test_modules_sharded_over_ranks_learn_the_same(cache, tmp_path, method, checkpointing):
    """FSDP2 gathers the modules' weights around their own calls: some run before the backbone does."""
    batch = cache(method.layout_for_training).batch(0)
    if method.most_states:
        batch = replace(batch, states=batch.text.embeddings[:, :, :5].expand(-1, 2, -1, -1))
    levels = torch.full((4, 3), 0.6)

    def gradients(backbone) -> dict[str, torch.Tensor]:
        conditions = given_conditions(method, batch, 0, 0)
        seen = {"text": batch.text} | method.prepare(backbone, batch.layout, batch.text, conditions)
        told = method.model_levels(levels)
        backbone(batch.latents, told, **seen, **method.backbone_kwargs(batch.layout)).square().mean().backward()
        return {name: p.grad for name, p in trainable(backbone).items() if p.grad is not None}

    expected = gradients(opened(method))
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = prepare(opened(method), Parallel(sharded=True), activation_checkpointing=checkpointing)
        gradients(sharded)
        sharded.zero_grad()
        found = {name: gradient.full_tensor() for name, gradient in gradients(sharded).items()}  # the second step's
    finally:
        destroy_process_group()
    assert found.keys() == expected.keys() and any(name.startswith("conditioner.") for name in found)
    for name, gradient in found.items():
        assert torch.allclose(expected[name], gradient, rtol=1e-4, atol=1e-6), name
