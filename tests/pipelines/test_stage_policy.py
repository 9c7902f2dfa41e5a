"""The policy for Ray Data's scheduler, asked by Ray's own function that picks what may run. No session is started."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.data._internal.execution.backpressure_policy import ENABLED_BACKPRESSURE_POLICIES
from ray.data._internal.execution.streaming_executor_state import get_eligible_operators

import pipelines.stage_policy as module
from pipelines.stage_policy import StagePolicy, StageState, stage_policies, stage_states
from preprocess.scratch import ScratchRoom


class Op:
    """What the scheduler asks of an operator of a plan."""

    def __init__(self, name: str, workers_up: bool = True) -> None:
        self.name, self.running, self.workers_up = name, 0, workers_up
        self.metrics = SimpleNamespace(num_tasks_finished=0)

    def num_active_tasks(self) -> int:
        return self.running

    def has_completed(self) -> bool:
        return False

    def can_add_input(self) -> bool:
        return self.workers_up

    def notify_in_task_submission_backpressure(self, *_: object) -> None:
        pass


class State:
    def __init__(self, waiting: int) -> None:
        self.waiting = waiting

    def has_pending_bundles(self) -> bool:
        return self.waiting > 0

    def total_enqueued_input_blocks(self) -> int:
        return self.waiting


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(module, "_INTERVAL", 0.0)
    read, decode, encode = (
        Op("ReadParquet->SplitBlocks(1)"),
        Op("Map(probe_row)->Map(decode_row)->Map(caption_row)->FlatMap(spread_row)"),
        Op("Map(EncodeRow)"),
    )
    topology = {read: State(0), decode: State(5), encode: State(2)}
    room = ScratchRoom((tmp_path,), limit=100)
    policy = StagePolicy(None, topology, None, decode="decode_row", room=room, rows=9, watcher="")

    def eligible() -> list[Op]:
        return get_eligible_operators(topology, [policy], ensure_liveness=True)

    return SimpleNamespace(
        read=read, decode=decode, encode=encode, topology=topology, folder=tmp_path, eligible=eligible
    )


def test_decode_goes_on_while_there_is_room(plan: SimpleNamespace) -> None:
    assert plan.eligible() == [plan.decode, plan.encode]
    (plan.folder / "a.frames").write_bytes(bytes(99))
    assert plan.decode in plan.eligible()


def test_nothing_is_decoded_into_full_scratch_while_an_encoder_works(plan: SimpleNamespace) -> None:
    (plan.folder / "a.frames").write_bytes(bytes(100))
    assert plan.eligible() == [plan.encode]
    plan.encode.running, plan.encode.workers_up = 1, False
    assert plan.eligible() == []
    (plan.folder / "a.frames").unlink()
    assert plan.eligible() == [plan.decode]


def test_full_scratch_locks_no_run(plan: SimpleNamespace) -> None:
    """Where nothing runs, as frames of a worker that died are all that is left, Ray starts one decode against us."""
    (plan.folder / "of_a_worker_that_died.frames").write_bytes(bytes(100))
    plan.topology[plan.encode].waiting = 0
    assert plan.eligible() == [plan.decode]
    plan.decode.running = 1
    assert plan.eligible() == []


def test_a_plan_that_names_no_decode_is_refused(plan: SimpleNamespace) -> None:
    with pytest.raises(RuntimeError, match=r"no operator of Ray Data runs decode_row: \['Map\(EncodeRow\)'\]"):
        StagePolicy(
            None, {plan.encode: State(0)}, None, decode="decode_row", room=ScratchRoom((), 1), rows=1, watcher=""
        )


def test_stages_say_where_the_rows_are(plan: SimpleNamespace) -> None:
    plan.decode.metrics.num_tasks_finished, plan.decode.running = 3, 1
    plan.encode.metrics.num_tasks_finished, plan.encode.running = 1, 1
    assert stage_states(plan.topology, 9) == [
        StageState("probe, decode, captions", done=3, running=1, waiting=5, total=9),
        # 6 of 9 rows are still to come; a film that is already cut has brought one row more
        StageState("encode", done=1, running=1, waiting=2, total=10),
    ]


def test_the_watcher_is_told_in_the_driver_alone(plan: SimpleNamespace) -> None:
    """Ray copies its context, and sends it to workers, where nobody watches."""
    told: list[list[StageState]] = []
    options = {"decode": "decode_row", "room": ScratchRoom((plan.folder,), 100), "rows": 9}
    with stage_policies(**options, watcher=told.append) as policies:
        *theirs, ours = copy.deepcopy(policies)
        assert theirs == ENABLED_BACKPRESSURE_POLICIES
        policy = pickle.loads(pickle.dumps(ours))(None, plan.topology, None)
        get_eligible_operators(plan.topology, [policy], ensure_liveness=True)
        assert told == [stage_states(plan.topology, 9)]
    get_eligible_operators(plan.topology, [policy], ensure_liveness=True)
    assert len(told) == 1 and not module._watchers
