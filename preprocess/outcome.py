"""How a source can end before it is written: set aside by a rule, or failed in a stage. One reason, in plain words."""

from __future__ import annotations


class SetAside(Exception):
    """Ends the work on one source; `stage` and `reason` go into sources.parquet, nothing else is affected."""

    status = "failed"

    def __init__(self, stage: str, reason: str):
        super().__init__(f"{stage}: {reason}")
        self.stage, self.reason = stage, reason


class Failed(SetAside):
    """The source is damaged, unreadable, or took too long."""


class Filtered(SetAside):
    """The source is sound, but a rule leaves it out; the reason names the rule and the measured value."""

    status = "filtered"


def short(error: BaseException, limit: int = 200) -> str:
    """An exception in one line."""
    text = getattr(error, "strerror", None) or str(error)  # strerror: without the path, which the record has anyway
    return f"{type(error).__name__}: {' '.join(text.split())}"[:limit]
