"""A vision chat model from a local transformers folder: images and a question in, an answer out."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

# (role, texts and images uint8 [H,W,3] in the order in which they are read); roles are user and assistant
Turn = tuple[str, Sequence[str | np.ndarray]]


class LocalVisionChat:
    """Any folder that transformers' AutoModelForImageTextToText and AutoProcessor open, such as a LLaVA or a Qwen-VL.

    Decoding is greedy, so that equal questions are answered alike. Raises FileNotFoundError for a folder without
    config.json, and whatever transformers says of one it does not know.
    """

    def __init__(
        self,
        folder: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_tokens: int = 512,  # of the answer
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder / 'config.json'} is missing: {folder} is no transformers model folder")
        self.processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=dtype
        )
        self.model, self.max_tokens = model.to(device).eval(), max_tokens
        self._lock = threading.Lock()  # one question at a time, whoever asks

    def __call__(self, images: Sequence[np.ndarray], question: str) -> str:
        """The answer to a question about images uint8 [H,W,3]."""
        return self.chat([("user", [*images, question])])

    @torch.no_grad()
    def chat(self, turns: Sequence[Turn]) -> str:
        """The next answer in a conversation that ends with a turn of the user."""
        messages = [{"role": role, "content": [_content(part) for part in parts]} for role, parts in turns]
        with self._lock:
            return self._generate(messages)

    def _generate(self, messages: list[dict[str, Any]]) -> str:
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_tokens)
        return self.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _content(part: str | np.ndarray) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "image": Image.fromarray(part)}
