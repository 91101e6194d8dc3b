"""Guards of the layout: rooms and what they may import, one table per extension point, names, sizes, and `platform`."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "voco"
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "pipelines").glob("*.py")])
OTHER_FILES = sorted(file for folder in ("tests", "bench") for file in (ROOT / folder).rglob("*.py"))

# A room may import the rooms of the levels before its own, and those named beside it. There are no exceptions by file.
LEVELS = (
    ("errors",),
    ("image", "store"),
    ("job",),
    ("run", "sequence", "video"),
    ("model", "methods"),
    ("ingest", "precompute"),
    ("train", "evaluate"),
    ("report",),
    ("commands",),
    ("demo", "pipelines"),
)
BESIDE = {"methods": {"model"}, "model": {"methods"}, "demo": {"pipelines"}}
WITHOUT_TORCH = ("image", "ingest", "job", "store", "run", "video")
WITHOUT_RAY = ("image", "model", "methods", "sequence", "job", "store", "video")

FILE_NAMES = {
    "utils", "util", "helpers", "helper", "common", "base", "core", "misc", "manager", "handler", "processor", "wrapper",
    "engine", "strategy", "registry", "factory", "v2", "legacy",
}  # fmt: skip
# identifiers that say nothing: the noun itself belongs there
EMPTY_NAMES = {
    "held", "found", "place", "places", "made", "told", "stated", "asked", "some", "one", "mine", "theirs", "ours", "said",
}  # fmt: skip
# phrases of a private dialect, in docstrings, comments, messages and, with underscores, in names
DIALECT = re.compile(r"\b(sent again|(is|are|was) told|goes on|went on|made anew|as it stands|of (its|their) own(?!\s+[a-z]))\b")
# one name for every file of a table or every script: the same meaning everywhere
INTERFACE = {"main", "run", "record", "read", "parse"}


def module(file: Path) -> str:
    top = ROOT / "platform" if PACKAGE in file.parents else ROOT
    parts = file.relative_to(top).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULE_NAMES = {module(file) for file in FILES}


def imports(file: Path) -> set[str]:
    """Every module that a file names in an import, at its head or inside a function: `from a import b` is a.b if that is one."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {item.name for item in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for item in node.names:
                full = f"{node.module}.{item.name}"
                names.add(full if full in MODULE_NAMES else str(node.module))
    return names


GRAPH = {module(file): imports(file) for file in FILES}


def own_imports(name: str) -> set[str]:
    """Modules of ours that a module imports."""
    return {item for item in GRAPH[name] if item in GRAPH and item != name}


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


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if parts[0] == "voco" and len(parts) > 1 else parts[0]


def level(name: str) -> int:
    return next(number for number, rooms in enumerate(LEVELS) if room(name) in rooms)


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


MODULES = sorted(name for name in GRAPH if name != "voco")


def test_the_graph_sees_the_package() -> None:
    assert {"voco.job.spec", "voco.model.attention.voco_mask", "pipelines.cli"} <= set(GRAPH)
    assert "voco.job.spec" in GRAPH["voco.run.manifest"]


def test_platform_is_the_standard_library() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not (ROOT / "platform.py").exists()
    code = "import platform, uuid, voco.job.spec; print(platform.__file__); platform.system()"
    for path in (str(ROOT), f"{ROOT / 'platform'}:{ROOT}"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).parent.name.startswith("python3.")


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name: str) -> None:
    """Down the levels, or within a room and the rooms beside it."""
    for item in own_imports(name) - {"voco"}:
        same = room(item) == room(name) or room(item) in BESIDE.get(room(name), set())
        assert same or level(item) < level(name), f"{name} imports {item}"


def test_no_circles() -> None:
    """No module reaches itself through what it imports, lazily or not."""
    for name in MODULES:
        reachable: set[str] = set()
        ahead = list(own_imports(name))
        while ahead:
            item = ahead.pop()
            if item not in reachable:
                reachable.add(item)
                ahead += own_imports(item)
        assert name not in reachable, name


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in WITHOUT_RAY])
def test_rooms_that_must_work_without_ray(name: str) -> None:
    assert not tops(reached(name)) & {"ray", "deepspeed"}


