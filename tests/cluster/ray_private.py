"""All private calls of the cluster tests into Ray's autoscaler, valid for ray 2.60.

They say what a launcher file or a RayCluster means to the autoscaler, and what its scheduler (v2) starts for given work.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest
from ray.core.generated.common_pb2 import LabelSelectorOperator


def launcher(file: Path | None = None, raw: dict[str, Any] | None = None) -> dict[str, Any]:
    """The configuration that `ray up` reads from a file, with its defaults. Raises what `ray up` raises for a wrong file."""
    config = prepare_config(copy.deepcopy(raw) if raw is not None else yaml.safe_load((file or Path()).read_text()))
    validate_config(config)
    for node_type in config["available_node_types"].values():
        validate_node_label_syntax(node_type.get("labels", {}))
    return config


def ray_cluster(spec: dict[str, Any]) -> dict[str, Any]:
    """The configuration that KubeRay's autoscaler container reads from a RayCluster's spec."""
    return _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "test", "namespace": "test"}, "spec": spec})


def schedule(
    config: dict[str, Any], gangs: list[list[dict[str, float]]], singles: list[dict[str, float]], selector: dict[str, str]
) -> tuple[Counter[str], int]:
    """Nodes by type that the autoscaler starts on an empty cluster, and the number of requests that fit nowhere.

    `gangs` are placement groups, all bundles at once or none; `singles` are tasks or actors on nodes of `selector`.
    """
    autoscaling = AutoscalingConfig(config, skip_content_hash=True)
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=autoscaling.get_node_type_configs(),
            max_num_nodes=autoscaling.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(
                [ResourceRequestUtil.make(bundle, label_selectors=_selectors(selector)) for bundle in singles]
            ),
            gang_resource_requests=[
                GangResourceRequest(requests=[ResourceRequestUtil.make(bundle) for bundle in gang]) for gang in gangs
            ],
        )
    )
    launched = Counter({request.instance_type: request.count for request in reply.to_launch})
    return launched, len(reply.infeasible_gang_resource_requests) + len(reply.infeasible_resource_requests)


def _selectors(selector: dict[str, str]) -> list[list[tuple[str, int, list[str]]]] | None:
    """Ray's `{"key": "!value"}` as the autoscaler receives it."""
    if not selector:
        return None
    operators = {True: LabelSelectorOperator.LABEL_OPERATOR_NOT_IN, False: LabelSelectorOperator.LABEL_OPERATOR_IN}
    return [[(key, operators[value.startswith("!")], [value.lstrip("!")]) for key, value in selector.items()]]
