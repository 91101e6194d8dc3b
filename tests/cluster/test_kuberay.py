"""Kubernetes manifests, hand-written and rendered from jobs, against KubeRay's definitions and its operator's checks.

The definitions (CRDs) are not part of this repository: their tests skip where VOCO_KUBERAY_CRDS does not have them.
"""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from voco.commands import render
from voco.commands.worker_groups import worker_groups
from voco.errors import Refused
from voco.job.load import build_job, load_job
from voco.job.spec import Job
from voco.run import units

ROOT = Path(__file__).parents[2]
CRDS = Path(os.environ.get("VOCO_KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay"))
JOBS = sorted(str(file.relative_to(ROOT)) for name in ("gpu", "paper") for file in (ROOT / "jobs" / name).glob("*.yaml"))
MANIFESTS = ("cluster/kuberay-raycluster.yaml", "cluster/kuberay-rayjob.yaml")
RENDERED = "jobs/gpu/8xh100.yaml"  # of which the second is an example
LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # DNS-1035


def manifest(file: str) -> dict[str, Any]:
    """The Ray object of a manifest, or of a rendered job file."""
    text = render.render_rayjob(str(ROOT / file)) if file.startswith("jobs/") else (ROOT / file).read_text()
    (resource,) = [item for item in yaml.safe_load_all(text) if item["apiVersion"] == "ray.io/v1"]
    return dict(resource)


@functools.cache
def definition(kind: str) -> jsonschema.Draft202012Validator:
    file = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not file.exists():
        pytest.skip(f"{file} does not exist: set VOCO_KUBERAY_CRDS to a folder with KubeRay's CRDs")
    (version,) = [item for item in yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]["versions"] if item["name"] == "v1"]
    return jsonschema.Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))


