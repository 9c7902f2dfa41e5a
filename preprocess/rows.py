"""The stages as functions on Ray Data rows: a row is a video's id and its unit as JSON, a few kilobytes.

A long video is one row until its scenes are known, and then one for the scenes of each of its pieces.

No frame travels in a row. Each call is one counted attempt under a time limit, because a broken file can kill or hang
the worker that opens it; what a stage raises ends its own unit only. Where the output cannot be written, the row comes
back as STOPPED with the reason, for the driver to end the run: there may be no room to write that down.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from preprocess.outcome import Failed
from preprocess.pieces import Job, SideBySide, in_turn
from preprocess.room import OutputError
from preprocess.scratch import ScratchRoom
from preprocess.spans import PieceShots
from preprocess.unit import (
    Unit,
    caption_stage,
    decode_stage,
    encode_stage,
    end_stage,
    part_is_there,
    probe_stage,
    run_stage,
    spread,
)
from preprocess.watch import MAX_ATTEMPTS, Attempts
from preprocess.workplace import Workplace

if TYPE_CHECKING:
    from preprocess.aesthetic import AestheticScorer
    from preprocess.asked import Asker

Row = dict[str, str]
STOPPED = "stopped"  # status of a unit that cannot be written: it passes all stages, and nothing is recorded of it


def probe_row(row: Row, place: Workplace) -> Row:
    return _stage("probe", lambda unit: probe_stage(unit, place), row, place)


def decode_row(row: Row, place: Workplace, side_by_side: SideBySide = in_turn, room: ScratchRoom | None = None) -> Row:
    """`room`: waited for before anything is decoded."""
    if room is not None and not Unit.from_json(row["unit"]).status:
        room.wait()
    attempts = _attempts(place)

    def waiting(work: Callable[[Job], PieceShots], jobs: Sequence[Job]) -> list[PieceShots | None]:
        with attempts.paused():  # each piece is an attempt of its own
            return side_by_side(work, jobs)

    return _stage("decode", lambda unit: decode_stage(unit, place, waiting), row, place, attempts)


def caption_row(row: Row, place: Workplace) -> Row:
    return _stage("captions", lambda unit: caption_stage(unit, place), row, place)


def spread_row(row: Row, place: Workplace) -> list[Row]:
    """The scenes of a long video as rows of their own."""
    return [{"video_id": row["video_id"], "unit": one.to_json()} for one in spread(Unit.from_json(row["unit"]), place)]


class CaptionRow:
    """Actor: holds whom captions and states are asked of; where that is an endpoint, many rows are under way at once.

    Then nothing here decodes or computes, every attempt at a question has its time limit, and one timer for the whole
    process, as `Attempts` has it, could not tell the rows apart; a row whose actor dies `Work.rounds` gives again.
    """

    def __init__(self, place: Workplace, make_asker: Callable[[], Asker]) -> None:
        self.place, self.asker = place, make_asker()

    def __call__(self, row: Row) -> Row:
        def stage(unit: Unit) -> None:
            caption_stage(unit, self.place, self.asker)

        if self.asker.side_by_side == 1:
            return _stage("captions", stage, row, self.place)
        unit = Unit.from_json(row["unit"])
        with _stopping(unit, self.place):
            run_stage("captions", stage, unit)
        return {"video_id": row["video_id"], "unit": unit.to_json()}


class EncodeRow:
    """Actor: holds the VAE and the text encoder; writes the part of each video, encoded or set aside."""

    def __init__(
        self,
        place: Workplace,
        model: str,
        device: str,
        threads: int,
        make_aesthetic: Callable[[], AestheticScorer | None] = lambda: None,
    ) -> None:
        from preprocess.encode import Encoder

        self.place = place
        self.encoder = Encoder.from_folder(Path(model), device, threads, make_aesthetic())

    def __call__(self, row: Row) -> Row:
        """Returns only what the driver needs: id, status ("": more of this video is under way), stage, seconds; what to
        drop then, as a worker that dies after it has dropped something cannot be replaced; why the run has to stop.
        """
        unit = Unit.from_json(row["unit"])
        if part_is_there(unit, self.place):
            unit.status = "written"
        else:
            unit = _run("encode", lambda unit: encode_stage(unit, self.place, self.encoder), unit, self.place)
        with _stopping(unit, self.place):
            if unit.status != STOPPED:
                end_stage(unit, self.place, self.encoder.aesthetic)
        stopped = unit.status == STOPPED
        return {
            "video_id": unit.file.video_id,
            "status": "" if stopped else unit.status,
            "stage": unit.stage,
            "seconds": json.dumps(unit.seconds),
            "leftovers": json.dumps([] if stopped else [str(path) for path in self.place.leftovers(unit)]),
            "stopped": unit.reason if stopped else "",
        }


def _attempts(place: Workplace) -> Attempts:
    return Attempts(place.parts / "attempts")


def _stage(
    name: str, stage: Callable[[Unit], None], row: Row, place: Workplace, attempts: Attempts | None = None
) -> Row:
    unit = _run(name, stage, Unit.from_json(row["unit"]), place, attempts)
    return {"video_id": row["video_id"], "unit": unit.to_json()}


def _run(
    name: str, stage: Callable[[Unit], None], unit: Unit, place: Workplace, attempts: Attempts | None = None
) -> Unit:
    if not unit.status:
        with _stopping(unit, place):
            _attempt(name, stage, unit, place, attempts or _attempts(place))
    return unit


@contextmanager
def _stopping(unit: Unit, place: Workplace) -> Iterator[None]:
    """Marks the unit as stopped where the block cannot write."""
    try:
        with place.writing():
            yield
    except OutputError as error:
        unit.status, unit.reason = STOPPED, str(error)


def _attempt(name: str, stage: Callable[[Unit], None], unit: Unit, place: Workplace, attempts: Attempts) -> None:
    # the stage's own deadline comes first and names what was slow; this one is for code that never returns
    hard_limit = 1.25 * place.settings.seconds_per_video + 10
    try:
        with attempts.attempt("-".join([unit.file.video_id, *map(str, unit.group)]), name, hard_limit) as attempt:
            unit.attempts = max(unit.attempts, attempt)
            run_stage(name, stage, unit)
    except Failed as end:
        unit.status, unit.stage, unit.reason, unit.attempts = "failed", end.stage, end.reason, MAX_ATTEMPTS
