"""Whether every job fits the clusters of `cluster/`, by Ray's own autoscaler: what it would start, from nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import ray_private
from voco.commands import render
from voco.job import spec
from voco.run import units

ROOT = Path(__file__).parents[2]
JOBS = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "jobs").rglob("*.yaml"))
CLUSTERS = ("aws.yaml", "gcp.yaml", "kuberay-raycluster.yaml")


def autoscaling(file: str) -> dict[str, Any]:
    if file.startswith("kuberay"):
        return ray_private.ray_cluster(yaml.safe_load((ROOT / "cluster" / file).read_text())["spec"])
    return ray_private.launcher(ROOT / "cluster" / file)


def bundle(one: render.WorkerDemand) -> dict[str, float]:
    held = {"CPU": one.cpus} | ({"GPU": one.gpus} if one.gpus else {})
    return held | ({f"accelerator_type:{one.accelerator}": 0.001} if one.accelerator else {})  # as Ray itself asks


def started(config: dict[str, Any], stage: list[render.WorkerDemand], selector: dict[str, str] | None = None) -> Counter[str]:
    """GPU workers as one gang, the harder case; others one by one. Nothing may be left without a place."""
    gangs = [[bundle(one)] * one.count for one in stage if one.gpus]
    singles = [bundle(one) for one in stage if not one.gpus for _ in range(one.count)]
    launched, infeasible = ray_private.started(config, gangs, singles, selector or {})
    assert infeasible == 0, stage
    return launched


def gpu_nodes(config: dict[str, Any], launched: Counter[str]) -> int:
    types = config["available_node_types"]
    return sum(count for name, count in launched.items() if types[name]["resources"].get("GPU"))


@pytest.mark.parametrize("file", JOBS)
@pytest.mark.parametrize("where", CLUSTERS)
def test_every_stage_fits_and_cpu_work_starts_no_gpu_node(where: str, file: str) -> None:
    config = autoscaling(where)
    for stage in render.worker_demands(spec.load_job(str(ROOT / file))):
        launched = started(config, stage)
        wants = any(one.gpus for one in stage)
        assert (gpu_nodes(config, launched) > 0) == wants, stage
        assert sum(launched.values()) <= config["max_workers"]


@pytest.mark.parametrize("file", [file for file in JOBS if "/paper/" in file])
def test_every_job_fits_its_own_rayjob_with_no_pod_to_spare(file: str) -> None:
    job = spec.load_job(str(ROOT / file))
    cluster = render.rayjob_manifest(job)["spec"]["rayClusterSpec"]
    config = ray_private.ray_cluster(cluster)
    used: Counter[str] = Counter()
    for stage in render.worker_demands(job):
        used |= started(config, stage)
    limits = Counter({group["groupName"]: group["maxReplicas"] for group in cluster["workerGroupSpecs"]})
    assert limits - used <= Counter({"cpu": 1})  # one CPU pod is always allowed


def test_what_does_not_fit_is_seen() -> None:
    config = autoscaling("aws.yaml")
    for bundles in ([{"GPU": 9.0}], [{"CPU": 8.0, "GPU": 1.0}] * 17, [{"GPU": 1.0, "accelerator_type:H100": 0.001}]):
        assert ray_private.started(config, [bundles], [], {})[1] == 1, bundles


@pytest.mark.parametrize("where", CLUSTERS)
def test_the_label_keeps_cpu_work_off_gpu_nodes_when_there_is_too_much(where: str) -> None:
    config = autoscaling(where)
    singles = [{"CPU": 1.0}] * 600
    assert gpu_nodes(config, ray_private.started(config, [], singles, {})[0]) > 0  # without it, Ray spills over
    launched, _ = ray_private.started(config, [], singles, units.CPU_WORK)
    assert gpu_nodes(config, launched) == 0
    assert sum(launched.values()) > 0
