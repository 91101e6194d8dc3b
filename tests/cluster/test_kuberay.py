"""Kubernetes manifests, written by hand and rendered from jobs, against KubeRay's own definitions and its operator's checks.

The definitions (CRDs) are not part of this repository: those tests skip where they are not at VOCO_KUBERAY_CRDS.
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
from voco.errors import Refused
from voco.job import spec

ROOT = Path(__file__).parents[2]
CRDS = Path(os.environ.get("VOCO_KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay"))
PAPER = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "jobs/paper").glob("*.yaml"))
MANIFESTS = ("cluster/kuberay-raycluster.yaml", "cluster/kuberay-rayjob.yaml")
LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # DNS-1035


def manifest(file: str) -> dict[str, Any]:
    """The Ray object of a manifest, or of a job file rendered as one."""
    text = render.render_rayjob(str(ROOT / file)) if file.startswith("jobs/") else (ROOT / file).read_text()
    (found,) = [item for item in yaml.safe_load_all(text) if item["apiVersion"] == "ray.io/v1"]
    return dict(found)


@functools.cache
def definition(kind: str) -> jsonschema.Draft202012Validator:
    file = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not file.exists():
        pytest.skip(f"{file} is not here: set VOCO_KUBERAY_CRDS to a folder with KubeRay's CRDs")
    (version,) = [item for item in yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]["versions"] if item["name"] == "v1"]
    return jsonschema.Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))


def strict(schema: Any) -> Any:
    """A CRD's schema with keys that it does not name refused, as the API server does with `--validate=strict`."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string") is True:
        return {"type": ["integer", "string"]}
    made = {key: value if key in ("enum", "default", "required") else strict(value) for key, value in schema.items()}
    properties = made.get("properties")
    if isinstance(properties, dict) and "type" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        if "metadata" in properties and properties["metadata"] == {"type": "object"}:
            properties["metadata"] = {}
        made.setdefault("additionalProperties", False)
    return made


def mistakes(found: dict[str, Any]) -> list[str]:
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in definition(found["kind"]).iter_errors(found)]


@pytest.mark.parametrize("file", [*MANIFESTS, *PAPER])
def test_kuberay_knows_every_field(file: str) -> None:
    assert mistakes(manifest(file)) == []


def test_a_wrong_field_is_seen() -> None:
    found = manifest(MANIFESTS[0])
    for path, key, value in (("", "rayVersions", "1"), ("autoscalerOptions", "version", "v3"), ("authOptions", "mode", "on")):
        wrong = copy.deepcopy(found)
        (wrong["spec"][path] if path else wrong["spec"])[key] = value
        assert len(mistakes(wrong)) == 1, key
    del found["spec"]["workerGroupSpecs"][0]["maxReplicas"]
    found["spec"]["workerGroupSpecs"][0]["minReplica"] = 0
    assert len(mistakes(found)) == 2


