"""Whether a cluster has, or can add, a node for every worker of a job. Ray itself lets a worker that fits nowhere wait for ever.

Ray 2.60 tells nobody what its autoscaler may add: `get_cluster_config` of the GCS is empty in its open-source version. But the
autoscaler is a process on the head, `monitor.py`, and its command line names the file with the node types, or no file where
there is nothing to add. Where that process cannot be seen (KubeRay's is in another container), its limits are unknown.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from voco.commands.cluster import ClusterTarget, find_cluster
from voco.commands.plan import output_state
from voco.errors import Refused
from voco.job.load import resolve_stage
from voco.job.resources import Resources
from voco.job.spec import Job, Sweep
from voco.job.trials import sweep_trials
from voco.run.units import CPU_WORK

HEAD = "node:__internal_head__"  # a resource of the head node alone
ACCELERATOR = "accelerator_type:"  # begins the resource of a GPU model
ANSWER_S = 2.0  # that a cluster may take to answer `voco plan`
JOIN_S = 5.0  # that a node may be away when a driver starts, as one that was just started again


class NodeType(NamedTuple):
    """Nodes of one size: resources by Ray's names, labels, and how many there are or may be; with no limit, math.inf."""

    resources: dict[str, float]
    labels: dict[str, str]
    most: float = 1


