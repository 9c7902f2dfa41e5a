"""Videos of several aspects by the commands: sizes as they are written, prepared, estimated, shown and trained from."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from infra.config import ConfigError, load_config
from models.layout import shots_layout
from models.methods import get_method
from models.tiny import build_tiny_folder
from models.tiny_svd import build_tiny_svd_folder
from pipelines import dry_run as dry_run_module
from pipelines.dataset_card import write_card
from pipelines.dry_run import DryRun, dry_run
from pipelines.prepare import PrepareConfig, make_settings
from pipelines.train import TrainConfig, TrainResult, run_train
from preprocess.settings import PrepareSettings
from preprocess.verify import verify
from tests.preprocess.runs import records, run_here
from tests.preprocess.videos import pan, write
from tests.train.tiny import tensors, write_dataset
from train import loop
from train.batches import SceneBatch
from train.scenes import ShardDataset
from train.shards import read_shard
from train.text_drop import TextDrop

SHAPES = {"wide": (48, 96), "tall": (96, 48), "square": (96, 96), "small": (32, 64)}  # height, width of the videos
TAKEN = {"wide.mp4": (32, 64), "tall.mp4": (64, 32), "square.mp4": (48, 48), "small.mp4": (32, 64)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, videos/ and the dataset of three sizes, out/; two shots of 9 frames in each video."""
    folder = tmp_path_factory.mktemp("sizes")
    build_tiny_folder(folder / "model", frames_per_shot=9, text_length=300)
    for number, (name, (height, width)) in enumerate(SHAPES.items()):
        images = [*pan(2 * number, 9, 96), *pan(2 * number + 1, 9, 96)]
        video = write(folder / "videos" / f"{name}.mp4", [image[:height, :width] for image in images])
        video.with_suffix(".json").write_text(json.dumps({"story": f"A {name} picture.", "shots": []}))
    settings = make_settings(config(folder, "sizes=[64x32,32x64,48x48]", "tile_over=32"))
    assert settings.sizes == ((32, 64), (64, 32), (48, 48)) and (settings.height, settings.width) == (32, 32)
    run_here(folder / "videos", folder / "out", folder / "model", settings)
    return folder


def config(folder: Path, *keys: str) -> PrepareConfig:
    given = [f"sources=[{folder / 'videos'}]", f"output={folder / 'out'}", f"model={folder / 'model'}", *keys]
    return load_config(PrepareConfig, None, given)


