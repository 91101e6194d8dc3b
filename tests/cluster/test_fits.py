"""Whether every job fits the clusters of `cluster/`: which nodes Ray's own autoscaler starts for it on an empty cluster."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import ray_private
from voco.commands import render, worker_groups
from voco.commands.worker_groups import StageDemands, WorkerDemand
from voco.job.load import load_job
from voco.run import units

ROOT = Path(__file__).parents[2]
JOBS = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "jobs").rglob("*.yaml"))
CLUSTERS = ("aws.yaml", "gcp.yaml", "kuberay-raycluster.yaml")


def autoscaling(file: str, accelerator: str = "A100") -> dict[str, Any]:
    """The cluster's configuration, its GPU nodes with another accelerator if the job wants one, as the file's comment says."""
    text = (ROOT / "cluster" / file).read_text()
    raw = yaml.safe_load(text.replace("accelerator_type:A100", f"accelerator_type:{accelerator}"))
    return ray_private.ray_cluster(raw["spec"]) if file.startswith("kuberay") else ray_private.launcher(raw=raw)


def accelerator_of(stages: list[StageDemands]) -> str:
    (accelerator,) = {demand.accelerator for stage in stages for demand in stage} - {None} or {"A100"}
    return str(accelerator)


def bundle(demand: WorkerDemand) -> dict[str, float]:
    resources = {"CPU": demand.cpus} | ({"GPU": demand.gpus} if demand.gpus else {})
    return resources | ({f"accelerator_type:{demand.accelerator}": 0.001} if demand.accelerator else {})  # Ray's own request


def launched_nodes(config: dict[str, Any], stage: StageDemands) -> Counter[str]:
    """GPU workers as one gang, the harder case; others one by one. Every worker must fit."""
    gangs = [[bundle(demand)] * demand.count for demand in stage if demand.gpus]
    singles = [bundle(demand) for demand in stage if not demand.gpus for _ in range(demand.count)]
    launched, infeasible = ray_private.schedule(config, gangs, singles, {})
    assert infeasible == 0, stage
    return launched


def gpu_nodes(config: dict[str, Any], launched: Counter[str]) -> int:
    types = config["available_node_types"]
    return sum(count for name, count in launched.items() if types[name]["resources"].get("GPU"))


@pytest.mark.parametrize("file", JOBS)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_every_stage_fits_and_cpu_work_starts_no_gpu_node(cluster: str, file: str) -> None:
    stages = worker_groups.worker_demands(load_job(str(ROOT / file)))
    config = autoscaling(cluster, accelerator_of(stages))
    for stage in stages:
        launched = launched_nodes(config, stage)
        uses_gpus = any(demand.gpus for demand in stage)
        assert (gpu_nodes(config, launched) > 0) == uses_gpus, stage
        assert sum(launched.values()) <= config["max_workers"]


@pytest.mark.parametrize("file", [file for file in JOBS if "/paper/" in file or "/gpu/" in file])
def test_every_job_fits_its_own_rayjob_with_no_pod_to_spare(file: str) -> None:
    job = load_job(str(ROOT / file))
    cluster = render.rayjob_manifest(job)["spec"]["rayClusterSpec"]
    config = ray_private.ray_cluster(cluster)
    used: Counter[str] = Counter()
    for stage in worker_groups.worker_demands(job):
        used |= launched_nodes(config, stage)
    limits = Counter({group["groupName"]: group["maxReplicas"] for group in cluster["workerGroupSpecs"]})
    assert limits - used <= Counter({"cpu": 1})  # one CPU pod is always allowed


def test_work_that_does_not_fit_is_reported() -> None:
    config = autoscaling("aws.yaml")
    for bundles in ([{"GPU": 9.0}], [{"CPU": 8.0, "GPU": 1.0}] * 17, [{"GPU": 1.0, "accelerator_type:H100": 0.001}]):
        assert ray_private.schedule(config, [bundles], [], {})[1] == 1, bundles


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_label_keeps_cpu_work_off_gpu_nodes_when_cpu_nodes_are_full(cluster: str) -> None:
    config = autoscaling(cluster)
    singles = [{"CPU": 1.0}] * 600
    assert gpu_nodes(config, ray_private.schedule(config, [], singles, {})[0]) > 0  # without the label, Ray spills over
    launched, _ = ray_private.schedule(config, [], singles, units.CPU_WORK)
    assert gpu_nodes(config, launched) == 0
    assert sum(launched.values()) > 0
