"""What a storyboard gives as files: shots, first frames and references, as pixels and as latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from models.codecs import to_video
from models.layout import ClipLayout
from models.methods import get_method
from models.scene import IMAGE_ROLES
from sample.given_frames import PlacedClip
from sample.shot import is_image
from sample.storyboard import FROM_IMAGE, Storyboard, StoryboardError, derive_seed
from sample.video_io import fit_frames, read_image, read_video

if TYPE_CHECKING:
    from models.folder import Model
    from models.methods import Method


def load_media(storyboard: Storyboard, index: int, model: Model) -> np.ndarray | None:
    """The given pixels of a shot at the model's size, uint8 [T, H, W, 3]: what the VAE takes, or the first frame."""
    shot = storyboard.shots[index]
    field, path = ("given", shot.given) if shot.given else ("first_frame", shot.first_frame)
    if not path:
        return None
    stride = model.codec.temporal_stride
    method = get_method(model.settings.method, **model.settings.method_params)
    start = stride * (method.first_frames - 1) + 1  # video frames that a shot starts from
    length = shot.frames or model.settings.frames_per_shot
    whole = storyboard.task == "edit"
    try:
        image = is_image(path)
        frames = (
            read_image(path)[None] if image or (shot.first_frame and start == 1 and not whole) else read_video(path)[0]
        )
        if shot.first_frame and len(frames) < start:
            raise ValueError(f"holds {len(frames)} frames, but this model starts from {start}; give a longer video")
    except ValueError as error:
        raise StoryboardError(f"{storyboard.where(index)}: {field}: {error}", f"shots.{index}.{field}") from error
    if storyboard.task in FROM_IMAGE:  # every frame starts from the image
        frames, start = frames[:1].repeat(length, axis=0), length
    longest = start if shot.first_frame and not whole else length
    step = model.codec.frame_step
    frames = frames[: (min(len(frames), longest) - 1) // step * step + 1]
    return fit_frames(frames, model.settings.height, model.settings.width)


def load_references(storyboard: Storyboard, method: Method, model: Model) -> list[np.ndarray]:
    """Pixels uint8 [T, H, W, 3] of what stands before the shot, one after another: clips, and images as still clips."""
    wanted = [(index, one) for index, shot in enumerate(storyboard.shots) for one in shot.references]
    if not wanted and not method.reads_references:
        return []
    index, stride = (wanted[0][0] if wanted else 0), model.codec.temporal_stride
    try:
        if len(storyboard.shots) > 1:
            raise ValueError("a shot with references is made alone; independent=true makes every shot by itself")
        clips, lengths = [], []
        for _, one in wanted:
            image = one.role in IMAGE_ROLES
            clips.append(read_image(one.path)[None] if image else read_video(one.path)[0])
            longest = min(len(clips[-1]), model.settings.frames_per_shot)
            step = model.codec.frame_step
            lengths.append(None if image else (longest - 1) // step * step // stride + 1)
        latent_frames = method.condition_frames([one.role for _, one in wanted], lengths)
    except ValueError as error:
        raise StoryboardError(f"{storyboard.where(index)}: references: {error}", f"shots.{index}.references") from error
    references = []
    for clip, frames in zip(clips, latent_frames, strict=True):
        at = np.minimum(np.arange(stride * (frames - 1) + 1), len(clip) - 1)  # an image stands still
        references.append(fit_frames(clip[at], model.settings.height, model.settings.width))
    return references


def encode_media(
    media: list[np.ndarray | None],
    references: list[np.ndarray],
    layout: ClipLayout,
    model: Model,
    batch: int,
    placed: Sequence[PlacedClip] = (),  # of the only shot
) -> Tensor | None:
    """Normalised latents [B, C, F, H, W] of the given frames, each clip of them encoded alone; zero elsewhere."""
    dummies = layout.is_dummy.tolist()
    shots = [frames.start for frames in layout.shot_slices if not dummies[frames.start]]
    starts = [] if references else shots  # references go with no media
    clips = [
        PlacedClip(start, num_latent_frames(model, pixels), pixels)
        for start, pixels in zip(starts, media, strict=False)
        if pixels is not None
    ]
    at = shots[0]
    for pixels in references:
        clips.append(PlacedClip(at, num_latent_frames(model, pixels), pixels))
        at += clips[-1].count
    clips += placed
    if not clips:
        return None
    given = torch.zeros(model.codec.latent_channels, layout.num_frames, *latent_size(model))
    for clip in clips:
        latents = model.codec.normalize(model.codec.encode(to_video([clip.pixels]))[0])[0]
        given[:, clip.start : clip.start + clip.count] = latents[:, -clip.count :].cpu()
    return given.expand(batch, -1, -1, -1, -1)


def encode_noised(pixels: np.ndarray, strength: float, seeds: Sequence[int], model: Model) -> Tensor:
    """Normalised latents [B, C, K, H, W] of K first frames uint8 [T, H, W, 3], with noise on them before encoding.

    As Stable Video Diffusion was trained and as diffusers' pipeline does it: `strength` is the deviation of Gaussian
    noise on pixels in [-1, 1]. Each sample has noise of its own, from its shot's seed.
    """
    video, rows = to_video([pixels]), []
    for seed in seeds:
        noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(derive_seed(seed, "noise_aug")))
        rows.append(model.codec.normalize(model.codec.encode(video + strength * noise)[0]))
    return torch.cat(rows)


def num_latent_frames(model: Model, pixels: np.ndarray) -> int:
    return model.codec.num_latent_frames(len(pixels))


def latent_size(model: Model) -> tuple[int, int]:
    return model.settings.height // model.codec.spatial_stride, model.settings.width // model.codec.spatial_stride
