"""The job store: leases, fences, restarts and repeated requests."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
from pathlib import Path

import pytest

from sample.jobs import JobStore, KeyReused, LeaseLost, NotFinished


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> JobStore:
    return JobStore(tmp_path / "jobs.sqlite", lease_s=10, max_attempts=2, dedupe_s=30, key_s=100, clock=clock)


def test_a_job_goes_from_queued_to_completed(store: JobStore) -> None:
    job, new = store.create({"prompt": "a"})
    assert new and job.status == "queued" and job.progress == 0
    lease = store.lease("w1")
    assert lease is not None and lease.job.id == job.id and lease.job.attempts == 1
    assert store.renew(lease, progress=40) is False
    assert store.get(job.id).status == "in_progress" and store.get(job.id).progress == 40
    store.renew(lease, progress=30)
    assert store.get(job.id).progress == 40, "progress never runs backward"
    store.complete(lease, "v.mp4")
    done = store.get(job.id)
    assert (done.status, done.progress, done.result) == ("completed", 100, "v.mp4") and done.completed_at == 1000.0


def test_media_stay_with_a_job_until_it_ends(store: JobStore, clock: Clock, tmp_path: Path) -> None:
    first, _ = store.create({"prompt": "a", "file": "f.png"}, media={"f.png": b"1", "g.mkv": b"22"})
    other, _ = store.create({"prompt": "b", "file": "f.png"}, media={"f.png": b"1"})
    again, new = store.create({"prompt": "a", "file": "f.png"}, media={"f.png": b"1", "g.mkv": b"22"})
    assert again.id == first.id and not new
    assert store.media(first.id) == {"f.png": b"1", "g.mkv": b"22"} and store.media("none") == {}
    store.release(store.lease("w1", first.id))
    assert len(JobStore(tmp_path / "jobs.sqlite").media(first.id)) == 2, "another attempt needs them"
    store.complete(store.lease("w2", first.id), "v.mp4")
    assert store.media(first.id) == {} and store.media(other.id) == {"f.png": b"1"}, "each job has its own"
    for worker in ("w1", "w2"):  # it dies twice
        store.lease(worker, other.id)
        clock.now += 11
    assert store.waiting() == [] and store.get(other.id).error_code == "worker_lost" and store.media(other.id) == {}


def test_a_store_gives_the_room_of_media_back(store: JobStore) -> None:
    job, _ = store.create({"prompt": "a"}, media={"f.mkv": bytes(5_000_000)})
    lease = store.lease("w1", job.id)
    store.complete(lease, "v.mp4")
    with sqlite3.connect(store.path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert store.path.stat().st_size < 500_000


def test_two_workers_cannot_take_one_lease(store: JobStore) -> None:
    store.create({"prompt": "a"})
    assert store.lease("w1") is not None
    assert store.lease("w2") is None


def test_many_threads_share_the_jobs_without_overlap(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite")
    for index in range(20):
        store.create({"n": index})
    taken: list[str] = []
    barrier = threading.Barrier(6)

    def work(name: str) -> None:
        barrier.wait()
        while (lease := store.lease(name)) is not None:
            taken.append(lease.job.id)

    threads = [threading.Thread(target=work, args=(f"w{k}",)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 20 and len(set(taken)) == 20


def _lease_in_process(path: str, answers: multiprocessing.Queue) -> None:
    lease = JobStore(path).lease("other process")
    answers.put(None if lease is None else lease.fence)


def test_processes_see_one_another(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite")
    store.create({"prompt": "a"})
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_lease_in_process, args=(str(store.path), answers))
    process.start()
    assert answers.get(timeout=60) == 1
    process.join()
    assert store.lease("here") is None


def test_an_expired_lease_is_taken_over_and_the_late_writer_refused(store: JobStore, clock: Clock) -> None:
    job, _ = store.create({"prompt": "a"})
    late = store.lease("w1")
    clock.now += 9
    store.renew(late)  # now good until 1019
    clock.now += 9
    assert store.waiting() == [] and store.lease("w2") is None
    clock.now += 2
    assert store.waiting() == [job.id]
    heir = store.lease("w2")
    assert heir.fence > late.fence and heir.job.attempts == 2
    for write in (
        lambda: store.renew(late, 99),
        lambda: store.complete(late, "late.mp4"),
        lambda: store.fail(late, "x", "late"),
        lambda: store.release(late),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert store.get(job.id).progress == 0
    store.complete(heir, "heir.mp4")
    assert store.get(job.id).result == "heir.mp4"
    with pytest.raises(LeaseLost):
        store.complete(heir, "twice.mp4")


def test_an_expired_lease_that_nobody_took_can_still_be_renewed(store: JobStore, clock: Clock) -> None:
    store.create({"prompt": "a"})
    lease = store.lease("w1")
    clock.now += 60
    store.renew(lease)
    assert store.lease("w2") is None


def test_a_job_that_keeps_losing_its_worker_fails(store: JobStore, clock: Clock) -> None:
    job, _ = store.create({"prompt": "a"})
    for _ in range(2):
        assert store.lease("w") is not None
        clock.now += 11
    assert store.lease("w") is None
    assert store.waiting() == []
    failed = store.get(job.id)
    assert (failed.status, failed.error_code) == ("failed", "worker_lost")


def test_a_released_job_waits_again_and_keeps_its_attempts(store: JobStore) -> None:
    job, _ = store.create({"prompt": "a"})
    for _ in range(5):
        store.release(store.lease("w"))
    assert store.waiting() == [job.id] and store.get(job.id).attempts == 0


def test_jobs_outlive_the_process_that_made_them(store: JobStore, clock: Clock) -> None:
    queued, _ = store.create({"prompt": "queued"})
    running, _ = store.create({"prompt": "running"})
    store.lease("w1", running.id)
    again = JobStore(store.path, lease_s=10, clock=clock)
    assert again.get(queued.id).request == {"prompt": "queued"}
    assert again.waiting() == [queued.id]
    clock.now += 11
    assert again.waiting() == [queued.id, running.id]


def test_a_repeated_body_is_one_job_inside_the_window(store: JobStore, clock: Clock) -> None:
    first, new = store.create({"prompt": "a", "seed": 1})
    again, new_again = store.create({"seed": 1, "prompt": "a"})
    assert new and not new_again and again.id == first.id
    assert store.create({"prompt": "a", "seed": 2})[0].id != first.id
    clock.now += 31
    assert store.create({"prompt": "a", "seed": 1})[0].id != first.id


def test_a_failed_job_does_not_answer_for_a_new_try(store: JobStore) -> None:
    first, _ = store.create({"prompt": "a"})
    store.fail(store.lease("w"), "generation_failed", "out of memory")
    assert store.create({"prompt": "a"})[0].id != first.id


def test_an_idempotency_key_names_one_job(store: JobStore, clock: Clock) -> None:
    first, _ = store.create({"prompt": "a"}, key="k")
    clock.now += 60
    assert store.create({"prompt": "a"}, key="k")[0].id == first.id
    assert store.create({"prompt": "a"}, key="other")[0].id != first.id
    with pytest.raises(KeyReused, match="'k'"):
        store.create({"prompt": "b"}, key="k")
    clock.now += 41
    assert store.create({"prompt": "b"}, key="k")[1], "a key is forgotten after its window"


def test_cancel_of_a_queued_and_of_a_running_job(store: JobStore) -> None:
    queued, _ = store.create({"prompt": "a"})
    assert store.cancel(queued.id).error_code == "cancelled"
    assert store.waiting() == []
    store.create({"prompt": "b"})
    lease = store.lease("w")
    assert store.cancel(lease.job.id).status == "in_progress"
    assert store.renew(lease) is True
    with pytest.raises(KeyError):
        store.cancel("video_none")


def test_delete_needs_a_finished_job(store: JobStore) -> None:
    job, _ = store.create({"prompt": "a"})
    with pytest.raises(NotFinished):
        store.delete(job.id)
    lease = store.lease("w")
    with pytest.raises(NotFinished):
        store.delete(job.id)
    store.complete(lease, "v.mp4")
    assert store.delete(job.id).result == "v.mp4" and store.get(job.id) is None


def test_pages_follow_one_another_in_both_orders(store: JobStore) -> None:
    ids = [store.create({"n": n})[0].id for n in range(5)]
    page, more = store.page(limit=2, order="asc")
    assert [j.id for j in page] == ids[:2] and more
    page, more = store.page(limit=3, order="asc", after=ids[1])
    assert [j.id for j in page] == ids[2:] and not more
    page, more = store.page(limit=3)
    assert [j.id for j in page] == ids[:1:-1] and more
    with pytest.raises(KeyError):
        store.page(after="video_none")
