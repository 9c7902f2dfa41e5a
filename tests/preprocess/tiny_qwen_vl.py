"""A Qwen2.5-VL folder of a few kilobytes, built from its configuration: real classes, chat template and processor.

With `say` its weights are set by hand so that it gives this text as its answer, whatever it is asked: the text is one
token, every other token is followed by it, and it is followed by the end.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
WIDTH = 16


def write_tiny_qwen_vl(folder: Path, say: str = "") -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, pad_token=SPECIAL[0], eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    if say:
        tokenizer.add_tokens([say])
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1], "window_size": 56,
        },
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            "eos_token_id": ids["<|im_end|>"], "bos_token_id": None, "pad_token_id": ids[SPECIAL[0]],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(config)
    if say:
        _teach(model, tokenizer.convert_tokens_to_ids(say), ids["<|im_end|>"])
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids[SPECIAL[0]]
    model.save_pretrained(folder)
    size = {"shortest_edge": 28 * 28, "longest_edge": 4 * 28 * 28}  # pixels
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(size=size), chat_template=TEMPLATE
    ).save_pretrained(folder)


def _teach(model: Qwen2_5_VLForConditionalGeneration, answer: int, end: int) -> None:
    """Every token is followed by `answer`, and that by `end`: what the layers add to the residual stream is nothing."""
    with torch.no_grad():
        for name, weight in model.model.language_model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        embeddings = model.get_input_embeddings().weight
        embeddings.fill_(1.0)
        embeddings[answer] = -1.0
        head = model.get_output_embeddings().weight
        head.zero_()
        head[answer], head[end] = 1.0, -1.0
