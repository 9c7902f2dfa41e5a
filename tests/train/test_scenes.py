"""Scene windows from real tars: order, texts, latents, errors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from models.methods import get_method
from models.tiny import TEXT_DIM
from tests.models.processes import PROCESSES
from tests.train.tiny import CHANNELS, SIZE, TEXT_LENGTH, write_dataset
from train.loop import all_conditions, clean_latents
from train.scenes import ShardDataset, Turns, check_states_seen
from train.shards import read_shard
from train.text_drop import TextDrop

NULL = torch.full((TEXT_LENGTH, TEXT_DIM), -1.0)
SCENES = [[2, 2, 2, 2], [2, 2, 2], [3, 3], [2, 0, 2, 2], [2]]


def open_dataset(folder: Path, **options) -> ShardDataset:
    options = {
        "batch_size": 2,
        "text_length": TEXT_LENGTH,
        "null_text": NULL,
        "layout_for": get_method("lct").layout_for_training,
        "normalize": lambda latents: latents / 10.0,
        "made_with": ("vae", "text"),
        "text_drop": TextDrop(0.0),
        "latents": "mean",
    } | options
    return ShardDataset(folder, **options)


def test_windows_are_all_runs_of_neighbours_of_equal_size(dataset):
    data = open_dataset(dataset(SCENES), shots_per_scene=3, single_shot_prob=0.5)
    scenes = {
        f"{w.scene_id}:{w.first}+{len(w.texts)}" for key, ws in data.buckets.items() if key[0] == "scene" for w in ws
    }
    assert scenes == {
        "scene000:0+3", "scene000:1+3", "scene001:0+3", "scene002:0+2", "scene003:0+1", "scene003:2+2", "scene004:0+1",
    }  # fmt: skip
    singles = [w for key, ws in data.buckets.items() if key[0] == "single" for w in ws]
    assert len(singles) == 4 + 3 + 2 + 3 + 1


def test_a_batch_is_a_function_of_seed_and_index_alone(dataset):
    folder = dataset(SCENES)
    options = {"single_shot_prob": 0.3, "latents": "sample", "text_drop": TextDrop(0.2, 0.2, 0.2)}
    forward, backward = open_dataset(folder, **options), open_dataset(folder, **options)
    batches = [forward.batch(i) for i in range(12)]
    for i in reversed(range(12)):
        again = backward.batch(i)
        assert torch.equal(again.latents, batches[i].latents)
        assert torch.equal(again.text.embeddings, batches[i].text.embeddings)
        halves = [backward.batch(i, slice(0, 1)), backward.batch(i, slice(1, 2))]
        assert torch.equal(torch.cat([h.latents for h in halves]), batches[i].latents)
        assert sum((h.keys for h in halves), []) == batches[i].keys
    other = open_dataset(folder, seed=1, **options)
    assert [other.batch(i).keys for i in range(12)] != [b.keys for b in batches]


def test_every_window_comes_once_per_epoch_of_its_bucket(dataset):
    data = open_dataset(dataset([[2, 2, 2]] * 6), shots_per_scene=2)
    seen = Counter(f"{w.scene_id}:{w.first}" for i in range(18) for w in data.windows(i))  # 3 epochs of 12 windows
    assert len(seen) == 12 and set(seen.values()) == {3}
    first, second = ([str(w) for i in range(a, a + 6) for w in data.windows(i)] for a in (0, 6))
    assert sorted(first) == sorted(second) and first != second


def test_latents_and_texts_of_each_shot(dataset):
    data = open_dataset(dataset([[2, 2, 2]]), batch_size=1)
    batch = data.batch(0)
    assert batch.latents.shape == (1, CHANNELS, 6, SIZE, SIZE)
    means = batch.latents.mean(dim=(0, 1, 3, 4)).reshape(3, 2).mean(dim=1)
    torch.testing.assert_close(means, torch.tensor([0.0, 0.1, 0.2]), atol=0.01, rtol=0)
    assert batch.text.frame_text.tolist() == batch.layout.text_ids.tolist()
    texts = batch.text.embeddings[0, :, :, 0]  # [S,L]
    for shot, text in enumerate(texts.tolist()):
        assert text == [1.0] * 5 + [100.0 + shot] * (3 + shot) + [0.0] * (TEXT_LENGTH - 8 - shot)


def test_single_shots_read_their_sentence_or_story_and_prompt(dataset):
    data = open_dataset(dataset([[2, 2]]), batch_size=1, single_shot_prob=1.0)
    texts = {data.batch(i).keys[0]: data.batch(i).text.embeddings[0, 0, :, 0].tolist() for i in range(4)}
    assert texts["scene000/s000+1"] == [200.0] * 4 + [0.0] * (TEXT_LENGTH - 4)
    assert texts["scene000/s001+1"] == [1.0] * 5 + [101.0] * 4 + [0.0] * (TEXT_LENGTH - 9)


@pytest.mark.parametrize(
    ("drop", "expected"),
    [
        (TextDrop(1.0), [-1.0] * TEXT_LENGTH),
        (TextDrop(0.0, story=1.0), [100.0] * 3 + [0.0] * (TEXT_LENGTH - 3)),
        (TextDrop(0.0, prompts=1.0), [1.0] * 5 + [0.0] * (TEXT_LENGTH - 5)),
    ],
)
def test_dropped_text(dataset, drop, expected):
    batch = open_dataset(dataset([[2, 2]]), batch_size=1, text_drop=drop).batch(0)
    assert batch.text.embeddings[0, 0, :, 0].tolist() == expected


def test_drop_shares_are_kept(dataset):
    data = open_dataset(dataset([[2, 2]] * 3), batch_size=50, text_drop=TextDrop(0.2, 0.3, 0.1))
    first = torch.cat([data.batch(i).text.embeddings[:, 0, 0, 0] for i in range(20)])
    assert (first == -1.0).float().mean().item() == pytest.approx(0.2, abs=0.04)
    assert (first >= 100.0).float().mean().item() == pytest.approx(0.3, abs=0.05)


def test_shots_lose_their_texts_one_by_one_and_never_all(dataset):
    folder = dataset([[2, 2, 2]] * 4)
    whole, some = (
        open_dataset(folder, batch_size=40, single_shot_prob=0.25, text_drop=TextDrop(0.0, shots=share))
        for share in (0.0, 0.8)
    )
    silent = Counter()
    for index in range(12):
        kept, dropped = whole.batch(index), some.batch(index)
        assert torch.equal(kept.latents, dropped.latents)
        lost = (dropped.text.embeddings == NULL).flatten(2).all(dim=2)  # [B,S]
        expected = torch.where(lost[..., None, None], NULL.expand_as(kept.text.embeddings), kept.text.embeddings)
        assert torch.equal(dropped.text.embeddings, expected), "the other shots keep their own text"
        if lost.shape[1] == 1:
            assert not lost.any(), "a single shot has no others to follow"
        else:
            silent.update(lost.sum(dim=1).tolist())
    total = silent.total()
    # Of three shots one speaks and each of the others is silent in half of the chosen samples.
    assert set(silent) == {0, 1, 2}
    assert silent[1] / total == pytest.approx(0.4, abs=0.08) and silent[2] / total == pytest.approx(0.2, abs=0.07)


def test_posterior_is_sampled_with_its_deviation(dataset):
    folder = dataset([[2, 2]])
    mean = open_dataset(folder, batch_size=1, normalize=lambda x: x).batch(0).latents
    drawn = open_dataset(folder, batch_size=1, normalize=lambda x: x, latents="sample").batch(0).latents
    assert (drawn - mean).std().item() == pytest.approx(np.exp(-2.0), rel=0.15)


def test_a_share_of_the_shots_is_one_of_their_frames_encoded_alone(dataset):
    folder = dataset([[2, 2, 1]] * 4)
    data = open_dataset(folder, batch_size=8, normalize=lambda x: x, single_frame_prob=0.3)
    kept, firsts = Counter(), Counter()
    for index in range(60):
        batch = data.batch(index)
        sizes = [frames.stop - frames.start for frames in batch.layout.shot_slices]
        assert sizes[2] == 1 and batch.latents.shape[2] == sum(sizes), "one layout for the whole batch"
        for shot, frames in enumerate(batch.layout.shot_slices[:2]):
            kept[sizes[shot]] += 1
            if sizes[shot] == 1:
                values = batch.latents[:, 0, frames.start, 0, 0] - shot
                assert set(values.tolist()) <= {0.25, 0.75}
                firsts.update(values.tolist())
            else:
                scenes = torch.tensor([int(key[5:8]) for key in batch.keys])
                assert (batch.latents[:, 0, frames, 0, 0] - 10 * scenes[:, None] - shot).abs().max() < 0.2
        again = [data.batch(index, slice(0, 3)), data.batch(index, slice(3, 8))]
        assert torch.equal(torch.cat([part.latents for part in again]), batch.latents)
    assert kept[1] / kept.total() == pytest.approx(0.3, abs=0.1)
    assert firsts[0.25] / firsts.total() == pytest.approx(0.5, abs=0.1)
    drawn = open_dataset(folder, batch_size=8, normalize=lambda x: x, single_frame_prob=1.0, latents="sample").batch(0)
    assert drawn.latents.shape[2] == 3 and 0.05 < (drawn.latents[:, :, 0] - 0.5).abs().std() < 0.5
    plain = open_dataset(folder, batch_size=8, normalize=lambda x: x)
    assert plain.batch(0).latents.shape[2] == 5 and plain.identity() == data.identity(), "the method names the share"


def test_frames_encoded_alone_are_asked_for_at_once(dataset, tmp_path):
    folder = dataset([[2, 2]])
    shard = folder / "shards" / "scenes-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"s001.last_mean", b"s001.lost_mean"))
    open_dataset(folder)
    with pytest.raises(ValueError, match=r"scenes-000000\.tar: scene000 has no tensor s001\.last_mean"):
        open_dataset(folder, single_frame_prob=0.1)


def test_turns_keep_to_their_shares():
    turns = Turns(np.array([0.5, 0.3, 0.2]))
    order = [turns.at(i) for i in range(1000)]
    for bucket, share in enumerate([0.5, 0.3, 0.2]):
        chosen = [b for b, _ in order]
        assert all(abs(chosen[:n].count(bucket) - n * share) <= 1.0 for n in range(1, 1000, 37))
        assert [t for b, t in order if b == bucket] == list(range(chosen.count(bucket)))


def test_errors_name_the_file_and_the_remedy(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"nothing.*no shards/\*\.tar"):
        open_dataset(tmp_path / "nothing")
    folder = dataset([[2, 2]])
    with pytest.raises(ValueError, match="scene000 was encoded by the text encoder text, the model to train has other"):
        open_dataset(folder, made_with=("vae", "other"))
    with pytest.raises(ValueError, match=r"scenes-000000\.tar: scene000 shot 0: its texts have \[5, 3\] tokens.* 4 in"):
        open_dataset(folder, text_length=4, null_text=NULL[:4])
    shard = folder / "shards" / "scenes-000000.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"scenes-000000\.tar"):
        open_dataset(folder)


def test_hostile_tensor_offsets_are_refused(dataset):
    shard = dataset([[2]]) / "shards" / "scenes-000000.tar"
    data = shard.read_bytes()
    assert b'"data_offsets":[0,' in data
    shard.write_bytes(data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1).replace(b"[9,", b"[-", 1))
    with pytest.raises(ValueError, match="scenes-000000"):
        read_shard(shard)


def test_given_frames_are_means_and_lost_ones_are_named(dataset):
    folder = dataset([[3]] * 8)
    drop = TextDrop(everything=0.2, given=0.2, both=0.3)
    options = {"normalize": lambda x: x, "latents": "sample", "shots_per_scene": 1, "batch_size": 8}
    means = open_dataset(folder, **options | {"latents": "mean"}).batch(0).latents
    batch = open_dataset(folder, **options, given_frames=2).batch(0)
    assert torch.equal(batch.latents[:, :, :2], means[:, :, :2]) and batch.given_lost is None
    assert (batch.latents[:, :, 2] - means[:, :, 2]).std() > 0.05
    data = open_dataset(folder, **options, given_frames=1, loses_given=True, text_drop=drop)
    lost = torch.cat([data.batch(index).given_lost for index in range(50)])
    assert float(lost.float().mean()) == pytest.approx(0.5, abs=0.1)


def test_text_drops_that_would_do_nothing_or_are_needed_are_refused(dataset):
    folder = dataset([[2]])
    for drop in (TextDrop(given=0.1), TextDrop(both=0.1)):
        with pytest.raises(ValueError, match=r"text_drop\.given is .* does not guide by given frames: set both to 0"):
            open_dataset(folder, text_drop=drop)
    with pytest.raises(ValueError, match=r"text_drop\.both is 0\.0, .* never be trained; set text_drop\.both, such as"):
        open_dataset(folder, text_drop=TextDrop(given=0.1), given_frames=1, loses_given=True)
    for drop in (TextDrop(), TextDrop(given=0.1), TextDrop(both=0.1)):  # a method that need not guide by them
        open_dataset(folder, text_drop=drop, given_frames=1, loses_given=True, needs_both=False)


def test_states_that_saw_more_than_is_given_are_refused(tmp_path):
    """Predicted from the frames that are to be made, they would tell the model its future."""
    check_states_seen(tmp_path, 1)
    (tmp_path / "dataset.json").write_text('{"settings": {"states_frames": 5}}')
    check_states_seen(tmp_path, 5)
    with pytest.raises(ValueError, match=r"first 5 frames of a shot, but the model is given 1: .*states\.frames=1"):
        check_states_seen(tmp_path, 1)


def test_states_are_read_and_go_with_the_text(dataset):
    folder = dataset([[2]] * 6, states=2)
    null = NULL.clone()
    null[3:] = 0
    options = {"shots_per_scene": 1, "batch_size": 6, "most_states": 2, "given_frames": 1, "loses_given": True}
    drop = TextDrop(everything=0.3, given=0.2, both=0.2)
    data = open_dataset(folder, **options, null_text=null, text_drop=drop)
    lost = {True: 0, False: 0}
    for index in range(10):
        batch = data.batch(index)
        for states, text in zip(batch.states, batch.text.embeddings[:, 0], strict=True):
            lost[gone := torch.equal(text, null)] += 1
            if gone:  # the empty text as the only state, as in sampling
                assert torch.equal(states[0, :3], null[:3]) and not states[0, 3:].any() and not states[1].any()
            else:
                assert states.shape == (2, 6, TEXT_DIM) and (states == 300).all()
    assert lost[True] / 60 == pytest.approx(0.5, abs=0.15)
    with pytest.raises(ValueError, match=r"makes one shot from its states; set shots_per_scene=1"):
        open_dataset(
            write_dataset(folder.parent / "two", [[2, 2]], states=2), **options | {"shots_per_scene": 2}, text_drop=drop
        )


@pytest.mark.parametrize(("method", "held"), [("fca", False), ("aid", True)])
def test_a_given_frame_is_not_cut_out_of_a_clip_whose_latents_know_the_future(dataset, method, held):
    """CogVideoX's and HunyuanVideo's VAEs are not causal: what is given is the first frame, encoded alone."""
    found = get_method(method)
    options = {"layout_for": found.layout_for_training, "given_frames": 1, "shots_per_scene": 1}
    folder = dataset([[3], [2], [3]])
    cut = [open_dataset(folder, **options).batch(i) for i in range(4)]
    alone = [open_dataset(folder, **options, given_alone=True).batch(i) for i in range(4)]
    for one, other in zip(cut, alone, strict=True):
        assert one.given is None and one.keys == other.keys
        first = torch.full_like(other.given, 0.25 / 10)
        assert torch.equal(other.given, first) and other.given.shape[2] == 1
        conditions = all_conditions(found, other)["given"]
        assert torch.equal(conditions[:, :CHANNELS], first) and not torch.equal(one.latents[:, :, :1], first)
        levels = found.for_model(PROCESSES["vp epsilon"], 1.0).sample_levels(
            other.layout, 2, torch.Generator().manual_seed(0)
        )
        expected = torch.cat([first, one.latents[:, :, 1:]], dim=2) if held else one.latents
        clean = clean_latents(other, levels)
        assert torch.equal(clean, expected), "held in the clip, too; else the clip is all to be made"
        assert torch.equal(clean_latents(one, levels), one.latents)
    with pytest.raises(ValueError, match="given_frames is 2, but in this model's VAE .* set given_frames=1"):
        open_dataset(folder, **options | {"given_frames": 2}, given_alone=True)
