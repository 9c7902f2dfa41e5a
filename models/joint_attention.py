"""Attention over the text and the video tokens of a clip together (MMDiT), without ever building an N x N mask.

B batch, F frames of tokens, n tokens per frame, T texts, L tokens per text, d width of a head.

The clip falls into *units*, inside which everything may be related: the whole clip under the rule "full", a shot under
"group_causal", a frame under "same_frame". Every unit has its own copy of each text that its frames read, so that its
text tokens see what its frames see, and no more. The rule says which frames that is. Which texts it is depends on
whether texts have positions: where they have (LCT 2503.10589, interleaved positions), all texts of the units that are
seen; where they have none, a frame sees the text that it reads and no other, because nothing else could tell it which
of several texts is its own.

Of a dummy frame (LCT's global prompt, `models.layout.with_story`) all see the first token only: the frame stands for
one. What comes out for its others means nothing.

A text has no noise level of its own, and where its readers differ in level it must be told one time (`TextTime`).

Text may be padded. Padding is cut off, and only where the samples of a batch differ in length is the rest of it masked,
as keys [B,1,1,K].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import Attend, AttentionRule, sdpa

# the time of a text whose readers differ in level: the mean of their time embeddings (Pusa's joint-text models, after
# FVDM 2410.03160), or that of the highest level among them, which is the clock
TextTime = Literal["mean", "max"]


@dataclass(frozen=True)
class JointPart:
    """These texts and these frames attend, in one call, to those texts and those frames."""

    texts: slice
    frames: tuple[int, ...]
    key_texts: slice
    key_frames: slice


@dataclass(frozen=True)
class JointPlan:
    """T text copies, in the order of their tokens, and who attends to whom; every token is in exactly one part."""

    text_groups: tuple[int, ...]  # the text group that each is a copy of
    text_frames: tuple[tuple[int, ...], ...]  # the frames that read each
    parts: tuple[JointPart, ...]
    back: tuple[int, ...]  # where each frame stands in the parts' order
    alone: bool  # the parts are equally large and see themselves only
    dummies: tuple[int, ...] = ()  # frames that are seen as one token


def joint_plan(
    shots: Sequence[int],  # frames of each shot
    reads: Sequence[int],  # the text group that each frame reads, F of them
    rule: AttentionRule,
    texts_have_positions: bool = False,
    dummies: Sequence[int] = (),  # frames of role "dummy"
) -> JointPlan:
    """The plan of a clip. A text that no frame reads has no copy, and so costs nothing."""
    frames = sum(shots)
    if len(reads) != frames:
        raise ValueError(f"{len(reads)} frames read a text, the shots {list(shots)} have {frames}")
    shot_of = [shot for shot, size in enumerate(shots) for _ in range(size)]
    units = {"full": [0] * frames, "group_causal": shot_of, "same_frame": list(range(frames))}
    if rule not in units:
        raise ValueError(f"unknown attention rule {rule!r}; choose one of {', '.join(get_args(AttentionRule))}")
    unit_of = units[rule]
    readers: dict[tuple[int, int], list[int]] = {}  # (unit, text group) -> frames; in the order of the units
    for frame, (unit, group) in enumerate(zip(unit_of, reads, strict=True)):
        readers.setdefault((unit, group), []).append(frame)

    text_frames = tuple(map(tuple, readers.values()))
    parts = []
    for unit in range(unit_of[-1] + 1):
        own = [frame for frame in range(frames) if unit_of[frame] == unit]
        texts = [i for i, (of, _) in enumerate(readers) if of == unit]
        key_frames = slice(0 if rule == "group_causal" else own[0], own[-1] + 1)
        if texts_have_positions:
            text_slice = slice(texts[0], texts[-1] + 1)
            key_texts = slice(0 if rule == "group_causal" else texts[0], texts[-1] + 1)
            parts.append(JointPart(text_slice, tuple(own), key_texts, key_frames))
        else:
            for i in texts:
                parts.append(JointPart(slice(i, i + 1), text_frames[i], slice(i, i + 1), key_frames))
    groups = tuple(group for _, group in readers)
    order = [frame for part in parts for frame in part.frames]
    back = tuple(sorted(range(frames), key=order.__getitem__))
    return JointPlan(groups, text_frames, tuple(parts), back, rule == "same_frame", tuple(dummies))


def mean_over_readers(frames: Tensor, text_frames: Sequence[Sequence[int]]) -> Tensor:
    """What frames [B,F,D] have, as the mean over the frames that read each of T texts: [B,T,D]."""
    return torch.stack([frames[:, list(read_by)].mean(dim=1) for read_by in text_frames], dim=1)


def check_text_time(text_time: str) -> None:
    """Raises ValueError for what is no `TextTime`."""
    if text_time not in get_args(TextTime):
        raise ValueError(f"text_time is {text_time!r}; choose mean or max")


@dataclass(frozen=True, eq=False)
class TextPadding:
    """Which tokens of padded text copies are valid."""

    longest: tuple[int, ...]  # most valid tokens of each copy over the batch
    differs: tuple[bool, ...]  # do the samples of the batch differ in it?
    valid: Tensor  # bool [B,T,L]


def text_padding(lengths: Sequence[Sequence[int]], valid: Tensor) -> TextPadding | None:
    """From the number of valid tokens of every sample's T text copies, B rows of T; None where all L are valid."""
    if all(length == valid.shape[2] for row in lengths for length in row):
        return None
    per_copy = list(zip(*lengths, strict=True))
    return TextPadding(tuple(map(max, per_copy)), tuple(len(set(row)) > 1 for row in per_copy), valid)


