"""Rules that leave a sound source or shot out. Each names itself and the measured value, so a reader can disagree.

A rule of shots compares one score with one threshold. Scores are measured and recorded for every shot, kept or not, so
other thresholds can be tried on the records (`preprocess.replay`). The first rule of `RULES` that a shot breaks takes
it; its reason is "rule: what, the value, the threshold". Rules on the whole data set (`preprocess.duplicates`) come
after these, when all shots are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, NamedTuple

from infra.knobs import knob
from preprocess.outcome import Filtered

if TYPE_CHECKING:
    from preprocess.probe import VideoInfo
    from preprocess.settings import PrepareSettings
    from preprocess.spans import RawShot


@dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """Thresholds of the rules on shots; null switches a rule off. Defaults keep ordinary footage and ToyWorld."""

    max_black: float | None = knob(0.25, "share of black frames; of all filters: null = off")
    max_frozen: float | None = knob(0.6, "share of the shot that its longest stretch of equal frames takes")
    min_movement: float | None = knob(0.25, "grey levels by which the liveliest places change in half a second")
    max_shake: float | None = knob(5.0, "percent of the width by which the camera's path jumps per encoded frame")
    max_blur: float | None = knob(0.72, "blur effect of Crete et al., 0 sharp to 1, at training size")
    min_brightness: float | None = knob(0.025, "mean luma, 0 to 1: darker is out")
    max_brightness: float | None = knob(0.97, "mean luma, 0 to 1: brighter is out")
    max_clipped: float | None = knob(0.9, "share of pixels without detail, black or white")
    max_text: float | None = knob(0.08, "share of the picture under overlaid text; needs 100 pixels of height or more")
    min_aesthetic: float | None = knob(4.0, "aesthetic score, about 1 to 10, where aesthetic.* gives a model")
    max_similarity: float | None = knob(0.998, "cosine to a shot of an earlier video: a near-duplicate is out")
    min_hash_distance: int | None = knob(1, "bits of 189 that differ from an earlier video's hash; 1 = equal")
    same_file: bool = knob(True, "take a file with the very bytes of an earlier one out")

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None and value < 0:
                raise ValueError(f"{one.name}={value} is negative; scores are not. null switches the filter off")


NO_FILTERS = FilterSettings(
    max_black=None, max_frozen=None, min_movement=None, max_shake=None, max_blur=None, min_brightness=None,
    max_brightness=None, max_clipped=None, max_text=None, min_aesthetic=None, max_similarity=None,
    min_hash_distance=None, same_file=False,
)  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """`name` takes the shots whose `score` lies under (`min`) or over (`max`) the threshold called `threshold`."""

    name: str
    score: str
    threshold: str
    side: Literal["min", "max"]
    what: str

    def breaks(self, scores: Mapping[str, float], threshold: float | None) -> bool:
        """Whether the rule takes a shot; what could not be measured is kept."""
        value = scores.get(self.score)
        if value is None or threshold is None:
            return False
        return value < threshold if self.side == "min" else value > threshold

    def reason(self, scores: Mapping[str, float], threshold: float) -> str:
        word = "under" if self.side == "min" else "over"
        return f"{self.name}: {self.what} {scores[self.score]:g}, {word} {threshold:g}"


TOO_SHORT = Rule("too_short", "frames", "min_shot_frames", "min", "encoded frames")
AESTHETIC = Rule("aesthetic", "aesthetic", "min_aesthetic", "min", "aesthetic score")
# in the order in which they are asked
RULES = (
    TOO_SHORT,
    Rule("black", "black", "max_black", "max", "share of black frames"),
    Rule("static", "movement", "min_movement", "min", "movement"),
    Rule("frozen", "frozen", "max_frozen", "max", "share of frozen frames"),
    Rule("shaky", "shake", "max_shake", "max", "shake"),
    Rule("dark", "brightness", "min_brightness", "min", "brightness"),
    Rule("bright", "brightness", "max_brightness", "max", "brightness"),
    Rule("clipped", "clipped", "max_clipped", "max", "share of clipped pixels"),
    Rule("blurred", "blur", "max_blur", "max", "blur"),
    Rule("text", "text", "max_text", "max", "share under text"),
    AESTHETIC,
    Rule("hash_duplicate", "hash_distance", "min_hash_distance", "min", "bits of the hash differ:"),
    Rule("near_duplicate", "similarity", "max_similarity", "max", "similarity"),
)
DATASET_RULES = RULES[-2:]
SAME_FILE = "same_file"
# columns of manifest.parquet; `bars` is measured for readers, judged by no rule
SCORES = tuple(dict.fromkeys(rule.score for rule in RULES)) + ("bars",)


def thresholds(settings: PrepareSettings) -> dict[str, float | None]:
    """Threshold of every rule by its name in the settings."""
    named = {rule.threshold: getattr(settings.filters, rule.threshold) for rule in RULES if rule is not TOO_SHORT}
    if not settings.aesthetic_key:
        named[AESTHETIC.threshold] = None  # no model, no scores
    return {"min_shot_frames": settings.min_shot_frames, **named}


def first_broken(
    scores: Mapping[str, float], limits: Mapping[str, float | None], rules: Sequence[Rule] = RULES
) -> Rule | None:
    """The first of `rules` that takes a shot with these scores; None keeps it."""
    return next((rule for rule in rules if rule.breaks(scores, limits.get(rule.threshold))), None)


def judge(scores: Mapping[str, float], limits: Mapping[str, float | None], rules: Sequence[Rule] = RULES) -> str:
    """Why a shot is left out; "" where it is kept."""
    rule = first_broken(scores, limits, rules)
    if rule is None:
        return ""
    limit = limits[rule.threshold]
    assert limit is not None
    return rule.reason(scores, limit)


class VideoShape(NamedTuple):
    """What the container index shows of a video, as displayed."""

    width: int
    height: int
    fps: float
    frames: int
    seconds: float


@dataclass(frozen=True)
class VideoRule:
    """A rule on a video before anything is decoded; `reason` says why it takes one, "" where it does not."""

    name: str
    threshold: float
    reason: Callable[[VideoShape], str]


def video_rules(settings: PrepareSettings) -> list[VideoRule]:
    """In the order in which they are asked."""
    needed = settings.min_rate * settings.fps
    shortest = (settings.min_shot_frames - 1) / settings.fps

    def resolution(video: VideoShape) -> str:
        if min(video.width, video.height) >= settings.min_side:
            return ""
        return f"too small: {video.width}x{video.height}, shorter side under {settings.min_side}"

    def frame_rate(video: VideoShape) -> str:
        if video.frames <= 1 or video.fps >= needed:
            return ""
        return f"frame rate too low: {video.fps:.2f} frames/s, under {needed:g}"

    def duration(video: VideoShape) -> str:
        if video.seconds > shortest and video.frames >= 2:
            return ""
        return (
            f"too short: {video.seconds:.2f} s, {video.frames} frames; a shot needs {settings.min_shot_frames} frames "
            f"at {settings.fps:g} frames/s"
        )

    return [
        VideoRule("resolution", settings.min_side, resolution),
        VideoRule("frame_rate", needed, frame_rate),
        VideoRule("duration", shortest, duration),
    ]


def check_video(info: VideoInfo, settings: PrepareSettings) -> None:
    """End a source that a rule on videos takes. Raises Filtered."""
    shape = VideoShape(info.width, info.height, info.fps, len(info.pts), info.duration_s)
    for rule in video_rules(settings):
        if reason := rule.reason(shape):
            raise Filtered("filters", reason)


def stage_of_shots(cuts: str) -> str:
    """The stage in which a source ends of which no shot is left: where captions cut it, others have another outcome."""
    return "captions" if cuts == "captions" else "filters"


def check_shots(shots: Sequence[RawShot], settings: PrepareSettings) -> None:
    """End a source of which no shot is left. Raises Filtered."""
    if any(shot.span_pts for shot in shots):
        return
    if all(shot.filtered.startswith(TOO_SHORT.name) for shot in shots):
        longest = max(shot.end_frame - shot.start_frame for shot in shots)
        raise Filtered(
            stage_of_shots(settings.cuts),
            f"no shot is long enough: the longest of {len(shots)} has {longest} source frames, and a shot needs "
            f"{settings.min_shot_frames} at {settings.fps:g} frames/s",
        )
    reasons = summary([shot.filtered for shot in shots])
    raise Filtered(stage_of_shots(settings.cuts), f"no shot is left of {len(shots)}: {reasons}")


def summary(reasons: Sequence[str]) -> str:
    """Why shots were left out, in one line: the reason where it is one, else how many each rule took."""
    left = [reason for reason in reasons if reason]
    if len(left) == 1:
        return left[0]
    names = [rule_of(reason) for reason in left]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


def rule_of(reason: str) -> str:
    """Name of the rule that gave a reason."""
    return reason.partition(":")[0]
