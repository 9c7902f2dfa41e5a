"""Text for the backbone: encode prompts, pack them into contexts, and say which frames read which context.

B batch, G text groups, L text tokens, D width of the text, F latent frames. A context is a fixed number of tokens,
which a backbone reads without a mask. Wan and Latte have zeros after the valid tokens, so several texts make a context
one after another. CogVideoX reads the padding, too, which the encoder has seen: its context is one text, padded before
it was encoded, and several texts are first joined (`TextStyle.padded`). HunyuanVideo reads one text, too, by two
encoders: its context is the pooled text of one as the first row, then the tokens of the other (`TextStyle.pooled`).
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn


@dataclass(frozen=True)
class TextContext:
    """Contexts of a batch: embeddings [B,G,L,D], and the group that each latent frame reads, long [F].

    Backbones with a text mask and a pooled text (HunyuanVideo) read `lengths` and `pooled`, others neither.
    """

    embeddings: Tensor
    frame_text: Tensor
    lengths: Tensor | None = None  # long [B,G], on the CPU: valid tokens of each context, its first; None: all L
    pooled: Tensor | None = None  # [B,G,P]: one vector per context

    def __post_init__(self) -> None:
        groups = self.embeddings.shape[1] if self.embeddings.ndim == 4 else 0
        if not groups or self.frame_text.ndim != 1:
            raise ValueError(
                f"text embeddings have shape {tuple(self.embeddings.shape)} and frame_text "
                f"{tuple(self.frame_text.shape)}, expected [B,G,L,D] and [F]"
            )
        batch, _, tokens, _ = self.embeddings.shape
        if self.pooled is not None and (self.pooled.ndim != 3 or self.pooled.shape[:2] != (batch, groups)):
            raise ValueError(f"pooled text has shape {tuple(self.pooled.shape)}, expected [{batch},{groups},P]")
        if self.lengths is not None:
            if self.lengths.shape != (batch, groups):
                raise ValueError(f"text lengths have shape {tuple(self.lengths.shape)}, expected [{batch},{groups}]")
            if int(self.lengths.min()) < 1 or int(self.lengths.max()) > tokens:
                raise ValueError(f"text lengths are {self.lengths.tolist()}, expected 1 to {tokens} tokens each")

    def to(self, device: torch.device, dtype: torch.dtype | None = None, non_blocking: bool = False) -> TextContext:
        """The vectors on a device; which frame reads which text stays on the CPU, because backbones decide by it."""
        return replace(
            self,
            embeddings=self.embeddings.to(device, dtype, non_blocking=non_blocking),
            pooled=None if self.pooled is None else self.pooled.to(device, dtype, non_blocking=non_blocking),
        )

    def samples(self, order: Sequence[int]) -> TextContext:
        """The contexts of the samples in `order`."""
        rows = list(order)
        return replace(
            self,
            embeddings=self.embeddings[rows],
            lengths=None if self.lengths is None else self.lengths[rows],
            pooled=None if self.pooled is None else self.pooled[rows],
        )


def stack_samples(contexts: Sequence[TextContext]) -> TextContext:
    """The samples of several batches as one batch, all of which read by the same frames; ValueError if they differ."""
    first = contexts[0]
    for name in ("lengths", "pooled"):
        if len({getattr(context, name) is None for context in contexts}) > 1:
            raise ValueError(f"some texts have {name}, some have not: give it with all or with none")
    return TextContext(
        torch.cat([context.embeddings for context in contexts]),
        first.frame_text,
        None if first.lengths is None else torch.cat([context.lengths for context in contexts]),  # type: ignore[misc]
        None if first.pooled is None else torch.cat([context.pooled for context in contexts]),  # type: ignore[misc]
    )


@dataclass(frozen=True)
class TextStyle:
    """What a family of models does with a text before its backbone reads it; the default is Wan's way."""

    padded: bool = False  # tokens are padded to `max_length`, encoded without a mask, and all are read (CogVideoX)
    lowercase: bool = False  # Latte
    pooled: bool = False  # a second encoder's pooled text, filled up with zeros, is the first row (HunyuanVideo)

    @property
    def joined(self) -> bool:
        """Whether several texts are joined to one before it is encoded."""
        return self.padded or self.pooled


