"""Who is asked for captions, by config: what each backend needs, names that tell models apart, keys that stay out."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.chat import ChatEndpoint
from pipelines.captioner import CaptionerConfig, api_key, asks, captioner_name, make_asker
from pipelines.prepare import PrepareConfig
from pipelines.states import StatesConfig
from preprocess.scene_question import answer_form

ENDPOINT = {"url": "http://localhost:9/v1", "model": "some-vlm"}


@pytest.mark.parametrize(
    ("backend", "given", "message"),
    [
        ("endpoint", {"model": "m"}, "captions=endpoint needs captioner.url"),
        ("endpoint", {}, "captions=endpoint needs captioner.url and captioner.model"),
        ("transformers", {}, "captions=transformers needs captioner.model"),
        ("describe", {"side_by_side": 0}, "captioner.side_by_side=0 must be at least 1"),
        ("describe", {"timeout": 0.0}, "captioner.timeout=0.0 must be positive"),
        ("endpoint", {"url": "http://me:secret@host/v1"}, "give the key in the environment variable"),
        ("endpoint", {"url": "http://host/v1?key=secret"}, "give the key in the environment variable"),
    ],
)
def test_what_is_missing_is_told_by_key(tmp_path: Path, backend: str, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        PrepareConfig(
            sources=["v"], output=tmp_path, model=tmp_path, captions=backend, captioner=CaptionerConfig(**given)
        )  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


def test_the_key_comes_from_the_variable_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CaptionerConfig(**ENDPOINT, api_key_env="MY_VLM_KEY", side_by_side=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="captioner.api_key_env=MY_VLM_KEY: this environment variable is not set"):
        make_asker("endpoint", config, StatesConfig())
    monkeypatch.setenv("MY_VLM_KEY", "secret")
    assert api_key(config) == "secret" and "secret" not in repr(config)
    asker = make_asker("endpoint", config, StatesConfig())
    assert isinstance(asker.chat, ChatEndpoint) and asker.chat.model == "some-vlm" and asker.side_by_side == 3
    assert asker.chat.answer_form == answer_form() and asker.chat.pictures == "JPEG" and asker.predictor is None
    assert api_key(CaptionerConfig()) == ""
    config.send_schema = False
    asker = make_asker("endpoint", config, StatesConfig())
    assert isinstance(asker.chat, ChatEndpoint) and asker.chat.answer_form is None


def test_states_are_asked_side_by_side_too_and_of_whom_they_are_asked() -> None:
    nobody, toyworld = StatesConfig(), StatesConfig(backend="toyworld")
    remote = StatesConfig(backend="endpoint", url="http://localhost:9/v1", model="m")
    assert [asks("describe", one) for one in (nobody, toyworld, remote)] == [False, True, True]
    assert asks("endpoint", nobody) and asks("transformers", nobody) and not asks("sidecar", nobody)
    asker = make_asker("describe", CaptionerConfig(), remote)
    assert asker.chat is None and asker.predictor is not None and asker.side_by_side == 16
    assert make_asker("describe", CaptionerConfig(), toyworld).side_by_side == 1


def test_a_folder_is_called_by_its_name_and_what_lies_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "qwen"
    config = CaptionerConfig(model=str(folder))
    with pytest.raises(FileNotFoundError, match="no transformers model folder"):
        captioner_name("transformers", config)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"1234")
    first = captioner_name("transformers", config)
    assert first.startswith("qwen@") and first == captioner_name("transformers", config)
    (folder / "config.json").write_text('{"a": 1}')
    second = captioner_name("transformers", config)
    (folder / "model.safetensors").write_bytes(b"12345")
    assert len({first, second, captioner_name("transformers", config)}) == 3
    assert captioner_name("endpoint", CaptionerConfig(**ENDPOINT)) == "some-vlm"  # type: ignore[arg-type]
    assert captioner_name("describe", config) == ""
