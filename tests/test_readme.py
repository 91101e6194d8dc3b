"""README, CONTRIBUTING and docs/ name files, commands and keys that exist, and show what the code really does."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml

from pipelines import cli
from voco.evaluate.metrics import Metric
from voco.job import chat_templates, spec, tables
from voco.job.load import build_job, load_job
from voco.model.attention.voco_mask import TokenIds, allowed
from voco.report.comparison import SUMMARY
from voco.sequence.sequence import NONE, PREFIX, TEXT, VISION, VOCO
from voco.store import schemas

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = sorted(path.name for path in (ROOT / "platform/voco").iterdir() if (path / "__init__.py").exists())
README = (ROOT / "README.md").read_text()
IDS = [path.name for path in PAGES]
PLACEHOLDERS = {"NAME", "KIND", "SOURCE", "JOB", "FILE", "OUTPUT", "DIR"}  # words in a path that the reader replaces


def named_paths(text: str) -> set[str]:
    """Paths of the repository that a page names in backticks or prose: they begin with a folder of the root."""
    roots = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    paths = re.findall(rf"(?<![\w/.<>-])(?:{roots})/[\w./-]*\w/?", text)
    return {path for path in paths if not PLACEHOLDERS & set(re.findall(r"[A-Z]+", path))}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_paths_exist(page: Path) -> None:
    for path in named_paths(page.read_text()):
        assert (ROOT / path).exists(), path


def test_many_paths_are_checked() -> None:
    assert len({path for page in PAGES for path in named_paths(page.read_text())}) > 60


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_and_targets_exist(page: Path) -> None:
    text = page.read_text()
    for command in re.findall(r"(?:^|`|\$ )voco ([a-z]+)", text, re.MULTILINE):
        assert command in cli.VERBS, command
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, target
    for module in re.findall(r"python -m (voco[\w.]*|pipelines)", text):
        path = ROOT / ("platform" if module.startswith("voco") else "") / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_every_command_is_in_the_readme() -> None:
    for command in cli.VERBS:
        assert re.search(rf"voco .*\b{command}\b", README), command


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_docstrings_point_to_headings() -> None:
    """`docs/method.md` and `docs/data.md` are what docstrings refer to, with or without a section."""
    for file in (ROOT / "platform").rglob("*.py"):
        for name, anchor in re.findall(r"docs/(\w+\.md)(?:#([\w-]+))?", file.read_text()):
            assert (ROOT / "docs" / name).exists(), f"{file}: {name}"
            assert not anchor or anchor in anchors(ROOT / "docs" / name), f"{file}: {name}#{anchor}"


def test_the_readme_is_short_and_starts_with_the_two_commands() -> None:
    lines = README.splitlines()
    assert len(lines) <= 130
    top = "\n".join(lines[:14])
    assert "make demo" in top
    assert "make test" in top
    assert max(map(len, lines)) <= 160


def test_the_readme_names_every_room_and_every_page() -> None:
    block = README.split("## The rooms")[1].split("```")[1]
    for room in ROOMS:
        assert f"{room}/" in block, room
    for page in PAGES[1:]:
        assert f"({page.relative_to(ROOT)})" in README, page


def test_the_tree_names_rooms_and_files_that_exist() -> None:
    tree = (ROOT / "docs/layout.md").read_text().split("## The tree")[1].split("```")[1]
    parents, named = [ROOT], set()
    for line in tree.splitlines():
        folder = re.match(r"([\u2502 ]*)[\u251c\u2514]\u2500\u2500 ([\w/]+)/", line)
        if folder:  # four columns a level
            level = len(folder[1]) // 4 + 1
            parents = [*parents[:level], parents[level - 1] / folder[2]]
            named.add(parents[-1])
        for file in ["", *re.findall(r"\w+\.py", line)]:
            assert (parents[-1] / file).exists(), f"{parents[-1]}/{file}"
    assert {ROOT / "platform/voco" / name for name in ROOMS} <= named


def test_the_job_in_the_readme_is_a_job() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert build_job("README.md", yaml.safe_load(text)).kind == "image_sft"


def test_every_job_file_loads() -> None:
    files = sorted((ROOT / "jobs").rglob("*.yaml"))
    assert files
    for file in files:
        load_job(str(file))


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/method.md"], ids=["README.md", "method.md"])
def test_the_picture_is_the_mask(page: Path) -> None:
    kinds = [PREFIX, VISION, VISION, VISION, PREFIX, VOCO] * 2 + [TEXT] * 4
    view = [0] * 6 + [1] * 6 + [NONE] * 4
    conversation = [NONE] * 12 + [0] * 4
    ids = TokenIds(*(torch.tensor([column]) for column in (kinds, [0] * 16, view, conversation)))
    expected = ["".join("#" if cell else "." for cell in row) for row in allowed(ids, "voco")[0].tolist()]
    rows = re.findall(r"^(?:BOS|v|\\n|<voco>|text) +([#.]{6}) ([#.]{6}) ([#.]{4})", page.read_text(), re.MULTILINE)
    assert ["".join(row) for row in rows] == expected


def test_what_ask_prints() -> None:
    code = (ROOT / "platform/voco/commands/ask.py").read_text()
    for page in (README, (ROOT / "docs/asking.md").read_text()):
        for words in (
            "pass 1, views to caches:",
            "caches found",
            "pass 2, question to answer:",
            "to the first token",
            "ended by",
        ):
            assert words in page
            assert words in code


def leaf_names(schema: pa.Schema) -> set[str]:
    return {field.name for field in schema}


@pytest.mark.parametrize(
    ("section", "schema"),
    [
        ("samples", schemas.SAMPLES),
        ("samples", pa.schema(list(schemas.MEDIUM))),
        ("samples", pa.schema(list(schemas.CONVERSATION))),
        ("Rejects", schemas.REJECTS),
        ("features", schemas.FEATURES),
        ("frame_cache", schemas.frame_cache_schema(8)),
        ("frame_cache", schemas.FRAME_INDEX),
        ("answers", schemas.ANSWERS),
        ("scores", schemas.SCORES),
        ("metrics", schemas.METRICS),
    ],
)
def test_every_column_is_described(section: str, schema: pa.Schema) -> None:
    text = (ROOT / "docs/data.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    first_cells = ", ".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| "))
    described = {name.strip() for name in first_cells.split(",")}
    assert leaf_names(schema) <= described


def test_derived_tables_are_described() -> None:
    text = (ROOT / "docs/data.md").read_text()
    for section, names in (("trials", leaf_names(schemas.TRIALS)), ("summary", leaf_names(SUMMARY))):
        body = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
        for name in names - leaf_names(schemas.SCORES):
            assert name in body, f"{section}: {name}"
    for reason in schemas.REASONS:
        assert f"`{reason}`" in text, reason


def test_every_name_of_a_table_is_described() -> None:
    method, data = ((ROOT / "docs" / name).read_text() for name in ("method.md", "data.md"))
    for name in [*tables.METHODS, *tables.ATTENTION, *chat_templates.CHAT_TEMPLATES]:
        assert f"`{name}`" in method, name
    for name in [*tables.FORMATS, *spec.STAGES]:
        assert f"`{name}`" in data, name


def test_the_metric_of_extending_is_one() -> None:
    text = (ROOT / "docs/extending.md").read_text()
    pyproject, code = re.findall(r"```(?:toml|python)\n(# (?:pyproject|voco_lenient).*?)```", text, re.DOTALL)
    assert tomllib.loads(pyproject)["project"]["entry-points"] == {"voco.metrics": {"lenient": "voco_lenient"}}
    scope: dict[str, object] = {}
    exec(code, scope)
    metric = scope["METRIC"]
    assert isinstance(metric, Metric)
    assert metric.mark("The red Kite", ["a red kite"]) == 1.0
    assert metric.mark("kite", ["a red kite"]) == 0.0
