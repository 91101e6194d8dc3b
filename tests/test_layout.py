"""Guards of the layout: what may import what, names that say nothing, sizes, and the standard library's `platform`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "voco"
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "pipelines").glob("*.py")])
# What a layer may import of ours, besides itself and the modules directly under voco.
ABOVE = {"ingest", "train", "video", "evaluate", "report", "demo"}
BANNED = {
    "utils", "util", "helpers", "helper", "common", "base", "core", "misc", "manager", "handler", "processor", "wrapper",
    "engine", "strategy", "registry", "factory", "v2", "legacy",
}  # fmt: skip
HEAVY = {"ray", "deepspeed"}


def module(file: Path) -> str:
    top = ROOT / "platform" if PACKAGE in file.parents else ROOT
    parts = file.relative_to(top).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> set[str]:
    """Every module that a file names in an import, at its head or inside a function, `from a import b` as a.b too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {item.name for item in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {str(node.module), *(f"{node.module}.{item.name}" for item in node.names)}
    return found


GRAPH = {module(file): imports(file) for file in FILES}


def reached(start: str) -> set[str]:
    """Every module that importing or calling `start` may import, ours followed."""
    seen: set[str] = set()
    ahead = [start]
    while ahead:
        name = ahead.pop()
        if name not in seen:
            seen.add(name)
            ahead += GRAPH.get(name, set())
    return seen


def layer(name: str) -> str:
    parts = name.split(".")
    return parts[1] if parts[0] == "voco" and len(parts) > 1 else parts[0]


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_the_graph_sees_the_package() -> None:
    assert {"voco.spec", "voco.model.voco_mask", "pipelines.cli"} <= set(GRAPH)
    assert "voco.spec" in GRAPH["voco.manifest"]


def test_platform_is_the_standard_library() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not (ROOT / "platform.py").exists()
    code = "import platform, uuid, voco.spec; print(platform.__file__); platform.system()"
    for path in (str(ROOT), f"{ROOT / 'platform'}:{ROOT}"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).parent.name.startswith("python3.")


@pytest.mark.parametrize("name", sorted(name for name in GRAPH if layer(name) == "model"))
def test_model_never_reaches_ray_or_deepspeed(name: str) -> None:
    assert not tops(reached(name)) & HEAVY


@pytest.mark.parametrize("name", sorted(name for name in GRAPH if layer(name) == "ingest"))
def test_ingest_never_reaches_torch(name: str) -> None:
    assert not tops(reached(name)) & {"torch", "transformers", "deepspeed"}


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_imports_go_one_way(name: str) -> None:
    ours = {item for item in GRAPH[name] if item in GRAPH and item != name}
    if not name.startswith("voco"):
        return
    assert not {item for item in ours if item.startswith("pipelines")}
    if layer(name) == "model":
        assert not {layer(item) for item in ours} & ABOVE
    elif layer(name) not in ABOVE and name not in ("voco.show", "voco.features", "voco.ask"):
        assert not {layer(item) for item in ours} & (ABOVE | {"model"})


def test_ingest_and_the_command_line_load_without_torch() -> None:
    names = [name for name in GRAPH if layer(name) == "ingest"] + ["pipelines.cli", "voco.plan", "voco.jobs", "voco.running"]
    code = f"import sys, {', '.join(names)}; assert not {{'torch', 'ray'}} & set(sys.modules), 'loaded'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_module_imports() -> None:
    names = [name for name in GRAPH if not name.endswith("__main__")]
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_names_and_sizes(file: Path) -> None:
    assert not set(file.stem.split("_")) & BANNED
    text = file.read_text()
    assert text.count("\n") <= 400
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 100, node.name
