"""The latent cache: order, text, padding, prefetching."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from models.layout import shots_layout
from models.methods import get_method
from models.tiny import TEXT_DIM
from tests.train.tiny import TEXT_LENGTH
from train.batches import LatentCache, PackedClips, keyed_seed, prefetch, stream, write_cache

LAYOUT_FOR = get_method("fvdm").layout_for_training


def test_stream_goes_through_every_epoch_whole_and_reshuffled():
    places = [p for first in range(0, 30, 4) for p in stream(10, first, 4, seed=3)][:30]
    epochs = [places[:10], places[10:20], places[20:30]]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert stream(3, 7, 8, seed=0) == [p for i in range(7, 15) for p in stream(3, i, 1, seed=0)]
    assert stream(10, 0, 10, seed=3) != stream(10, 0, 10, seed=4)


def test_rows_make_up_the_batch_and_keep_clip_and_text_together(cache):
    data = cache(LAYOUT_FOR, batch_size=6, text_drop_prob=0.0)
    whole = data.batch(5)
    parts = [data.batch(5, slice(i, i + 2)) for i in (0, 2, 4)]
    assert torch.equal(torch.cat([p.latents for p in parts]), whole.latents)
    assert torch.equal(torch.cat([p.text.embeddings for p in parts]), whole.text.embeddings)
    assert whole.latents.shape == (6, 4, 3, 4, 4) and whole.text.embeddings.shape == (6, 1, TEXT_LENGTH, TEXT_DIM)
    for latents, text in zip(whole.latents, whole.text.embeddings[:, 0], strict=True):
        text_id = int((text.abs().sum(dim=1) > 0).sum()) - 3  # text i has 3 + i tokens
        assert round(latents.mean().item() + 2.0) == text_id


def test_text_is_dropped_in_the_asked_share(cache):
    data = cache(LAYOUT_FOR, batch_size=100, text_drop_prob=0.25, null_text=torch.full((TEXT_LENGTH, TEXT_DIM), 9.0))
    dropped = torch.cat([(data.batch(i).text.embeddings == 9.0).flatten(1).all(dim=1) for i in range(10)])
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert torch.equal(data.batch(3).text.embeddings, data.batch(3).text.embeddings)


def test_several_files_are_one_cache(cache_file, tmp_path):
    other = tmp_path / "more.safetensors"
    write_cache(other, torch.zeros(3, 4, 3, 4, 4), [torch.full((2, TEXT_DIM), 7.0)], torch.zeros(3))
    data = LatentCache(
        [cache_file, other],
        batch_size=40,
        text_length=TEXT_LENGTH,
        null_text=torch.zeros(TEXT_LENGTH, TEXT_DIM),
        layout_for=LAYOUT_FOR,
        text_drop_prob=0.0,
    )
    batch = data.batch(0)
    late = [row for row, key in enumerate(batch.keys) if key >= "clip-000037"]
    assert Counter(batch.keys).most_common(1)[0][1] == 1 and len(late) == 3
    assert (batch.text.embeddings[late, 0, :2] == 7.0).all() and (batch.latents[late] == 0).all()


def test_packed_clips_are_the_clips_of_the_batch_each_with_its_own_text(cache):
    data = cache(LAYOUT_FOR, batch_size=8, text_drop_prob=0.3, null_text=torch.full((TEXT_LENGTH, TEXT_DIM), 9.0))
    packed = PackedClips(data, (1, 2, 4))
    for index, pack in enumerate((1, 2, 4, 1, 2, 4)):
        alone, batch = data.batch(index), packed.batch(index)
        assert batch.latents.shape == (8 // pack, 4, 3 * pack, 4, 4) and batch.layout == shots_layout([3] * pack)
        assert batch.text.embeddings.shape[:2] == (8 // pack, pack)
        for number, key in enumerate(alone.keys):
            row, shot = divmod(number, pack)
            frames = batch.layout.shot_slices[shot]
            assert batch.keys[row].split("+")[shot] == key
            assert torch.equal(batch.latents[row, :, frames], alone.latents[number])
            group = batch.text.frame_text[frames].unique().item()
            assert torch.equal(batch.text.embeddings[row, group], alone.text.embeddings[number, 0])
    halves = [packed.batch(2, slice(i, i + 4)) for i in (0, 4)]
    assert torch.equal(torch.cat([half.latents for half in halves]), packed.batch(2).latents)
    with pytest.raises(ValueError, match="2 clips of a worker do not fill sequences of 4"):
        packed.batch(2, slice(0, 2))
    with pytest.raises(ValueError, match="must divide the batch of 8 clips"):
        PackedClips(data, (1, 3))


def test_prefetch_keeps_order_and_passes_errors_on(cache):
    data = cache(LAYOUT_FOR)
    assert [b.keys for b in prefetch(data, slice(0, 4), 3, 9)] == [data.batch(i).keys for i in range(3, 9)]
    assert list(prefetch(data, slice(None), 4, 4)) == []
    data.latents = data.latents[:1]  # sample numbers now point outside
    data.text_ids = data.text_ids[:1] + 1000
    with pytest.raises(IndexError):
        list(prefetch(data, slice(None), 0, 2))


def test_bad_caches_are_refused_by_name(cache_file, tmp_path):
    with pytest.raises(ValueError, match=r"x\.safetensors: 2 clips, 3 text ids"):
        write_cache(tmp_path / "x.safetensors", torch.zeros(2, 4, 3, 4, 4), [torch.zeros(2, 4)], torch.zeros(3))
    with pytest.raises(ValueError, match="tokens do not fit a context of 5"):
        LatentCache(
            [cache_file], batch_size=1, text_length=5, null_text=torch.zeros(5, TEXT_DIM), layout_for=LAYOUT_FOR
        )


def test_keys_of_random_draws_do_not_collide():
    keys = {keyed_seed(seed, name, step) for seed in range(5) for name in ("a", "b") for step in range(50)}
    assert len(keys) == 500
    assert keyed_seed(1, 23) != keyed_seed(12, 3)
