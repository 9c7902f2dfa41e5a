"""FVDM: one noise level per latent frame, one model for every task in which some frames are given.

Liu et al., "Redefining Temporal Modeling in Video Diffusion: The Vectorized Timestep Approach", 2410.03160. Training
draws levels by PTSS (section 3.3): independent per frame with probability p, else one for the clip. Sampling holds the
given frames at level 0 and lets the others follow the clock. Where this departs from the authors' code: the coin of
PTSS is tossed per sample, not per batch; given frames are held exactly clean; and `clean_prob` of the training samples
have frames at exactly 0, which continuous draws never hit (with a VAE that is not causal the first alone). Where text
stands in one attention with the video (CogVideoX, HunyuanVideo) it needs one time: by default the mean of the time
embeddings of the frames, as in the first author's later code (Pusa); `text_time="max"` is that of the noisiest frame.

    t2v, i2v, interpolation, extension, transition, next_frame, any_frame, tvp: given frames are held
    noisy_frames      given frames start part of the way noised, at m_f s[k], and are remade with the rest (Pusa)
    edit              given frames start at level m and join the clock there, min(s[k], m) (SDEdit 2108.01073)
    progressive       from one image: frame i at min(slope i, 1) s[k], and starts from the image noised so far
    progressive_min   the same start, but a frame waits until the clock comes by, min(s[k], slope i)
    diagonal          each frame `lag` rows after the one before (Diffusion Forcing 2407.01392)
    long_video        clip after clip, each going on from the last frames of the one before (`models.windows`)

With `labels` the model reads a class, or nothing, in place of text. With `image_beside` it is a Stable Video Diffusion:
where the first frame is given, its latents also stand beside those of every noisy frame and its image embedding in the
place of a text, as that model was trained; else there are zeros, which a share `image_drop` of the training samples
has. No noise is put on the image.

F latent frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from models.backbones.base import Backbone, Capabilities
from models.backbones.svd import ImageCondition, SVDBackbone
from models.joint_attention import TextTime, check_text_time
from models.layout import ClipLayout, mark_given, shots_layout
from models.methods.base import Method, check_indices
from models.modules.labels import LabelEmbedding
from models.noise import check_edm_levels, loss_weights, noise_plan, sample_levels
from models.process import EDM, Process
from models.text import TextContext
from models.windows import default_overlap, plan_of_clips

# what a task's layout needs to be told, what it can be told, and what its plan can be
_NEEDS = {
    "extension": {"head"}, "transition": {"head", "tail"}, "any_frame": {"frames"}, "tvp": {"head"},
    "noisy_frames": {"frames"}, "edit": {"frames"},
}  # fmt: skip
_TAKES = {"diagonal": {"head"}, "long_video": {"frames"}}
_HOLD = ("i2v", "interpolation", "extension", "transition", "next_frame", "any_frame", "tvp")
_PLAN_TAKES = {
    "noisy_frames": {"multipliers"}, "edit": {"edit_level"}, "progressive": {"slope"}, "progressive_min": {"slope"},
    "diagonal": {"lag", "context_level"}, "long_video": {"clip", "overlap", "context_level"},
} | {task: {"context_level"} for task in _HOLD}  # fmt: skip


@dataclass(frozen=True)
class FVDM(Method):
    """p = 0 and clean_prob = 0 is plain text-to-video training."""

    name: ClassVar[str] = "fvdm"
    tasks: ClassVar[tuple[str, ...]] = (
        "t2v", "i2v", "interpolation", "extension", "transition", "next_frame", "any_frame", "tvp", "noisy_frames",
        "edit", "progressive", "progressive_min", "diagonal", "long_video",
    )  # fmt: skip
    reads_image: ClassVar[Literal["no", "alone", "with_text"]] = "with_text"  # where `image_beside`
    before: ClassVar[Mapping[str, Any]] = {"text_time": "max"}

    p: float = 0.2
    clean_prob: float = 0.1
    clean_first: bool = False  # of those samples the first frame is clean, and no other: see `for_model`
    labels: int | None = None  # classes the model is told in place of text; 0: nothing at all (unconditional)
    label_drop: float = 0.1  # share of training samples without their class
    text_time: TextTime = "mean"  # of a text among the video's tokens, where its frames differ in level
    image_beside: bool = False  # for Stable Video Diffusion, which takes the first frame beside the noisy ones, too
    image_drop: float = 0.1  # share of training samples without it

    def __post_init__(self) -> None:
        if self.labels is not None and self.labels < 0:
            raise ValueError(f"fvdm: labels is {self.labels}, expected a number of classes, or none for text")
        for name in ("label_drop", "image_drop"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"fvdm: {name} is {value}, expected a probability")
        check_text_time(self.text_time)
        if self.image_beside and self.labels is not None:
            raise ValueError(
                f"fvdm: labels is {self.labels} with image_beside, but a Stable Video Diffusion reads the image in the "
                "place of a class: set one of them"
            )

    def for_model(self, process: Process, level_shift: float, *, causal_vae: bool = True) -> Self:
        """Where the VAE is not causal, `clean_first`.

        In sampling a given frame is encoded knowing nothing of what is made. Datasets hold a shot's first frame so, and
        training puts it in (`train.loop.clean_latents`). Of a later frame they hold the latent that it has in its shot,
        which knows the frames around it, and its latent as a lone image, which is not what it has in the middle of a
        video (`sample.given_frames`). Clean, the one would tell the model what it is to make, and it would learn to
        look there; the other it never meets in sampling. So neither is shown clean.
        """
        fitted = super().for_model(process, level_shift)
        return fitted if causal_vae else replace(fitted, clean_first=True)

    def layout_for_training(self, shot_frames: list[int]) -> ClipLayout:
        """Shots back to back; with `image_beside` one, whose first frame is the image."""
        return shots_layout([self.one_shot(shot_frames)] if self.image_beside else shot_frames)

    def layout_for_task(  # type: ignore[override]  # each method names its own givens
        self,
        task: str,
        shot_frames: list[int],
        *,
        frames: Sequence[int] = (),
        head: int | None = None,
        tail: int | None = None,
    ) -> ClipLayout:
        """Latent frames are counted over the whole clip.

        t2v: none given. i2v, progressive, progressive_min: the first. interpolation: first and last. extension, tvp:
        the first `head`. transition: the first `head` and the last `tail`. next_frame: all but the last. any_frame:
        those in `frames`. diagonal: the first `head`, if any. long_video: those in `frames`, if any. noisy_frames,
        edit: those in `frames`, which do not stay as given; all of them may be edited.
        """
        self.check_task(task)
        count = self.one_shot(shot_frames) if self.image_beside else sum(shot_frames)
        needs = _NEEDS.get(task, set())
        takes = needs | _TAKES.get(task, set())
        passed = {name for name, value in (("frames", frames), ("head", head), ("tail", tail)) if value}
        if not needs <= passed <= takes:
            raise ValueError(f"task {task!r} takes {sorted(takes) or 'no givens'}, got {sorted(passed) or 'none'}")
        given: Sequence[int]
        if task == "interpolation":
            given = [0, count - 1]
        elif task in ("i2v", "progressive", "progressive_min"):
            given = [0]
        elif task == "next_frame":
            given = range(count - 1)
        elif "frames" in takes:
            given = frames
        else:
            given = [*range(head or 0), *range(count - (tail or 0), count)]
        layout = shots_layout(shot_frames)
        if task == "edit" and set(given) == set(range(count)):
            return mark_given(layout, range(count), "buffer")
        chosen = check_indices("the given frames", given, count, "latent frames")
        return mark_given(layout, chosen, "buffer" if task in ("noisy_frames", "edit") else "condition")

    def sample_levels(self, layout: ClipLayout, batch: int, generator: torch.Generator) -> Tensor:
        return sample_levels(
            layout, batch, "mixed", generator=generator, p=self.p, clean_prob=self.clean_prob,
            clean_first=self.clean_first, **self.drawn_with(),
        )  # fmt: skip

    def plan(
        self,
        layout: ClipLayout,
        levels: Tensor,
        task: str,
        *,
        multipliers: Sequence[float] | None = None,
        edit_level: float | None = None,
        slope: float | None = None,
        lag: int | None = None,
        clip: int | None = None,
        overlap: int | None = None,
        context_level: float | None = None,
    ) -> Tensor:
        """The sampling plan [K+1,F], diagonal: [K + lag (n-1) + 1,F], from base levels [K+1].

        noisy_frames: `multipliers`, one for all given frames or one each (default 0.2, Pusa's for one image; its
        authors use 0.2 and 0.4 for first and last, rising ones for several in a row). edit: `edit_level` m (default
        0.5); rows in which nothing moves are left out. progressive, progressive_min: `slope` per frame (default 0.1,
        or steeper, so that the last frame starts at 1). diagonal: `lag` in rows (default 1). long_video: `clip` latent
        frames at a time (default all), of which `overlap` are taken over (default half); [J K + 1,F] for J clips, see
        `models.windows.plan_of_clips`. Where frames are held, `context_level` is the level they are held at, as which
        they are seen (default 0; SkyReels-DF takes 0.02).
        """
        self.check_task(task)
        options = {
            "multipliers": multipliers, "edit_level": edit_level, "slope": slope, "lag": lag, "clip": clip,
            "overlap": overlap, "context_level": context_level,
        }  # fmt: skip
        unread = {name for name, value in options.items() if value is not None} - _PLAN_TAKES.get(task, set())
        if unread:
            raise ValueError(f"the plan of task {task!r} takes no {', '.join(sorted(unread))}")
        part_way = [role == "buffer" for role in layout.roles]
        if task == "noisy_frames":
            shares = list(multipliers or [0.2])
            shares = shares * sum(part_way) if len(shares) == 1 else shares
            if len(shares) != sum(part_way):
                raise ValueError(f"multipliers are {shares}, expected one, or one for each of {sum(part_way)} frames")
            each = iter(shares)
            return noise_plan(layout, levels, "scale", multipliers=[next(each) if part else 1.0 for part in part_way])
        if task == "edit":
            level = 0.5 if edit_level is None else edit_level
            if not 0 < level <= 1:
                raise ValueError(f"edit_level is {level}; give a level above 0, at which nothing would change, up to 1")
            plan = noise_plan(layout, levels, "min", caps=[level if part else 1.0 for part in part_way])
            still = int((plan == plan[0]).all(dim=1).sum()) - 1
            return plan[still:]
        if task in ("progressive", "progressive_min"):
            frames = layout.num_frames
            steepness = max(0.1, 1 / (frames - 1)) if slope is None else slope
            ramp = (steepness * torch.arange(frames)).clamp(max=1.0)
            if task == "progressive":
                return noise_plan(layout, levels, "scale", multipliers=ramp)
            return noise_plan(layout, levels, "min", caps=ramp)
        if task == "diagonal":
            return noise_plan(layout, levels, "lag", lag=1 if lag is None else lag, context_level=context_level or 0.0)
        if task == "long_video":
            clip = layout.num_frames if clip is None else clip
            overlap = default_overlap(clip) if overlap is None else overlap
            return plan_of_clips(layout, levels, clip, overlap, context_level or 0.0)
        return noise_plan(layout, levels, "hold", context_level=context_level or 0.0)

    def attach(self, backbone: Backbone, seed: int = 0) -> None:
        """With `labels`: a table of classes, trained with the model."""
        if self.labels is None:
            return super().attach(backbone, seed)
        config = backbone.config
        dim = getattr(config, "text_dim", None) or getattr(config, "caption_channels", None)
        if dim is None:
            raise ValueError(
                f"fvdm: {type(backbone).__name__} reads padding or a pooled text besides, not a class alone; labels "
                "work with Wan and Latte"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            table = LabelEmbedding(self.labels, dim)
        old = backbone.conditioner
        if old is None:
            backbone.conditioner = table.to(next(backbone.parameters()).device)
        elif not isinstance(old, LabelEmbedding) or old.table.weight.shape != table.table.weight.shape:
            raise ValueError(
                f"fvdm: labels is {self.labels}, but the model has other conditioning modules; start from one without"
            )

    def check_task(self, task: str) -> None:
        super().check_task(task)
        if self.image_beside and task == "long_video":
            raise ValueError(
                "task 'long_video' goes on from frames that it made, and of these this Stable Video Diffusion has no "
                "image embedding: make shots as long as its clips, or use a text-to-video model"
            )

    def check_backbone(self, capabilities: Capabilities) -> None:
        if capabilities.image_beside and not self.image_beside:
            raise ValueError(
                "fvdm: this model, a Stable Video Diffusion, also takes an image beside every noisy frame: set "
                "method_params.image_beside=true method_params.density=edm method_params.shift=1"
            )
        if self.image_beside and not capabilities.image_beside:
            raise ValueError(
                "fvdm: image_beside is set, but only Stable Video Diffusion takes an image beside its frames: leave "
                "method_params.image_beside out"
            )
        super().check_backbone(capabilities)

    def check_process(self, process: Process) -> None:
        super().check_process(process)
        if isinstance(process, EDM):
            check_edm_levels(self.name, self.density, process)

    @property
    def reads_text(self) -> bool:
        return not self.image_beside

    @property
    def guided(self) -> Mapping[str, tuple[str, ...]]:
        """With `labels` the scale of the text is that of the class; a model that is told nothing has none."""
        if self.image_beside:
            return {"image": ("given",)}
        if self.labels is None:
            return {"text": ("text",)}
        return {"text": ("label",)} if self.labels else {}

    @property
    def classes(self) -> int | None:
        return self.labels

    @property
    def drops(self) -> Mapping[str, float]:
        if self.image_beside:
            return {"given": self.image_drop}
        return {"label": self.label_drop} if self.labels else {}

    def conditions(self, clean: Tensor, layout: ClipLayout, labels: Tensor | None = None) -> dict[str, Tensor]:
        """With `labels`: the class of each sample plus one, [B]; 0 is none. With `image_beside`: the first frame.

        That is given [B,C,1,H,W], zeros where no first frame is given.
        """
        if self.image_beside:
            return {"given": clean[:, :, :1]}
        if self.labels is None:
            return {}
        if self.labels == 0:
            return {"label": torch.zeros(len(clean), dtype=torch.long, device=clean.device)}
        if labels is None:
            raise ValueError(f"fvdm: this model is told one of {self.labels} classes, but these samples have none")
        return {"label": labels.to(clean.device) + 1}

    def prepare(
        self,
        backbone: Backbone,
        layout: ClipLayout,
        text: TextContext | Tensor,
        conditions: Mapping[str, Tensor],
    ) -> dict[str, Any]:
        """The time of texts, where they have one; with `labels` or `image_beside` what stands in the text's place."""
        if self.image_beside:
            return self._prepare_image(backbone, layout, conditions)
        told: dict[str, Any] = {"text_time": self.text_time} if backbone.capabilities.joint_text else {}
        if self.labels is None:
            return told
        table, label = backbone.conditioner, conditions["label"]
        if not isinstance(table, LabelEmbedding):
            raise ValueError("this backbone has no table of classes: call FVDM.attach, or load a folder that holds it")
        context = table((label - 1).clamp(min=0), drop=label == 0)
        return told | {"text": TextContext(context[:, None], torch.zeros(layout.num_frames, dtype=torch.long))}

    def _prepare_image(
        self, backbone: Backbone, layout: ClipLayout, conditions: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """The first frame's latents beside all frames, and its embedding [B,1,D] as a text of one token; or zeros."""
        self.check_backbone(backbone.capabilities)
        assert isinstance(backbone, SVDBackbone)  # of the backbones, the only one that has image_beside
        given, embedding = conditions["given"], conditions.get("embedding")
        if embedding is None:
            raise ValueError("fvdm: this model reads the image embedding of the first frame, `embedding` [B,1,D]")
        known = (given != 0).flatten(1).any(dim=1)  # what is not given, or lost, is all zeros
        token = embedding * known.view(-1, 1, 1).to(embedding)
        return {
            "text": TextContext(token[:, None], torch.zeros(layout.num_frames, dtype=torch.long)),
            "image": ImageCondition(given / backbone.latent_scale, backbone.fps, noise_aug=0.0),
        }

    def loss_weights(self, layout: ClipLayout) -> Tensor:
        return loss_weights(layout, "frame")
