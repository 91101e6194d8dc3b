"""A job whose workers fit nowhere is refused before anything runs: here, in a cluster, and by the limits of an autoscaler."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ingest import source
from job.test_spec import INGEST, TRAIN, changed, of_stages

import pipelines
from cluster import ray_private
from voco.commands.capacity import Capacity, NodeType, _autoscaling_capacity, check_capacity
from voco.errors import Refused
from voco.job.load import build_job, load_job
from voco.job.spec import Job

ROOT = Path(__file__).parents[2]
HEAD = NodeType({"CPU": 4, "node:__internal_head__": 1}, {"voco-pool": "head"})
EVALUATE: dict[str, Any] = {
    "name": "answers", "kind": "evaluate", "output": "out/answers", "evaluate": {"benchmark": "b"},
    "inputs": {"samples": [{"uri": "a"}], "checkpoint": "c", "features": "f"},
}  # fmt: skip


def gpu_node(count: float, cpus: float = 32, **resources: float) -> NodeType:
    return NodeType({"CPU": cpus, "GPU": count, **resources}, {"voco-pool": "gpu"})


def job_with(raw: dict[str, Any], **resources: Any) -> Job:
    return build_job("job.yaml", changed(raw, "resources", resources))


@pytest.mark.parametrize(
    ("job", "nodes", "fits"),
    [
        (job_with(TRAIN, workers=2, gpus_per_worker=1), [HEAD], False),
        (job_with(TRAIN, workers=2, gpus_per_worker=1), [HEAD, gpu_node(1)], False),  # both workers start at once
        (job_with(TRAIN, workers=2, gpus_per_worker=1), [HEAD, gpu_node(1), gpu_node(1)], True),
        (job_with(TRAIN, workers=2, gpus_per_worker=2), [gpu_node(3), gpu_node(1)], False),  # four GPUs, but not two and two
        (job_with(TRAIN, workers={"min": 2, "max": 8}, gpus_per_worker=1), [HEAD, gpu_node(1)], False),  # the fewest must fit
        (job_with(TRAIN, workers={"min": 2, "max": 8}, gpus_per_worker=1), [HEAD, gpu_node(2)], True),
        (job_with(TRAIN, workers=2, gpus_per_worker=0.5), [gpu_node(1)], True),
        (job_with(TRAIN, workers=2, gpus_per_worker=1, cpus_per_worker=20), [gpu_node(2)], False),
        (job_with(TRAIN, workers=1, gpus_per_worker=1, accelerator="H100"), [gpu_node(1)], False),
        (job_with(TRAIN, workers=1, gpus_per_worker=1, accelerator="H100"), [gpu_node(1, **{"accelerator_type:H100": 1})], True),
        (job_with(EVALUATE, workers=8, gpus_per_worker=1), [gpu_node(1)], True),  # one worker answers everything, slowly
        (job_with(EVALUATE, cpus_per_worker=8), [HEAD], False),
        (job_with(EVALUATE, cpus_per_worker=8), [gpu_node(1)], False),  # work without a GPU stays off GPU nodes
        (job_with(EVALUATE, cpus_per_worker=8), [NodeType({"CPU": 8}, {})], True),
        (job_with(TRAIN, workers=2, cpus_per_worker=3), [HEAD], False),
        (job_with(TRAIN, workers=2, cpus_per_worker=2), [HEAD], True),
        (build_job("x", of_stages(INGEST, changed(EVALUATE, "resources", {"gpus_per_worker": 1}))), [HEAD], False),
    ],
)  # fmt: skip
def test_workers_and_nodes(job: Job, nodes: list[NodeType], fits: bool) -> None:
    if fits:
        assert check_capacity("job.yaml", job, Capacity(nodes, [])) == []
        return
    with pytest.raises(Refused, match=r"job.yaml: resources: .* needs .*; the cluster has .*, and no autoscaler adds any"):
        check_capacity("job.yaml", job, Capacity(nodes, []))
    (note,) = check_capacity("job.yaml", job, Capacity(nodes, None))  # an autoscaler may be there
    assert "waits until an autoscaler adds the rest" in note


def test_a_trial_is_checked_with_the_resources_of_its_axis() -> None:
    sweep = {
        "name": "s", "kind": "sweep", "output": "o",
        "sweep": {
            "axes": {"resources.workers": [1, 4]},
            "train": {key: value for key, value in TRAIN.items() if key != "output"},
            "evaluate": {**changed(EVALUATE, "inputs.checkpoint", "@train")},
        },
    }  # fmt: skip
    sweep["sweep"]["evaluate"].pop("output")  # type: ignore[index]
    job = build_job("job.yaml", sweep)
    with pytest.raises(Refused, match="trial 4 of s needs 4 workers at once, each with 1 CPU"):
        check_capacity("job.yaml", job, Capacity([NodeType({"CPU": 3}, {})], []))
    assert check_capacity("job.yaml", job, Capacity([HEAD], [])) == []


def test_a_finished_stage_needs_nothing(tmp_path: Path) -> None:
    """A flow whose GPU stage is done continues on a cluster without GPUs."""
    source.write(tmp_path / "source", *source.good(3, 3))
    stage = source.job(tmp_path / "source", tmp_path / "out").model_dump(exclude_none=True)
    stage["resources"] = {"gpus_per_worker": 1}
    job = build_job("job.yaml", stage)
    with pytest.raises(Refused):
        check_capacity("job.yaml", build_job("x", changed(stage, "ingest.in_process_rows", 0)), Capacity([HEAD], []))
    assert "unless its rows are few enough for the driver" in check_capacity("job.yaml", job, Capacity([HEAD], []))[0]
    pipelines.run(job)  # few rows: the driver does them
    assert check_capacity("job.yaml", job, Capacity([HEAD], [])) == []


@pytest.mark.parametrize("cluster", ["aws.yaml", "gcp.yaml"])
def test_the_limits_are_those_of_rays_own_scheduler(cluster: str) -> None:
    """Training on the launchers' files: refused if and only if Ray's autoscaler calls the placement group infeasible."""
    config = ray_private.launcher(ROOT / "cluster" / cluster)
    head = config["available_node_types"][config["head_node_type"]]
    capacity = _autoscaling_capacity([NodeType({**head["resources"], "node:__internal_head__": 1}, {})], config)
    verdicts = set()
    for workers, cpus, gpus, accelerator in (
        (1, 1, 1, "A100"), (8, 8, 1, "A100"), (16, 8, 8, "A100"), (1, 8, 9, None), (1, 1, 1, "H100"), (2000, 4, 0, None),
        (1, 500, 0, None), (1, 1, 0.5, None), (600, 1, 1, None),
    ):  # fmt: skip
        resources = {"workers": workers, "cpus_per_worker": cpus, "gpus_per_worker": gpus}
        micro = TRAIN["image_sft"]["micro_batch"]
        raw = changed(TRAIN, "image_sft.global_batch", max(8, micro) * workers)  # so many that each has a virtual rank
        raw = changed(raw, "resources", resources)
        if accelerator:
            raw["resources"]["accelerator"] = accelerator
        bundle: dict[str, float] = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        bundle |= {f"accelerator_type:{accelerator}": 0.001} if accelerator else {}
        infeasible = ray_private.schedule(config, [[bundle] * workers], [], {})[1]
        try:
            refused = bool(check_capacity("job.yaml", build_job("job.yaml", raw), capacity))
        except Refused as error:
            refused = True
            assert "its autoscaler cannot add enough" in str(error)  # noqa: PT017
        assert refused == bool(infeasible), raw["resources"]
        verdicts.add(refused)
    assert verdicts == {True, False}


def test_every_paper_stage_fits_its_launcher() -> None:
    config = ray_private.launcher(ROOT / "cluster" / "aws.yaml")
    capacity = _autoscaling_capacity([HEAD], config)
    assert check_capacity("flow.yaml", load_job(str(ROOT / "jobs" / "paper" / "flow.yaml")), capacity) == []


def test_node_types_without_resources_are_unknown() -> None:
    """`ray up` fills them in from the cloud's list of machines; a file without them says nothing."""
    config = {"head_node_type": "h", "max_workers": 3, "available_node_types": {"h": {}, "w": {"node_config": {}}}}
    assert _autoscaling_capacity([HEAD], config).added is None
    config["available_node_types"]["w"]["resources"] = {"CPU": 1}  # type: ignore[index]
    assert _autoscaling_capacity([HEAD], config).added == [NodeType({"CPU": 1}, {}, 3)]
    assert Capacity([], None).most_added == math.inf


@pytest.mark.ray
def test_a_local_ray_and_a_cluster_without_an_autoscaler_refuse_at_once(ray_local: str, tmp_path: Path) -> None:
    source.write(tmp_path / "source", *source.good(20, 20))
    stages = []
    for name, resources in (("first", {}), ("second", {"gpus_per_worker": 2, "accelerator": "A100"})):
        stage = source.job(tmp_path / "source", tmp_path / name).model_dump(exclude_none=True)
        stages.append({**stage, "name": name, "resources": resources, "ingest": {**stage["ingest"], "in_process_rows": 0}})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**of_stages(*stages), "output": str(tmp_path / "out")}))
    outside = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    for environment, has in (
        ({"RAY_ADDRESS": ray_local, "RAY_AUTH_MODE": "disabled"}, "the cluster has 1 node with 0 GPU, at most 4 CPU on a node"),
        ({}, "this machine has 0 GPU"),
    ):
        command = [sys.executable, "-m", "pipelines", "run", str(tmp_path / "job.yaml")]
        done = subprocess.run(command, env=outside | environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        assert f"job.yaml: resources: second needs a worker with 1 CPU, 2 GPU, A100; {has}" in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "first").exists()  # the first stage could have run
