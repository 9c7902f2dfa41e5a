"""Where a run keeps its files while it is under way, and what a stage that cannot write there raises."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from preprocess.answers import ANSWERS, Answers, question_key
from preprocess.captions import template_hash
from preprocess.outcome import Failed
from preprocess.pieces import FRAMES, frames_file
from preprocess.remote import copy_here, is_direct
from preprocess.room import writing
from preprocess.settings import PrepareSettings
from preprocess.sizes import Size
from preprocess.sources import fields_text

if TYPE_CHECKING:
    from preprocess.parts import Row
    from preprocess.unit import Unit

Stage = TypeVar("Stage", bound=Callable[..., Any])


@dataclass(frozen=True)
class Workplace:
    """Where a run keeps its files, and the keys of its settings."""

    settings: PrepareSettings
    parts: Path
    scratch: Path
    encoder_key: str

    def scratch_file(self, unit: Unit, piece: int = 0) -> Path:
        """Where the encoded spans of a video wait, or those of one piece of it."""
        return frames_file(self.film(unit), piece) if piece else self.scratch / f"{unit.file.video_id}{FRAMES}"

    def film(self, unit: Unit) -> Path:
        """The folder of a long video that is under way. Its name says what it depends on, so it outlives a run."""
        settings = self.settings_of(unit)
        depends = [
            unit.sha256,
            unit.captions_sha256,
            fields_text(unit.file),
            [asdict(one) for one in unit.references],
            asdict(settings),
            _keys(settings, self.encoder_key),
        ]
        return self.parts / "films" / f"{unit.file.video_id}-{question_key(depends, sorted(unit.recall))[:12]}"

    def part_folder(self, unit: Unit) -> Path:
        """Where the part of a unit goes: that of some scenes of a long video waits for the others."""
        return self.film(unit) / f"scenes-{unit.group[0]:04d}" if unit.group else self.parts

    def video(self, unit: Unit) -> str:
        """The source as a local path; one in a tar or at an address is copied to scratch until it is decoded."""
        return self._here(unit.file.path, unit.file.span, self._copies(unit)[0])

    def captions(self, unit: Unit) -> str | None:
        """The caption file as a local path, alike; None where there is none, or it is known to hold no captions."""
        file = unit.file
        if not file.captions or unit.untold:
            return None
        try:
            return self._here(file.captions, file.captions_span, self._copies(unit)[1])
        except Failed as error:  # of its own stage, so that it is looked at again when it has changed
            raise Failed("captions", f"the caption file: {error.reason}") from error

    def leftovers(self, unit: Unit) -> list[Path]:
        """All that may lie in scratch for a source; nobody needs it once the source has its part."""
        return [self.scratch_file(unit), *self._copies(unit), self.film(unit)]

    def forget(self, unit: Unit) -> None:
        """Drop all that lies in scratch for a source."""
        drop(self.leftovers(unit))

    def forget_video(self, unit: Unit) -> None:
        """Drop the copy that was made for the decode."""
        self._copies(unit)[0].unlink(missing_ok=True)

    def _copies(self, unit: Unit) -> tuple[Path, Path]:
        # a name with the suffix: some demuxers go by it
        suffix = re.search(r"(\.[A-Za-z0-9]{1,8})(~\d+)?$", unit.file.name)
        stem = f"{unit.file.video_id}.source"
        return self.scratch / f"{stem}{suffix[1] if suffix else ''}", self.scratch / f"{stem}.captions.json"

    def _here(self, path: str, span: list[int] | None, copy: Path) -> str:
        if is_direct(path, span):
            return path
        if not copy.exists():
            copy_here(path, span, copy)
        return str(copy)

    def settings_of(self, unit: Unit) -> PrepareSettings:
        """The settings at the size that the unit takes, once it is known."""
        return self.settings.at(unit.size) if unit.size else self.settings

    def answers(self) -> Answers:
        """What models have answered for this output folder."""
        return Answers(self.parts.parent / ANSWERS, self.parts / "answers")

    def keys(self, size: Size | None = None) -> dict[str, str]:
        """What the results of this run depend on; equal keys and equal input mean equal results.

        `size`: of a video that takes this one; None: of one that ended before its size was known.
        """
        return dict(_keys(self.settings.at(size) if size else self.settings, self.encoder_key))

    def keys_for(self, row: Row) -> dict[str, str]:
        """What the result of an earlier row of sources.parquet would depend on now; {}: on what it does not say."""
        if not self.settings.sizes:
            return self.keys()
        picture = row.get("picture_height"), row.get("picture_width")
        if picture[0] and picture[1]:
            return self.keys(self.settings.size_of((picture[0], picture[1])))
        return {} if row["shots"] else self.keys()

    def writing(self) -> AbstractContextManager[None]:
        """Turns errors in writing here into OutputErrors."""
        return writing(self.parts.parent, self.parts, self.scratch)


@lru_cache  # asked for every source of a run
def _keys(settings: PrepareSettings, encoder_key: str) -> dict[str, str]:
    return {
        "vision_key": settings.vision_key(),
        "caption_key": settings.caption_key(template_hash(settings.captions)),
        "encoder_key": question_key(encoder_key, settings.tile)[:16] if settings.tile else encoder_key,
    }


def drop(paths: Iterable[Path]) -> None:
    """Remove files and folders that are there."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def writes(stage: Stage) -> Stage:
    """A stage function whose errors in writing to the place, its second argument, are OutputErrors."""

    @wraps(stage)
    def guarded(unit: Unit, place: Workplace, *args: Any, **kwargs: Any) -> Any:
        with place.writing():
            return stage(unit, place, *args, **kwargs)

    return guarded  # type: ignore[return-value]
