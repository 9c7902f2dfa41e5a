"""Whether a prepared scene was encoded by the model that is to be trained on it."""

from __future__ import annotations

from models.scene import Scene
from train.shards import Record


def check_encoders(record: Record, scene: Scene, made_with: tuple[str, str]) -> None:
    """Raises ValueError unless its latents and texts are of the VAE and the text encoder of these hashes."""
    found = (scene.latents.vae_hash, scene.latents.text_hash) if scene.latents else ("", "")
    for part, has, needs in zip(("VAE", "text encoder"), found, made_with, strict=True):
        if has != needs:
            raise ValueError(
                f"{record.shard}: {scene.scene_id} was encoded by the {part} {has[:12] or '(none)'}, the model to "
                f"train has {needs[:12]}; prepare the videos again with this model"
            )


def check_image_encoder(record: Record, scene: Scene, needs: str) -> None:
    """Raises ValueError unless its first frames were embedded by the image encoder of this hash."""
    has = scene.latents.image_hash if scene.latents else ""
    if has != needs:
        raise ValueError(
            f"{record.shard}: the first frames of {scene.scene_id} were embedded by the image encoder "
            f"{has[:12] or '(none)'}, the model to train has {needs[:12]}; prepare the videos again with this model"
        )