def joint_attention(
    q: Tensor,  # [B,T*L+F*n,heads,d]: the tokens of all text copies, then those of all frames
    k: Tensor,
    v: Tensor,
    text_tokens: int,  # T*L
    plan: JointPlan,
    attend: Attend = sdpa,
    padding: TextPadding | None = None,  # None: all text tokens are valid
    past: tuple[Tensor, Tensor] | None = None,  # keys and values of tokens that all see, [B,P,heads,d]
) -> Tensor:
    """Attention under a plan, exact, one dense call per part; [B,T*L+F*n,heads,d].

    What a part does not see never enters its arithmetic. Parts that see themselves only are one call, as a batch.
    What comes out for a padding token means nothing.
    """
    if len(plan.parts) == 1 and padding is None and not plan.dummies:
        return attend(q, *_behind(past, k, v))  # all see all
    texts, frames = len(plan.text_groups), len(plan.back)

    def split(x: Tensor) -> tuple[Tensor, Tensor]:  # [B,T,L,heads,d] and [B,F,n,heads,d]
        return x[:, :text_tokens].unflatten(1, (texts, -1)), x[:, text_tokens:].unflatten(1, (frames, -1))

    (q_text, q_video), (k_text, k_video), (v_text, v_video) = split(q), split(k), split(v)
    if plan.alone:
        if past is not None:
            raise ValueError("frames that see themselves only have no past: use the rule group_causal")
        folded = [
            torch.cat(pair, dim=2).flatten(0, 1)  # [B*F,L+n,heads,d]
            for pair in ((q_text, q_video), (k_text, k_video), (v_text, v_video))
        ]
        mask = () if padding is None else (_key_mask([padding.valid.flatten(0, 1)], folded[1]),)
        out = attend(*folded, *mask).unflatten(0, (-1, frames))
        return torch.cat([x.flatten(1, 2) for x in out.split([q_text.shape[2], q_video.shape[2]], dim=2)], dim=1)

    length = q_text.shape[2]
    longest = (length,) * texts if padding is None else padding.longest
    text_outs, video_outs = [], []
    for part in plan.parts:
        video = _take(q_video, part.frames)
        query = _join(q_text, part.texts, longest, video.flatten(1, 2))
        key = _join(k_text, part.key_texts, longest, _seen(k_video, part.key_frames, plan.dummies))
        value = _join(v_text, part.key_texts, longest, _seen(v_video, part.key_frames, plan.dummies))
        key, value = _behind(past, key, value)
        if padding is not None and any(padding.differs[part.key_texts]):
            if past is not None:
                raise ValueError("texts of different lengths in a batch behind a past: give all the same length")
            seen = range(texts)[part.key_texts]
            out = attend(query, key, value, _key_mask([padding.valid[:, i, : longest[i]] for i in seen], key))
        else:
            out = attend(query, key, value)
        *text_out, video_out = out.split([*longest[part.texts], video.shape[1] * video.shape[2]], dim=1)
        text_outs += [F.pad(x, (0, 0, 0, 0, 0, length - x.shape[1])) for x in text_out]
        video_outs.append(video_out.unflatten(1, (len(part.frames), -1)))
    return torch.cat([*text_outs, _take(torch.cat(video_outs, dim=1), plan.back).flatten(1, 2)], dim=1)


def seen_later(x: Tensor, text_tokens: int, plan: JointPlan, texts_have_positions: bool) -> Tensor:
    """What later units see of keys or values [B,T*L+F*n,heads,d]: all frames, and texts where they have positions."""
    frames = len(plan.back)
    video = _seen(x[:, text_tokens:].unflatten(1, (frames, -1)), slice(0, frames), plan.dummies)
    return torch.cat([x[:, :text_tokens], video], dim=1) if texts_have_positions else video


def _behind(past: tuple[Tensor, Tensor] | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with those of the past in front."""
    return (key, value) if past is None else (torch.cat([past[0], key], dim=1), torch.cat([past[1], value], dim=1))


def _join(text: Tensor, texts: slice, longest: tuple[int, ...], video: Tensor) -> Tensor:
    """The valid tokens of some texts of [B,T,L,heads,d], then those of the video [B,N,heads,d]."""
    parts = [text[:, i, : longest[i]] for i in range(text.shape[1])[texts]]
    return torch.cat([*parts, video], dim=1)


def _seen(video: Tensor, frames: slice, dummies: tuple[int, ...]) -> Tensor:
    """The tokens of some frames of [B,F,n,heads,d], of dummies the first one each: [B,N,heads,d]."""
    parts, start = [], frames.start
    for dummy in (f for f in dummies if frames.start <= f < frames.stop):
        parts += [video[:, start:dummy].flatten(1, 2), video[:, dummy, :1]]
        start = dummy + 1
    rest = video[:, start : frames.stop].flatten(1, 2)
    return torch.cat([*parts, rest], dim=1) if parts else rest


def _key_mask(valid: list[Tensor], key: Tensor) -> Tensor:
    """[B,1,1,K] for keys [B,K,heads,d] that are text tokens, of which `valid` [B,L] each are, and then video."""
    text = torch.cat(valid, dim=1)
    return F.pad(text, (0, key.shape[1] - text.shape[1]), value=True)[:, None, None]


def _take(x: Tensor, frames: tuple[int, ...]) -> Tensor:
    """Frames of x [B,F,...]; a view where they are an unbroken run."""
    if frames == tuple(range(frames[0], frames[0] + len(frames))):
        return x[:, frames[0] : frames[0] + len(frames)]
    return x[:, torch.tensor(frames, device=x.device)]
