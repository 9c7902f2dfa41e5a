"""The durable record of video jobs: one SQLite file, shared by every process that creates, works on or reads jobs.

A worker holds a job by a lease that it must renew. A lease carries a fence, a number that grows with every lease of
the job, and every write of a worker is accepted only under the current fence: a worker that was thought dead and
comes back cannot overwrite its successor. A job whose lease ran out is waiting again, until its attempts are spent.
States are OpenAI's four: queued -> in_progress -> completed | failed (a cancelled job is failed with code
"cancelled", because clients poll until one of these two).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["queued", "in_progress", "completed", "failed"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of creation, also within one clock tick
    id TEXT NOT NULL UNIQUE,
    created_at REAL NOT NULL,
    completed_at REAL,
    body_hash TEXT NOT NULL,
    idempotency_key TEXT,
    request TEXT NOT NULL,                     -- JSON
    status TEXT NOT NULL,
    progress INTEGER NOT NULL DEFAULT 0,       -- percent
    attempts INTEGER NOT NULL DEFAULT 0,
    fence INTEGER NOT NULL DEFAULT 0,
    worker TEXT,
    lease_until REAL,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    result TEXT,                               -- file name, relative to the service's folder
    error_code TEXT,
    error_message TEXT
);
CREATE TABLE IF NOT EXISTS media (               -- what a job is given; it goes when the job ends
    job TEXT NOT NULL,
    name TEXT NOT NULL,                        -- file name, as the request has it
    data BLOB NOT NULL,
    PRIMARY KEY (job, name)
);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, number);
CREATE INDEX IF NOT EXISTS jobs_by_body ON jobs (body_hash, created_at);
CREATE INDEX IF NOT EXISTS jobs_by_key ON jobs (idempotency_key, created_at);
"""


@dataclass(frozen=True)
class Job:
    id: str
    number: int
    created_at: float
    completed_at: float | None
    request: dict[str, Any]
    status: Status
    progress: int
    attempts: int
    fence: int
    cancel_requested: bool
    result: str | None
    error_code: str | None
    error_message: str | None


@dataclass(frozen=True)
class Lease:
    """The right to work on a job until `lease_until` (renew before), under `fence`."""

    job: Job
    worker: str
    fence: int


class LeaseLost(Exception):
    """The job is no longer this worker's: its lease ran out and was taken, or the job was cancelled or deleted."""


class KeyReused(Exception):
    """An idempotency key came back with another body."""


class NotFinished(Exception):
    """Only completed or failed jobs may be deleted."""


