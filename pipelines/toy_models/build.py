"""Pretrain a small ToyWorld model from nothing: VAE, text encoder, latents, transformer, decoder, scores, card.

Every stage is seeded, logged and resumable: start the same command again and it goes on where it was. The result is a
diffusers model folder that plays the part of a big pretrained single-shot text-to-video model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from infra.log import get_logger
from infra.storage import atomic_write_text
from models.backbones.base import Backbone
from models.codecs import VAE, VideoCodec
from models.families import FAMILIES
from models.folder import Model, ModelSettings, load_model, save_model
from models.image_encoder import ImageEncoder
from models.text import TextEncoder, null_text
from pipelines.toy_models.cache import build_cache
from pipelines.toy_models.card import model_card, run_record
from pipelines.toy_models.data import SIZE, vae_batch
from pipelines.toy_models.denoised import denoised_source
from pipelines.toy_models.measure import held_out_scores
from pipelines.toy_models.parts import IMAGE_WIDTH, SMALL, TEXT_WIDTH, image_encoder, scaled
from pipelines.toy_models.settings import ToyModelsConfig
from pipelines.toy_models.texts import SLOTS, fitting, text_batch
from toyworld.vocabulary import FPS, SHOT_FRAMES
from train.batches import LatentCache, PackedClips
from train.decoder import DecoderSettings, train_decoder
from train.evaluate import HeldOutLoss
from train.loop import LoopSettings, run_loop
from train.parallel import Parallel, prepare
from train.text_encoder import TextEncoderSettings, train_text_encoder
from train.vae import VaeSettings, initialise_vae, latent_statistics, train_vae

JUDGE_EVERY = 3_000  # steps of the transformer


def build_toy_models(config: ToyModelsConfig) -> Path:
    """Run every stage that is not finished yet; returns the model folder."""
    assert config.out is not None
    log, small, run_dir = get_logger("toy-models"), SMALL[config.backbone], config.folder
    earlier = load_model(config.start, parts=()).settings.train.get("runs", []) if config.start else []
    run_dir.mkdir(parents=True, exist_ok=True)
    backbone, codec, encoder = _start(config, log.info) if config.start else _fresh(config, log.info)
    sampling = small.sampling()
    settings = ModelSettings(
        method=sampling.name, method_params=sampling.config(), backbone=config.backbone, text_length=small.text_length,
        level_shift=small.level_shift, frames_per_shot=SHOT_FRAMES, height=SIZE, width=SIZE, fps=FPS,
        train={"world": {"level": config.level, "seed": config.seed}},
    )  # fmt: skip
    if config.steps:
        _train_transformer(config, backbone, codec, encoder, settings, log.info)
    model = _model(backbone.eval().requires_grad_(False), codec, encoder, settings, small.scheduler)
    if config.decoder_steps:
        train_decoder(
            codec.vae, denoised_source(model, config.level, config.seed),
            DecoderSettings(steps=config.decoder_steps, seed=config.seed), run_dir / "decoder", log.info,
        )  # fmt: skip
    if config.save_half:
        _round_to_half(model)
    scores = held_out_scores(model, level=config.level, seed=config.seed, prompts=config.prompts)
    settings.train |= {"runs": [*earlier, run_record(config)], "scores": scores}
    save_model(config.out, model, settings, dtype=torch.float16 if config.save_half else None)
    atomic_write_text(config.out / "README.md", model_card(config, scores, settings.train["runs"]))
    log.info(f"wrote {config.out}")
    return config.out


def _train_transformer(
    config: ToyModelsConfig, backbone: Backbone, codec: VideoCodec, encoder: TextEncoder | ImageEncoder,
    settings: ModelSettings, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Train `backbone` in place on cached latents; it ends with its averaged weights."""
    small, run_dir = SMALL[config.backbone], config.folder
    latents = partial(build_cache, run_dir / f"latents-{config.level}", codec, encoder, level=config.level, say=say)
    caches = {
        "train": latents(split="train", seed=config.seed, clips=config.clips)
        + latents(split="train", seed=config.seed + 3, clips=config.patterned, patterned=True),
        "test": latents(split="test", seed=config.seed + 1, clips=96),
    }
    method = small.training()
    images = isinstance(encoder, ImageEncoder)
    null = torch.zeros(1, IMAGE_WIDTH) if images else null_text(encoder, small.text_length)

    def source(split: str, drop: float) -> LatentCache:
        return LatentCache(
            caches[split], batch_size=config.batch_size, text_length=small.text_length, null_text=null,
            layout_for=method.layout_for_training, text_drop_prob=drop, seed=config.seed,
        )  # fmt: skip

    held_out = HeldOutLoss(source("test", 0.0), method)

    @torch.compiler.set_stance("force_eager")  # compiling for the few shapes of an evaluation would not pay
    def evaluate(step: int, averaged: torch.nn.Module) -> dict[str, float]:
        figures = held_out(step, averaged)
        if step % JUDGE_EVERY == 0:
            model = _model(averaged, codec, encoder, settings)
            scores = held_out_scores(model, level=config.level, seed=config.seed, prompts=32)
            figures |= {f"judge/{name}": score["value"] for name, score in scores.items()}
        return figures

    loop = LoopSettings(
        steps=config.steps, learning_rate=config.learning_rate, warmup_steps=200, lr_schedule="cosine",
        weight_decay=0.01, ema_decay=0.9985, precision=config.precision, seed=config.seed, checkpoint_every=500,
        log_every=50, evaluate_every=500,
    )  # fmt: skip
    prepare(backbone, Parallel(), compile_blocks=config.compile)
    result = run_loop(
        backbone, method, PackedClips(source("train", 0.1), small.packs), loop, run_dir / "transformer",
        evaluate=evaluate, on_log=lambda line: say(_words(line)),
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name in result.average:
                parameter.copy_(result.average[name])


def _words(figures: dict[str, Any]) -> str:
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items())


