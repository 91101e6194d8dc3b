"""Extension from outside: a package with one format, method, metric, chat template, attention backend and stage kind.

`extending/fruit` is installed as pip would: its folder, with its dist-info, is on the path of the driver and of every worker.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import world
from PIL import Image

from voco.job import chat_templates, tables
from voco.job.spec import STAGES
from voco.run import manifest
from voco.store import parquet, storage

HERE = Path(__file__).parent
PLUGIN = HERE / "extending"
ROOT = HERE.parent

# The files of each, besides its row: the flow is the job file, and this test the test, of all of them.
FILES = {
    "format": ["fruit/fruit_csv.py", "flow.yaml", "../test_extending.py"],
    "method": ["fruit/every_other_row.py", "fruit/every_other.py", "../test_extending.py"],
    "metric": ["fruit/contains.py", "../test_extending.py"],
    "stage": ["fruit/row_count.py", "fruit/count_rows.py", "flow.yaml", "../test_extending.py"],
    "template": ["fruit/q_and_a.py"],
    "backend": ["fruit/pairwise.py"],
}
LIMITS = {"format": 3, "method": 3, "metric": 2, "stage": 4, "template": 1, "backend": 1}


def write_data(folder: Path) -> None:
    """32 images of one colour each, a question about each; one line that is no row."""
    (folder / "images").mkdir(parents=True)
    names = list(world.COLOURS)
    for index in range(32):
        Image.new("RGB", (64, 64), world.COLOURS[names[index % 4]]).save(folder / "images" / f"{index}.png")
    lines = [f"{index}.png,What color is it?,{names[index % 4]}" for index in range(32)]
    (folder / "train.csv").write_text("\n".join([*lines[:24], "a line that is no row"]) + "\n")
    (folder / "test.csv").write_text("\n".join(lines[24:]) + "\n")


def voco(folder: Path, *words: str, plugin: bool = True) -> subprocess.CompletedProcess[str]:
    path = [str(PLUGIN)] if plugin else []
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["PYTHONPATH"] = os.pathsep.join([*path, str(ROOT / "platform"), str(ROOT)])
    command = [sys.executable, "-m", "pipelines", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_each_takes_few_files() -> None:
    for kind, files in FILES.items():
        assert all((PLUGIN / file).is_file() for file in files), kind
        assert len(files) <= LIMITS[kind], kind


def test_without_the_package_its_names_are_refused(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    done = voco(tmp_path, "plan", str(PLUGIN / "flow.yaml"), plugin=False)
    assert done.returncode == 2
    assert "row_count: unknown key; expected one of" in done.stderr


def test_a_package_cannot_replace_a_row() -> None:
    """The tables of this process, which does not see the package, are the ones that it would have to add to."""
    assert "fruit_csv" not in tables.FORMATS
    assert tables.METHODS["voco"].label == "VoCo"
    assert "q_and_a" not in chat_templates.CHAT_TEMPLATES
    assert "row_count" not in STAGES


def install(folder: Path, package: str, entry_points: str, **modules: str) -> None:
    """A package as pip would install it: a module for each keyword, and its entry points."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)


