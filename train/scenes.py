"""Batches of prepared scenes: windows of neighbouring shots, each shot with its own text.

Shapes: B batch, F latent frames, C channels, H W latent size, S shots, L text tokens, D width of the text.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from models.layout import ClipLayout, with_story
from models.scene import IMAGE_TENSOR, STORY_TEXT, Scene, reference_tensor_key, shot_tensor_key
from models.states import null_states
from models.text import TextContext, pack_text
from train.batches import SceneBatch, Turns, keyed_generator, rows_of, stream
from train.labels import class_of
from train.made_with import check_encoders, check_image_encoder
from train.shards import Record, encoded_runs, latent_shape, read_shard, shards_of
from train.text_drop import TextDrop

Latents = Literal["sample", "mean"]
# kind ("scene"; "story", a scene whose story is a group of its own; "single"), latent frames of each reference and of
# each shot, (C, H, W)
Bucket = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
# roles of a scene's references and their latent frames -> how many frames of each stand before the shot
ConditionFrames = Callable[[Sequence[str], Sequence[int | None]], list[int]]


@dataclass(frozen=True)
class Window:
    """Shots first..first+len(texts)-1 of one record; `texts` names the tensors that make each shot's context.

    `conditions` says how many latent frames of each of the scene's references come before the shots.
    """

    record: Record
    scene_id: str
    first: int
    texts: tuple[tuple[str, ...], ...]
    conditions: tuple[int, ...] = ()
    label: int | None = None  # the class of its shots, where the method is told one
    story: bool = False  # a text group of its own, and no part of the shots' contexts

    @property
    def name(self) -> str:
        return f"{self.scene_id}/s{self.first:03d}+{len(self.texts)}"

    @property
    def shots(self) -> range:
        return range(self.first, self.first + len(self.texts))


class ShardDataset:
    """Scene windows and single shots of a prepared dataset.

    A window is `shots_per_scene` neighbouring shots with equal latent size (all of a shorter run); each of its shots
    reads [story; its prompt]. A share `single_shot_prob` of the batches holds single shots, which read their own
    self-contained sentence. With `story_group` the story of a scene window is a text group of its own, the last one,
    read by a dummy frame in front, and its shots read their prompts alone. With `condition_frames` a window is one shot
    after what its scene refers to, such as a condition image or the source clip of a style pair. Every batch has one
    layout. Buckets take turns in proportion to their size, each going through its windows epoch after epoch in a seeded
    order.

    Args:
        folder: a prepared dataset (`shards/*.tar`).
        batch_size: samples per micro-batch, over all workers.
        text_length: tokens of one shot's context.
        null_text: [text_length,D] context of dropped text.
        layout_for: the method's layout for a list of shot lengths in latent frames, and for the frames of conditions.
        condition_frames: of a method that reads references (`Method.condition_frames`); None leaves them out.
        normalize: raw latents [B,C,F,H,W] -> the model's (`VideoCodec.normalize`).
        most_states: of a method that reads states (`Method.most_states`), whose samples are single shots.
        classes: of a method that is told a class (`Method.classes`); every sample is of shots of one class.
        given_frames: latent frames from a shot's first that the method is given: they are means, as in sampling.
        given_alone: of a VAE that is not causal (`VideoCodec.causal`): the given frame is the shot's first, encoded
            alone, because a latent cut out of the shot's would know the frames to be made.
        loses_given: whether `text_drop` is to name samples that lose them; what else they lose stays.
        needs_both: whether some of them then have to lose their text, too, because sampling has such a pass unasked.
        made_with: hashes of the VAE and the text encoder of the model to train; the dataset's must be the same.
        image_hash: of the image encoder of the model to train, whose embedding of its first frame each sample then has,
            a sample being one shot; None: it has none.
        latents: draw from the VAE's posterior, or take its mean.
        story_group: of a method whose global prompt is a group (`Method.story_group`).
        held_out_share: share of the scenes that is not read but kept to measure on (`kept_out`).
        held_out: read those, and not the others.
        single_frame_prob: share of shots of which a batch holds only the first or the last frame, encoded alone (LCT).
    Raises:
        ValueError: no shard, no scene or encoded shot to read, damaged shard, text that does not fit, another VAE or
            text encoder, references that fit no task of the method, labels that are missing or not of the method's
            classes, a text drop that the method cannot use or has to have.
    """

    def __init__(
        self,
        folder: Path,
        *,
        batch_size: int,
        text_length: int,
        null_text: Tensor,
        layout_for: Callable[..., ClipLayout],
        condition_frames: ConditionFrames | None = None,
        normalize: Callable[[Tensor], Tensor],
        made_with: tuple[str, str],
        image_hash: str | None = None,
        most_states: int = 0,
        classes: int | None = None,
        given_frames: int = 0,
        given_alone: bool = False,
        loses_given: bool = False,
        needs_both: bool = True,
        shots_per_scene: int = 3,
        single_shot_prob: float = 0.0,
        text_drop: TextDrop | None = None,
        latents: Latents = "sample",
        single_frame_prob: float = 0.0,
        story_group: bool = False,
        held_out_share: float = 0.0,
        held_out: bool = False,
        seed: int = 0,
    ):
        self.folder, self.batch_size, self.text_length, self.seed = folder, batch_size, text_length, seed
        self.layout_for, self.normalize, self.latents = layout_for, normalize, latents
        self.condition_frames, self.most_states, self.given_frames = condition_frames, most_states, given_frames
        self.classes = classes
        self._state_tokens = 0  # of the longest state; all are padded to it, whatever batch they are in
        self.null_text, self.text_drop, self.loses_given = null_text, text_drop or TextDrop(), loses_given
        self.text_drop.check(loses_given, needs_both)
        self.image_hash = image_hash
        self.given_alone = given_alone and given_frames > 0
        if self.given_alone and given_frames > 1:
            raise ValueError(
                f"given_frames is {given_frames}, but in this model's VAE the latents of a shot's first frames know "
                "the later ones, and the dataset has only its first frame encoded alone: set given_frames=1, or use a "
                "model with a causal VAE, such as Wan"
            )
        self.shots_per_scene, self.single_shot_prob = shots_per_scene, single_shot_prob
        self.single_frame_prob, self.story_group = single_frame_prob, story_group
        self.held_out_share = held_out_share

        whole = [record for shard in shards_of(folder) for record in read_shard(shard)]
        keys = "\n".join(f"{record.key} {sorted(record.tensors)}" for record in whole)
        self._dataset = hashlib.sha256(keys.encode()).hexdigest()[:16]  # held-out scenes are part of what it is
        self.records: list[Record] = []
        self.buckets: dict[Bucket, list[Window]] = defaultdict(list)
        apart = kept_out([record.key for record in whole], held_out_share)  # a record's key is its scene's id
        for record in whole:
            if (record.key in apart) != held_out:
                continue
            self.records.append(record)
            scene = Scene.from_json(record.json)
            check_encoders(record, scene, made_with)
            if image_hash is not None:
                check_image_encoder(record, scene, image_hash)
            self._check_drop(record, scene)
            for run in encoded_runs(record, len(scene.shots)):
                self._add(record, scene, run)
        if whole and not self.records:
            raise ValueError(
                f"{folder}: with held_out.share={held_out_share} none of its {len(whole)} scenes is left to "
                f"{'measure' if held_out else 'train on'}: change it, or set held_out.share=0 and held_out.dataset to "
                "a second dataset"
            )
        told = sorted(f"{window.name} {window.label}" for found in self.buckets.values() for window in found)
        self._labels = hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
        self._weights = self._bucket_weights()
        self._turns = Turns(np.array(list(self._weights.values())))

    def _check_drop(self, record: Record, scene: Scene) -> None:
        joined = scene.latents is not None and scene.latents.texts_joined
        if joined and not self.story_group and (self.text_drop.story or self.text_drop.prompts):
            raise ValueError(
                f"{record.shard}: {scene.scene_id}: story and prompts are encoded as one text, as the model reads it, "
                "so neither can be dropped alone; set text_drop.story=0 text_drop.prompts=0"
            )

    def _add(self, record: Record, scene: Scene, run: range) -> None:
        conditions = self._conditions(record, scene, run) if self.condition_frames else ()
        count = min(self.shots_per_scene, len(run))
        kind = "story" if self.story_group and scene.story else "scene"
        together = {i: scene_texts(scene, i) for i in run}
        own = {i: (own_text(scene, i),) for i in run} if kind == "story" else together
        if kind == "story":
            self._check_story(record, scene, run)
        for first in range(run.start, run.stop - count + 1):
            texts = tuple(own[i] for i in range(first, first + count))
            label = class_of(record, scene, range(first, first + count), self.classes)
            self._put(kind, Window(record, scene.scene_id, first, texts, conditions, label, kind == "story"))
        for i in run:
            alone = (shot_tensor_key(i, "sentence_text"),) if scene.shots[i].sentence else together[i]
            label = class_of(record, scene, range(i, i + 1), self.classes)
            self._put("single", Window(record, scene.scene_id, i, (alone,), conditions, label))

    def _check_story(self, record: Record, scene: Scene, run: range) -> None:
        where = f"{record.shard}: {scene.scene_id}"
        if missing := [name for name in (STORY_TEXT, *(own_text(scene, i) for i in run)) if not record.shape(name)]:
            raise ValueError(
                f"{where}: has no {missing[0]}: for a global prompt that is a group of its own, story and prompts have "
                "to be encoded apart; prepare the videos again with texts_apart=true"
            )
        if (tokens := record.require(STORY_TEXT).shape[0]) > self.text_length:
            raise ValueError(
                f"{where}: its story has {tokens} tokens, the model reads {self.text_length}; prepare the videos again "
                "with a shorter story"
            )

    def _conditions(self, record: Record, scene: Scene, run: range) -> tuple[int, ...]:
        """Frames of each reference that stand before the scene's one shot."""
        assert self.condition_frames is not None
        where = f"{record.shard}: {scene.scene_id}"
        shapes = [record.require(reference_tensor_key(i)).shape for i in range(len(scene.references))]
        try:
            frames = self.condition_frames([r.role for r in scene.references], [shape[1] for shape in shapes])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        shots = [i for i in range(len(scene.shots)) if latent_shape(record, i)]
        if len(shots) != 1:
            raise ValueError(f"{where}: its references belong to one shot, but shots {shots} are encoded; split it")
        channels, _, *size = latent_shape(record, run.start)
        if any((shape[0], *shape[2:]) != (channels, *size) for shape in shapes):
            raise ValueError(f"{where}: references of latent shapes {shapes} before a shot of {(channels, *size)}")
        return tuple(frames)

    def _put(self, kind: str, window: Window) -> None:
        for shot, names in zip(window.shots, window.texts, strict=True):
            lengths = [window.record.require(name).shape[0] for name in names]
            if sum(lengths) > self.text_length:
                raise ValueError(
                    f"{window.record.shard}: {window.scene_id} shot {shot}: its texts have {lengths} tokens, the model "
                    f"reads {self.text_length} in all; prepare the videos again with shorter captions"
                )
        if self.given_alone:
            window.record.require(shot_tensor_key(window.first, "first_mean"))
        if self.single_frame_prob:
            for name in ("first_mean", "last_mean"):
                for shot in window.shots:
                    window.record.require(shot_tensor_key(shot, name))
        if self.image_hash is not None:
            window.record.require(shot_tensor_key(window.first, IMAGE_TENSOR))
        if self.most_states:
            self._check_states(window)
        shapes = [latent_shape(window.record, shot) for shot in window.shots]
        channels, _, height, width = shapes[0]
        frames = tuple(shape[1] for shape in shapes)
        self.buckets[kind, window.conditions, frames, (channels, height, width)].append(window)

    def _check_states(self, window: Window) -> None:
        where = f"{window.record.shard}: {window.scene_id} shot {window.first}"
        if len(window.shots) != 1:
            raise ValueError(f"{where}: this method makes one shot from its states; set shots_per_scene=1")
        shape = window.record.shape(shot_tensor_key(window.first, "states_text"))
        if shape is None:
            raise ValueError(f"{where}: has no predicted states; prepare the videos again with states.backend set")
        if shape[0] != self.most_states:
            raise ValueError(
                f"{where}: has {shape[0]} states, the method reads {self.most_states}; prepare with "
                f"states.count={self.most_states}, or train with num_states={shape[0]}"
            )
        self._state_tokens = max(self._state_tokens, shape[1])

    def _bucket_weights(self) -> dict[Bucket, float]:
        shares = {"scene": 1.0 - self.single_shot_prob, "single": self.single_shot_prob}

        def kind(key: Bucket) -> str:
            return "single" if key[0] == "single" else "scene"  # a scene with its story apart is a scene

        totals = {name: sum(len(w) for key, w in self.buckets.items() if kind(key) == name) for name in shares}
        if not totals["single"]:
            raise ValueError(f"{self.folder}: none of {len(self.records)} scenes to read has an encoded shot")
        weights = {key: shares[kind(key)] * len(self.buckets[key]) / totals[kind(key)] for key in sorted(self.buckets)}
        return {key: weight for key, weight in weights.items() if weight > 0}

    def identity(self) -> dict[str, Any]:
        return {
            "dataset": self._dataset,
            "held_out_share": self.held_out_share,
            "batch_size": self.batch_size,
            "shots_per_scene": self.shots_per_scene,
            "single_shot_prob": self.single_shot_prob,
            "latents": self.latents,
            "text_drop": asdict(self.text_drop),
            "data_seed": self.seed,
            **({"labels": self._labels} if self.classes else {}),
            **({"latent_sizes": sizes} if len(sizes := self._sizes()) > 1 else {}),
        }

    def _sizes(self) -> list[str]:
        """Latent sizes of the dataset, `HxW`, each with its number of shots: which batch holds what depends on them."""
        counts = Counter(key[3][1:] for key, found in self.buckets.items() if key[0] == "single" for _ in found)
        return [f"{height}x{width}: {count}" for (height, width), count in sorted(counts.items())]

    def windows(self, index: int) -> list[Window]:
        """Windows of micro-batch `index`, all of one bucket."""
        number, turn = self._turns.at(index)
        key = list(self._weights)[number]
        found = self.buckets[key]
        return [found[i] for i in stream(len(found), turn * self.batch_size, self.batch_size, self.seed, repr(key))]

    def batch(self, index: int, rows: slice = slice(None)) -> SceneBatch:
        number, _ = self._turns.at(index)
        kind, conditions, frames, _ = list(self._weights)[number]
        frames = self._single_frames(index, frames)
        layout = self.layout_for(list(frames), *([list(conditions)] if conditions else []))
        if layout.num_frames != sum(conditions) + sum(frames):
            raise ValueError(
                f"the method's layout has {layout.num_frames} frames for conditions of {list(conditions)} and shots of "
                f"{list(frames)} latent frames"
            )
        windows = self.windows(index)[rows]
        numbers = [index * self.batch_size + row for row in rows_of(self, rows)]
        latents = self.normalize(
            torch.stack([self._latents(window, frames, n) for window, n in zip(windows, numbers, strict=True)])
        )
        text = torch.stack([self._text(window, n) for window, n in zip(windows, numbers, strict=True)])
        if kind == "story":
            layout, stories = with_story(layout), [self._story(w, n) for w, n in zip(windows, numbers, strict=True)]
            text = torch.cat([text, torch.stack(stories)[:, None]], dim=1)
            latents = torch.cat([torch.zeros_like(latents[:, :, :1]), latents], dim=2)
        context = TextContext(text, layout.text_ids)
        keys = [window.name for window in windows]
        states = given_lost = None
        if self.most_states:
            states = torch.stack([self._states(window, n) for window, n in zip(windows, numbers, strict=True)])
        if self.loses_given:
            given_lost = torch.tensor([self._lost(n) in ("given", "both") for n in numbers])
        labels = torch.tensor([window.label for window in windows]) if self.classes else None
        given = None
        if self.given_alone:
            alone = [window.record.read(shot_tensor_key(window.first, "first_mean")).float() for window in windows]
            given = self.normalize(torch.stack(alone))
        embedding = None
        if self.image_hash is not None:
            embeddings = [window.record.read(shot_tensor_key(window.first, IMAGE_TENSOR)) for window in windows]
            embedding = torch.stack(embeddings).float()
        return SceneBatch(latents, layout, context, keys, labels, states, given_lost, given, embedding)

    def _single_frames(self, index: int, frames: tuple[int, ...]) -> tuple[int, ...]:
        """The latent frames of each shot in micro-batch `index`, whose samples have one layout: all, or one."""
        if not self.single_frame_prob:
            return frames
        draws = torch.rand(len(frames), generator=keyed_generator(self.seed, "single_frame", index))
        return tuple(1 if draw < self.single_frame_prob else n for draw, n in zip(draws.tolist(), frames, strict=True))

    def _latents(self, window: Window, frames: tuple[int, ...], number: int) -> Tensor:
        """Raw latents of the window's conditions and shots: [C,F,H,W]. `number` keys the draws of this sample.

        Conditions are posterior means, as they are in sampling. A shot that is to have one of its frames only is that
        frame encoded alone: cut out of the shot's latents it would know the frames before it.
        """
        shots = [
            window.record.read(reference_tensor_key(i))[:, :count].float() for i, count in enumerate(window.conditions)
        ]
        for shot, count in zip(window.shots, frames, strict=True):
            tensor = "latent"
            if count < latent_shape(window.record, shot)[1]:
                first = torch.rand((), generator=keyed_generator(self.seed, "which_frame", number, shot)) < 0.5
                tensor = "first" if first else "last"
            latent = mean = window.record.read(shot_tensor_key(shot, f"{tensor}_mean")).float()
            if self.latents == "sample":
                logvar = window.record.read(shot_tensor_key(shot, f"{tensor}_logvar")).float()
                noise = torch.randn(latent.shape, generator=keyed_generator(self.seed, "posterior", number, shot))
                latent = mean + torch.exp(0.5 * logvar) * noise
                latent[:, : self.given_frames] = mean[:, : self.given_frames]
            shots.append(latent)
        return torch.cat(shots, dim=1)

    def _text(self, window: Window, number: int) -> Tensor:
        """One context per shot: [S,L,D]."""
        lost = self._lost(number)
        if lost in ("everything", "both") or (lost == "prompts" and window.story):
            return self.null_text.float().expand(len(window.texts), -1, -1)
        silent = self._silent(number, len(window.texts)) if lost == "shots" else ()
        contexts = []
        for shot, names in enumerate(window.texts):
            if shot in silent:
                contexts.append(self.null_text.float())
                continue
            if lost in ("story", "prompts") and len(names) > 1:  # a text that stands alone has no layers to lose
                names = tuple(name for name in names if (name == STORY_TEXT) != (lost == "story"))
            contexts.append(pack_text([window.record.read(name).float() for name in names], self.text_length))
        return torch.stack(contexts)

    def _silent(self, number: int, shots: int) -> list[int]:
        """Which of a sample's shots lose their text, each by a coin of its own; never all of them."""
        generator = keyed_generator(self.seed, "silent", number)
        speaks = int(torch.randint(shots, (), generator=generator))
        coins = torch.rand(shots, generator=generator) < 0.5
        return [shot for shot in range(shots) if coins[shot] and shot != speaks]

    def _story(self, window: Window, number: int) -> Tensor:
        """The context of the story's group: [L,D]."""
        if self._lost(number) in ("everything", "both", "story"):
            return self.null_text.float()
        return pack_text([window.record.read(STORY_TEXT).float()], self.text_length)

    def _lost(self, number: int) -> str | None:
        """What sample `number` loses, if anything; see `TextDrop`."""
        return self.text_drop.choose(float(torch.rand((), generator=keyed_generator(self.seed, "drop", number))))

    def _states(self, window: Window, number: int) -> Tensor:
        """States of the window's one shot, [S,L,D] padded with zeros; the null text where the text is lost."""
        found = window.record.read(shot_tensor_key(window.first, "states_text")).float()
        if self._lost(number) in ("everything", "both"):
            found = null_states(self.null_text.float())
        length = max(self._state_tokens, int((self.null_text != 0).any(dim=1).sum()))
        return torch.nn.functional.pad(found, (0, 0, 0, length - found.shape[1], 0, self.most_states - len(found)))