def groups(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    cluster = found["spec"].get("rayClusterSpec", found["spec"])
    yield "head", cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group


def operator_problems(found: dict[str, Any]) -> list[str]:
    """What the operator's own checks would say that the schema does not: names, limits, combinations."""
    cluster = found["spec"].get("rayClusterSpec", found["spec"])
    limit = {"RayJob": 47, "RayCluster": 53}[found["kind"]]
    name = found["metadata"]["name"]
    told = [] if len(name) <= limit and LABEL.fullmatch(name) else [f"name {name}"]
    if cluster["authOptions"]["mode"] == "token" and not cluster.get("rayVersion"):
        told.append("a token needs rayVersion")
    names = [group for group, _ in groups(found)]
    told += [f"group {group} twice" for group in set(names) if names.count(group) > 1]
    for group, held in groups(found):
        params = held.get("rayStartParams", {})
        if held.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(params):
            told.append(f"{group}: resources in two places")
        if "labels" in params:
            told.append(f"{group}: labels in rayStartParams")
        if held["template"]["spec"].get("restartPolicy", "Never") != "Never":
            told.append(f"{group}: restartPolicy")
        if group != "head" and not 0 <= held["minReplicas"] <= held["replicas"] <= held["maxReplicas"]:
            told.append(f"{group}: replicas")
        env = {item["name"] for item in held["template"]["spec"]["containers"][0].get("env", [])}
        if "RAY_enable_autoscaler_v2" in env:
            told.append(f"{group}: autoscaler version in two places")
        if not LABEL.fullmatch(group):
            told.append(f"group name {group}")
    if found["kind"] == "RayJob" and found["spec"].get("clusterSelector"):
        told.append("clusterSelector beside rayClusterSpec")
    return told


@pytest.mark.parametrize("file", [*MANIFESTS, *PAPER])
def test_the_operator_takes_it(file: str) -> None:
    assert operator_problems(manifest(file)) == []


def test_an_operator_problem_is_seen() -> None:
    found = manifest(PAPER[0])
    found["metadata"]["name"] = "9-" + "x" * 50
    cluster = found["spec"]["rayClusterSpec"]
    del cluster["rayVersion"]
    cluster["workerGroupSpecs"][-1]["rayStartParams"] = {"num-cpus": "1"}
    cluster["workerGroupSpecs"][-1]["resources"] = {"x": "1"}
    cluster["headGroupSpec"]["rayStartParams"]["labels"] = "a=b"
    assert len(operator_problems(found)) == 4


@pytest.mark.parametrize("file", [*MANIFESTS, *PAPER])
def test_what_every_cluster_has(file: str) -> None:
    found = manifest(file)
    cluster = found["spec"].get("rayClusterSpec", found["spec"])
    assert cluster["rayVersion"] == render.RAY_VERSION
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group, held in groups(found):
        pod = held["template"]["spec"]
        (mount,) = [item for item in pod["containers"][0]["volumeMounts"] if item["mountPath"] == "/dev/shm"]
        (volume,) = [item for item in pod["volumes"] if item["name"] == mount["name"]]
        assert volume["emptyDir"]["medium"] == "Memory"
        spot = any(item["key"] == "cloud.google.com/gke-spot" for item in pod.get("tolerations", []))
        assert spot == (held["labels"][render.POOL] == "cpu")
        if group == "head":
            continue
        assert held["minReplicas"] == 0
        (drain,) = [item["value"] for item in pod["containers"][0]["env"] if "DRAIN_TIMEOUT" in item["name"]]
        assert int(drain) < pod["terminationGracePeriodSeconds"]


def test_the_job_file_travels_as_it_is(tmp_path: Path) -> None:
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
    assert spec.load_job(str(tmp_path / "job.yaml")) == spec.load_job(str(file))


def test_the_example_is_a_rendered_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    told = "cluster/kuberay-rayjob.yaml: write it again, with `voco render jobs/paper/image-sft.yaml --kuberay`"
    assert (ROOT / MANIFESTS[1]).read_text() == render.render_rayjob("jobs/paper/image-sft.yaml"), told


def job(raw: dict[str, Any] | None = None, **resources: Any) -> spec.Job:
    held = {
        "name": "ingest", "kind": "ingest", "output": "s3://b/o", "inputs": {"annotations": "s3://b/a"},
        "ingest": {"format": "llava_json", "dataset": "x"}, "resources": resources,
    }  # fmt: skip
    return spec.build_job("job.yaml", {**held, **(raw or {})})


def test_pods_are_sized_from_the_job() -> None:
    def sized(**resources: Any) -> list[tuple[str, int, int, int]]:
        return [(pool.name, pool.pods, pool.cpus, pool.gpus) for pool in render.worker_groups(job(**resources))]

    assert sized(workers=40, cpus_per_worker=1) == [("cpu", 3, 16, 0)]
    assert sized(workers=3, cpus_per_worker=20) == [("cpu", 3, 20, 0)]
    assert sized(workers=16, cpus_per_worker=4, gpus_per_worker=1, accelerator="A100") == [
        ("cpu", 1, 16, 0), ("gpu-a100", 2, 32, 8)
    ]  # fmt: skip
    assert sized(workers=2, cpus_per_worker=6, gpus_per_worker=1) == [("cpu", 1, 16, 0), ("gpu", 1, 12, 2)]
    assert sized(workers=3, cpus_per_worker=1, gpus_per_worker=5) == [("cpu", 1, 16, 0), ("gpu", 3, 1, 8)]
    assert sized(workers=4, cpus_per_worker=1, gpus_per_worker=0.5) == [("cpu", 1, 16, 0), ("gpu", 1, 4, 2)]


def test_refusals() -> None:
    with pytest.raises(Refused, match="gpus_per_worker: expected at most 8"):
        render.rayjob_manifest(job(workers=1, gpus_per_worker=9))
    with pytest.raises(Refused, match="accelerator: expected gpus_per_worker above 0"):
        render.rayjob_manifest(job(accelerator="A100"))
    with pytest.raises(Refused, match=r"output: expected s3://, .* got out"):
        render.rayjob_manifest(job({"output": "out"}))
    stage = {"name": "i", "kind": "ingest", "output": "b", "inputs": {"annotations": "s3://b/a"}}
    stage["ingest"] = {"format": "llava_json", "dataset": "x"}
    flow = spec.build_job("f.yaml", {"name": "f", "kind": "flow", "output": "/a", "flow": {"stages": [stage]}})
    with pytest.raises(Refused, match=r"flow\.stages\[0\]\.output: expected s3://"):
        render.rayjob_manifest(flow)


@pytest.mark.parametrize("word", ["a", "9lives-", "-" * 40, "x" * 40])
def test_names_are_kubernetes_names(word: str) -> None:
    made = render.k8s_name(job({"name": word}))
    assert LABEL.fullmatch(made)
    assert len(made) <= 47
