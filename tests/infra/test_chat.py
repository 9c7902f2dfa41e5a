"""The chat endpoint: what goes over the wire, what is tried again, and what every failure says."""

from __future__ import annotations

import base64
import io
import json
from datetime import UTC, datetime, timedelta

import httpx
import numpy as np
import pytest
from PIL import Image

from infra.chat import ChatEndpoint, ChatError, retry_after

IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def endpoint(handler, **options) -> ChatEndpoint:
    options = {"first_wait": 0.0} | options
    return ChatEndpoint("http://localhost:9/v1/", "some-vlm", transport=httpx.MockTransport(handler), **options)


def answer(text: object) -> httpx.Response:
    return httpx.Response(200, json={"choices": [{"message": {"content": text}}]})


def test_a_question_with_images_goes_out_as_openai_has_it() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return answer("two states")

    assert endpoint(handler, api_key="secret")([IMAGE, IMAGE], "Which states?") == "two states"
    assert str(seen[0].url) == "http://localhost:9/v1/chat/completions"
    assert seen[0].headers["authorization"] == "Bearer secret"
    body = json.loads(seen[0].content)
    assert body["model"] == "some-vlm" and body["temperature"] == 0
    *pictures, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "Which states?"} and len(pictures) == 2
    data = base64.b64decode(pictures[0]["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), IMAGE)


def test_a_busy_server_is_asked_again() -> None:
    replies = iter([httpx.Response(503), httpx.Response(429, headers={"retry-after": "0"}), answer("now")])
    assert endpoint(lambda request: next(replies))([IMAGE], "?") == "now"


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 507, 520, 522, 524, 529, 599])
def test_what_may_pass_is_tried_again(status: int) -> None:
    """529: overloaded; 520 to 527: a proxy in front of the server lost it."""
    replies = iter([httpx.Response(status), answer("now")])
    assert endpoint(lambda request: next(replies))([IMAGE], "?") == "now"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 501, 505])
def test_what_stays_so_is_not_tried_again(status: int) -> None:
    replies = iter([httpx.Response(status, text="no")])
    with pytest.raises(ChatError, match=f"status {status}: no"):
        endpoint(lambda request: next(replies))([IMAGE], "?")


def test_retry_after_is_seconds_or_a_date() -> None:
    soon = (datetime.now(UTC) + timedelta(seconds=60)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    assert 50 < retry_after(soon) <= 60 and retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert [retry_after(value) for value in ("7", "1.5", "", "soon", "-3", "nan")] == [7.0, 1.5, 0.0, 0.0, 0.0, 0.0]


def test_a_conversation_keeps_its_order_and_its_turns() -> None:
    seen: list[dict] = []
    ask = endpoint(lambda request: seen.append(json.loads(request.content)) or answer("ok"), pictures="JPEG")
    assert ask.chat([("user", ["one", IMAGE, "two"]), ("assistant", ["said"]), ("user", ["again"])]) == "ok"
    first, said, again = seen[0]["messages"]
    assert [part["type"] for part in first["content"]] == ["text", "image_url", "text"]
    assert first["content"][1]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert said == {"role": "assistant", "content": "said"} and again["content"][0]["text"] == "again"
    assert "response_format" not in seen[0]


def test_an_unreachable_server_is_given_up_with_its_address() -> None:
    tried = []

    def handler(request: httpx.Request) -> httpx.Response:
        tried.append(request)
        raise httpx.ConnectError("refused")

    with pytest.raises(ChatError, match=r"http://localhost:9/v1/chat/completions: no answer in 3 attempts.*refused"):
        endpoint(handler, attempts=3)([IMAGE], "?")
    assert len(tried) == 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (httpx.Response(400, text="image too large"), "status 400: image too large"),
        (httpx.Response(200, text="<html>"), "not a chat completion"),
        (httpx.Response(200, json={"choices": []}), "not a chat completion"),
        (answer(None), "the answer is empty"),
        (answer(" "), "the answer is empty"),
    ],
)
def test_a_refusal_is_not_tried_again(reply: httpx.Response, message: str) -> None:
    tried = []
    with pytest.raises(ChatError, match=message):
        endpoint(lambda request: tried.append(request) or reply)([IMAGE], "?")
    assert len(tried) == 1


def test_a_bad_address_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="expected one like http://HOST:PORT/v1"):
        ChatEndpoint("localhost:8000", "m")
