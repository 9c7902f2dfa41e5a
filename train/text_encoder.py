"""Train a small text encoder (`T5EncoderModel`) so that what a prompt says can be read by one attention query.

Each *slot* is one thing a text may say (a colour, an action, ...). A learned query attends over the encoder's output
and a linear layer names the value: the same way a diffusion transformer's cross-attention will read it. The heads are
thrown away afterwards. One process, resumable, seeded. Shapes: B batch, L text tokens, D width.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from train.snapshot import load_snapshot, save_snapshot

# step -> texts and, per slot, the class of each text (-1: the text does not say)
TextSource = Callable[[int], tuple[list[str], dict[str, list[int]]]]

LENGTH_GROUPS = 4


@dataclass
class TextEncoderSettings:
    steps: int = 2200
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    checkpoint_every: int = 100
    log_every: int = 20
    seed: int = 0


class SlotReader(nn.Module):
    """The encoder with one attention query and one classifier per slot."""

    def __init__(self, encoder: T5EncoderModel, slots: dict[str, int]):
        super().__init__()
        width = encoder.config.d_model
        self.encoder = encoder
        self.queries = nn.Parameter(torch.randn(len(slots), width) / width**0.5)
        self.heads = nn.ModuleList(nn.Linear(width, classes) for classes in slots.values())
        self.slots = list(slots)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """ids [B,L], mask [B,L] (1 where there is text) -> logits [B,classes] per slot."""
        lengths = mask.sum(dim=1)
        pooled = ids.new_empty(len(ids), *self.queries.shape, dtype=self.queries.dtype)  # [B,slots,D]
        for rows in lengths.argsort().chunk(LENGTH_GROUPS):  # texts of like length together: hardly any padding
            longest = int(lengths[rows].max())
            pooled[rows] = self._pool(ids[rows, :longest], mask[rows, :longest])
        return {name: head(pooled[:, k]) for k, (name, head) in enumerate(zip(self.slots, self.heads, strict=True))}

    def _pool(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids [B,L], mask [B,L] -> what each slot's query reads of the encoder's output, [B,slots,D]."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # [B,L,D]
        scores = torch.einsum("sd,bld->bsl", self.queries, hidden)
        scores = scores.masked_fill(mask[:, None] == 0, float("-inf"))
        return scores.softmax(dim=-1) @ hidden


def train_text_encoder(
    encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, slots: dict[str, int], texts: TextSource,
    settings: TextEncoderSettings, run_dir: Path, say: Callable[[str], None] = print, pad_to: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Train `encoder` in place (resuming from `run_dir`); returns the last accuracy per slot on fresh texts.

    With `pad_to` texts are padded to so many tokens, and the padding is read as text is (`TextStyle.padded`).
    `texts(step)` must be a pure function of the step.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    reader = SlotReader(encoder, slots).train()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    average = {name: value.detach().clone() for name, value in reader.state_dict().items()}
    step = load_snapshot(run_dir, reader, average, optimizer, asdict(settings))
    accuracy: dict[str, float] = {}
    began, first = time.time(), step
    while step < settings.steps:
        share = max(step - settings.warmup_steps, 0) / max(settings.steps - settings.warmup_steps, 1)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min((step + 1) / settings.warmup_steps, 1.0) * (1.0 - 0.97 * share)
        prompts, classes = texts(step)
        padding: dict[str, Any] = {"padding": True if pad_to is None else "max_length", "max_length": pad_to}
        tokens = tokenizer(prompts, **padding, return_tensors="pt")
        mask = tokens.attention_mask if pad_to is None else torch.ones_like(tokens.attention_mask)
        logits = reader(tokens.input_ids, mask)
        losses, accuracy = [], {}
        for name, values in logits.items():
            truth = torch.tensor(classes[name])
            said = truth >= 0
            if said.any():
                losses.append(nn.functional.cross_entropy(values[said], truth[said]))
                accuracy[name] = (values[said].argmax(-1) == truth[said]).float().mean().item()
        loss = torch.stack(losses).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(0.99, step / (step + 10))
        with torch.no_grad():
            for name, value in reader.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        if step % settings.log_every == 0 or step == settings.steps:
            mean = sum(accuracy.values()) / len(accuracy)
            row = {"step": step, "loss": loss.item(), "accuracy": mean, "worst": min(accuracy.values()),
                   "seconds_per_step": round((time.time() - began) / (step - first), 3)}  # fmt: skip
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            say(
                f"text encoder {step}/{settings.steps} "
                + " ".join(f"{k}={v:.4g}" for k, v in row.items() if k != "step")
            )
        if step % settings.checkpoint_every == 0 or step == settings.steps:
            save_snapshot(run_dir, step, reader, average, optimizer, asdict(settings))
    reader.load_state_dict(average)
    encoder.eval()
    return accuracy