@dataclass(frozen=True)
class Need:
    """Workers of one size that must exist at the same time, or the work of `who` never starts."""

    who: str  # the stage, for messages
    count: int
    resources: dict[str, float]  # of each, by Ray's names
    selector: dict[str, str]  # Ray's label selector: {label: value, or !value}
    optional: bool = False  # the stage may do without workers

    def __str__(self) -> str:
        shown = [f"{amount:g} {name}" for name, amount in self.resources.items() if not name.startswith(ACCELERATOR)]
        shown += [name.removeprefix(ACCELERATOR) for name in self.resources if name.startswith(ACCELERATOR)]
        several = f"{self.count} workers at once, each with" if self.count > 1 else "a worker with"
        return f"{self.who} needs {several} {', '.join(shown)}"

    def fitting(self, node: NodeType) -> int:
        """How many of the workers fit on one such node."""
        for label, value in self.selector.items():
            if (node.labels.get(label) == value.lstrip("!")) == value.startswith("!"):
                return 0
        return int(min((node.resources.get(name, 0) + 1e-9) // amount for name, amount in self.resources.items()))


@dataclass(frozen=True)
class Capacity:
    """The nodes that are alive, and the node types of the autoscaler: none without one, None where they are unknown."""

    nodes: list[NodeType]
    added: list[NodeType] | None
    most_added: float = math.inf  # nodes of all types together
    local: bool = False  # a Ray that the driver started for itself

    def fitting(self, need: Need) -> float:
        """How many of the workers fit at once, on the nodes that are alive or after the autoscaler added all that it may."""
        alive = sum(need.fitting(node) for node in self.nodes)
        total: float = sum(need.fitting(node) for node in self.nodes if HEAD in node.resources)  # the others may be of its types
        remaining = self.most_added
        for fit, most in sorted(((need.fitting(kind), kind.most) for kind in self.added or []), reverse=True):
            number = min(most, remaining)
            total += fit * number if fit else 0
            remaining -= number
        return max(alive, total)

    def __str__(self) -> str:
        gpus = sum(node.resources.get("GPU", 0) for node in self.nodes)
        kinds = sorted({name.removeprefix(ACCELERATOR) for node in self.nodes for name in node.resources if ACCELERATOR in name})
        cpus = max((node.resources.get("CPU", 0) for node in self.nodes), default=0)
        shown = f"{gpus:g} GPU" + (f" ({', '.join(kinds)})" if kinds else "")
        if self.local:
            return f"this machine has {shown}, {cpus:g} CPU"
        return (
            f"the cluster has {len(self.nodes)} node{'s' * (len(self.nodes) != 1)} with {shown}, at most {cpus:g} CPU on a node"
        )


def check_capacity(file: str, job: Job, capacity: Capacity) -> list[str]:
    """A line for every worker that fits nowhere though the job may still run. Raises Refused when one would wait for ever.

    All stages of a flow are checked, but for those that are finished.
    """
    notes: list[str] = []
    outputs: dict[str, str] = {}
    for stage in job.stages:
        unmet = [need for need in _stage_needs(stage) if capacity.fitting(need) < need.count]
        if unmet and output_state(resolve_stage(stage, outputs)).startswith("finished"):
            unmet = []
        outputs[stage.name] = stage.output
        for need in unmet:
            if capacity.added is None:
                notes.append(f"{need}; {capacity}: it waits until an autoscaler adds the rest, if it can")
            elif need.optional:
                notes.append(f"{need}, unless its rows are few enough for the driver; {capacity}")
            else:
                limit = "its autoscaler cannot add enough" if capacity.added else "no autoscaler adds any"
                limit = "RAY_ADDRESS names no cluster" if capacity.local else limit
                raise Refused(f"{file}: resources: {need}; {capacity}, and {limit}")
    return notes


def _stage_needs(stage: Job) -> Iterator[Need]:
    """Training starts with its fewest workers or not at all; other stages work with as many as there are, so they need one."""
    if stage.stage.in_driver:
        return
    if isinstance(stage.block, Sweep):
        for trial in sweep_trials(stage):
            yield _need(f"trial {trial.name} of {stage.name}", trial.train.resources, all_at_once=True)
        yield _need(f"the evaluation of {stage.name}", stage.block.evaluate.resources)
        return
    small = stage.kind == "ingest" and stage.block.in_process_rows > 0
    yield _need(stage.name, stage.resources, all_at_once=bool(stage.stage.trains), optional=small)


def _need(who: str, resources: Resources, all_at_once: bool = False, optional: bool = False) -> Need:
    amounts = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        amounts["GPU"] = resources.gpus_per_worker
        if resources.accelerator is not None:
            amounts[f"{ACCELERATOR}{resources.accelerator}"] = 0.001  # what Ray itself asks for
    selector = {} if all_at_once or resources.gpus_per_worker else CPU_WORK
    return Need(who, resources.fewest_workers if all_at_once else 1, amounts, selector, optional)


def driver_notes(file: str, job: Job) -> list[str]:
    """`check_capacity` in the cluster that this driver has joined. Nodes that are missing have JOIN_S to join it."""
    deadline = time.monotonic() + (JOIN_S if "RAY_ADDRESS" in os.environ else 0)
    while True:
        try:
            return check_capacity(file, job, _driver_capacity())
        except Refused:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def _driver_capacity() -> Capacity:
    """A local Ray, which adds no nodes, where RAY_ADDRESS is not set."""
    import ray

    nodes = [NodeType(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]
    if "RAY_ADDRESS" not in os.environ:
        return Capacity(nodes, [], local=True)
    return _with_autoscaler(nodes, ray.get_runtime_context().get_session_name())


def plan_capacity(file: str, job: Job) -> list[str]:
    """What `voco plan` adds for the cluster that the environment names: a line of its nodes, and one for each unmet need.

    Asks the dashboard, without Ray, for at most ANSWER_S a request. Raises Refused where `run` would refuse.
    """
    target = find_cluster()
    target.bypass_proxy()
    try:
        answer = _get(target, "/api/v0/nodes?detail=1&limit=10000")
        rows = [row for row in answer["data"]["result"]["result"] if row["state"] == "ALIVE"]
        nodes = [NodeType(row["resources_total"], row["labels"] or {}) for row in rows]
        capacity = _with_autoscaler(nodes, str(_get(target, "/api/version")["session_name"]))
    except (OSError, HTTPException, ValueError, LookupError, TypeError):  # no answer, or not a dashboard's
        return [f"cluster {target.address}: its dashboard does not answer, so its nodes are not checked"]
    if not nodes:  # it has just started
        return [f"cluster {target.address}: it lists no node yet, so its nodes are not checked"]
    return [f"cluster {target.address}: {str(capacity).removeprefix('the cluster has ')}", *check_capacity(file, job, capacity)]


def _get(target: ClusterTarget, path: str) -> Any:
    request = urllib.request.Request(target.address + path, headers=target.headers())
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        return json.load(answer)


def _with_autoscaler(nodes: list[NodeType], session: str) -> Capacity:
    """The capacity of a cluster by its session's name: the autoscaler's limits, if it runs on this machine."""
    command = _monitor_command(session)
    if command is None:
        return Capacity(nodes, None)
    files = [argument.partition("=")[2] for argument in command if argument.startswith("--autoscaling-config=")]
    try:
        return (
            _autoscaling_capacity(nodes, yaml.safe_load(Path(files[0]).expanduser().read_text()))
            if files
            else Capacity(nodes, [])
        )
    except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return Capacity(nodes, None)


def _monitor_command(session: str) -> list[str] | None:
    """The command line of the session's autoscaler process on this machine."""
    import psutil

    logs = re.compile(rf"--logs-dir=.*/{re.escape(session)}/logs/?")
    for process in psutil.process_iter(["cmdline"]):
        command: list[str] = process.info["cmdline"] or []
        if any(argument.endswith("monitor.py") for argument in command[:4]) and any(map(logs.fullmatch, command)):
            return command
    return None


def _autoscaling_capacity(nodes: list[NodeType], config: dict[str, Any]) -> Capacity:
    """With the worker types of a launcher's file (`ray up`, format of Ray's autoscaler/ray-schema.json)."""
    most = config.get("max_workers", math.inf)
    head = config.get("head_node_type")
    workers = {name: kind for name, kind in config["available_node_types"].items() if name != head}
    if any("resources" not in kind for kind in workers.values()):  # which the cloud's own list of machines says
        return Capacity(nodes, None)
    types = [NodeType(kind["resources"], kind.get("labels", {}), kind.get("max_workers", most)) for kind in workers.values()]
    return Capacity(nodes, types, most)
