"""Given frames at places of a shot (`StoryboardShot.given_frames`): the latent frames that they are, and their pixels.

With a causal VAE of temporal stride s latent frame 0 is video frame 0 and latent frame k the s video frames
s(k-1)+1 .. sk. What is given is given in whole latent frames:

- an image at video frame t is the latent frame that t lies in, as a still: all its video frames show the image;
- a video begins at frame 0, where it has 1, s+1, 2s+1, ... frames, or where a latent frame does, 1, s+1, 2s+1, ...
  (from the end: s, 2s, ...), where it has s, 2s, ... frames. A video that is not told how many is cut to that.

Where a token of the model joins P latent frames (CogVideoX 1.5: 2), what is given is given in whole tokens: latent
frame 0, then P latent frames at a time, so read P s for s above.

Each is encoded alone, knowing neither the others nor what is made (the rule of `models.codecs`). What does not begin at
frame 0 is encoded behind a still of its own first frame, LEAD latent frames long, which are left out: a latent frame
then holds s video frames, and the VAE is past the start of a clip, as it is at that place of a shot. So encoded, frames
of a film have nearly the latents that they have in it; as a lone image or clip they have others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sample.shot import GivenFrames, StoryboardError, is_image
from sample.storyboard import Storyboard
from sample.video_io import fit_frames, read_image, read_video

LEAD = 3  # latent frames

if TYPE_CHECKING:
    from models.codecs import VideoCodec
    from models.folder import Model


@dataclass(frozen=True)
class PlacedClip:
    """A clip to be encoded alone; the last `count` of its latent frames are the shot's from `start` on."""

    start: int
    count: int
    pixels: np.ndarray  # uint8 [T, H, W, 3]

    @property
    def frames(self) -> range:
        """Latent frames of the shot."""
        return range(self.start, self.start + self.count)


def load_given_frames(storyboard: Storyboard, index: int, model: Model) -> list[PlacedClip]:
    """The given frames of a shot at the model's size. Raises StoryboardError for one that does not fit its place."""
    shot, patch = storyboard.shots[index], model.backbone.capabilities.frames_per_token
    placed: list[PlacedClip] = []
    for number, one in enumerate(shot.given_frames):
        try:
            clip = _place(one, shot.frames or model.settings.frames_per_shot, model.codec, patch)
            for other, taken in enumerate(placed):
                if shared := set(clip.frames) & set(taken.frames):
                    first, last = _video_frames(min(shared), max(shared), model.codec.temporal_stride)
                    raise ValueError(
                        f"at={one.at}: video frames {first} to {last}, which a latent frame holds as one, are already "
                        f"those of given_frames[{other}]; leave one of them out, or give a video of both"
                    )
        except ValueError as error:
            field = f"given_frames[{number}]"
            raise StoryboardError(
                f"{storyboard.where(index)}: {field}: {error}", f"shots.{index}.given_frames.{number}"
            ) from error
        pixels = fit_frames(clip.pixels, model.settings.height, model.settings.width)
        placed.append(PlacedClip(clip.start, clip.count, pixels))
    return placed


def _place(one: GivenFrames, length: int, codec: VideoCodec, patch: int = 1) -> PlacedClip:
    """Where `one` lies in a shot of `length` video frames, in units of `patch` latent frames after the first.

    ValueError if it does not fit there.
    """
    if not -length <= one.at < length:
        raise ValueError(f"at={one.at}; the shot has frames 0 to {length - 1}, from the end -{length} to -1")
    at, unit = one.at % length, codec.temporal_stride * patch  # video frames of a unit
    number = -(-at // unit)  # of the unit that holds video frame `at`; 0 is latent frame 0
    start = 0 if number == 0 else patch * (number - 1) + 1  # its first latent frame
    first, last = _video_frames(number, number, unit)
    if is_image(one.path):
        clip = read_image(one.path)[None].repeat(last - first + 1, axis=0)
    else:
        if at != first:
            before, after = first - length, last + 1 - length
            places = f"{first} ({before})" + (f" and {last + 1} ({after})" if after < 0 else "")
            holder = "a latent frame" if patch == 1 else f"a token of {patch} latent frames"
            raise ValueError(
                f"at={one.at}; {holder} holds {unit} video frames, {first} to {last} here, and a video begins with "
                f"one: the nearest places are {places}"
            )
        clip = _cut(one, at, length, codec, unit)
    return placed_clip(clip, start, codec)


def placed_clip(clip: np.ndarray, start: int, codec: VideoCodec) -> PlacedClip:
    """Video frames [T, H, W, 3] that are whole latent frames of a shot, from `start` on; behind a still unless at 0."""
    if start == 0:
        return PlacedClip(0, codec.num_latent_frames(len(clip)), clip)
    stride = codec.temporal_stride
    lead = stride * (LEAD - 1) + 1
    still = clip[:1].repeat(lead + -(lead + len(clip) - 1) % codec.frame_step, axis=0)  # to a length that the VAE takes
    return PlacedClip(start, len(clip) // stride, np.concatenate([still, clip]))


def _cut(one: GivenFrames, at: int, length: int, codec: VideoCodec, unit: int) -> np.ndarray:
    """The frames of a video that are taken, as many as whole units from video frame `at` of the shot on."""
    video, _ = read_video(one.path)
    if not -len(video) <= one.start < len(video):
        raise ValueError(f"start={one.start}; {one.path} has frames 0 to {len(video) - 1}")
    video = video[one.start % len(video) :]
    room = length - at
    if one.frames is not None and one.frames > min(len(video), room):
        raise ValueError(
            f"frames={one.frames}; there are {len(video)} in {one.path} from start={one.start} on, and {room} in the "
            f"shot from at={one.at} on"
        )
    wanted = min(len(video), room) if one.frames is None else one.frames
    if at == 0:
        unit, whole = codec.frame_step, (wanted - 1) // codec.frame_step * codec.frame_step + 1
        lengths = f"1, {unit + 1}, {2 * unit + 1}, ..."
    else:
        whole = wanted // unit * unit
        lengths = f"{unit}, {2 * unit}, {3 * unit}, ..."
    if whole < 1:
        raise ValueError(f"{wanted} frames of {one.path}; at={one.at} takes {lengths}: give a longer video or an image")
    if one.frames is not None and whole != one.frames:
        raise ValueError(f"frames={one.frames}; at={one.at} takes {lengths}, for example {whole}")
    return video[:whole]


def _video_frames(first: int, last: int, stride: int) -> tuple[int, int]:
    """The first and last video frame of latent frames `first` to `last`."""
    return max(0, stride * (first - 1) + 1), stride * last
