"""Encoding: the posterior of each span, first and last frames alone, each text once, and bytes that repeat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.codecs import to_video
from models.scene import STORY_TEXT, Scene, Shot, Source, link_shots
from models.tiny import build_tiny_folder
from preprocess.encode import Encoder, encoder_key, scene_texts
from preprocess.outcome import Failed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    build_tiny_folder(path, text_length=200)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder.from_folder(folder)


def clip(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8)


def make_scene(prompts: list[str], story: str = "story") -> Scene:
    shots = [Shot("", 0, i, i + 1, i, i + 1, [1, 8], prompt=p, sentence=f"{p} alone") for i, p in enumerate(prompts)]
    return Scene("s", "v", Source("v", "", 1), 8.0, 32, 32, 1.0, link_shots(shots, "s"), story=story)


def test_spans_first_and_last_frames(encoder: Encoder) -> None:
    spans = [clip(17), None, clip(5, 1), clip(17, 2)]
    results = encoder.encode_shots(spans, "float32")
    assert results[1] == {}
    assert results[0]["latent_mean"].shape == results[0]["latent_logvar"].shape == (4, 5, 4, 4)
    assert results[2]["latent_mean"].shape == (4, 2, 4, 4)
    for span, result in zip(spans, results, strict=True):
        if span is None:
            continue
        whole, _ = encoder.codec.encode(to_video([span]))
        last, logvar = encoder.codec.encode(to_video([span[-1:]]))
        assert torch.allclose(result["latent_mean"], whole[0], atol=1e-4)
        assert torch.allclose(result["last_mean"], last[0], atol=1e-4)
        assert torch.allclose(result["last_logvar"], logvar[0], atol=1e-4)
        assert torch.allclose(result["first_mean"], whole[0, :, :1], atol=1e-4)  # causal: nothing before it anyway


def test_only_spans_of_one_shape_share_a_call_of_the_vae(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = [clip(5)[:, :16], clip(5, 1), clip(9, 2)[:, :16], clip(5, 3)[:, :16]]
    alone = [encoder.encode_shots([span], "float32")[0] for span in spans]
    encode, shapes = encoder.codec.encode, []
    monkeypatch.setattr(encoder.codec, "encode", lambda video, tile: shapes.append(video.shape) or encode(video, tile))
    for together, one in zip(encoder.encode_shots(spans, "float32"), alone, strict=True):
        assert all(torch.allclose(together[name], one[name], atol=1e-5) for name in one)
    of_clips, of_frames = [s for s in shapes if s[2] > 1], [s for s in shapes if s[2] == 1]
    assert sorted((s[0], *s[2:]) for s in of_clips) == [(1, 5, 32, 32), (1, 9, 16, 32), (2, 5, 16, 32)]
    assert sorted((s[0], *s[3:]) for s in of_frames) == [(2, 16, 32), (2, 32, 32), (4, 16, 32)]
    shapes.clear()
    encoder.encode_shots(spans, "float32", tile=32)
    assert {s[0] for s in shapes} == {1}, "in tiles, a clip at a time"


def test_video_range() -> None:
    video = to_video([np.array([0, 255], np.uint8).repeat(24).reshape(1, 4, 4, 3)])
    assert video.shape == (1, 3, 1, 4, 4) and video.min() == -1 and video.max() == 1


def test_each_text_is_encoded_once(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = encoder.text.encode
    monkeypatch.setattr(encoder.text, "encode", lambda texts: seen.extend(texts) or encode(texts))
    scenes = [make_scene(["a", "b"]), make_scene(["a", "a"])]
    texts = encoder.encode_texts(scenes, "float16")
    assert sorted(seen) == ["a", "a alone", "b", "b alone", "story"]
    assert texts["story"].dtype == torch.float16 and texts["story"].shape == (6, 32)  # bytes and the end token
    assert set(scene_texts(scenes[0])) == {
        STORY_TEXT,
        "s000.text",
        "s000.sentence_text",
        "s001.text",
        "s001.sentence_text",
    }


def test_texts_longer_than_the_model_reads_are_refused_by_shot(encoder: Encoder) -> None:
    encoder.check_texts(make_scene(["p" * 99], story="s" * 99))
    with pytest.raises(Failed, match=r"shot 1 of s have 202 tokens \(story 101, prompt 101\), the model reads 200"):
        encoder.check_texts(make_scene(["p", "p" * 100], story="s" * 100))


def test_values_that_are_not_finite_are_refused(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = encoder.codec.encode
    monkeypatch.setattr(
        encoder.codec, "encode", lambda video, tile: (encode(video)[0] * float("nan"), encode(video)[1])
    )
    with pytest.raises(Failed, match="not finite for shot 1"):
        encoder.encode_shots([None, clip(5)], "float16")


def test_the_key_follows_the_weights_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert encoder_key(copy) == encoder_key(folder)
    weights = next((copy / "vae").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert encoder_key(copy) != encoder_key(folder)
    other = next((copy / "transformer").glob("*.safetensors"))
    other.write_bytes(b"")
    assert encoder_key(copy) == encoder_key(copy)  # the backbone does not encode
