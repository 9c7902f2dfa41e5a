"""Frame-wise text: a sentence and an image of the start, read into a few tokens for every latent frame.

FCA's text module (Frame-wise Conditioning Adaptation, TMLR 2025), in the form of BLIP-2's Q-Former (2301.12597):
learned queries of every frame attend to themselves and to the text, then to the image, and pass a feed-forward layer.

B batch, F latent frames, q queries per frame, L text tokens, V image tokens, E width inside.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FrameTextQFormer(nn.Module):
    """One module; FCA has one per layer of the backbone.

    Args:
        text_dim, image_dim, out_dim: widths of the text, of the image tokens and of what comes out.
        frames: most latent frames a clip may have; each has queries of its own.
    """

    def __init__(
        self, text_dim: int, image_dim: int, out_dim: int, *, width: int, heads: int, queries: int, frames: int
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(frames, queries, width))
        self.text_in, self.image_in = nn.Linear(text_dim, width), nn.Linear(image_dim, width)
        self.norm_text, self.norm_image = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.image_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.out = nn.Linear(width, out_dim)
        self.norm_out = nn.LayerNorm(out_dim)  # as large as what the layer's own attention reads

    def forward(self, text: Tensor, valid: Tensor, image: Tensor, frames: int) -> Tensor:
        """Tokens [B,frames,q,out_dim] from text [B,L,text_dim], which of it is no padding [B,L], and image [B,V,.].

        Raises ValueError for more frames than the module has queries for.
        """
        most, per_frame, width = self.queries.shape
        if frames > most:
            raise ValueError(
                f"a clip of {frames} latent frames, but the frame-wise text was made for {most}; train with a larger "
                "max_frames"
            )
        x = self.queries[:frames].reshape(1, -1, width).expand(len(text), -1, -1)  # [B,F*q,E]
        words, pixels = self.norm_text(self.text_in(text)), self.norm_image(self.image_in(image))
        queries = self.norms[0](x)
        ignored = torch.cat([valid.new_zeros(x.shape[:2]), ~valid], dim=1)  # [B,F*q+L]
        x = x + _attend(self.self_attention, queries, torch.cat([queries, words], dim=1), ignored)
        x = x + _attend(self.image_attention, self.norms[1](x), pixels)
        x = x + self.feed_forward(self.norms[2](x))
        return self.norm_out(self.out(x)).unflatten(1, (frames, per_frame))


def _attend(attention: nn.MultiheadAttention, query: Tensor, context: Tensor, ignored: Tensor | None = None) -> Tensor:
    return attention(query, context, context, key_padding_mask=ignored, need_weights=False)[0]
