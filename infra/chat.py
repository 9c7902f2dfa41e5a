"""A vision chat model behind an OpenAI-compatible endpoint, such as vLLM's: images and a question in, an answer out."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence

import httpx
import numpy as np
from PIL import Image

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
LONGEST_WAIT = 30.0  # seconds between two attempts


class ChatError(RuntimeError):
    """The endpoint gave no answer; the message holds its address and what it said."""


class ChatEndpoint:
    """Asks `url`/chat/completions for the answer of `model`; temperature 0, so that equal questions are answered alike.

    What a busy or unreachable server fails is tried `attempts` times, after 1, 2, 4, ... seconds or as long as its
    Retry-After says; what the server refuses is not tried again. Raises ChatError.
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
        transport: httpx.BaseTransport | None = None,  # None: the network
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint url is {url!r}, expected one like http://HOST:PORT/v1")
        if not model or attempts < 1:
            raise ValueError(f"endpoint model is {model!r}, attempts is {attempts}; give a name and at least 1")
        self.url, self.model = f"{url.rstrip('/')}/chat/completions", model
        self.attempts, self.max_tokens, self.first_wait = attempts, max_tokens, first_wait
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(timeout=timeout, headers=headers, transport=transport)

    def __call__(self, images: Sequence[np.ndarray], question: str) -> str:
        """The answer to a question about images uint8 [H,W,3]."""
        pictures = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
        request = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}],
        }
        failure, asked = "", 0.0
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(max(self.first_wait * 2 ** (attempt - 1), asked), LONGEST_WAIT))
            asked = 0.0
            try:
                response = self._client.post(self.url, json=request)
            except httpx.TransportError as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            if response.is_success:
                return self._answer(response)
            failure = f"status {response.status_code}: {response.text[:500]}"
            if response.status_code not in RETRIED:
                raise ChatError(f"{self.url}: {failure}")
            wait = response.headers.get("retry-after", "")
            asked = float(wait) if wait.isdigit() else 0.0
        raise ChatError(f"{self.url}: no answer in {self.attempts} attempts; the last: {failure}")

    def _answer(self, response: httpx.Response) -> str:
        try:
            answer = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise ChatError(f"{self.url}: not a chat completion: {response.text[:500]}") from error
        if not isinstance(answer, str) or not answer.strip():
            raise ChatError(f"{self.url}: the answer is empty: {response.text[:500]}")
        return answer


def data_url(image: np.ndarray) -> str:
    """An image uint8 [H,W,3] as a PNG in a data URL."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
