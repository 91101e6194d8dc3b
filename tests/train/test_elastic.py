"""What counts as a failure of a training that is restarted, and what rank 0 hears between steps."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from voco.store import schemas, storage
from voco.train import checkpoint_files, preemption
from voco.train.elastic import RestartPolicy, answers
from voco.train.preemption import Notice, WorkersLeave

LOST = WorkerGroupError("a node is lost", {1: RuntimeError("lost")})


def save(folder: str, step: int) -> None:
    """A complete checkpoint, of no files."""
    uri = checkpoint_files.step_uri(folder, step)
    checkpoint_files.write_metrics(storage.join(uri, schemas.METRICS_FILE), [])
    storage.write_json(storage.join(uri, checkpoint_files.PROGRESS_FILE), {"step": step, "workers": 1, "files": []})


def test_failures_are_counted_up_to_the_next_checkpoint(tmp_path: Path) -> None:
    """Ray counts those of the complete run: three lost nodes in a week would end it."""
    policy = RestartPolicy(FailureConfig(max_failures=3), str(tmp_path))
    assert [policy.make_decision(LOST) for _ in range(3)] == [FailureDecision.RETRY] * 3
    save(str(tmp_path), 8)
    assert [policy.make_decision(LOST) for _ in range(3)] == [FailureDecision.RETRY] * 3
    assert policy.make_decision(LOST) == FailureDecision.RAISE  # no step further than last time


def test_a_node_that_is_gone_does_not_answer() -> None:
    """Ray still calls it alive, and a group that counts on it would wait for its place."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert answers("127.0.0.1", port)
    assert not answers("127.0.0.1", port)


def test_workers_that_leave_are_no_failure(tmp_path: Path) -> None:
    policy = RestartPolicy(FailureConfig(max_failures=0), str(tmp_path))
    collateral = {0: RuntimeError("connection reset"), 1: WorkersLeave("node a is drained")}
    assert [policy.make_decision(WorkerGroupError("", collateral)) for _ in range(9)] == [FailureDecision.RETRY] * 9
    info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0]})
    assert policy.make_decision(PreemptionError(info)) == FailureDecision.RETRY  # a node that went before they had saved
    assert policy.make_decision(LOST) == FailureDecision.RAISE


def test_a_worker_without_news_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preemption.read_notice(None) == Notice.NONE
    info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a" * 56: [0]})
    monkeypatch.setattr(preemption, "preemption_info", lambda: info)
    assert preemption.read_notice(None) == Notice.LEAVE
    assert preemption.leaving_reason() == "node aaaaaaaaaaaa is drained"
    resized = PreemptionInfo(deadline_ms=1, preempted_node_to_ranks={})
    monkeypatch.setattr(preemption, "preemption_info", lambda: resized)
    assert preemption.leaving_reason() == "the number of workers changes"
