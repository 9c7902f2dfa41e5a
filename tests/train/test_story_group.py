"""Scene windows whose story is a text group of its own, in front of the shots (LCT's global prompt)."""

from __future__ import annotations

import pytest
import torch

from models.layout import shots_layout, with_story
from models.methods import get_method
from tests.models.test_backbones import BACKBONES
from tests.train.test_scenes import NULL, open_dataset
from tests.train.tiny import TEXT_LENGTH
from train.evaluate import HeldOutLoss
from train.loop import LoopSettings, run_loop
from train.metrics import read
from train.text_drop import TextDrop

METHOD = get_method("lct", position_mode="diagonal", global_prompt="group", shift=1.0)


def values(batch, sample: int = 0) -> list[list[float]]:
    """First number of every text token, per context."""
    return batch.text.embeddings[sample, :, :, 0].tolist()


def padded(*runs: tuple[float, int]) -> list[float]:
    tokens = [value for value, count in runs for _ in range(count)]
    return tokens + [0.0] * (TEXT_LENGTH - len(tokens))


@pytest.mark.parametrize("joined", [False, True])
def test_the_story_is_the_last_context_and_a_zero_frame_in_front(dataset, joined):
    folder = dataset([[2, 1, 2]], joined=joined, apart=True)
    batch = open_dataset(folder, batch_size=1, story_group=True, normalize=lambda x: x / 10 + 5).batch(0)
    assert batch.layout == with_story(shots_layout([2, 1, 2]))
    assert batch.latents.shape[2] == 6 and (batch.latents[:, :, 0] == 0).all(), "zero as the model sees it"
    assert (batch.latents[:, :, 1:] > 4.9).all()
    assert values(batch) == [padded((100.0 + i, 3 + i)) for i in range(3)] + [padded((1.0, 5))]
    assert batch.text.frame_text.tolist() == [3, 0, 0, 1, 2, 2]


def test_single_shots_have_no_group(dataset):
    folder = dataset([[2, 2]], joined=True, apart=True)
    data = open_dataset(folder, batch_size=1, story_group=True, single_shot_prob=1.0)
    plain = open_dataset(folder, batch_size=1, single_shot_prob=1.0)
    for index in range(4):
        batch, expected = data.batch(index), plain.batch(index)
        assert batch.layout == expected.layout == shots_layout([2]) and batch.keys == expected.keys
        assert torch.equal(batch.text.embeddings, expected.text.embeddings)
        assert torch.equal(batch.latents, expected.latents)


@pytest.mark.parametrize(
    ("drop", "prompts", "story"),
    [
        (TextDrop(1.0), False, False),
        (TextDrop(0.0, story=1.0), True, False),
        (TextDrop(0.0, prompts=1.0), False, True),
    ],
)
def test_story_and_prompts_are_lost_apart(dataset, drop, prompts, story):
    folder = dataset([[2, 2]], joined=True, apart=True)
    batch = open_dataset(folder, batch_size=1, story_group=True, text_drop=drop).batch(0)
    null = NULL[:, 0].tolist()
    expected = [padded((100.0 + i, 3 + i)) if prompts else null for i in range(2)]
    assert values(batch) == [*expected, padded((1.0, 5)) if story else null]


def test_a_dataset_without_texts_apart_is_refused(dataset):
    with pytest.raises(ValueError, match=r"scene000: has no text.story: .*prepare .* again with texts_apart=true"):
        open_dataset(dataset([[2, 2]], joined=True), story_group=True)


def test_without_a_story_group_nothing_changes(dataset):
    """Neither order nor content: runs that were started before go on."""
    folder = dataset([[2, 2, 2], [2, 2]])
    data = open_dataset(folder, single_shot_prob=0.3)
    assert {key[0] for key in data.buckets} == {"scene", "single"}
    assert not any(window.story for windows in data.buckets.values() for window in windows)


def test_it_trains_and_is_measured(dataset, tmp_path):
    folder = dataset([[2, 2, 2], [2, 2, 2], [2, 2]])
    source = open_dataset(
        folder, story_group=True, single_shot_prob=0.3, layout_for=METHOD.layout_for_training, text_drop=TextDrop(0.1)
    )
    backbone = BACKBONES["cogvideox-5b"]()
    seen = []
    backbone.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    evaluate = HeldOutLoss(source, METHOD, batches=2, levels=(0.5,))
    settings = LoopSettings(steps=6, log_every=1, warmup_steps=0, evaluate_every=6)
    run_loop(backbone, METHOD, source, settings, tmp_path, evaluate=evaluate)
    groups = 0
    for (x, levels, _), kwargs in ((args if len(args) == 3 else (*args, None), kwargs) for args, kwargs in seen):
        dummies = kwargs["layout"].is_dummy
        groups += bool(dummies.any())
        assert (x[:, :, dummies] == 0).all() and (levels[:, dummies] == 0).all()
    assert 0 < groups < len(seen), "scenes with their story, and plain single shots"
    lines = read(tmp_path / "metrics.jsonl")
    assert len(lines) == 6 and lines[-1]["eval/loss/0.5"] > 0