@pytest.mark.parametrize("name", [*(name for name in MODULES if room(name) in WITHOUT_TORCH), "voco.commands.plan"])
def test_rooms_that_must_work_without_torch(name: str) -> None:
    assert not tops(reached(name)) & {"torch", "transformers", "deepspeed"}


def test_plan_and_the_command_line_load_neither_torch_nor_ray() -> None:
    names = [name for name in MODULES if room(name) in WITHOUT_TORCH] + ["pipelines.cli", "voco.commands.plan"]
    code = f"import sys, {', '.join(names)}; assert not {{'torch', 'ray'}} & set(sys.modules), 'loaded'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "jobs/paper/flow.yaml"]], ids=["help", "plan"])
def test_quick_commands_load_nothing_heavy(arguments: list[str]) -> None:
    """What `voco --help` and `voco plan` load decides how long they take. `-X importtime` names every import on stderr."""
    code = "import sys; from pipelines.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-X", "importtime", "-c", code, *arguments]
    # with RAY_ADDRESS, which a Ray test in this process may have set, `plan` would ask the cluster too
    alone = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = tops({line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")})
    assert "pipelines" in loaded
    heavy = {"torch", "ray", "transformers", "deepspeed", "pandas", "numpy", "pyarrow", "wandb", "PIL", "psutil", "s3fs"}
    assert not loaded & (heavy | ({"pydantic", "yaml", "fsspec"} if arguments == ["--help"] else set()))


def test_every_module_imports() -> None:
    names = [name for name in GRAPH if not name.endswith("__main__")]
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_room_is_packaged() -> None:
    listed = (ROOT / "pyproject.toml").read_text()
    for init in PACKAGE.rglob("__init__.py"):
        assert f'"{module(init)}"' in listed, f"{module(init)} is not in pyproject.toml"


def test_names_in_tests_and_benches_say_something() -> None:
    for file in OTHER_FILES:
        names = identifiers(ast.parse(file.read_text()))
        assert not names & EMPTY_NAMES, file


def test_prose_is_plain_english() -> None:
    for file in [*FILES, *OTHER_FILES]:
        if file != Path(__file__):
            phrase = DIALECT.search(file.read_text().replace("_", " "))
            assert phrase is None, f"{file}: {phrase[0]}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_names_and_sizes(file: Path) -> None:
    assert not set(file.stem.split("_")) & FILE_NAMES
    text = file.read_text()
    assert text.count("\n") <= 400
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    assert not identifiers(tree) & EMPTY_NAMES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 100, node.name


def identifiers(tree: ast.AST) -> set[str]:
    """Every name that a file gives to something or uses: variables, arguments, attributes, functions, classes."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
    return names


def test_a_public_name_has_one_meaning() -> None:
    """No class or function name of two files, but for the interface that every file of a table has."""
    owners: dict[str, list[str]] = defaultdict(list)
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                owners[node.name].append(module(file))
    verbs = {"pipelines.cli"}  # a verb's function is named as the verb, and so is what it calls
    doubles = {name: files for name, files in owners.items() if len(set(files) - verbs) > 1 and name not in INTERFACE}
    assert not doubles


def test_pipelines_are_short() -> None:
    for file in (ROOT / "pipelines").glob("*.py"):
        if file.name != "cli.py":
            assert file.read_text().count("\n") <= 40, file.name


def test_samples_have_one_reader() -> None:
    """Only `store/samples.py` knows how parts and row groups of `samples/` are laid out."""
    for file in FILES:
        if file.name != "samples.py" and "write_samples" not in file.name:
            assert not re.search(r'(join|list_parts|part_uri)\([^)]*"samples"', file.read_text()), file
