"""HunyuanVideo's real classes, a few thousand random weights each, and a whole folder of them. For tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from models.backbones.hunyuan import HunyuanVideoBackbone
from models.codecs import VideoCodec
from models.folder import Model, ModelSettings, save_model
from models.text_hunyuan import CLIP_TOKENS, CROP, TEMPLATE, HunyuanTextEncoder
from models.tiny import LATENT_CHANNELS, TEXT_DIM

POOLED_DIM = 16


def tiny_hunyuan(seed: int = 0, **changes: Any) -> HunyuanVideoTransformer3DModel:
    """2 double-stream, 2 single-stream and 1 refiner block of width 24; rotary dimensions 4, 4, 4."""
    config: dict[str, Any] = {
        "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "num_attention_heads": 2,
        "attention_head_dim": 12, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_DIM, "pooled_projection_dim": POOLED_DIM, "rope_axes_dim": (4, 4, 4),
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HunyuanVideoTransformer3DModel(**config | changes)


def tiny_hunyuan_vae(seed: int = 0) -> AutoencoderKLHunyuanVideo:
    """Strides 4 in time and 8 in space, 4 latent channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKLHunyuanVideo(
            block_out_channels=(8, 8, 8, 8), latent_channels=LATENT_CHANNELS, layers_per_block=1, norm_num_groups=4,
            scaling_factor=0.7,
        )  # fmt: skip


def tiny_hunyuan_text(seed: int = 0, max_length: int = 33) -> HunyuanTextEncoder:
    """Byte tokens; a LLaMA of three layers of width 32, whose tokenizer makes 95 tokens of the template, and a CLIP."""
    tokenizer, tokenizer_2 = _llama_tokenizer(), _clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llama = LlamaModel(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=TEXT_DIM, intermediate_size=64, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=None, pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer_2), hidden_size=POOLED_DIM, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, projection_dim=POOLED_DIM, max_position_embeddings=CLIP_TOKENS,
                bos_token_id=tokenizer_2.bos_token_id, eos_token_id=tokenizer_2.eos_token_id,
                pad_token_id=tokenizer_2.pad_token_id,
            )
        )  # fmt: skip
    return HunyuanTextEncoder(tokenizer, llama, tokenizer_2, clip, max_length)


def _llama_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, but the template before the text is cut into as many tokens as LLaMA 3 makes of it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bos, pad = "<|begin_of_text|>", "<|pad|>"
    core = Tokenizer(BPE({char: i for i, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    head = TEMPLATE.split("{}")[0]
    size, longer = divmod(len(head), CROP - 1)  # one token is the first, bos
    ends = [(i + 1) * size + min(i + 1, longer) for i in range(CROP - 1)]
    pieces = [head[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    core.add_special_tokens([AddedToken(token, normalized=False) for token in dict.fromkeys([bos, pad, *pieces])])
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, pad_token=pad, padding_side="right")


def _clip_tokenizer() -> CLIPTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"{char}</w>" for char in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: i for i, word in enumerate(words)}, [])


def build_tiny_hunyuan_folder(path: Path | str, seed: int = 0, *, text_length: int = 33, **settings: Any) -> Model:
    """Write a tiny random HunyuanVideo folder to `path` and return its model; `settings` are those of ModelSettings."""
    given = {"frames_per_shot": 9, "height": 32, "width": 32, "fps": 8.0, "level_shift": 7.0} | settings
    described = ModelSettings(backbone="hunyuan", text_length=text_length, **given)
    model = Model(
        HunyuanVideoBackbone(tiny_hunyuan(seed, guidance_embeds=True), packed_text=True).eval(),
        VideoCodec(tiny_hunyuan_vae(seed)),
        tiny_hunyuan_text(seed, text_length),
        described,
    )
    save_model(path, model, described)
    return model
