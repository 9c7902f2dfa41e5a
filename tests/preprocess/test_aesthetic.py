"""The aesthetic score against open_clip and the head used by hand; shots under the threshold are not encoded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models.tiny import build_tiny_folder
from pipelines.aesthetic import AestheticConfig, make_scorer, scorer_key
from preprocess.aesthetic import AestheticScorer
from preprocess.encode import Encoder
from preprocess.filters import NO_FILTERS, FilterSettings, rule_of
from preprocess.parts import Part
from preprocess.settings import PrepareSettings
from preprocess.sources import list_sources
from preprocess.unit import prepare_video
from tests.preprocess.videos import pan, write

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip")
    torch.save(model.state_dict(), folder / "clip.pt")
    generator = torch.Generator().manual_seed(1)
    head = {"weight": torch.randn(1, 16, generator=generator), "bias": torch.tensor([5.0])}
    torch.save(head, folder / "head.pth")
    save_file(head, folder / "head.safetensors")
    save_file({"weight": head["weight"][:, :8].contiguous(), "bias": head["bias"]}, folder / "narrow.safetensors")
    return {path.name: path for path in folder.iterdir()}


def test_the_score_is_the_head_on_the_normalised_embedding(files: dict[str, Path]) -> None:
    frames = pan(count=3)
    scorer = AestheticScorer.from_files("tiny-clip", files["clip.pt"], files["head.pth"])
    model, _, transform = open_clip.create_model_and_transforms("tiny-clip", pretrained=str(files["clip.pt"]))
    head = torch.load(files["head.pth"], weights_only=True)
    with torch.no_grad():
        embedded = model.eval().encode_image(torch.stack([transform(Image.fromarray(frame)) for frame in frames]))
        embedded = embedded / embedded.norm(dim=-1, keepdim=True)
        expected = (embedded @ head["weight"][0] + 5.0).mean()
    assert abs(scorer(frames) - float(expected)) < 1e-3
    same = AestheticScorer.from_files("tiny-clip", files["clip.pt"], files["head.safetensors"])
    assert same(frames) == scorer(frames)


def test_the_published_head_opens(shared_data: Path) -> None:
    from preprocess.aesthetic import _load

    state = _load(shared_data / "weights" / "laion-aesthetic__sa_0_4_vit_b_32_linear.pth")
    assert {name: tuple(value.shape) for name, value in state.items()} == {"weight": (1, 512), "bias": (1,)}


def test_files_that_do_not_fit_are_refused_by_name(files: dict[str, Path], tmp_path: Path) -> None:
    clip, head = files["clip.pt"], files["head.pth"]
    for arguments, message in (
        (("tiny-clip", tmp_path / "no.pt", head), "aesthetic.clip=.*no.pt: no such file"),
        (("no-such-model", clip, head), "aesthetic.architecture=no-such-model"),
        (
            ("tiny-clip", clip, files["narrow.safetensors"]),
            r"weight is \[1, 8\], embeddings of tiny-clip need \[1,16\]",
        ),
        (("tiny-clip", clip, clip), "expected weight"),
        (("tiny-clip", head, head), "aesthetic.clip=.* holds no weights"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            AestheticScorer.from_files(*arguments)
    with pytest.raises(ValueError, match="go together"):
        AestheticConfig(clip=clip)
    assert make_scorer(AestheticConfig()) is None and scorer_key(AestheticConfig()) == ""


def test_shots_under_the_threshold_are_not_encoded(files: dict[str, Path], tmp_path: Path) -> None:
    build_tiny_folder(tmp_path / "model")
    scorer = AestheticScorer.from_files("tiny-clip", files["clip.pt"], files["head.pth"])
    encoder = Encoder.from_folder(tmp_path / "model", aesthetic=scorer)
    file = list_sources([write(tmp_path / "a.mp4", [*pan(1), *[255 - image for image in pan(2)]])]).files[0]

    def prepare(limit: float | None, name: str) -> Part:
        filters = FilterSettings(min_aesthetic=limit)
        settings = PrepareSettings(height=32, width=32, aesthetic_key="tiny", filters=filters)
        return prepare_video(file, settings, encoder, tmp_path / name)

    scores = [row["score_aesthetic"] for row in prepare(None, "all").shots]
    assert len(scores) == 2 and scores[0] != scores[1]
    worse = int(np.argmin(scores))
    part = prepare(float(np.mean(scores)), "some")
    assert [row["score_aesthetic"] for row in part.shots] == scores
    assert [rule_of(row["filtered"]) for row in part.shots] == ["aesthetic" if i == worse else "" for i in range(2)]
    assert [bool(row["encoded_frames"]) for row in part.shots] == [i != worse for i in range(2)]
    none = prepare(99.0, "none")
    assert (none.source["status"], none.source["stage"]) == ("filtered", "filters") and "2 aesthetic" in none.source[
        "reason"
    ]
    assert [row["score_aesthetic"] for row in none.shots] == scores


def test_what_other_filters_took_is_scored_too(files: dict[str, Path], tmp_path: Path) -> None:
    """As it is scored where it is kept; also where filters leave nothing of a video, which then is never encoded."""
    build_tiny_folder(tmp_path / "model")
    scorer = AestheticScorer.from_files("tiny-clip", files["clip.pt"], files["head.pth"])
    encoder = Encoder.from_folder(tmp_path / "model", aesthetic=scorer)
    still = [pan(2)[0]] * 17
    write(tmp_path / "videos" / "a.mp4", [*still, *pan(1), *pan(3)[:3]])
    shots = [{"start_frame": a, "end_frame": b, "prompt": "p"} for a, b in ((0, 17), (17, 34), (34, 37))]
    (tmp_path / "videos" / "a.json").write_text(json.dumps({"shots": shots}))
    write(tmp_path / "videos" / "b.mp4", still)
    (tmp_path / "videos" / "b.json").write_text(json.dumps({"shots": shots[:1]}))
    settings = PrepareSettings(
        height=32, width=32, aesthetic_key="tiny", cuts="captions", filters=FilterSettings(min_aesthetic=None)
    )
    for name, reasons in (("a.mp4", ["static", "", "too_short"]), ("b.mp4", ["static"])):
        (file,) = [one for one in list_sources([tmp_path / "videos"]).files if one.name == name]
        some = prepare_video(file, settings, encoder, tmp_path / "some")
        every = prepare_video(file, replace(settings, filters=NO_FILTERS), encoder, tmp_path / "all")
        assert [rule_of(row["filtered"]) for row in some.shots] == reasons
        assert [bool(row["encoded_frames"]) for row in some.shots] == [not reason for reason in reasons]
        scores = [row["score_aesthetic"] for row in some.shots]
        assert None not in scores and scores == [row["score_aesthetic"] for row in every.shots]
        assert [json.loads(row["scores"])["aesthetic"] for row in some.shots] == scores
        assert some.source["status"] == ("written" if "" in reasons else "filtered")
