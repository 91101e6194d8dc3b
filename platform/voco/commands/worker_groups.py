"""The Ray workers that a job needs at once, and the groups of Kubernetes pods that provide them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from voco.errors import Refused
from voco.job.resources import Resources
from voco.job.spec import Flow, Job, Sweep

CPU_POD_CPUS = 16
GPU_POD_GPUS = 8

StageDemands = list["WorkerDemand"]  # at the same time


@dataclass(frozen=True)
class WorkerDemand:
    """`count` Ray workers of one size that run at the same time; elastic training starts with `fewest`."""

    count: int
    cpus: float
    gpus: float
    accelerator: str | None
    fewest: int


@dataclass(frozen=True)
class WorkerGroup:
    """One worker group: at most `pods` pods of this size, and at least `fewest`. What is elastic may run on spot nodes."""

    name: str
    pods: int
    cpus: int
    gpus: int
    accelerator: str | None
    fewest: int = 0
    spot: bool = True


def worker_demands(job: Job) -> list[StageDemands]:
    """The workers that each stage of a job needs at once; none for stages that run in the driver.

    A sweep: its trials' workers, then the workers that evaluate; the trials' own drivers run on the head.
    """
    block = job.block
    if isinstance(block, Flow):
        return [demand for stage in block.stages for demand in worker_demands(stage)]
    if isinstance(block, Sweep):
        return [[_demand(block.train.resources, block.concurrent)], [_demand(block.evaluate.resources)]]
    return [] if job.stage.in_driver else [[_demand(job.resources)]]


def most_cpus(job: Job) -> float:
    """CPUs of the workers of a job's largest stage."""
    return max((sum(demand.count * demand.cpus for demand in stage) for stage in worker_demands(job)), default=1)


def _demand(resources: Resources, times: int = 1) -> WorkerDemand:
    most = resources.most_workers * times
    fewest = resources.fewest_workers if resources.is_elastic else most
    return WorkerDemand(most, resources.cpus_per_worker, resources.gpus_per_worker, resources.accelerator, fewest)


def worker_groups(job: Job) -> list[WorkerGroup]:
    """Worker groups for the largest stage: `cpu`, and a group for every kind of GPU. Pods are started only when needed.

    A job that is nothing but elastic training keeps the pods of its fewest workers, so that a restart waits for none.
    Raises Refused for a worker that no pod could hold.
    """
    stages = worker_demands(job)
    demands = [demand for stage in stages for demand in stage]
    for demand in demands:
        if demand.gpus > GPU_POD_GPUS:
            limit = f"at most {GPU_POD_GPUS}, the GPUs of a pod"
            raise Refused(f"resources.gpus_per_worker: expected {limit}, got {demand.gpus:g}")
        if demand.accelerator is not None and not demand.gpus:
            raise Refused(f"resources.accelerator: expected gpus_per_worker above 0 with {demand.accelerator}, got 0")
    accelerators = sorted({demand.accelerator or "" for demand in demands if demand.gpus})
    alone = bool(job.stage.trains) and job.resources.is_elastic
    return [_cpu_group(stages), *(_gpu_group(demands, accelerator or None, alone) for accelerator in accelerators)]


def _cpu_group(stages: list[StageDemands]) -> WorkerGroup:
    per_stage = [[demand for demand in stage if not demand.gpus] for stage in stages]
    largest = max([demand.cpus for stage in per_stage for demand in stage], default=1)
    cpus = max(CPU_POD_CPUS, math.ceil(largest))
    pods = [sum(math.ceil(demand.count / math.floor(cpus / demand.cpus)) for demand in stage) for stage in per_stage]
    return WorkerGroup("cpu", max([1, *pods]), cpus, 0, None)


def _gpu_group(demands: list[WorkerDemand], accelerator: str | None, alone: bool) -> WorkerGroup:
    """Pods of at most GPU_POD_GPUS, and no larger than the fewest workers of elastic training fill: or it is all or nothing."""
    same = [demand for demand in demands if demand.gpus and demand.accelerator == accelerator]
    gpus = min(GPU_POD_GPUS, max(math.ceil(max(demand.gpus, demand.fewest * demand.gpus)) for demand in same))
    per_pod = [min(demand.count, math.floor(gpus / demand.gpus)) for demand in same]
    cpus = max(math.ceil(count * demand.cpus) for count, demand in zip(per_pod, same, strict=True))
    pods = max(math.ceil(demand.count / count) for count, demand in zip(per_pod, same, strict=True))
    suffix = "" if accelerator is None else "-" + re.sub(r"[^a-z0-9]+", "-", accelerator.lower()).strip("-")
    fewest = max(math.ceil(demand.fewest / count) for count, demand in zip(per_pod, same, strict=True)) if alone else 0
    spot = any(demand.fewest < demand.count for demand in same)
    return WorkerGroup(f"gpu{suffix}", pods, cpus, gpus, accelerator, fewest, spot)
