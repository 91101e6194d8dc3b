"""Decisions of Ray Train's controller: how many workers, what counts as a failure, and who frees their places when it dies.

They replace parts of Ray 2.60 (`ray.train.v2._internal`), which restarts a group without a word to its workers, may wait for
nodes that are leaving, and asks another cluster on the same machine whether the controller is alive.
"""

from __future__ import annotations

import logging
import math
import queue
import socket
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2.api.preemption import PreemptionInfo

from voco.errors import JobFailed, message_line
from voco.run.logs import get_logger
from voco.store import storage
from voco.train import checkpoint_files
from voco.train.preemption import WorkersLeave

log = get_logger(__name__)

ANSWER_S = 2.0  # that a node may take to accept a connection
LEAVE_S = 600.0  # that workers have to save a checkpoint before they are resized anyway


class RestartPolicy(DefaultFailurePolicy):  # type: ignore[misc]
    """Failures are counted up to the next checkpoint, and workers that leave are none: a run on spot nodes may last for days."""

    def __init__(self, failure_config: Any, folder: str) -> None:
        """`folder` holds the run's checkpoints."""
        super().__init__(failure_config)
        self._folder, self._step = folder, 0

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """As Ray's, which counts the failures of the complete run."""
        failures = getattr(training_failed_error, "worker_failures", {}).values()
        if any(isinstance(failure, WorkersLeave) for failure in failures):
            return FailureDecision.RETRY
        if (step := self._newest_step()) > self._step:
            self._worker_group_failures, self._step = 0, step
        return super().make_decision(training_failed_error)

    def _log_decision(self, decision: FailureDecision, training_failed_error: Any, error_count: int, retry_limit: Any) -> None:
        """A line instead of Ray's stack of every rank, which is in the session's logs."""
        failures = getattr(training_failed_error, "worker_failures", {})
        rank, failure = min(failures.items(), default=(None, training_failed_error), key=lambda item: item[0])
        cause = message_line(getattr(failure, "health_check_failure", failure), 300)
        where = "" if rank is None else f" on rank {rank}"
        count = f"failure {error_count}" + ("" if math.isinf(retry_limit) else f" of {retry_limit} since step {self._step}")
        outcome = "the workers start again" if decision == FailureDecision.RETRY else "the training ends"
        log.warning("%s%s: %s; %s", count, where, cause, outcome)

    @storage.s3_patience(0)
    def _newest_step(self) -> int:
        """Steps of the newest complete checkpoint; 0 without one, or where storage does not answer."""
        with suppress(OSError, JobFailed):
            newest = checkpoint_files.newest(self._folder)
            return 0 if newest is None else newest.step
        return 0


class ResizePolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray's elastic policy, but workers save a checkpoint before they are resized, and nodes that leave are not counted."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ask for room in the run's name: what a killed driver has reserved is then this driver's at once, not after 180 s."""
        logging.getLogger(ElasticScalingPolicy.__module__).addFilter(_is_news)
        super().after_controller_start(SimpleNamespace(run_id=train_run_context.run_config.name))

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Announce a resize as Ray announces a node that leaves: the workers save and end, and then their number is chosen."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if not isinstance(decision, ResizeDecision):
            return decision
        before, after = worker_group_state.num_workers, decision.num_workers
        log.info("room for %d workers instead of %d: they save and start again", after, before)
        info = PreemptionInfo(deadline_ms=int((time.time() + LEAVE_S) * 1000), preempted_node_to_ranks={})
        for worker in worker_group_state.workers:
            worker.actor.mark_preempt.remote(info)
        return NoopDecision()

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        draining = ray._private.state.state.get_draining_nodes()
        alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
        staying = {node["NodeID"] for node in alive if answers(node["NodeManagerAddress"], node["NodeManagerPort"])}
        return int(super()._count_possible_workers({node: room for node, room in reserved_resources.items() if node in staying}))


def answers(host: str, port: int) -> bool:
    """Whether a node can be reached. Ray takes a dead one for alive until its health checks fail, up to half a minute."""
    try:
        socket.create_connection((host, port), timeout=ANSWER_S).close()
    except OSError:
        return False
    return True


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Did not detect any changes")  # at every look for room


class OwnClusterCleaner(PlacementGroupCleaner):  # type: ignore[misc]
    """Frees the workers' places when their controller has died, asking the cluster that it runs in.

    Ray's asks the state API at the address in a file of the machine, that of the last `ray start --head`. Another cluster knows
    no such controller, so the group of a healthy training is removed, or the cleaner ends before it has a group to clean.
    """

    def _monitor_loop(self) -> None:
        group = None
        while not self._stop_event.is_set():
            with suppress(queue.Empty):
                group = self._pg_queue.get(timeout=self._check_interval_s)
            if not _is_alive(self._controller_actor_id):
                while not self._pg_queue.empty():
                    group = self._pg_queue.get_nowait()
                self._cleanup_placement_group(group)
                break
        self._exit()


def _is_alive(actor_id: str) -> bool:
    actor = ray._private.state.actors(actor_id)
    return bool(actor) and actor["State"] != "DEAD"


class CleanerCallback(PlacementGroupCleanerCallback):  # type: ignore[misc]
    """Starts the cleaner of this cluster in the place of Ray's."""

    def after_controller_start(self, train_run_context: Any) -> None:
        self._controller_actor_id = ray.get_runtime_context().get_actor_id()
        # DEFAULT: not in the placement group of a Tune trial, which has no room for it
        options = {"lifetime": "detached", "resources": {HEAD_NODE_RESOURCE_NAME: 0.001}, "scheduling_strategy": "DEFAULT"}
        self._cleaner = (
            ray.remote(num_cpus=0)(OwnClusterCleaner)
            .options(**options)
            .remote(self._controller_actor_id, self._check_interval_s, self._get_actor_timeout_s, self._stop_timeout)
        )
        self._cleaner.start_monitoring.remote()
