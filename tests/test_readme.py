"""The README names files, commands and keys that exist."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from pipelines import cli
from voco.job import spec

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_paths_exist():
    named = set(re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|yaml|md))`", README))
    assert len(named) > 10
    for path in named:
        assert (ROOT / path).exists(), path


def test_the_file_map_names_every_module():
    block = README.split("## Files")[1].split("```")[1]
    for module in (ROOT / "platform/voco").glob("*.py"):
        assert module.name in block or module.name in ("__init__.py", "errors.py"), module.name
    for folder in ("ingest", "model", "train", "video", "evaluate", "report", "demo"):
        assert f"{folder}/" in block


def test_commands_exist():
    for command in re.findall(r"^voco (\w+)", README, re.MULTILINE):
        assert command in cli.COMMANDS, command
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE):
        assert target in targets, target


def test_the_job_in_the_readme_is_a_job():
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    job = spec.build_job("README.md", yaml.safe_load(text))
    assert job.kind == "image_sft"


def test_every_job_file_loads():
    files = sorted((ROOT / "jobs").rglob("*.yaml"))
    assert files
    for file in files:
        spec.load_job(str(file))


def test_the_path_from_job_to_step_is_short():
    path = README.split("From a job file to the training step")[1]
    files = re.findall(r"`([\w./]+)`", path)
    assert len(files) <= 14
    lines = sum(len((ROOT / file).read_text().splitlines()) for file in files)
    assert lines <= 2000, lines