class TextEncoder:
    """A tokenizer and a T5, UMT5 or CLIP text encoder.

    Each text is encoded alone: an embedding never depends on what else is in the batch.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: nn.Module,
        max_length: int = 512,
        folder: Path | None = None,
        style: TextStyle | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.style = style or TextStyle()
        self.model = model.eval().requires_grad_(False)
        self.max_length = max_length  # tokens; longer texts are cut
        self.truncated = 0  # texts cut so far
        self._folder = folder  # of the weights, when they were read from files

    @staticmethod
    def from_folder(
        path: Path | str,
        max_length: int = 512,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        style: TextStyle | None = None,
    ) -> TextEncoder:
        """Reads `tokenizer/` and `text_encoder/` of a model folder."""
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel, UMT5EncoderModel

        path = Path(path)
        config = path / "text_encoder" / "config.json"
        if not config.is_file():
            raise FileNotFoundError(f"{config} is missing: a model folder keeps its text encoder there")
        kind = json.loads(config.read_text())["model_type"]
        classes: dict[str, Any] = {"t5": T5EncoderModel, "umt5": UMT5EncoderModel, "clip_text_model": CLIPTextModel}
        if kind not in classes:
            raise ValueError(f"{config}: model_type is {kind!r}, supported are {', '.join(classes)}")
        tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer", local_files_only=True)
        model = classes[kind].from_pretrained(path / "text_encoder", local_files_only=True, dtype=dtype)
        if kind == "clip_text_model":  # it has a table of positions
            max_length = min(max_length, model.config.max_position_embeddings)
        return TextEncoder(tokenizer, model.to(device), max_length, path / "text_encoder", style)

    @property
    def dim(self) -> int:
        return text_width(self.model.config.to_dict())  # type: ignore[union-attr, operator]

    @property
    def modules_by_folder(self) -> dict[str, Any]:
        """Encoders and tokenizers, by the folder of a model folder that each lies in."""
        return {"text_encoder": self.model, "tokenizer": self.tokenizer}

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the weights as on disk, whatever type they were loaded in, tokenizer's name and style."""
        weights = stored_weights(self._folder) if self._folder else sorted(self.model.state_dict().items())
        config: dict[str, Any] = {"tokenizer": type(self.tokenizer).__name__}
        if self.style.padded:
            config["padded_to"] = self.max_length
        if self.style.lowercase:
            config["lowercase"] = True
        return weights_hash(weights, config)

    def parts(self, texts: Sequence[str]) -> list[str]:
        """The strings that a context of these texts is encoded from: each alone, or all as one (`TextStyle.joined`)."""
        return [" ".join(text for text in texts if text)] if self.style.joined else list(texts)

    def num_tokens(self, text: str) -> int:
        """Valid tokens of a text, with its end token."""
        return len(self.tokenizer(self._clean(text), verbose=False).input_ids)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """One embedding [L_i,D] per text, float32 on the CPU, valid tokens only; L_i >= 1 (an empty text's end token).

        With a padded style L_i is `max_length` and the rows are those of the padding, too. Texts of more than
        `max_length` tokens are cut, counted in `truncated`, and warned about.
        """
        done, cut = encode_distinct(texts, self._encode_one, self.max_length)
        self.truncated += cut
        return done

    def _encode_one(self, text: str) -> tuple[Tensor, bool]:
        """The embedding of a text, and whether it was cut."""
        ids = self.tokenizer(self._clean(text), return_tensors="pt", verbose=False).input_ids
        cut = ids.shape[1] > self.max_length
        if cut:
            ids = torch.cat([ids[:, : self.max_length - 1], ids[:, -1:]], dim=1)  # the end token stays
        if self.style.padded:
            missing = self.max_length - ids.shape[1]
            ids = torch.nn.functional.pad(ids, (0, missing), value=self.tokenizer.pad_token_id)
        device = next(self.model.parameters()).device
        return self.model(ids.to(device)).last_hidden_state[0].float().cpu(), cut

    def _clean(self, text: str) -> str:
        text = clean_prompt(text)
        return text.lower() if self.style.lowercase else text


def encode_distinct(
    texts: Sequence[str], encode_one: Callable[[str], tuple[Tensor, bool]], max_length: int
) -> tuple[list[Tensor], int]:
    """One embedding per text, each distinct one made once, and how many of these were cut, with a warning."""
    done = {text: encode_one(text) for text in dict.fromkeys(texts)}
    cut = sum(was_cut for _, was_cut in done.values())
    if cut:
        warnings.warn(f"{cut} of {len(done)} texts have over {max_length} tokens and were cut", stacklevel=3)
    return [done[text][0] for text in texts], cut


def text_width(config: Mapping[str, Any]) -> int:
    """Width of the embeddings that a text encoder of this configuration makes: a T5 calls it d_model, a CLIP not."""
    return int(config["d_model"] if "d_model" in config else config["hidden_size"])


def null_text(encoder: TextEncoder, length: int) -> Tensor:
    """The context of "no text", [length,D]: the packed encoding of the empty string, as the models' pipelines do."""
    return pack_text(encoder.encode([""]), length)


def clean_prompt(text: str) -> str:
    """Undo HTML escapes and join runs of white space, as WanPipeline does."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def pack_text(embeddings: Sequence[Tensor], length: int) -> Tensor:
    """One context [length,D] from the valid tokens of several texts [L_i,D], in order, zeros at the end.

    Raises ValueError naming the lengths when they do not fit.
    """
    tokens = torch.cat(list(embeddings))
    if len(tokens) > length:
        parts = " + ".join(str(len(e)) for e in embeddings)
        raise ValueError(
            f"texts of {parts} = {len(tokens)} tokens do not fit a context of {length}: shorten them, or use a model "
            "with a larger text_length"
        )
    return torch.nn.functional.pad(tokens, (0, 0, 0, length - len(tokens)))


def unpack_pooled(context: TextContext, width: int) -> TextContext:
    """Contexts whose first row is a pooled text, `width` numbers wide, with zeros after the valid tokens, taken apart.

    Embeddings [B,G,1+L,D] become [B,G,L,D] with `lengths` and `pooled` [B,G,width].
    """
    tokens = context.embeddings[:, :, 1:]
    places = torch.arange(1, tokens.shape[2] + 1, device=tokens.device)
    lengths = ((tokens != 0).any(dim=3) * places).amax(dim=2)
    return replace(context, embeddings=tokens, lengths=lengths.cpu(), pooled=context.embeddings[:, :, 0, :width])


def weights_hash(weights: Iterable[tuple[str, Tensor]], config: dict[str, Any]) -> str:
    """SHA-256 over tensors (name, type, shape, bytes) in the order given and over the public fields of a config."""
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode())
    for name, tensor in weights:
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def stored_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a folder's safetensors files in order of name, one in memory at a time."""
    files = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
    found = sorted((name, i) for i, file in enumerate(files) for name in file.keys())  # noqa: SIM118
    for name, i in found:
        yield name, files[i].get_tensor(name)