BROKEN = """
[voco.formats]
no_module = nowhere
no_format = plum_empty
wrong_row = plum_number:ROW
llava_json = nowhere:ROW
twice = plum_empty

[voco.methods]
absent = plum_number:ABSENT
fails = plum_fails:ROW

[voco.chat_templates]
no_row = plum_empty

[voco.stages]
seed = plum_stage:ROW
no_block = plum_fails:STAGE
"""
STAGE = """
from voco.job.config import Report
from voco.job.spec import Stage
ROW = Stage(Report, "A kind with the name of a key")
"""
# a line of a job file -> the end of its message
FAULTS = {
    "ingest: {format: wrong_row}": "plum 1.0 cannot be used: TypeError: plum_number:ROW: expected a FormatRow, got int",
    "ingest: {format: twice}": "voco.formats of plum 1.0, prune 1.0 cannot be used: ValueError: several packages add this name",
    "compression: {method: absent}": "cannot be used: AttributeError: module 'plum_number' has no attribute 'ABSENT'",
    "compression: {method: fails}": "voco.methods of plum 1.0 cannot be used: ZeroDivisionError: division by zero",
    "no_block: {}": "no_block: unknown key; voco.stages of plum 1.0 cannot be used: ZeroDivisionError: division by zero",
}
CHECK = """
import json, sys
from voco.errors import Refused
from voco.ingest.formats import get_format
from voco.job import load, tables
from voco.job.spec import Job, STAGES
assert tables.FORMATS["llava_json"].module is None
assert STAGES.get("seed") is None and Job.model_fields["seed"].annotation is int
job = "name: a\\nkind: ingest\\noutput: o\\ninputs: {annotations: a}\\n"
messages = {}
for words in json.loads(sys.argv[1]):
    blocks = words if words.startswith("ingest") else "ingest: {format: llava_json, dataset: d}\\n" + words
    try:
        load.load_job("job.yaml", job + blocks)
    except Refused as error:
        messages[words] = str(error)
load.load_job("job.yaml", job + "ingest: {format: llava_json, dataset: d}")
for name in ("no_module", "no_format"):
    load.load_job("job.yaml", job + f"ingest: {{format: {name}, dataset: d}}")
    try:
        get_format(name)
    except Refused as error:
        messages[name] = str(error)
assert "torch" not in sys.modules
print(json.dumps(messages))
"""


def test_a_broken_package_is_named_by_the_jobs_that_use_it_and_spares_the_others(tmp_path: Path) -> None:
    fails = "STAGE = ROW = 1 / 0"
    install(tmp_path, "plum", BROKEN, plum_empty="", plum_number="ROW = 1", plum_stage=STAGE, plum_fails=fails)
    install(tmp_path, "prune", "[voco.formats]\ntwice = prune\n", prune="FORMAT = None\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "platform"), str(ROOT)])}
    command = [sys.executable, "-c", CHECK, json.dumps(list(FAULTS))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    messages = json.loads(done.stdout)
    for words, reason in FAULTS.items():
        assert messages[words].endswith(reason), messages[words]
    assert messages["no_module"] == "formats: no_module: module nowhere: ModuleNotFoundError: No module named 'nowhere'"
    missing = "AttributeError: module 'plum_empty' has no attribute 'FORMAT'"
    assert messages["no_format"] == f"formats: no_format: module plum_empty: {missing}"


@pytest.mark.ray
@pytest.mark.slow
def test_one_of_each_from_outside_the_package_runs(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    planned = voco(tmp_path, "plan", str(PLUGIN / "flow.yaml"))
    assert planned.returncode == 0, planned.stderr
    done = voco(tmp_path, "run", str(PLUGIN / "flow.yaml"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    out = tmp_path / "out"
    # the format
    assert manifest.read_manifest(str(out / "fruit")).counts == {
        "read": 25, "written": 24, "samples": 24, "rejected": {"bad_record": 1},
    }  # fmt: skip
    # the stage kind
    assert json.loads((out / "count" / "count.json").read_text()) == {"rows": 32}
    # the method, whose weights were trained and saved under its name, and the chat template
    config = json.loads((out / "sft/model/config.json").read_text())
    assert (config["layout"]["method"], config["layout"]["template"]) == ("every_other", "q_and_a")
    with safetensors.safe_open(out / "sft/model/model.safetensors", "pt") as weights:
        scale = weights.get_tensor("every_other.weight")
    assert scale.shape == (112,)
    assert (scale != 1).any()
    # the metric, which marks otherwise than the default
    answers = parquet.read_table(str(out / "answers/answers/part-00000.parquet")).to_pylist()
    assert len(answers) == 8
    for answer in answers:
        assert answer["correct"] == float(answer["references"][0] in answer["prediction"].lower())
        assert answer["method"] == "every_other"
    # the report names the method by its row's label
    assert "every other patch" in storage.read_bytes(str(out / "report/report.html")).decode()
