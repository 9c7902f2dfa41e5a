"""A vision chat server on the loopback: chat completions as OpenAI has them, with faults where a test asks."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

KEY = "sk-only-in-the-header"
_SHOT = re.compile(r"Shot (\d+) has (\d+) frames, [\d.]+ per second, and begins with a (\w+)\. Its frame 0:")


@dataclass
class Reply:
    """What the server answers: a model's words by default."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # in place of a chat completion
    delay: float = 0.0  # seconds before the answer
    drip: float = 0.0  # seconds between its bytes


@dataclass
class Request:
    """A request as it came, checked against the protocol."""

    body: dict[str, Any]
    headers: dict[str, str]
    at: float

    @property
    def parts(self) -> list[str | np.ndarray]:
        """What the first turn holds: texts, and the images of its data URLs."""
        return [
            part["text"] if part["type"] == "text" else _image(part["image_url"]["url"])
            for part in self.body["messages"][0]["content"]
        ]

    @property
    def shots(self) -> list[tuple[int, int]]:
        """(number, frames) of the shots that a scene's question is about."""
        texts = [part for part in self.parts if isinstance(part, str)]
        return [(int(found[1]), int(found[2])) for text in texts if (found := _SHOT.match(text))]


def scene_answer(request: Request) -> dict[str, Any]:
    """A good answer about the scene of a question."""
    return {
        "entities": [{"id": "c1", "description": "a red circle"}],
        "environment": "A meadow in daylight",
        "story": "Character 1 crosses the meadow.",
        "shots": [
            {
                "shot": number,
                "entities": ["c1"],
                "prompt": f"Wide shot. Character 1 moves, part {number}.",
                "sentence": f"A red circle moves over a meadow, part {number}.",
                "camera": "static camera",
                "states": [{"text": "It is left.", "frame": 0}, {"text": "It is right.", "frame": frames - 1}],
            }
            for number, frames in request.shots
        ],
    }


def good(request: Request, number: int) -> Reply:
    return Reply(json.dumps(scene_answer(request)))


@dataclass
class ChatServer:
    """`reply` is asked for the answer to a request; its second argument counts the requests from 0."""

    reply: Callable[[Request, int], Reply] = good
    requests: list[Request] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        request = Request(body, headers, time.monotonic())
        _check(request)
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            reply = self.reply(request, number)
            time.sleep(reply.delay)
        finally:
            with self._lock:
                self._now -= 1
        return reply


@contextlib.contextmanager
def chat_server(reply: Callable[[Request, int], Reply] = good) -> Iterator[ChatServer]:
    server = ChatServer(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            try:
                if self.path != "/v1/chat/completions":
                    raise ValueError(f"no such path: {self.path}")
                answer = server.take(json.loads(data), {k.lower(): v for k, v in self.headers.items()})
            except (KeyError, TypeError, ValueError, AssertionError) as error:
                answer = Reply(status=400, body=json.dumps({"error": {"message": repr(error)}}).encode())
            body = answer.body if answer.body is not None else _completion(answer.text)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(answer.status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for begin in range(0, len(body), 1 if answer.drip else len(body)):
                    self.wfile.write(body[begin : begin + 1] if answer.drip else body)
                    self.wfile.flush()
                    time.sleep(answer.drip)

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def _completion(text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    reply = {"id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return json.dumps(reply | {"usage": usage}).encode()


def _check(request: Request) -> None:
    """What a server of this protocol insists on."""
    body = request.body
    assert set(body) <= {"model", "temperature", "max_tokens", "messages", "response_format"}, sorted(body)
    assert isinstance(body["model"], str) and body["messages"][-1]["role"] == "user"
    for number, message in enumerate(body["messages"]):
        assert message["role"] == ("assistant" if number % 2 else "user")
        if message["role"] == "assistant":
            assert isinstance(message["content"], str)
            continue
        for part in message["content"]:
            if part["type"] == "text":
                assert set(part) == {"type", "text"}
            else:
                assert set(part) == {"type", "image_url"} and _image(part["image_url"]["url"]).ndim == 3
    if "response_format" in body:
        assert body["response_format"]["type"] == "json_schema"
        assert {"name", "schema"} <= set(body["response_format"]["json_schema"])


def _image(url: str) -> np.ndarray:
    head, _, data = url.partition(",")
    assert re.fullmatch(r"data:image/(png|jpeg);base64", head), head
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB"))