def scene_texts(scene: Scene, shot: int) -> tuple[str, ...]:
    """Tensors of a shot's context inside its scene: [story; its prompt], or the two encoded as one text."""
    own = "text" if scene.shots[shot].prompt or not scene.shots[shot].sentence else "sentence_text"
    if scene.latents is not None and scene.latents.texts_joined:
        return (shot_tensor_key(shot, own),)
    return (STORY_TEXT,) * bool(scene.story) + (shot_tensor_key(shot, own),)


def kept_out(scene_ids: Sequence[str], share: float) -> set[str]:
    """Scenes that are never trained on, about a `share` of them, at least one if it is above 0.

    Each scene's id decides for it, neither the other scenes (but where no other is kept out) nor seed, order or number
    of workers: as data are added, no scene changes sides.
    """

    def draw(scene_id: str) -> float:
        digest = hashlib.blake2b(scene_id.encode(), digest_size=8, person=b"held-out").digest()
        return int.from_bytes(digest, "big") / 2**64

    if not share or not scene_ids:
        return set()
    return {scene_id for scene_id in scene_ids if draw(scene_id) < share} or {min(scene_ids, key=draw)}


def own_text(scene: Scene, shot: int) -> str:
    """The tensor of a shot's prompt alone, where the story is not part of its context; its sentence if it has none."""
    if scene.shots[shot].prompt or not scene.shots[shot].sentence:
        joined = scene.latents is not None and scene.latents.texts_joined
        return shot_tensor_key(shot, "prompt_text" if joined else "text")
    return shot_tensor_key(shot, "sentence_text")


def check_states_seen(folder: Path, given: int) -> None:
    """Raises ValueError where a dataset's states were predicted from more frames of a shot than the `given` ones."""
    file = folder / "dataset.json"
    facts = json.loads(file.read_text()) if file.is_file() else {}
    shown = facts.get("settings", {}).get("states_frames", 1)
    if shown > given:
        raise ValueError(
            f"{file}: its states were predicted from the first {shown} frames of a shot, but the model is given "
            f"{given}: they would tell it the future; prepare the videos again with states.frames={given}"
        )
