"""Held-out scenes: a share chosen by id, never trained on, the same whatever else changes."""

from __future__ import annotations

import pytest

from tests.train.test_scenes import open_dataset
from train.scenes import kept_out
from train.text_drop import TextDrop

SHARE = 0.4
SCENES = [[2, 2], [2, 2, 2], [3], [2, 2], [1, 2], [2, 2], [3, 3], [2], [2, 2], [2, 2]]


def ids(data) -> set[str]:
    return {record.key for record in data.records}


def test_a_scene_is_kept_out_by_its_id_alone():
    names = [f"scene{i:05d}" for i in range(4000)]
    chosen = kept_out(names, SHARE)
    assert len(chosen) / len(names) == pytest.approx(SHARE, abs=0.02)
    assert chosen <= kept_out(names, 0.5), "a larger share keeps out those of a smaller one, and more"
    assert kept_out(list(reversed(names)), SHARE) == chosen and kept_out(names[:500], SHARE) == chosen & set(
        names[:500]
    )
    assert kept_out(names, 0.0) == set() and kept_out(names, 1.0) == set(names)
    (only,) = kept_out(names[:20], 1e-9)
    assert only in names[:20], "one at least"


def test_held_out_scenes_are_never_in_a_training_batch(dataset):
    folder = dataset(SCENES)
    options = {"held_out_share": SHARE, "single_shot_prob": 0.4, "text_drop": TextDrop(0.1)}
    trained = open_dataset(folder, **options)
    apart = open_dataset(folder, held_out=True, **options)
    everything = open_dataset(folder)
    assert ids(apart) and ids(trained) and not ids(apart) & ids(trained)
    assert ids(apart) | ids(trained) == ids(everything)
    seen = {key.split("/")[0] for i in range(60) for key in trained.batch(i).keys}
    assert seen == ids(trained), "all the others are"
    assert {key.split("/")[0] for i in range(20) for key in apart.batch(i).keys} == ids(apart)


def test_the_split_depends_on_no_other_scene_seed_or_batch(dataset, tmp_path):
    folder = dataset(SCENES)
    apart = ids(open_dataset(folder, held_out_share=SHARE, held_out=True))
    for options in ({"seed": 5}, {"batch_size": 1}, {"shots_per_scene": 1}, {"single_shot_prob": 1.0}):
        assert ids(open_dataset(folder, held_out_share=SHARE, held_out=True, **options)) == apart
    from tests.train.tiny import write_dataset

    more = write_dataset(tmp_path / "more", [*SCENES, [2, 2], [2, 2], [2]], per_shard=5)
    grown = ids(open_dataset(more, held_out_share=SHARE, held_out=True))
    assert {name for name in grown if int(name[5:]) < len(SCENES)} == apart, "a scene keeps its side as data are added"


def test_the_share_is_part_of_what_a_run_is(dataset):
    folder = dataset(SCENES)
    plain, shared = open_dataset(folder).identity(), open_dataset(folder, held_out_share=SHARE).identity()
    assert {name for name in plain if plain[name] != shared[name]} == {"held_out_share"}


def test_a_share_that_leaves_nothing_is_named(dataset):
    folder = dataset(SCENES)
    with pytest.raises(ValueError, match=r"held_out.share=1.0 none of its 10 scenes is left to train on: change it"):
        open_dataset(folder, held_out_share=1.0)
    with pytest.raises(ValueError, match=r"held_out.share=0.0 none of its 10 scenes is left to measure: change it"):
        open_dataset(folder, held_out=True)
