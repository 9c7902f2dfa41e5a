"""A vision chat model behind an OpenAI-compatible endpoint, such as vLLM's: images and a question in, an answer out."""

from __future__ import annotations

import base64
import io
import random
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpx
import numpy as np
from PIL import Image

# as OpenAI's own client tries again, and 425 (too early); of 5xx two say what will not change: 501, 505
RETRIED = {408, 409, 425, 429, *range(500, 600)} - {501, 505}
LONGEST_WAIT = 30.0  # seconds between two attempts
LONGEST_ASKED = 300.0  # seconds that a server may ask for by Retry-After
LARGEST_ANSWER = 2**24  # bytes

# (role, texts and images uint8 [H,W,3] in the order in which they are read); roles are user and assistant
Turn = tuple[str, Sequence[str | np.ndarray]]


class ChatError(RuntimeError):
    """The endpoint gave no answer; the message holds its address and what it said."""


class ChatEndpoint:
    """Asks `url`/chat/completions for the answer of `model`; temperature 0, so that equal questions are answered alike.

    What a busy or unreachable server fails is tried `attempts` times, after 1, 2, 4, ... seconds or as long as its
    Retry-After says; what the server refuses is not tried again. Raises ChatError. May be asked by several threads at
    once.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str = "",
        timeout: float = 120.0,  # seconds, of one attempt
        attempts: int = 4,
        max_tokens: int = 512,  # of the answer
        first_wait: float = 1.0,  # seconds
        pictures: Literal["PNG", "JPEG"] = "PNG",  # how images travel
        answer_form: dict[str, Any] | None = None,  # `response_format` of the request; None: free text
        transport: httpx.BaseTransport | None = None,  # None: the network
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint url is {url!r}, expected one like http://HOST:PORT/v1")
        if not model or attempts < 1:
            raise ValueError(f"endpoint model is {model!r}, attempts is {attempts}; give a name and at least 1")
        self.url, self.model = f"{url.rstrip('/')}/chat/completions", model
        self.attempts, self.max_tokens, self.first_wait = attempts, max_tokens, first_wait
        self.timeout, self.pictures, self.answer_form = timeout, pictures, answer_form
        self._key = api_key
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)  # who asks bounds how many at once
        self._client = httpx.Client(timeout=timeout, headers=headers, transport=transport, limits=limits)

    def __call__(self, images: Sequence[np.ndarray], question: str) -> str:
        """The answer to a question about images uint8 [H,W,3]."""
        return self.chat([("user", [*images, question])])

    def chat(self, turns: Sequence[Turn]) -> str:
        """The next answer in a conversation that ends with a turn of the user."""
        request = self._request(turns)
        failure, asked = "", 0.0
        for attempt in range(self.attempts):
            if attempt:
                backoff = min(self.first_wait * 2 ** (attempt - 1), LONGEST_WAIT)
                # those that were turned away together do not come back together
                time.sleep(max(backoff, min(asked, LONGEST_ASKED)) + random.uniform(0.0, 0.25 * backoff))
            asked = 0.0
            try:
                response = self._post(request)
            except httpx.TransportError as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            if response.is_success:
                return self._answer(response)
            failure = f"status {response.status_code}: {self._said(response)}"
            if response.status_code not in RETRIED:
                raise ChatError(f"{self.url}: {failure}")
            asked = retry_after(response.headers.get("retry-after", ""))
        raise ChatError(f"{self.url}: no answer in {self.attempts} attempts; the last: {failure}")

    def _request(self, turns: Sequence[Turn]) -> dict[str, Any]:
        form = {"response_format": self.answer_form} if self.answer_form is not None else {}
        return {
            "model": self.model,
            "temperature": 0,
            "max_tokens": self.max_tokens,
            **form,
            "messages": [{"role": role, "content": self._content(role, parts)} for role, parts in turns],
        }

    def _content(self, role: str, parts: Sequence[str | np.ndarray]) -> str | list[dict[str, Any]]:
        if role != "user":  # not all servers take a list for what the model said
            return "".join(part for part in parts if isinstance(part, str))
        return [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": data_url(part, self.pictures)}}
            for part in parts
        ]

    def _post(self, request: dict[str, Any]) -> httpx.Response:
        """One attempt. The time limit holds for the whole of it, also where a server sends byte after byte."""
        deadline = time.monotonic() + self.timeout
        with self._client.stream("POST", self.url, json=request) as response:
            body = bytearray()
            for chunk in response.iter_bytes():
                body += chunk
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout(f"the answer was not whole after {self.timeout:g} s")
                if len(body) > LARGEST_ANSWER:
                    raise ChatError(f"{self.url}: the answer is longer than {LARGEST_ANSWER} bytes")
        headers = {name: value for name, value in response.headers.items() if name in ("content-type", "retry-after")}
        return httpx.Response(response.status_code, headers=headers, content=bytes(body))

    def _answer(self, response: httpx.Response) -> str:
        try:
            answer = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise ChatError(f"{self.url}: not a chat completion: {self._said(response)}") from error
        if not isinstance(answer, str) or not answer.strip():
            raise ChatError(f"{self.url}: the answer is empty: {self._said(response)}")
        return answer

    def _said(self, response: httpx.Response) -> str:
        """The begin of a response, for people; some servers quote the key that they refuse."""
        return (response.text.replace(self._key, "***") if self._key else response.text)[:500]


def retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for, which holds seconds or a date (RFC 9110); 0 for none."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def data_url(image: np.ndarray, pictures: Literal["PNG", "JPEG"] = "PNG") -> str:
    """An image uint8 [H,W,3] in a data URL."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, pictures, **({"quality": 92} if pictures == "JPEG" else {}))
    return f"data:image/{pictures.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
