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