def strict(schema: Any) -> Any:
    """A CRD's schema that rejects unknown keys, as the API server does with `--validate=strict`."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string") is True:
        return {"type": ["integer", "string"]}
    strict_schema = {key: value if key in ("enum", "default", "required") else strict(value) for key, value in schema.items()}
    properties = strict_schema.get("properties")
    if isinstance(properties, dict) and "type" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        if "metadata" in properties and properties["metadata"] == {"type": "object"}:
            properties["metadata"] = {}
        strict_schema.setdefault("additionalProperties", False)
    return strict_schema


def schema_errors(resource: dict[str, Any]) -> list[str]:
    errors = definition(resource["kind"]).iter_errors(resource)
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in errors]


@pytest.mark.parametrize("file", [*MANIFESTS, *JOBS])
def test_kuberay_knows_every_field(file: str) -> None:
    assert schema_errors(manifest(file)) == []


def test_a_wrong_field_is_reported() -> None:
    resource = manifest(MANIFESTS[0])
    for path, key, value in (("", "rayVersions", "1"), ("autoscalerOptions", "version", "v3"), ("authOptions", "mode", "on")):
        wrong = copy.deepcopy(resource)
        (wrong["spec"][path] if path else wrong["spec"])[key] = value
        assert len(schema_errors(wrong)) == 1, key
    del resource["spec"]["workerGroupSpecs"][0]["maxReplicas"]
    resource["spec"]["workerGroupSpecs"][0]["minReplica"] = 0
    assert len(schema_errors(resource)) == 2


def groups(resource: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    cluster = resource["spec"].get("rayClusterSpec", resource["spec"])
    yield "head", cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group


def operator_problems(resource: dict[str, Any]) -> list[str]:
    """What the operator checks and the schema does not: names, limits, combinations."""
    cluster = resource["spec"].get("rayClusterSpec", resource["spec"])
    limit = {"RayJob": 47, "RayCluster": 53}[resource["kind"]]
    name = resource["metadata"]["name"]
    problems = [] if len(name) <= limit and LABEL.fullmatch(name) else [f"name {name}"]
    if cluster["authOptions"]["mode"] == "token" and not cluster.get("rayVersion"):
        problems.append("a token needs rayVersion")
    names = [name for name, _ in groups(resource)]
    problems += [f"group {name} twice" for name in set(names) if names.count(name) > 1]
    for name, group in groups(resource):
        params = group.get("rayStartParams", {})
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(params):
            problems.append(f"{name}: resources in two places")
        if "labels" in params:
            problems.append(f"{name}: labels in rayStartParams")
        if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            problems.append(f"{name}: restartPolicy")
        if name != "head" and not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            problems.append(f"{name}: replicas")
        env = {item["name"] for item in group["template"]["spec"]["containers"][0].get("env", [])}
        if "RAY_enable_autoscaler_v2" in env:
            problems.append(f"{name}: autoscaler version in two places")
        if not LABEL.fullmatch(name):
            problems.append(f"group name {name}")
    if resource["kind"] == "RayJob" and resource["spec"].get("clusterSelector"):
        problems.append("clusterSelector beside rayClusterSpec")
    return problems


@pytest.mark.parametrize("file", [*MANIFESTS, *JOBS])
def test_the_operator_accepts_it(file: str) -> None:
    assert operator_problems(manifest(file)) == []


def test_an_operator_problem_is_reported() -> None:
    resource = manifest(JOBS[0])
    resource["metadata"]["name"] = "9-" + "x" * 50
    cluster = resource["spec"]["rayClusterSpec"]
    del cluster["rayVersion"]
    cluster["workerGroupSpecs"][-1]["rayStartParams"] = {"num-cpus": "1"}
    cluster["workerGroupSpecs"][-1]["resources"] = {"x": "1"}
    cluster["headGroupSpec"]["rayStartParams"]["labels"] = "a=b"
    assert len(operator_problems(resource)) == 4


@pytest.mark.parametrize("file", [*MANIFESTS, *JOBS])
def test_what_every_cluster_has(file: str) -> None:
    resource = manifest(file)
    cluster = resource["spec"].get("rayClusterSpec", resource["spec"])
    assert cluster["rayVersion"] == render.RAY_VERSION
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for name, group in groups(resource):
        pod = group["template"]["spec"]
        (mount,) = [item for item in pod["containers"][0]["volumeMounts"] if item["mountPath"] == "/dev/shm"]
        (volume,) = [item for item in pod["volumes"] if item["name"] == mount["name"]]
        assert volume["emptyDir"]["medium"] == "Memory"
        spot = any(item["key"] == "cloud.google.com/gke-spot" for item in pod.get("tolerations", []))
        assert spot == (group["labels"][units.POOL] == "cpu")
        if name == "head":
            continue
        assert group["minReplicas"] == 0
        (drain,) = [item["value"] for item in pod["containers"][0]["env"] if "DRAIN_TIMEOUT" in item["name"]]
        assert int(drain) < pod["terminationGracePeriodSeconds"]


def test_the_job_file_is_copied_unchanged(tmp_path: Path) -> None:
    file = ROOT / "jobs/paper/flow.yaml"
    config, job = yaml.safe_load_all(render.render_rayjob(str(file), image="registry/voco:1"))
    assert config["data"] == {"job.yaml": file.read_text()}
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = [item for item in head["containers"][0]["volumeMounts"] if item["name"] == "job"]
    (volume,) = [item for item in head["volumes"] if item["name"] == "job"]
    assert volume["configMap"]["name"] == config["metadata"]["name"] == job["metadata"]["name"]
    assert job["spec"]["entrypoint"] == f"python -m pipelines run {mount['mountPath']}/job.yaml"
    assert head["containers"][0]["image"] == "registry/voco:1"
    (tmp_path / "job.yaml").write_text(config["data"]["job.yaml"])
    assert load_job(str(tmp_path / "job.yaml")) == load_job(str(file))


def test_the_example_is_a_rendered_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    hint = f"cluster/kuberay-rayjob.yaml: write it again, with `voco render {RENDERED} --kuberay`"
    assert (ROOT / MANIFESTS[1]).read_text() == render.render_rayjob(RENDERED), hint


def job(raw: dict[str, Any] | None = None, **resources: Any) -> Job:
    base = {
        "name": "ingest", "kind": "ingest", "output": "s3://b/o", "inputs": {"annotations": "s3://b/a"},
        "ingest": {"format": "llava_json", "dataset": "x"}, "resources": resources,
    }  # fmt: skip
    return build_job("job.yaml", {**base, **(raw or {})})


def test_pods_are_sized_from_the_job() -> None:
    def sized(**resources: Any) -> list[tuple[str, int, int, int]]:
        return [(group.name, group.pods, group.cpus, group.gpus) for group in worker_groups(job(**resources))]

    assert sized(workers=40, cpus_per_worker=1) == [("cpu", 3, 16, 0)]
    assert sized(workers=3, cpus_per_worker=20) == [("cpu", 3, 20, 0)]
    assert sized(workers=16, cpus_per_worker=4, gpus_per_worker=1, accelerator="A100") == [
        ("cpu", 1, 16, 0), ("gpu-a100", 2, 32, 8)
    ]  # fmt: skip
    assert sized(workers=2, cpus_per_worker=6, gpus_per_worker=1) == [("cpu", 1, 16, 0), ("gpu", 1, 12, 2)]
    assert sized(workers=3, cpus_per_worker=1, gpus_per_worker=5) == [("cpu", 1, 16, 0), ("gpu", 3, 1, 8)]
    assert sized(workers=4, cpus_per_worker=1, gpus_per_worker=0.5) == [("cpu", 1, 16, 0), ("gpu", 1, 4, 2)]


def training(**workers: int) -> Job:
    block = {"epochs": 1, "global_batch": 64, "micro_batch": 8, "learning_rate": 1e-4}
    raw = {
        "name": "train", "kind": "image_sft", "output": "s3://b/o", "image_sft": block,
        "inputs": {"samples": [{"uri": "s3://b/s"}], "checkpoint": "s3://b/c"}, "compression": {"method": "voco", "tokens": 2},
        "resources": {"workers": workers, "cpus_per_worker": 8, "gpus_per_worker": 1, "accelerator": "H100"},
    }  # fmt: skip
    return build_job("job.yaml", raw)


@pytest.mark.parametrize(
    ("workers", "gpus", "fewest", "most"),
    [((2, 8), 2, 1, 4), ((8, 32), 8, 1, 4), ((16, 32), 8, 2, 4), ((3, 8), 3, 1, 3)],
)
def test_replicas_follow_the_range_of_workers(workers: tuple[int, int], gpus: int, fewest: int, most: int) -> None:
    """Pods are no larger than the fewest workers fill: in pods of 8 GPUs, 2 to 8 workers would be 8 or none."""
    resource = render.rayjob_manifest(training(min=workers[0], max=workers[1]))
    group = resource["spec"]["rayClusterSpec"]["workerGroupSpecs"][-1]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (fewest, fewest, most)
    pod = group["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == str(gpus)
    assert any(item["key"] == "cloud.google.com/gke-spot" for item in pod["tolerations"])
    assert operator_problems(resource) == []
    assert schema_errors(resource) == []


def test_refusals() -> None:
    with pytest.raises(Refused, match="gpus_per_worker: expected at most 8"):
        render.rayjob_manifest(job(workers=1, gpus_per_worker=9))
    with pytest.raises(Refused, match="accelerator: expected gpus_per_worker above 0"):
        render.rayjob_manifest(job(accelerator="A100"))
    with pytest.raises(Refused, match=r"output: expected s3://, .* got out"):
        render.rayjob_manifest(job({"output": "out"}))
    stage = {"name": "i", "kind": "ingest", "output": "b", "inputs": {"annotations": "s3://b/a"}}
    stage["ingest"] = {"format": "llava_json", "dataset": "x"}
    flow = build_job("f.yaml", {"name": "f", "kind": "flow", "output": "/a", "flow": {"stages": [stage]}})
    with pytest.raises(Refused, match=r"flow\.stages\[0\]\.output: expected s3://"):
        render.rayjob_manifest(flow)


@pytest.mark.parametrize("word", ["a", "9lives-", "-" * 40, "x" * 40])
def test_names_are_kubernetes_names(word: str) -> None:
    name = render.k8s_name(job({"name": word}))
    assert LABEL.fullmatch(name)
    assert len(name) <= 47
