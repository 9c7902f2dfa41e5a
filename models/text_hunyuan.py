"""HunyuanVideo's two text encoders, as one: a LLaMA behind a prompt template, and the pooled text of a CLIP.

L text tokens, D width of the LLaMA, P width of the CLIP.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor, nn

from models.text import TextEncoder, TextStyle, encode_distinct, stored_weights, weights_hash

TEMPLATE = str(DEFAULT_PROMPT_TEMPLATE["template"])
CROP = int(str(DEFAULT_PROMPT_TEMPLATE["crop_start"]))  # tokens of the template before the text, which are not read
LAYERS_SKIPPED = 2  # the features are those before the last two layers
CLIP_TOKENS = 77


class HunyuanTextEncoder(TextEncoder):
    """Encodes as HunyuanVideoPipeline does: a text has L rows of the LLaMA behind one of the CLIP's pooled text.

    The pooled text [P] fills its row of D with zeros; `models.text.unpack_pooled` takes the two apart again.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: nn.Module,  # LlamaModel
        tokenizer_2: Any,
        model_2: nn.Module,  # CLIPTextModel
        max_length: int = 257,  # rows
        folder: Path | None = None,  # the model folder, when the weights were read from one
    ) -> None:
        super().__init__(tokenizer, model, max_length, folder, TextStyle(pooled=True))
        self.tokenizer_2, self.model_2 = tokenizer_2, model_2.eval().requires_grad_(False)
        if self.pooled_dim > self.dim:
            raise ValueError(f"the CLIP is {self.pooled_dim} wide, the LLaMA {self.dim}: its pooled text fits no row")

    @staticmethod
    def from_folder(  # type: ignore[override]  # of one style
        path: Path | str,
        max_length: int = 257,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> HunyuanTextEncoder:
        """Reads `tokenizer/`, `text_encoder/`, `tokenizer_2/` and `text_encoder_2/` of a model folder."""
        from transformers import AutoTokenizer, CLIPTextModel, LlamaModel

        path = Path(path)
        found: list[Any] = []
        for suffix, kind, model_class in (("", "llama", LlamaModel), ("_2", "clip_text_model", CLIPTextModel)):
            folder = path / f"text_encoder{suffix}"
            if not (config := folder / "config.json").is_file():
                raise FileNotFoundError(f"{config} is missing: a HunyuanVideo keeps two text encoders")
            if (read := json.loads(config.read_text())["model_type"]) != kind:
                raise ValueError(f"{config}: model_type is {read!r}, supported is {kind}")
            tokenizer = AutoTokenizer.from_pretrained(path / f"tokenizer{suffix}", local_files_only=True)
            model: Any = model_class.from_pretrained(folder, local_files_only=True, dtype=dtype)
            found += [tokenizer, model.to(device)]
        tokenizer, llama, tokenizer_2, clip = found
        return HunyuanTextEncoder(tokenizer, llama, tokenizer_2, clip, max_length, path)

    @property
    def dim(self) -> int:
        return int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @property
    def pooled_dim(self) -> int:
        return int(self.model_2.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @property
    def modules_by_folder(self) -> dict[str, Any]:
        return super().modules_by_folder | {"text_encoder_2": self.model_2, "tokenizer_2": self.tokenizer_2}

    @cached_property
    def hash(self) -> str:
        """SHA-256 over both encoders' weights and what the texts are put into."""
        digests = []
        for name, model in (("text_encoder", self.model), ("text_encoder_2", self.model_2)):
            weights: Iterable[tuple[str, Tensor]] = (
                stored_weights(self._folder / name) if self._folder else sorted(model.state_dict().items())
            )
            digests.append(weights_hash(weights, {"template": TEMPLATE, "crop": CROP, "skip": LAYERS_SKIPPED}))
        return weights_hash((), {"encoders": digests, "tokenizer": type(self.tokenizer).__name__})

    def num_tokens(self, text: str) -> int:
        """Rows of a text, the pooled one among them."""
        return 1 + len(self._ids(text)) - CROP

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """One embedding [1+L_i,D] per text, float32 on the CPU: the pooled text, then the valid tokens.

        Texts of more than `max_length` rows are cut, counted in `truncated`, and warned about.
        """
        done, cut = encode_distinct(texts, self._encode_one, self.max_length)
        self.truncated += cut
        return done

    def _encode_one(self, text: str) -> tuple[Tensor, bool]:
        """The embedding of a text, and whether it was cut."""
        device = next(self.model.parameters()).device
        ids, most = self._ids(text), self.max_length - 1 + CROP
        features = self.model(torch.tensor([ids[:most]], device=device), output_hidden_states=True)
        tokens = features.hidden_states[-(LAYERS_SKIPPED + 1)][0, CROP:].float().cpu()
        words = self.tokenizer_2(
            text, padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
        )
        pooled = self.model_2(words.input_ids.to(device)).pooler_output.float().cpu()
        return torch.cat([torch.nn.functional.pad(pooled, (0, self.dim - self.pooled_dim)), tokens]), len(ids) > most

    def _ids(self, text: str) -> list[int]:
        """Tokens of the template with the text in it."""
        ids: list[int] = self.tokenizer(TEMPLATE.format(text), verbose=False).input_ids
        if len(ids) <= CROP:
            raise ValueError(
                f"the tokenizer makes {len(ids)} tokens of prompt template and text, and the first {CROP} are cut: "
                "tokenizer/ is not HunyuanVideo's"
            )
        return ids
