"""A job as a KubeRay RayJob: a cluster of its own, sized for the job, that ends with it.

The job file travels as it is in a ConfigMap and is mounted on the head, where Ray runs drivers. Field names and limits:
KubeRay's CRD `ray.io/v1` and the operator's `validation.go`, as of KubeRay 1.7: older ones may lack a group's `resources`,
`labels` and `priority`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from voco.errors import Refused
from voco.job import spec
from voco.job.config import Resources
from voco.job.spec import Job
from voco.run.units import POOL
from voco.store import storage

RAY_VERSION = "2.60.0"  # that of the image; a test holds it to the pin in pyproject.toml
IMAGE = "YOUR-REGISTRY/voco:0.1.0"
FOLDER = "/etc/voco"  # where the head finds the job file
NAME_LENGTH = 47  # of a RayJob
CONFIG_MAP_BYTES = 1 << 20
CPU_POD_CPUS = 16
GPU_POD_GPUS = 8
STOP_WAIT_S = 120  # for a checkpoint, when the job is stopped


@dataclass(frozen=True)
class WorkerDemand:
    """`count` Ray workers of one size that are wanted at the same time."""

    count: int
    cpus: float
    gpus: float
    accelerator: str | None


@dataclass(frozen=True)
class WorkerGroup:
    """One worker group: at most `pods` pods of this size."""

    name: str
    pods: int
    cpus: int
    gpus: int
    accelerator: str | None


def worker_demands(job: Job) -> list[list[WorkerDemand]]:
    """What each stage of a job asks Ray for at once; nothing for stages that work in the driver.

    A sweep: its trials' workers, and then the workers that evaluate; the trials' own drivers sit on the head.
    """
    if job.flow is not None:
        return [wanted for stage in job.flow.stages for wanted in worker_demands(stage)]
    if job.sweep is not None:
        return [[_demand(job.sweep.train.resources, job.sweep.concurrent)], [_demand(job.sweep.evaluate.resources)]]
    return [] if job.kind == "report" else [[_demand(job.resources)]]


def most_cpus(job: Job) -> float:
    """CPUs of the workers of a job's largest stage."""
    return max((sum(one.count * one.cpus for one in stage) for stage in worker_demands(job)), default=1)


def _demand(held: Resources, times: int = 1) -> WorkerDemand:
    return WorkerDemand(held.workers * times, held.cpus_per_worker, held.gpus_per_worker, held.accelerator)


def worker_groups(job: Job) -> list[WorkerGroup]:
    """Worker groups that hold the largest stage: `cpu`, and one for every kind of GPU. Pods are started only when needed.

    Raises Refused for a worker that no pod could hold.
    """
    stages = worker_demands(job)
    for one in (one for stage in stages for one in stage):
        if one.gpus > GPU_POD_GPUS:
            raise Refused(f"resources.gpus_per_worker: expected at most {GPU_POD_GPUS}, the GPUs of a pod, got {one.gpus:g}")
        if one.accelerator is not None and not one.gpus:
            raise Refused(f"resources.accelerator: expected gpus_per_worker above 0 with {one.accelerator}, got 0")
    kinds = sorted({one.accelerator or "" for stage in stages for one in stage if one.gpus})
    return [_cpu_pool(stages), *(_gpu_pool(stages, kind or None) for kind in kinds)]


def _cpu_pool(stages: list[list[WorkerDemand]]) -> WorkerGroup:
    per_stage = [[one for one in stage if not one.gpus] for stage in stages]
    largest = max([one.cpus for stage in per_stage for one in stage], default=1)
    cpus = max(CPU_POD_CPUS, math.ceil(largest))
    pods = [sum(math.ceil(one.count / math.floor(cpus / one.cpus)) for one in stage) for stage in per_stage]
    return WorkerGroup("cpu", max([1, *pods]), cpus, 0, None)


def _gpu_pool(stages: list[list[WorkerDemand]], accelerator: str | None) -> WorkerGroup:
    wanted = [one for stage in stages for one in stage if one.gpus and one.accelerator == accelerator]
    gpus = min(GPU_POD_GPUS, max(math.ceil(max(one.gpus, one.count * one.gpus)) for one in wanted))
    each = [min(one.count, math.floor(gpus / one.gpus)) for one in wanted]  # workers of one pod
    cpus = max(math.ceil(count * one.cpus) for count, one in zip(each, wanted, strict=True))
    pods = max(math.ceil(one.count / count) for count, one in zip(each, wanted, strict=True))
    word = "" if accelerator is None else "-" + re.sub(r"[^a-z0-9]+", "-", accelerator.lower()).strip("-")
    return WorkerGroup(f"gpu{word}", pods, cpus, gpus, accelerator)


def k8s_name(job: Job) -> str:
    """A name that Kubernetes takes for a RayJob and its ConfigMap: it starts with a letter and has at most 47 characters."""
    return f"voco-{job.name}"[:NAME_LENGTH].strip("-")


def rayjob_manifest(job: Job, image: str = IMAGE) -> dict[str, Any]:
    """The RayJob. It mounts the ConfigMap of the same name, with the job file as `job.yaml`; see `render`.

    Raises Refused for a local path, which no two pods share, and for workers that fit no pod.
    """
    _check_places(job)
    runtime_env = {"env_vars": {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": k8s_name(job)},
        "spec": {
            "entrypoint": f"python -m pipelines run {FOLDER}/job.yaml",
            "runtimeEnvYAML": yaml.safe_dump(runtime_env),
            "submissionMode": "K8sJobMode",
            "backoffLimit": 2,  # a new cluster each time; the job continues from what is finished
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": {
                "rayVersion": RAY_VERSION,
                "authOptions": {"mode": "token"},
                "enableInTreeAutoscaling": True,
                "autoscalerOptions": {"version": "v2", "upscalingMode": "Default", "idleTimeoutSeconds": 300},
                "headGroupSpec": _head(job, image),
                "workerGroupSpecs": [_group(pool, image) for pool in worker_groups(job)],
            },
        },
    }


