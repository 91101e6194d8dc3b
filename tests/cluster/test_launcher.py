"""The files for `ray up`, and the image: what Ray itself makes of them, and that they name the versions of this repository."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster import ray_private
from voco.commands import render

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHER = ("aws.yaml", "gcp.yaml", "workstation.yaml")
CLOUD = ("aws.yaml", "gcp.yaml")


def project() -> dict[str, Any]:
    held: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return held


def pin() -> str:
    """The version of Ray in pyproject.toml."""
    (found,) = [line.split("==")[1] for line in project()["project"]["dependencies"] if line.startswith("ray[")]
    return str(found)


@pytest.mark.parametrize("file", LAUNCHER)
def test_ray_takes_it_and_nothing_unpinned_is_in_it(file: str) -> None:
    told = yaml.safe_dump(ray_private.launcher(CLUSTER / file))  # with the defaults that Ray fills in
    assert not re.search(r"ray-wheels|3\.0\.0\.dev|nightly|:latest|pip install -U", told)
    assert "RAY_AUTH_MODE=token" in told


def test_ray_refuses_what_is_wrong() -> None:
    raw = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    with pytest.raises(jsonschema.ValidationError):
        ray_private.launcher(raw={**raw, "idle_timeout_minute": 5})
    raw["available_node_types"]["gpu_train"]["resources"]["GPU"] = 7.5
    with pytest.raises(jsonschema.ValidationError):
        ray_private.launcher(raw=raw)


@pytest.mark.parametrize("file", CLOUD)
def test_the_head_does_no_work_and_only_cpu_nodes_are_spot(file: str) -> None:
    config = ray_private.launcher(CLUSTER / file)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]

    def spot(node_type: dict[str, Any]) -> bool:
        node = node_type["node_config"]
        return "InstanceMarketOptions" in node or any(item.get("preemptible") for item in node.get("scheduling", []))

    assert {name for name, held in types.items() if spot(held)} == {"cpu_ingest"}
    for name, held in types.items():
        assert held["labels"]["ray.io/market-type"] == ("spot" if spot(held) else "on-demand")
        assert held["min_workers"] == 0, name
    assert {name: held["labels"][render.POOL] for name, held in types.items()} == {
        "head": "head", "cpu_ingest": "cpu", "gpu_train": "gpu"
    }  # fmt: skip
    assert "spot_notice.py " + file.split(".")[0] in config["worker_start_ray_commands"][-1]


def test_nothing_ends_a_ray_that_is_not_ours_on_a_workstation() -> None:
    config = ray_private.launcher(CLUSTER / "workstation.yaml")
    assert "ray stop" not in yaml.safe_dump(config)


def test_one_version_of_ray_everywhere() -> None:
    assert pin() == render.RAY_VERSION
    assert f"ray=={pin()}\n" in (ROOT / "constraints.txt").read_text()
    for file in sorted(CLUSTER.iterdir()):
        if file.is_file():
            said = re.findall(r"\bray(?:\[[a-z,]*\])?(?:==|:)(\d+\.\d+\.\d+)|rayVersion: \"?(\d+\.\d+\.\d+)", file.read_text())
            assert {one or other for one, other in said} <= {pin()}, file
    assert f'"ray[default,data,train,tune]=={pin()}"' in (CLUSTER / "workstation.yaml").read_text()


def test_the_image_holds_what_it_needs() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    assert f"ARG BASE=rayproject/ray:{pin()}-py311-gpu" in lines
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert {"pyproject.toml", "constraints.txt", "platform", "pipelines", "cluster/spot_notice.py"} == set(copied)
    assert all((ROOT / word).exists() for word in copied)
    assert lines[-2] == "USER 1000"
    (version,) = [f'voco"\nversion = "{project()["project"]["version"]}"']
    assert version in (ROOT / "pyproject.toml").read_text()
    assert render.IMAGE.endswith(":" + project()["project"]["version"])
    # `pip install .` takes the packages that pyproject.toml names, and no others
    packages = {
        ".".join(["voco", *folder.relative_to(ROOT / "platform/voco").parts])
        for folder in (ROOT / "platform/voco").rglob("*")
        if (folder / "__init__.py").exists()
    }
    assert packages - set(project()["tool"]["setuptools"]["packages"]) == set()