class JobStore:
    """Jobs in the SQLite file `path`. Safe to use from many threads and processes; picklable.

    `lease_s`: seconds a lease lasts without renewal. `max_attempts`: leases a job may use up before it fails.
    `dedupe_s`: seconds in which an equal body without a key is taken for a client's retry. `key_s`: seconds an
    idempotency key is remembered. `clock`: seconds since the epoch.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        lease_s: float = 30.0,
        max_attempts: int = 3,
        dedupe_s: float = 30.0,
        key_s: float = 86400.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = Path(path)
        self.lease_s, self.max_attempts, self.dedupe_s, self.key_s = lease_s, max_attempts, dedupe_s, key_s
        self.clock = clock
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connect() as db:
            db.execute("PRAGMA auto_vacuum=FULL")  # of a new file: the room of media is given back
            db.execute("PRAGMA journal_mode=WAL")
            db.executescript(SCHEMA)

    # -- clients ---------------------------------------------------------------------------------------------------

    def create(
        self, request: dict[str, Any], key: str | None = None, media: Mapping[str, bytes] | None = None
    ) -> tuple[Job, bool]:
        """A new queued job, or the one an earlier equal call made: (job, whether it is new).

        `media`: files that the request names; names must tell contents apart, since equal requests are one.
        With `key`: the same key within `key_s` gives the same job; with another body it raises KeyReused.
        Without: an equal body within `dedupe_s` gives the same job, unless that one failed.
        """
        body = json.dumps(request, sort_keys=True)
        digest, now = hashlib.sha256(body.encode()).hexdigest(), self.clock()
        with self._transaction() as db:
            if key is not None:
                row = self._one(
                    db, "idempotency_key = ? AND created_at > ? ORDER BY number DESC", key, now - self.key_s
                )
                if row is not None and row["body_hash"] != digest:
                    raise KeyReused(f"idempotency key {key!r} was used for another request; use a new key")
            else:
                row = self._one(
                    db,
                    "body_hash = ? AND idempotency_key IS NULL AND created_at > ? AND status != 'failed' "
                    "ORDER BY number DESC",
                    digest,
                    now - self.dedupe_s,
                )
            if row is not None:
                return _job(row), False
            job_id = f"video_{uuid.uuid4().hex}"
            db.execute(
                "INSERT INTO jobs (id, created_at, body_hash, idempotency_key, request, status) "
                "VALUES (?, ?, ?, ?, ?, 'queued')",
                (job_id, now, digest, key, body),
            )
            db.executemany(
                "INSERT INTO media (job, name, data) VALUES (?, ?, ?)",
                [(job_id, name, data) for name, data in (media or {}).items()],
            )
            return _job(self._row(db, job_id)), True

    def get(self, job_id: str) -> Job | None:
        with self._connect() as db:
            row = self._one(db, "id = ?", job_id)
        return None if row is None else _job(row)

    def media(self, job_id: str) -> dict[str, bytes]:
        """The files of an unfinished job, by name."""
        with self._connect() as db:
            return dict(db.execute("SELECT name, data FROM media WHERE job = ?", (job_id,)).fetchall())

    def page(
        self, *, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> tuple[list[Job], bool]:
        """A page of jobs by creation, and whether more follow. Raises KeyError when `after` names no job."""
        with self._connect() as db:
            start = None if after is None else self._row(db, after)["number"]
            compare, direction = (">", "ASC") if order == "asc" else ("<", "DESC")
            where = "" if start is None else f"WHERE number {compare} {int(start)}"
            rows = db.execute(
                f"SELECT * FROM jobs {where} ORDER BY number {direction} LIMIT ?", (limit + 1,)
            ).fetchall()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def cancel(self, job_id: str) -> Job:
        """Ask for an end: a queued job fails at once, a running one at its next step. KeyError for an unknown id."""
        with self._transaction() as db:
            row = self._row(db, job_id)
            if row["status"] == "queued":
                self._end(db, job_id, "failed", code="cancelled", message="cancelled before it started")
            elif row["status"] == "in_progress":
                db.execute("UPDATE jobs SET cancel_requested = 1 WHERE id = ?", (job_id,))
            return _job(self._row(db, job_id))

    def delete(self, job_id: str) -> Job:
        """Remove a completed or failed job and return it; NotFinished otherwise, KeyError for an unknown id."""
        with self._transaction() as db:
            job = _job(self._row(db, job_id))
            if job.status not in ("completed", "failed"):
                raise NotFinished(f"video {job_id} is {job.status}; cancel it first, or wait")
            db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            return job

    # -- dispatcher and workers ------------------------------------------------------------------------------------

    def waiting(self, limit: int = 100) -> list[str]:
        """Ids of jobs to hand to workers, oldest first. Jobs whose last allowed worker vanished are failed here."""
        with self._transaction() as db:
            now = self.clock()
            for row in db.execute(
                "SELECT id FROM jobs WHERE status = 'in_progress' AND lease_until <= ? AND attempts >= ?",
                (now, self.max_attempts),
            ).fetchall():
                message = f"the worker was lost {self.max_attempts} times; the server's log says why"
                self._end(db, row["id"], "failed", code="worker_lost", message=message)
            rows = db.execute(
                "SELECT id FROM jobs WHERE status = 'queued' OR (status = 'in_progress' AND lease_until <= ?) "
                "ORDER BY number LIMIT ?",
                (now, limit),
            ).fetchall()
        return [row["id"] for row in rows]

    def counts(self) -> dict[str, int]:
        with self._connect() as db:
            return dict(db.execute("SELECT status, COUNT(*) FROM jobs GROUP BY status").fetchall())

    def lease(self, worker: str, job_id: str | None = None) -> Lease | None:
        """Take `job_id` (or the oldest waiting job); None when it is not waiting or another worker was faster."""
        with self._transaction() as db:
            now = self.clock()
            row = self._one(
                db,
                "(? IS NULL OR id = ?) AND attempts < ? "
                "AND (status = 'queued' OR (status = 'in_progress' AND lease_until <= ?)) ORDER BY number",
                job_id,
                job_id,
                self.max_attempts,
                now,
            )
            if row is None:
                return None
            db.execute(
                "UPDATE jobs SET status = 'in_progress', progress = 0, attempts = attempts + 1, fence = fence + 1, "
                "worker = ?, lease_until = ? WHERE id = ?",
                (worker, now + self.lease_s, row["id"]),
            )
            job = _job(self._row(db, row["id"]))
            return Lease(job=job, worker=worker, fence=job.fence)

    def renew(self, lease: Lease, progress: int | None = None) -> bool:
        """Extend the lease, note progress (percent), and say whether a cancel was asked for. LeaseLost if not ours."""
        with self._transaction() as db:
            row = self._held(db, lease)
            db.execute(
                "UPDATE jobs SET lease_until = ?, progress = MAX(progress, ?) WHERE id = ?",
                (self.clock() + self.lease_s, row["progress"] if progress is None else progress, lease.job.id),
            )
            return bool(row["cancel_requested"])

    def complete(self, lease: Lease, result: str) -> None:
        """End the job well. LeaseLost when the lease is not ours any more: the caller then removes its result."""
        with self._transaction() as db:
            self._held(db, lease)
            self._end(db, lease.job.id, "completed", result=result)

    def fail(self, lease: Lease, code: str, message: str) -> None:
        """End the job badly (no retry). LeaseLost when the lease is not ours any more."""
        with self._transaction() as db:
            self._held(db, lease)
            self._end(db, lease.job.id, "failed", code=code, message=message)

    def release(self, lease: Lease) -> None:
        """Give the job back at once, as when a worker is told to stop; the attempt is not counted."""
        with self._transaction() as db:
            self._held(db, lease)
            db.execute(
                "UPDATE jobs SET status = 'queued', progress = 0, attempts = attempts - 1, lease_until = NULL "
                "WHERE id = ?",
                (lease.job.id,),
            )

    # -- SQLite ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        try:
            db.row_factory = sqlite3.Row
            yield db
        finally:
            db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction that holds the file's write lock from its first read on."""
        with self._connect() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    @staticmethod
    def _one(db: sqlite3.Connection, where: str, *values: Any) -> sqlite3.Row | None:
        row: sqlite3.Row | None = db.execute(f"SELECT * FROM jobs WHERE {where} LIMIT 1", values).fetchone()
        return row

    def _row(self, db: sqlite3.Connection, job_id: str) -> sqlite3.Row:
        row = self._one(db, "id = ?", job_id)
        if row is None:
            raise KeyError(job_id)
        return row

    def _held(self, db: sqlite3.Connection, lease: Lease) -> sqlite3.Row:
        row = self._one(db, "id = ? AND status = 'in_progress' AND fence = ?", lease.job.id, lease.fence)
        if row is None:
            raise LeaseLost(f"{lease.worker} no longer holds {lease.job.id} (fence {lease.fence})")
        return row

    def _end(
        self,
        db: sqlite3.Connection,
        job_id: str,
        status: Status,
        *,
        result: str | None = None,
        code: str | None = None,
        message: str | None = None,
    ) -> None:
        db.execute(
            "UPDATE jobs SET status = ?, result = ?, error_code = ?, error_message = ?, completed_at = ?, "
            "lease_until = NULL, progress = CASE WHEN ? = 'completed' THEN 100 ELSE progress END WHERE id = ?",
            (status, result, code, message, self.clock(), status, job_id),
        )
        db.execute("DELETE FROM media WHERE job = ?", (job_id,))


def _job(row: sqlite3.Row) -> Job:
    return Job(
        id=row["id"],
        number=row["number"],
        created_at=row["created_at"],
        completed_at=row["completed_at"],
        request=json.loads(row["request"]),
        status=row["status"],
        progress=row["progress"],
        attempts=row["attempts"],
        fence=row["fence"],
        cancel_requested=bool(row["cancel_requested"]),
        result=row["result"],
        error_code=row["error_code"],
        error_message=row["error_message"],
    )
