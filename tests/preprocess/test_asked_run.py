"""Captions of a model through a whole run, without Ray: shards, recorded answers, scenes set aside, a local model."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from infra.chat import ChatEndpoint
from models.vision_chat import LocalVisionChat
from pipelines.captioner import CaptionerConfig, captioner_name, make_asker
from pipelines.dataset_card import write_card
from pipelines.states import StatesConfig
from preprocess import unit
from preprocess.answers import ANSWERS
from preprocess.asked import Asker
from preprocess.dataset import scenes_aside
from preprocess.encode import Encoder
from preprocess.rows import CaptionRow, decode_row, probe_row
from preprocess.run import plan_work
from preprocess.settings import PrepareSettings
from preprocess.sources import list_sources
from preprocess.unit import Unit, prepare_video
from preprocess.verify import verify
from tests.preprocess.chat_server import ChatServer, Reply, Request, chat_server, good, scene_answer
from tests.preprocess.runs import Predictor, count_calls, records, run_here
from tests.preprocess.tiny_qwen_vl import write_tiny_qwen_vl

# one shot per scene, so that the two videos are four scenes
SETTINGS = PrepareSettings(height=32, width=32, max_shots=1, captions="endpoint", caption_model="some-vlm")
SHARD = "shards/scenes-000000.tar"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    return count_calls(monkeypatch, (unit, "read_shots"), (Encoder, "encode_shots"))


def chat(server: ChatServer) -> ChatEndpoint:
    return ChatEndpoint(server.url, "some-vlm", pictures="JPEG", first_wait=0.0, timeout=20.0)


def aside(output: Path) -> dict[str, str]:
    return scenes_aside(*(pq.read_table(output / f"{name}.parquet").to_pylist() for name in ("sources", "manifest")))


def test_nothing_is_asked_twice_and_recorded_captions_give_the_same_bytes(
    videos: Path, tmp_path: Path, model: Path, calls: Counter[str]
) -> None:
    out, settings = tmp_path / "out", replace(SETTINGS, states_key="2 ")
    predictor = Predictor(2)
    with chat_server() as server:
        assert run_here(videos, out, model, settings, states=predictor, chat=chat(server))[1] == 2
        assert len(server.requests) == predictor.calls == 4 and verify(out).faults == []
        for scene, tensors in records(out).values():
            assert scene.captions is not None and scene.captions.backend == "endpoint"
            assert (scene.captions.model, scene.captions.states_key) == ("some-vlm", "2 ")
            assert scene.story.startswith("[Character] Character 1: a red circle. [Environment] ")
            assert scene.shots[0].entities == ["c1"] and len(scene.shots[0].predicted_states) == 2
            assert len(tensors["s000.text"]) == len(scene.shots[0].prompt.encode()) + 1
        assert {row["kind"] for row in pq.read_table(out / ANSWERS).to_pylist()} == {"captions", "states"}

        calls.clear()  # other texts of the same captions: answers are found without a decode
        assert run_here(videos, out, model, replace(settings, texts_apart=True), states=predictor, chat=chat(server))[1]
        assert not calls and len(server.requests) == predictor.calls == 4

    # nobody answers any more: another folder, with the recorded answers, gets the same bytes
    (tmp_path / "copy").mkdir()
    shutil.copy(out / ANSWERS, tmp_path / "copy" / ANSWERS)
    run_here(videos, tmp_path / "copy", model, replace(settings, texts_apart=True), states=predictor, chat=chat(server))
    assert predictor.calls == 4
    assert (tmp_path / "copy" / SHARD).read_bytes() == (out / SHARD).read_bytes()
    assert (tmp_path / "copy" / ANSWERS).read_bytes() == (out / ANSWERS).read_bytes()


def test_a_refused_scene_is_set_aside_alone_and_tried_again_where_asked(
    videos: Path, tmp_path: Path, model: Path
) -> None:
    out = tmp_path / "out"

    def reply(request: Request, number: int) -> Reply:
        return Reply(status=400, body=b"no") if number in (1, 2, 3) else good(request, number)

    with chat_server(reply) as server:
        run_here(videos, out, model, SETTINGS, chat=chat(server))
        sources = {row["name"]: row for row in pq.read_table(out / "sources.parquet").to_pylist()}
        ends = {name: (row["status"], row["stage"], row["scenes"]) for name, row in sources.items()}
        assert ends == {"toy0.mp4": ("written", "", 1), "toy1.mp4": ("failed", "captions", 0)}
        assert "all 2 scenes; the first: " in sources["toy1.mp4"]["reason"]
        assert "status 400: no" in sources["toy1.mp4"]["reason"]
        (reason,) = aside(out).values()
        assert reason.startswith("captions: ChatError") and "status 400: no" in reason
        assert json.loads((out / "dataset.json").read_text())["totals"]["set_aside_scenes"] == 1
        assert len(records(out)) == 1 and verify(out).faults == []

        page = write_card(out, tmp_path / "card.html").read_text()
        assert "1 scenes of videos that are written" in page and "status 400: no" in page

        assert run_here(videos, out, model, SETTINGS, chat=chat(server))[1] == 0
        assert len(server.requests) == 4, "a second run asks nothing again, also not what was refused"
        assert run_here(videos, out, model, SETTINGS, True, chat=chat(server))[1] == 2
        assert len(server.requests) == 7 and not aside(out) and len(records(out)) == 4
        assert verify(out).faults == []


def test_a_copy_of_a_video_that_was_refused_stays(videos: Path, tmp_path: Path, model: Path) -> None:
    """Nor does a scene that is set aside make a shot like it a duplicate: it is not in the dataset."""
    for suffix in ("mp4", "json"):
        shutil.copy(videos / f"toy0.{suffix}", videos / f"toy1.{suffix}")

    def reply(request: Request, number: int) -> Reply:
        return Reply(status=400, body=b"no") if number in refused else good(request, number)

    for refused, written in (({0, 1}, ["toy1.mp4", "toy1.mp4"]), ({0}, ["toy0.mp4", "toy1.mp4"])):
        out = tmp_path / f"out{len(refused)}"
        with chat_server(reply) as server:
            run_here(videos, out, model, SETTINGS, chat=chat(server))
        found = [scene.source.path for scene, _ in records(out).values()]
        assert found == written and verify(out).faults == []


def test_rows_in_many_threads_share_the_limit_and_give_the_same(videos: Path, tmp_path: Path, model: Path) -> None:
    """As Ray runs an actor with several calls at once."""
    meet = threading.Barrier(2, timeout=60)

    def reply(request: Request, number: int) -> Reply:
        if number < 4:
            meet.wait()
        return good(request, number)

    done: dict[str, list[str]] = {}
    with chat_server(reply) as server:
        for name in ("threads", "one"):
            work = plan_work(list_sources([videos]).files, tmp_path / name, SETTINGS, model)
            caption = CaptionRow(work.place, lambda: Asker(chat(server), None, 2))
            (manifest,) = [next(iter(work.rounds()))]
            rows = [decode_row(probe_row(row, work.place), work.place) for row in pq.read_table(manifest).to_pylist()]
            if name == "threads":
                with ThreadPoolExecutor(4) as pool:
                    captioned = list(pool.map(caption, rows))
                assert server.most_at_once == 2
            else:
                captioned = [caption(row) for row in rows]
            units = [Unit.from_json(row["unit"]) for row in captioned]
            assert [one.status for one in units] == ["", ""]
            done[name] = [scene.to_json() for one in units for scene in one.scenes]
    assert done["threads"] == done["one"] and len(done["one"]) == 4


def test_answers_survive_a_run_that_was_killed(videos: Path, tmp_path: Path, model: Path) -> None:
    with chat_server() as server:
        run_here(videos, tmp_path / "whole", model, SETTINGS, chat=chat(server))
        server.requests.clear()

        class Killed(BaseException):
            pass

        def write_part(*args):
            raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(unit, "write_part", write_part)
            with pytest.raises(Killed):
                run_here(videos, tmp_path / "out", model, SETTINGS, chat=chat(server))
        assert len(server.requests) == 2  # of the first video
        run_here(videos, tmp_path / "out", model, SETTINGS, chat=chat(server))
        assert len(server.requests) == 4
    assert (tmp_path / "out" / SHARD).read_bytes() == (tmp_path / "whole" / SHARD).read_bytes()


def test_captions_too_long_for_the_model_set_their_scene_aside(videos: Path, tmp_path: Path, model: Path) -> None:
    def reply(request: Request, number: int) -> Reply:
        answer = scene_answer(request)
        if number == 0:
            answer["environment"] = "meadow" * 300  # few words, many tokens
        return Reply(json.dumps(answer))

    with chat_server(reply) as server:
        run_here(videos, tmp_path / "out", model, SETTINGS, chat=chat(server))
    (reason,) = aside(tmp_path / "out").values()
    assert reason.startswith("encode: the texts of shot 0") and len(records(tmp_path / "out")) == 3
    assert verify(tmp_path / "out").faults == []


def test_a_qwen2_5_vl_folder_captions_a_video(videos: Path, tmp_path: Path, model: Path) -> None:
    """Built from its configuration, with weights that say one answer: folder, processor, pictures and generation."""
    answer = scene_answer(Request({"messages": [{"content": []}]}, {}, 0.0))
    shot = {
        "shot": 0, "entities": ["c1"], "prompt": "Wide shot. Character 1 moves.", "sentence": "A circle moves.",
        "camera": "static camera", "states": [{"text": "It moves.", "frame": 0}],
    }  # fmt: skip
    write_tiny_qwen_vl(tmp_path / "qwen", json.dumps(answer | {"shots": [shot]}))
    config = CaptionerConfig(model=str(tmp_path / "qwen"), max_tokens=4, frames=2)
    name = captioner_name("transformers", config)
    assert name.startswith("qwen@")
    asker = make_asker("transformers", config, StatesConfig())
    assert asker.side_by_side == 1 and asker.predictor is None and isinstance(asker.chat, LocalVisionChat)
    settings = replace(SETTINGS, captions="transformers", caption_model=name, caption_frames=2)
    run_here(videos, tmp_path / "out", model, settings, chat=asker.chat)
    found = [scene for scene, _ in records(tmp_path / "out").values()]
    assert len(found) == 4
    for scene in found:
        assert scene.captions is not None and scene.captions.backend == "transformers" and scene.captions.model == name
        assert scene.shots[0].prompt == "[SHOT CUT] Wide shot. Character 1 moves."

    pixels: list[int] = []
    generate = asker.chat.model.generate
    asker.chat.model.generate = lambda **inputs: pixels.append(len(inputs["image_grid_thw"])) or generate(**inputs)
    picture = np.zeros((32, 32, 3), np.uint8)
    asker.chat.chat([("user", ["a", picture, "b", picture]), ("assistant", ["x"]), ("user", ["again"])])
    assert pixels == [2]


def test_a_qwen_of_random_weights_sets_every_scene_aside(videos: Path, tmp_path: Path, model: Path) -> None:
    write_tiny_qwen_vl(tmp_path / "qwen")
    config = CaptionerConfig(model=str(tmp_path / "qwen"), max_tokens=4)
    asker = make_asker("transformers", config, StatesConfig())
    settings = replace(SETTINGS, captions="transformers", caption_model="q")
    part = prepare_video(
        list_sources([videos]).files[0], settings, Encoder.from_folder(model), tmp_path / "parts", asker=asker
    )
    assert (part.source["status"], part.source["stage"]) == ("failed", "captions")
    assert "no usable answer: it holds no JSON object" in part.source["reason"]
    assert "nor when asked to correct that" in part.source["reason"]
    assert isinstance(asker, Asker) and all(row["set_aside"] for row in part.shots)