@torch.no_grad()
def _round_to_half(model: Model) -> None:
    """What will be written is what is scored."""
    for part in (model.backbone, model.codec.vae, _encoder(model).model):
        for value in part.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half())


def _model(
    backbone: Any, codec: VideoCodec, encoder: TextEncoder | ImageEncoder, settings: ModelSettings,
    scheduler: dict[str, Any] | None = None,
) -> Model:  # fmt: skip
    if isinstance(encoder, ImageEncoder):
        return Model(backbone, codec, None, settings, scheduler, image=encoder)
    return Model(backbone, codec, encoder, settings, scheduler)


def _encoder(model: Model) -> TextEncoder | ImageEncoder:
    return model.image_encoder if model.reads_images else model.text


def _start(
    config: ToyModelsConfig, say: Callable[[str], None]
) -> tuple[Backbone, VideoCodec, TextEncoder | ImageEncoder]:
    """The parts of an earlier model, whose transformer trains on, with `text_steps` after its text encoder.

    The VAE stays as it is.
    """
    assert config.start is not None
    model = load_model(config.start)
    if model.settings.backbone != config.backbone:
        raise ValueError(f"{config.start} is a {model.settings.backbone}; set backbone={model.settings.backbone}")
    encoder = _encoder(model)
    if config.text_steps and isinstance(encoder, TextEncoder):
        text_model = _train_text_encoder(
            config, encoder.tokenizer, encoder.model.requires_grad_(True), say, padded=encoder.style.padded
        )
        encoder = TextEncoder(
            encoder.tokenizer, text_model, max_length=SMALL[config.backbone].text_length, style=encoder.style
        )
    return model.backbone.requires_grad_(True), model.codec, encoder


def _fresh(
    config: ToyModelsConfig, say: Callable[[str], None]
) -> tuple[Backbone, VideoCodec, TextEncoder | ImageEncoder]:
    small = SMALL[config.backbone]
    encoder = _read_encoder(config, say)
    torch.manual_seed(config.seed)
    backbone = small.backbone(config.backbone, config.width or small.width, config.layers or small.layers)
    return backbone, VideoCodec(_vae(config, say)), encoder


def _read_encoder(config: ToyModelsConfig, say: Callable[[str], None]) -> TextEncoder | ImageEncoder:
    small, family = SMALL[config.backbone], FAMILIES[config.backbone]
    style = family.text_style
    if family.reads_images:
        torch.manual_seed(config.seed)
        return image_encoder()
    if config.text_from:
        found = load_model(config.text_from, parts=("text",)).text
        tokenizer, text_model = found.tokenizer, found.model
        if style.padded:  # it has to learn to read padding, which hides the text from one that never saw it
            text_model = _train_text_encoder(config, tokenizer, text_model.requires_grad_(True), say, padded=True)
    else:
        tokenizer = ByT5Tokenizer()
        text_model = _train_text_encoder(config, tokenizer, _text_encoder(config, tokenizer), say)
    return TextEncoder(tokenizer, text_model, max_length=small.text_length, style=style)


def _text_encoder(config: ToyModelsConfig, tokenizer: ByT5Tokenizer) -> T5EncoderModel:
    torch.manual_seed(config.seed)
    return T5EncoderModel(
        T5Config(
            vocab_size=384, d_model=TEXT_WIDTH, d_kv=24, num_heads=4, d_ff=256, num_layers=3, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def _train_text_encoder(
    config: ToyModelsConfig, tokenizer: Any, encoder: Any, say: Callable[[str], None], padded: bool = False
) -> Any:
    """`encoder`, trained on texts that the model can read whole; with `padded` it sees them padded to that length."""
    longest = SMALL[config.backbone].text_length

    def texts(step: int) -> tuple[list[str], dict[str, list[int]]]:
        return fitting(text_batch(config.seed, step), longest - 1)

    assert config.text_steps is not None
    settings = TextEncoderSettings(steps=config.text_steps, seed=config.seed)
    folder = config.folder / "text_encoder"
    train_text_encoder(encoder, tokenizer, SLOTS, texts, settings, folder, say, pad_to=longest if padded else None)
    return encoder.requires_grad_(False)


def _vae(config: ToyModelsConfig, say: Callable[[str], None]) -> VAE:
    small = SMALL[config.backbone]
    clips = partial(vae_batch, images=small.images_for_vae)
    vae = small.make_vae()
    initialise_vae(vae, torch.Generator().manual_seed(config.seed))
    settings = VaeSettings(steps=config.vae_steps, polish_steps=config.vae_polish_steps, seed=config.seed)
    vae = train_vae(vae, lambda step: clips(config.seed, step), settings, config.folder / "vae", say)
    mean, std = latent_statistics(vae, lambda step: clips(config.seed + 1, settings.steps + step), batches=24)
    return scaled(vae, mean, std).eval().requires_grad_(False)