# ---------------------------------------------------------------- as they are written


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["sizes=[64x32,48]"], r"sizes\[1\]=48: expected WIDTHxHEIGHT in pixels, such as 832x480"),
        (["sizes=[64x32,64x32]"], r"sizes\[1\]=64x32: it is listed twice"),
        (["sizes=[64x0]"], r"sizes\[0\]=64x0: expected WIDTHxHEIGHT"),
        (["sizes=[64x32]", "height=32"], r"sizes=\['64x32'\], height=32, width=None: give sizes, or one size"),
    ],
)
def test_what_is_no_list_of_sizes_is_refused_at_once(base: Path, keys: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(base, *keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["sizes=[64x32,830x478]"], r"sizes\[1\]=830x478: .*multiples of 16 pixels.*; nearest is 832x480"),
        (["sizes=[8x32]"], r"sizes\[0\]=8x32: .*nearest is 16x32"),
        (["height=40"], r"height=40: .*model takes multiples of 16 .*VAE 8, of a patch 2.*; nearest is 32"),
        (["width=4"], r"width=4: .*nearest is 16"),
        (["tile_over=48"], r"tile_over=48: a tile of 48 pixels: this VAE needs a multiple of 32; nearest is 64"),
    ],
)
def test_sizes_that_the_model_cannot_take_are_refused_with_the_nearest(
    base: Path, keys: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_settings(config(base, *keys))


def test_a_vae_without_tiles_says_so(base: Path, tmp_path: Path) -> None:
    build_tiny_svd_folder(tmp_path / "model")
    with pytest.raises(ValueError, match="tile_over=64: .* AutoencoderKLTemporalDecoder encodes whole frames only"):
        make_settings(replace(config(base, "tile_over=64"), model=tmp_path / "model"))


def test_no_sizes_are_the_models_own(base: Path) -> None:
    for keys in ([], ["sizes=[]"], ["sizes=null"]):
        settings = make_settings(config(base, *keys))
        assert settings.sizes == () and (settings.height, settings.width) == (32, 32) and settings.tile_over is None


# ---------------------------------------------------------------- prepared, shown, estimated


def test_each_video_is_prepared_at_its_size_and_the_card_counts_them(base: Path, tmp_path: Path) -> None:
    found = {scene.source.path: scene.shots[0].encoded for scene, _ in records(base / "out").values()}
    assert {name: (span.height, span.width) for name, span in found.items() if span} == TAKEN
    assert verify(base / "out").faults == []
    card = write_card(base / "out", tmp_path / "card.html").read_text()
    assert "64x32 (4), 48x48 (2), 32x64 (2), 8" in card and "size (encoded shots), frames/s" in card


def test_tiles_are_in_the_keys_of_the_videos_they_change(base: Path, tmp_path: Path) -> None:
    """Tiles of 64 pixels change nothing here, so nothing is done again but by those that were in tiles of 32."""
    rows = {row["name"]: row["encoder_key"] for row in pq.read_table(base / "out" / "sources.parquet").to_pylist()}
    assert len(set(rows.values())) == 1, "all are over 32 pixels"
    whole = make_settings(config(base, "sizes=[64x32,32x64,48x48]"))
    videos, out, model = base / "videos", tmp_path / "out", base / "model"
    assert run_here(videos, out, model, whole)[1] == 4
    plain = {key: tensors for key, (_, tensors) in records(out).items()}
    in_tiles = {key: tensors for key, (_, tensors) in records(base / "out").items()}
    assert plain.keys() == in_tiles.keys()
    for key, found in plain.items():
        assert not torch.equal(found["s000.latent_mean"], in_tiles[key]["s000.latent_mean"])
        assert not torch.equal(found["s000.first_mean"], in_tiles[key]["s000.first_mean"])
        assert torch.equal(found["s000.text"], in_tiles[key]["s000.text"])
    assert run_here(videos, out, model, replace(whole, tile_over=64))[1] == 0
    assert json.loads((out / "dataset.json").read_text())["settings"]["tile_over"] == 64
    assert all(torch.equal(records(out)[key][1][name], found[name]) for key, found in plain.items() for name in found)
    assert run_here(videos, out, model, replace(whole, sizes=((32, 32), (64, 32)), tile_over=32))[1] == 4
    keys = {row["name"]: row["encoder_key"] for row in pq.read_table(out / "sources.parquet").to_pylist()}
    assert len({keys["wide.mp4"], keys["square.mp4"], keys["small.mp4"]}) == 1
    assert keys["wide.mp4"] != keys["tall.mp4"] == rows["tall.mp4"], "frames of 32x32 are encoded whole"


def test_the_dry_run_samples_every_size_and_weighs_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run_module, "SAMPLE", 2)
    found = dry_run(replace(config(base, "sizes=[64x32,32x64,48x48]"), output=base / "nowhere", dry_run=True))
    assert found.sizes == {(32, 64): 36, (64, 32): 18, (48, 48): 18} and found.frames == 72
    assert len(found.sampled) == 3 and {"tall.mp4", "square.mp4"} < set(found.sampled), "one of each size"
    assert "frames: 64x32 (50% of what is decoded), 32x64 (25% of what is decoded), 48x48 (25%" in found.summary()
    assert found.scratch_bytes == 18 * 48 * 48 * 3, "of the video that has most pixels"
    assert not (base / "nowhere").exists()


def test_the_sample_is_weighted_by_what_there_is_of_each_size() -> None:
    class Some:
        def __init__(self, size: tuple[int, int], shown: int) -> None:
            self.size, self.count = size, type("Count", (), {"shown": shown})

    found = DryRun(Path("out"), PrepareSettings(), 1, 1, 1, sizes={(32, 64): 900, (64, 32): 100})
    units = [Some((32, 64), 10), Some((64, 32), 10), Some((64, 32), 30)]
    weights = dry_run_module._weights(units, found)  # type: ignore[arg-type]
    work = sum(weight * seconds for weight, seconds in zip(weights, [10 * 1.0, 10 * 2.0, 30 * 2.0], strict=True))
    assert work / 50 * 1000 == pytest.approx(900 * 1.0 + 100 * 2.0), "one and two seconds a frame"


# ---------------------------------------------------------------- trained from


