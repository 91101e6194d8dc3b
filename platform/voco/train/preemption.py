"""What rank 0 hears between two steps: the run was asked to stop, or its workers must leave.

Workers leave when Ray drains a node of theirs (a spot notice, an evicted pod, `ray drain-node`), or before the group changes
its size. `ray.train.get_preemption_info()` says the same, but is a barrier of all ranks and a call of an actor. The controller
has put the news into each worker already, so rank 0 reads it there, and the all-reduce of the next step tells every rank.
"""

from __future__ import annotations

import logging
import time
from enum import IntEnum
from typing import TYPE_CHECKING

from voco.run import claim

if TYPE_CHECKING:
    from ray.train.v2.api.preemption import PreemptionInfo


class Notice(IntEnum):
    """What rank 0 has heard; the other ranks report NONE, so the sum over all ranks is the notice."""

    NONE = 0
    STOP = 1
    LEAVE = 2


class WorkersLeave(Exception):
    """A checkpoint is complete, and the workers start again elsewhere, or as another number. Raised on every rank.

    An exception, because Ray Train takes workers that return for a training that is done.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        # Ray logs the stack of whatever a worker raises
        logging.getLogger("ray.train.v2._internal.util").addFilter(lambda record: "WorkersLeave" not in record.getMessage())


def read_notice(run: str | None) -> Notice:
    """In the process of rank 0."""
    if claim.stop_requested(run):
        return Notice.STOP
    return Notice.NONE if preemption_info() is None else Notice.LEAVE


def preemption_info() -> PreemptionInfo | None:
    """What the controller has told this worker, without a call; None outside a worker of Ray Train."""
    from ray.train.v2._internal.execution.context import get_train_context

    try:
        return get_train_context().preemption_context.preemption_info
    except RuntimeError:  # no training context
        return None


def leaving_reason() -> str:
    """For the log: which node leaves and when, or that the group changes its size."""
    info = preemption_info()
    if info is None or not info.preempted_node_ids:
        return "the number of workers changes"
    nodes = ", ".join(node[:12] for node in info.preempted_node_ids)
    if info.deadline_ms is None:
        return f"node {nodes} is drained"
    return f"node {nodes} is drained and leaves in {info.deadline_ms / 1000 - time.time():.0f} s"
