"""`voco render --kuberay`: a job as a KubeRay RayJob, whose cluster is sized for the job and ends with it.

The job file is copied unchanged into a ConfigMap and mounted on the head, where Ray runs drivers. Field names and limits:
KubeRay's CRD `ray.io/v1` and the operator's `validation.go`, as of KubeRay 1.7: older ones may lack a group's `resources`,
`labels` and `priority`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from voco.commands.worker_groups import WorkerGroup, worker_groups
from voco.errors import Refused
from voco.job.load import load_job
from voco.job.spec import Job
from voco.run.claim import STOP_WAIT_S
from voco.run.units import POOL
from voco.store import storage

RAY_VERSION = "2.60.0"  # of the image; a test compares it with the pin in pyproject.toml
IMAGE = "YOUR-REGISTRY/voco:0.1.0"
FOLDER = "/etc/voco"  # where the head finds the job file
NAME_LENGTH = 47  # of a RayJob
CONFIG_MAP_BYTES = 1 << 20


def k8s_name(job: Job) -> str:
    """A name that Kubernetes accepts for a RayJob and its ConfigMap: it starts with a letter and has at most 47 characters."""
    return f"voco-{job.name}"[:NAME_LENGTH].strip("-")


def rayjob_manifest(job: Job, image: str = IMAGE) -> dict[str, Any]:
    """The RayJob. It mounts the ConfigMap of the same name, with the job file as `job.yaml`; see `render_rayjob`.

    Raises Refused for a local path, which pods do not share, and for workers that fit no pod.
    """
    _check_portable(job)
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
                "workerGroupSpecs": [_group(group, image) for group in worker_groups(job)],
            },
        },
    }


def _check_portable(job: Job) -> None:
    uris = [("output", job.output)]
    for index, stage in enumerate(job.stages):
        prefix = "" if stage is job else f"flow.stages[{index}]."
        uris += [(f"{prefix}{key}", uri) for key, uri in {"output": stage.output, **stage.uris()}.items()]
    for key, uri in uris:
        if not uri.startswith(("s3://", "@", "/")):
            raise Refused(f"{key}: expected s3://, or an absolute path on a volume that all pods mount, got {uri}")


def _head(job: Job, image: str) -> dict[str, Any]:
    not_spot = [  # a node without the key also matches
        {"key": "cloud.google.com/gke-spot", "operator": "DoesNotExist"},
        {"key": "karpenter.sh/capacity-type", "operator": "NotIn", "values": ["spot"]},
        {"key": "eks.amazonaws.com/capacityType", "operator": "NotIn", "values": ["SPOT"]},
    ]
    required = {"nodeSelectorTerms": [{"matchExpressions": not_spot}]}
    pod = _pod("ray-head", image, cpus=4, memory_gib=16, gpus=0)
    pod["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
    pod["containers"][0]["volumeMounts"].append({"name": "job", "mountPath": FOLDER, "readOnly": True})
    pod["volumes"].append({"name": "job", "configMap": {"name": k8s_name(job)}})
    # no CPUs for workers, which could push the driver out of memory
    return {"rayStartParams": {"num-cpus": "0"}, "labels": {POOL: "head"}, "template": {"spec": pod}}


def _group(group: WorkerGroup, image: str) -> dict[str, Any]:
    memory = 64 * group.gpus if group.gpus else 4 * group.cpus
    pod = _pod("ray-worker", image, group.cpus, memory, group.gpus)
    grace = 120 if group.gpus else 60
    pod["terminationGracePeriodSeconds"] = grace
    # an eviction drains the node, so that training saves a checkpoint: shorter than the grace, or it is cut off
    pod["containers"][0]["env"] = [{"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": str(grace - 15)}]
    pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}] if group.gpus else []
    if group.spot:
        spot = {"key": "karpenter.sh/capacity-type", "operator": "Equal", "value": "spot", "effect": "NoSchedule"}
        pod["tolerations"] += [{"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"}, spot]
    spec: dict[str, Any] = {
        "groupName": group.name,
        "replicas": group.fewest,
        "minReplicas": group.fewest,
        "maxReplicas": group.pods,
        "idleTimeoutSeconds": 600 if group.gpus else 300,
        "priority": 0 if group.gpus else 10,
        "rayStartParams": {},
        "labels": {POOL: "gpu" if group.gpus else "cpu"},
        "template": {"spec": pod},
    }
    if group.accelerator is not None:  # the autoscaler cannot see the model of a GPU before it starts
        spec["resources"] = {f"accelerator_type:{group.accelerator}": "1"}
    return spec


def _pod(container: str, image: str, cpus: int, memory_gib: int, gpus: int) -> dict[str, Any]:
    """A pod with Ray's container first, as KubeRay wants it, and shared memory in /dev/shm for the object store and NCCL."""
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
    """The text that `voco render JOB.yaml --kuberay` prints: the ConfigMap with the unchanged job file, and the RayJob.

    Raises Refused for a job file with a mistake, and for what `rayjob_manifest` refuses.
    """
    job = load_job(file)
    text = Path(file).read_text()
    if len(text.encode()) > CONFIG_MAP_BYTES:
        raise Refused(f"{file}: expected at most {CONFIG_MAP_BYTES:,} bytes, which is what a ConfigMap holds")
    try:
        rayjob = rayjob_manifest(job, image)
    except Refused as error:
        raise Refused(f"{file}: {error}") from None
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": k8s_name(job)}, "data": {"job.yaml": text}}
    head = f"# The job {job.name} on Kubernetes, from `voco render {file} --kuberay`. Fill in every YOUR-, then\n"
    head += "#   kubectl replace --force -f FILE      (applied again, the job continues)\n"
    if storage.is_placeholder(text):
        head += "# The job file itself has YOUR- in it: fill that in and render again.\n"
    body = yaml.dump_all([config, rayjob], Dumper=_Dumper, sort_keys=False, width=1000)
    return head + body


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block, lists indented, no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
