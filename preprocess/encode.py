"""Encode a source's shots and texts with the VAE and the encoders of a model folder.

C channels, F latent frames, h w latent size, L text tokens, D width of the text. Batches are formed inside one source,
in the order of its shots, never by arrival: the same source gives the same bytes at any parallelism.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infra.storage import sha256_file
from models.codecs import VideoCodec, to_video
from models.folder import load_model, load_settings, part_folders
from models.image_encoder import ImageEncoder
from models.scene import IMAGE_TENSOR, STORY_TEXT, LatentSource, Scene, Shot, shot_tensor_key
from models.states import encode_states
from models.text import TextEncoder
from preprocess.aesthetic import AestheticScorer
from preprocess.outcome import Failed
from preprocess.settings import StoreType

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BATCH = 4  # clips per VAE call


@dataclass
class Encoder:
    """A VAE, a text encoder with the length of text that their backbone reads, and its image encoder, if any."""

    codec: VideoCodec
    text: TextEncoder
    text_length: int  # tokens that the model reads per shot
    threads: int = 1
    aesthetic: AestheticScorer | None = None  # None: not scored
    image: ImageEncoder | None = None

    @staticmethod
    def from_folder(
        path: Path | str,
        device: str = "cpu",
        threads: int = 1,
        aesthetic: AestheticScorer | None = None,
    ) -> Encoder:
        """Reads the parts of a model folder besides its backbone, and the text length."""
        model = load_model(path, ("codec", "text", "image"), device)
        image = model.image_encoder if model.reads_images else None
        return Encoder(model.codec, model.text, model.settings.text_length, threads, aesthetic, image)

    def encode_shots(
        self, spans: Sequence[np.ndarray | None], dtype: StoreType, tile: int | None = None
    ) -> list[dict[str, Tensor]]:
        """Posterior of each span uint8 [n,H,W,3], and of its first and last frame, each frame encoded alone.

        `tile`: side of the tiles in which larger frames are encoded, then one clip at a time; None: whole.

        Returns per shot latent_mean, latent_logvar [C,F,h,w] and first_*, last_* [C,1,h,w] in raw VAE units, for a
        model that reads images also first_image [1,D], the embedding of the first frame; {} for a shot without span.
        """
        torch.set_num_threads(self.threads)
        results: list[dict[str, Tensor]] = [{} for _ in spans]
        clips = [(i, "latent", span) for i, span in enumerate(spans) if span is not None]
        singles = [
            (i, name, span[at : at + 1] if at == 0 else span[-1:])
            for i, span in enumerate(spans)
            if span is not None
            for name, at in (("first", 0), ("last", -1))
        ]
        count = _BATCH if tile is None else 1
        for jobs in (*_by_shape(clips), *_by_shape(singles)):
            for begin in range(0, len(jobs), count):
                batch = jobs[begin : begin + count]
                mean, logvar = self.codec.encode(to_video([span for _, _, span in batch]), tile)
                for (shot, name, _), m, v in zip(batch, mean, logvar, strict=True):
                    if not (torch.isfinite(m).all() and torch.isfinite(v).all()):
                        raise Failed("encode", f"the VAE gave values that are not finite for shot {shot}")
                    results[shot][f"{name}_mean"] = m.to("cpu", _DTYPES[dtype]).contiguous()
                    results[shot][f"{name}_logvar"] = v.to("cpu", _DTYPES[dtype]).contiguous()
        for shot, span in enumerate(spans):
            if self.image is not None and span is not None:
                embedding = self.image.encode(to_video([span[:1]])[:, :, 0])[0]
                results[shot][IMAGE_TENSOR] = embedding.to(_DTYPES[dtype]).contiguous()
        return results

    def encode_references(self, clips: Sequence[np.ndarray], dtype: StoreType, tile: int | None = None) -> list[Tensor]:
        """Posterior mean [C,F,h,w] in raw VAE units of each clip uint8 [n,H,W,3], each encoded alone."""
        torch.set_num_threads(self.threads)
        means = [self.codec.encode(to_video([clip]), tile)[0][0] for clip in clips]
        if not all(torch.isfinite(mean).all() for mean in means):
            raise Failed("encode", "the VAE gave values that are not finite for a reference")
        return [mean.to("cpu", _DTYPES[dtype]).contiguous() for mean in means]

    def encode_texts(self, scenes: Sequence[Scene], dtype: StoreType, apart: bool = False) -> dict[str, Tensor]:
        """Embedding [L,D] of every text of the scenes (see `scene_texts`), each distinct text encoded once."""
        torch.set_num_threads(self.threads)
        texts = list(dict.fromkeys(text for scene in scenes for text in scene_texts(scene, apart).values()))
        return {
            text: embedding.to(_DTYPES[dtype]).contiguous()
            for text, embedding in zip(texts, self.text.encode(texts), strict=True)
        }

    def encode_states(self, scene: Scene, dtype: StoreType) -> dict[str, Tensor]:
        """Embeddings [S,L,D] of the predicted states of each shot that has some."""
        return {
            shot_tensor_key(shot.index, "states_text"): encode_states(
                [state.text for state in shot.predicted_states], self.text
            ).to(_DTYPES[dtype])
            for shot in scene.shots
            if shot.predicted_states
        }

    def source(self, dtype: StoreType) -> LatentSource:
        image = "" if self.image is None else self.image.hash
        return LatentSource(self.codec.hash, self.text.hash, dtype, self.text.style.joined, image)

    def check_texts(self, scene: Scene) -> None:
        """Raises Failed naming the shot whose story and prompt together are longer than the model reads."""
        for shot in scene.shots:
            self._check_length(scene, shot)

    def _check_length(self, scene: Scene, shot: Shot) -> None:
        together = self.text.parts([scene.story, shot.prompt])
        longest = max(
            sum(self.text.num_tokens(text) for text in together),
            self.text.num_tokens(shot.sentence) if shot.sentence else 0,
        )
        if longest > self.text_length:
            story, prompt = self.text.num_tokens(scene.story), self.text.num_tokens(shot.prompt)
            raise Failed(
                "encode",
                f"the texts of shot {shot.index} of {scene.scene_id} have {longest} tokens (story {story}, "
                f"prompt {prompt}), the model reads {self.text_length}; shorten the captions",
            )


def encoder_key(path: Path | str) -> str:
    """Changes when a model folder would encode otherwise. Reads the files without loading them."""
    settings = load_settings(path)
    digest = hashlib.sha256(str(settings.text_length).encode())
    if settings.backbone != "wan":  # what the same files make of a text depends on the family
        digest.update(settings.backbone.encode())
    for part in ("codec", "text", "image"):
        for folder in part_folders(path)[part]:
            for file in sorted(p for p in (Path(path) / folder).rglob("*") if p.is_file()):
                digest.update(f"{file.relative_to(path).as_posix()} {sha256_file(file)} ".encode())
    return digest.hexdigest()[:16]


def scene_texts(scene: Scene, apart: bool = False) -> dict[str, str]:
    """Tensor name -> text, of every text of a scene that is encoded.

    `apart`: where story and prompt are one text, also each alone, for a global prompt that is a group of its own (LCT).
    """
    joined = scene.latents is not None and scene.latents.texts_joined
    texts = {STORY_TEXT: scene.story} if apart or not joined else {}
    for shot in scene.shots:
        prompt = " ".join(text for text in (scene.story, shot.prompt) if text) if joined else shot.prompt
        texts[shot_tensor_key(shot.index, "text")] = prompt
        if apart and joined:
            texts[shot_tensor_key(shot.index, "prompt_text")] = shot.prompt
        if shot.sentence:
            texts[shot_tensor_key(shot.index, "sentence_text")] = shot.sentence
    return texts


def _by_shape(clips: list[tuple[int, str, np.ndarray]]) -> list[list[tuple[int, str, np.ndarray]]]:
    """Clips that fit into one call of the VAE: of one length and one size."""
    groups: dict[tuple[int, ...], list[tuple[int, str, np.ndarray]]] = {}
    for clip in clips:
        groups.setdefault(clip[2].shape, []).append(clip)
    return [groups[shape] for shape in sorted(groups)]