def _check_places(job: Job) -> None:
    stages = job.flow.stages if job.flow is not None else [job]
    places = [("output", job.output)]
    for index, stage in enumerate(stages):
        where = f"flow.stages[{index}]." if job.flow is not None else ""
        places += [(f"{where}{key}", uri) for key, uri in {"output": stage.output, **stage.uris()}.items()]
    for key, uri in places:
        if not uri.startswith(("s3://", "@", "/")):
            raise Refused(f"{key}: expected s3://, or an absolute path on a volume that all pods mount, got {uri}")


def _head(job: Job, image: str) -> dict[str, Any]:
    not_spot = [  # a node without the key fits as well
        {"key": "cloud.google.com/gke-spot", "operator": "DoesNotExist"},
        {"key": "karpenter.sh/capacity-type", "operator": "NotIn", "values": ["spot"]},
        {"key": "eks.amazonaws.com/capacityType", "operator": "NotIn", "values": ["SPOT"]},
    ]
    required = {"nodeSelectorTerms": [{"matchExpressions": not_spot}]}
    pod = _pod("ray-head", image, cpus=4, memory_gib=16, gpus=0)
    pod["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
    pod["containers"][0]["volumeMounts"].append({"name": "job", "mountPath": FOLDER, "readOnly": True})
    pod["volumes"].append({"name": "job", "configMap": {"name": k8s_name(job)}})
    # no CPUs for work: the driver must not be pushed out of memory by it
    return {"rayStartParams": {"num-cpus": "0"}, "labels": {POOL: "head"}, "template": {"spec": pod}}


def _group(pool: WorkerGroup, image: str) -> dict[str, Any]:
    memory = 64 * pool.gpus if pool.gpus else 4 * pool.cpus
    pod = _pod("ray-worker", image, pool.cpus, memory, pool.gpus)
    grace = 120 if pool.gpus else 60
    pod["terminationGracePeriodSeconds"] = grace
    # an eviction drains the node, so that training saves a checkpoint: shorter than the grace, or it is cut off
    pod["containers"][0]["env"] = [{"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": str(grace - 15)}]
    if pool.gpus:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    else:
        spot = {"key": "karpenter.sh/capacity-type", "operator": "Equal", "value": "spot", "effect": "NoSchedule"}
        pod["tolerations"] = [{"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"}, spot]
    group: dict[str, Any] = {
        "groupName": pool.name,
        "replicas": 0,
        "minReplicas": 0,
        "maxReplicas": pool.pods,
        "idleTimeoutSeconds": 600 if pool.gpus else 300,
        "priority": 0 if pool.gpus else 10,
        "rayStartParams": {},
        "labels": {POOL: "gpu" if pool.gpus else "cpu"},
        "template": {"spec": pod},
    }
    if pool.accelerator is not None:  # the autoscaler cannot see the model of a GPU that is not there yet
        group["resources"] = {f"accelerator_type:{pool.accelerator}": "1"}
    return group


def _pod(container: str, image: str, cpus: int, memory_gib: int, gpus: int) -> dict[str, Any]:
    """A pod with Ray's container first, as KubeRay wants it, and memory in /dev/shm for the object store and NCCL."""
    size = {"cpu": str(cpus), "memory": f"{memory_gib}Gi"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    shared = {"medium": "Memory", "sizeLimit": f"{memory_gib * 3 // 8}Gi"}
    return {
        "containers": [
            {
                "name": container,
                "image": image,
                # AWS_*, WANDB_API_KEY and the like; a job file never holds them
                "envFrom": [{"secretRef": {"name": "voco-environment", "optional": True}}],
                "resources": {"limits": size, "requests": dict(size)},
                "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
            }
        ],
        "volumes": [{"name": "shared-memory", "emptyDir": shared}],
    }


def render_rayjob(file: str, image: str = IMAGE) -> str:
    """What `voco render JOB.yaml --kuberay` prints: the ConfigMap with the job file as it stands, and the RayJob.

    Raises Refused for a job file that is not right, and for what `rayjob` refuses.
    """
    job = spec.load_job(file)
    text = Path(file).read_text()
    if len(text.encode()) > CONFIG_MAP_BYTES:
        raise Refused(f"{file}: expected at most {CONFIG_MAP_BYTES:,} bytes, which is what a ConfigMap holds")
    try:
        made = rayjob_manifest(job, image)
    except Refused as error:
        raise Refused(f"{file}: {error}") from None
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": k8s_name(job)}, "data": {"job.yaml": text}}
    head = f"# The job {job.name} on Kubernetes, from `voco render {file} --kuberay`. Fill in every YOUR-, then\n"
    head += "#   kubectl replace --force -f FILE      (sent again, the job continues)\n"
    if storage.is_placeholder(text):
        head += "# The job file itself has YOUR- in it: fill that in and render again.\n"
    body = yaml.dump_all([config, made], Dumper=_Dumper, sort_keys=False, width=1000)
    return head + body


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block, lists indented, nothing shared by anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
