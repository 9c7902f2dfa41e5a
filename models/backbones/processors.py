"""Attention of diffusers' `BasicTransformerBlock` and its temporal sibling, through a choosable attention backend.

diffusers' own processor for them calls torch directly; this one computes the same, bit for bit, where the backend is
"native".
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor


class Processor:
    """Dense attention of [B,N,D] to itself, or to a context [B,L,D]."""

    _attention_backend: AttentionBackendName | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        query, key, value = project(attn, hidden_states, encoder_hidden_states)
        return merge(attn, self.attend(query, key, value).type_as(query))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B,N,heads,d] each."""
        return dispatch_attention_fn(query, key, value, backend=self._attention_backend)


def project(attn: Any, hidden: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Query of [B,N,D], key and value of the context, or of itself, each [B,N or L,heads,d]."""
    source = hidden if context is None else context
    query, key, value = attn.to_q(hidden), attn.to_k(source), attn.to_v(source)
    heads = (attn.heads, -1)
    return query.unflatten(2, heads), key.unflatten(2, heads), value.unflatten(2, heads)


def merge(attn: Any, out: Tensor) -> Tensor:
    """[B,N,heads,d] -> [B,N,D], with output projection and dropout."""
    return attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))