def open_dataset(folder: Path, **options) -> ShardDataset:
    scene = next(iter(records(folder).values()))[0]
    width = next(iter(records(folder).values()))[1]["s000.text"].shape[1]
    given = {
        "batch_size": 2, "text_length": 300, "null_text": torch.zeros(300, width), "latents": "mean",
        "layout_for": get_method("lct").layout_for_training, "normalize": lambda latents: latents,
        "made_with": (scene.latents.vae_hash, scene.latents.text_hash), "text_drop": TextDrop(0.0),
        "shots_per_scene": 2, "single_shot_prob": 0.5,
    }  # fmt: skip
    return ShardDataset(folder, **given | options)


def test_a_batch_is_of_one_size_and_holds_the_latents_of_its_scenes(base: Path) -> None:
    data = open_dataset(base / "out")
    by_id = {record.key: record for shard in (base / "out" / "shards").glob("*.tar") for record in read_shard(shard)}
    seen: Counter[tuple[int, int]] = Counter()
    for index in range(16):
        batch = data.batch(index)
        seen[tuple(batch.latents.shape[3:])] += 1
        for latents, window in zip(batch.latents, data.windows(index), strict=True):
            shots = [by_id[window.scene_id].read(f"s{shot:03d}.latent_mean").float() for shot in window.shots]
            assert torch.equal(latents, torch.cat(shots, dim=1))
    assert seen[4, 8] == 2 * seen[8, 4] == 2 * seen[6, 6] == 8, "buckets take turns by their share of the shots"
    assert data.identity()["latent_sizes"] == ["4x8: 4", "6x6: 2", "8x4: 2"]


def test_the_levels_of_a_sample_do_not_depend_on_its_size(base: Path) -> None:
    """The shift of the levels is the model's; the size changes the noise, not how much of it."""
    method, layout = get_method("lct", shift=3.0), shots_layout([3])
    found = []
    for size in ((4, 8), (8, 4), (6, 6)):
        batch = SceneBatch(torch.zeros(2, 4, 3, *size), layout, None, ["a", "b"])  # type: ignore[arg-type]
        levels, noise = loop.draw(method, batch, 0, 6)
        assert noise.shape[3:] == size
        found.append(levels)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def train(base: Path, run_dir: Path, *overrides: str, **callbacks) -> TrainResult:
    keys = {"dataset": base / "out", "model": base / "model", "run_dir": run_dir, "steps": 12, "batch_size": 2}
    keys |= {"shots_per_scene": 2, "single_shot_prob": 0.5, "learning_rate": 3e-3, "warmup_steps": 0, "num_workers": 0}
    keys |= {"checkpoint_every": 5, "log_every": 1, "activation_checkpointing": True}
    given = [f"{name}={value}" for name, value in keys.items()] + list(overrides)
    return run_train(load_config(TrainConfig, None, given), **callbacks)


class Killed(Exception):
    pass


def test_training_goes_through_all_sizes_and_resumes_bit_for_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, shapes = loop.clip_losses, []

    def noting(backbone, method, batch, *rest):
        shapes.append(tuple(batch.latents.shape[2:]))
        losses, errors, weights = plain(backbone, method, batch, *rest)
        assert errors.shape == (2, batch.latents.shape[2]) and bool(torch.isfinite(losses).all())
        return losses, errors, weights

    monkeypatch.setattr(loop, "clip_losses", noting)
    whole = train(base, tmp_path / "whole")
    assert {shape[1:] for shape in shapes} == {(4, 8), (8, 4), (6, 6)} and {shape[0] for shape in shapes} == {3, 6}

    def die(step: int, _: Path) -> None:
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        train(base, tmp_path / "killed", on_checkpoint=die)
    again = train(base, tmp_path / "killed")
    expected, found = tensors(whole.checkpoint), tensors(again.checkpoint)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_dataset_of_other_sizes_is_no_continuation(base: Path, tmp_path: Path) -> None:
    """The scenes have the same names, so only their sizes tell that other batches would follow."""
    train(base, tmp_path / "run", "steps=1")
    fewer = make_settings(config(base, "sizes=[64x32,32x64]", "tile_over=32"))
    run_here(base / "videos", tmp_path / "out", base / "model", fewer)
    with pytest.raises(ValueError, match="latent_sizes"):
        train(base, tmp_path / "run", "steps=2", f"dataset={tmp_path / 'out'}")


def test_one_size_is_no_part_of_what_a_dataset_is(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "dataset", [[2, 2], [3]])
    data = ShardDataset(
        folder, batch_size=1, text_length=12, null_text=torch.zeros(12, 32), made_with=("vae", "text"),
        layout_for=get_method("lct").layout_for_training, normalize=lambda latents: latents,
    )  # fmt: skip
    assert "latent_sizes" not in data.identity(), "runs on such a dataset go on"
