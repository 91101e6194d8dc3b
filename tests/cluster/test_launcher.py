"""The files for `ray up`, and the image: Ray accepts them, and their versions are those of this repository."""

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
from voco.run import units

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHER = ("aws.yaml", "gcp.yaml", "workstation.yaml")
CLOUD = ("aws.yaml", "gcp.yaml")
IMAGE_FILES = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "platform", "pipelines", "cluster/spot_notice.py"}


def project() -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return content


def pin() -> str:
    """The version of Ray in pyproject.toml."""
    (version,) = [line.split("==")[1] for line in project()["project"]["dependencies"] if line.startswith("ray[")]
    return str(version)


@pytest.mark.parametrize("file", LAUNCHER)
def test_ray_accepts_it_and_every_version_is_pinned(file: str) -> None:
    text = yaml.safe_dump(ray_private.launcher(CLUSTER / file))  # with Ray's defaults
    assert not re.search(r"ray-wheels|3\.0\.0\.dev|nightly|:latest|pip install -U", text)
    assert "RAY_AUTH_MODE=token" in text


def test_ray_rejects_a_wrong_file() -> None:
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

    assert {name for name, node_type in types.items() if spot(node_type)} == {"cpu_ingest"}
    for name, node_type in types.items():
        assert node_type["labels"]["ray.io/market-type"] == ("spot" if spot(node_type) else "on-demand")
        assert node_type["min_workers"] == 0, name
    assert {name: node_type["labels"][units.POOL] for name, node_type in types.items()} == {
        "head": "head", "cpu_ingest": "cpu", "gpu_train": "gpu"
    }  # fmt: skip
    assert "spot_notice.py " + file.split(".")[0] in config["worker_start_ray_commands"][-1]


def test_nothing_stops_another_users_ray_on_a_workstation() -> None:
    config = ray_private.launcher(CLUSTER / "workstation.yaml")
    assert "ray stop" not in yaml.safe_dump(config)


def test_one_version_of_ray_everywhere() -> None:
    assert pin() == render.RAY_VERSION
    assert f"ray=={pin()}\n" in (ROOT / "constraints.txt").read_text()
    for file in sorted(CLUSTER.iterdir()):
        if file.is_file():
            versions = re.findall(
                r"\bray(?:\[[a-z,]*\])?(?:==|:)(\d+\.\d+\.\d+)|rayVersion: \"?(\d+\.\d+\.\d+)", file.read_text()
            )
            assert {tag or field for tag, field in versions} <= {pin()}, file
    assert f'"ray[default,data,train,tune]=={pin()}"' in (CLUSTER / "workstation.yaml").read_text()


def test_the_image_has_what_it_needs() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    assert f"ARG BASE=rayproject/ray:{pin()}-py311-cu130" in lines  # torch's wheel is built for CUDA 13.0
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert set(copied) == IMAGE_FILES
    assert all((ROOT / word).exists() for word in copied)
    assert lines[-2] == "USER 1000"
    metadata = project()["project"]
    assert {metadata["readme"], *metadata["license-files"]} <= set(copied)  # setuptools reads them
    assert f'voco"\nversion = "{metadata["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert render.IMAGE.endswith(":" + metadata["version"])
    # `pip install .` installs only the packages that pyproject.toml names
    packages = {
        ".".join(["voco", *folder.relative_to(ROOT / "platform/voco").parts])
        for folder in (ROOT / "platform/voco").rglob("*")
        if (folder / "__init__.py").exists()
    }
    assert packages - set(project()["tool"]["setuptools"]["packages"]) == set()


def test_the_image_installs_the_gpu_extra_which_is_pinned() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert "\nARG EXTRA=gpu\n" in text
    assert re.search(r'pip install .*--no-build-isolation .*"\.\[\$EXTRA\]"', text)
    extras = project()["project"]["optional-dependencies"]
    kernels, *others = extras["gpu"]
    assert re.fullmatch(r"flash-attn==[\w.]+", kernels)
    assert others == extras["lora"], "a job with an adapter runs in the image"
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert set(others) <= {line for line in pinned if "==" in line}
