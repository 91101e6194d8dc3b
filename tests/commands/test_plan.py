"""`voco plan`: three states of an input, sizes, steps and memory; quick, without Ray and torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ingest import source
from job.test_spec import TRAIN, changed

import pipelines
from voco.commands import plan
from voco.errors import Refused
from voco.job.load import build_job
from voco.store.s3 import PatientS3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source.write(tmp_path / "source", *source.good(30, 5))
    return tmp_path / "source"


def test_states_of_inputs_and_outputs(folder: Path, tmp_path: Path) -> None:
    job = source.job(folder, tmp_path / "out")
    printed = "\n".join(plan.plan_lines("job.yaml", job))
    assert f"output {tmp_path}/out: new" in printed
    assert "mix.json: present: " in printed
    assert "free disk there" in printed
    run = pipelines.run(job).run_id
    assert f"finished as {run}" in "\n".join(plan.plan_lines("job.yaml", job))
    (tmp_path / "out" / "manifest.json").unlink()
    assert f"unfinished, continues {run}" in "\n".join(plan.plan_lines("job.yaml", job))
    with pytest.raises(Refused, match="holds run"):
        plan.plan_exit_code("job.yaml", source.job(folder, tmp_path / "out", split="test"))
    with pytest.raises(Refused, match=r"job.yaml: inputs\.annotations: .* does not exist"):
        plan.plan_lines("job.yaml", source.job(tmp_path / "none", tmp_path / "out2"))


def test_not_checked_inputs_are_sized_by_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = changed(TRAIN, "inputs", {"samples": [{"uri": "s3://YOUR-BUCKET/a"}], "features": "s3://nowhere/f"})
    raw["expect"] = {"rows": 1001, "bytes": 5 << 30}
    raw["output"] = "s3://nowhere/out"
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:9", "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    PatientS3.clear_instance_cache()  # another test's server may be cached
    job = build_job("job.yaml", raw)
    printed = "\n".join(plan.plan_lines("job.yaml", job))
    assert plan.plan_exit_code("job.yaml", job) == 0
    assert "output s3://nowhere/out: not checked" in printed
    assert "s3://YOUR-BUCKET/a: not checked, expect: 1,001 rows, 5.0 GiB" in printed
    assert "s3://nowhere/f: not checked, expect" in printed
    assert "steps: ceil(1,001 rows / 8) x 1 epochs = 126" in printed


def test_expect_gives_the_rows_of_annotations_and_the_bytes_of_media() -> None:
    inputs = {"annotations": "s3://YOUR-BUCKET/a.json", "media": "s3://YOUR-BUCKET/m"}
    raw = {"name": "x", "kind": "ingest", "output": "s3://YOUR-BUCKET/o", "inputs": inputs}
    raw |= {"expect": {"rows": 1001, "bytes": 5 << 30}, "ingest": {"format": "llava_json", "dataset": "d", "split": "train"}}
    printed = "\n".join(plan.plan_lines("job.yaml", build_job("job.yaml", raw)))
    assert "a.json: not checked, expect: 1,001 rows\n" in printed
    assert "/m: not checked, expect: 5.0 GiB\n" in printed


def test_zero_memory_adds_up() -> None:
    def formula(stage: int, precision: str) -> str:
        raw = changed(changed(TRAIN, "image_sft.zero_stage", stage), "image_sft.precision", precision)
        job = build_job("x", raw)
        return plan.training_memory(job, job.model.llama)[1]  # type: ignore[union-attr, arg-type]

    assert "x (2 + 2 + 12/2) bytes" in formula(1, "bf16")
    assert "x (2 + 2/2 + 12/2) bytes" in formula(2, "bf16")
    assert "x (4/2 + 4/2 + 8/2) bytes" in formula(3, "fp32")


@pytest.mark.parametrize(("precision", "gpus", "warned"), [("bf16", 0, True), ("fp32", 0, False), ("bf16", 1, False)])
def test_bf16_without_a_gpu_gives_a_warning(precision: str, gpus: int, warned: bool) -> None:
    raw = changed(changed(TRAIN, "image_sft.precision", precision), "resources", {"workers": 2, "gpus_per_worker": gpus})
    sizes = {"inputs.samples[0].uri": plan.InputSize(10, None, "manifest")}
    lines = plan.training_plan(build_job("x", raw), sizes)
    assert any("multiply bf16 many times slower" in line for line in lines) == warned


def test_the_command_is_quick_and_imports_neither_ray_nor_torch(folder: Path, tmp_path: Path) -> None:
    import yaml

    job = source.job(folder, tmp_path / "out")
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job.model_dump(exclude_none=True)))
    code = (
        "import sys; from pipelines.cli import main; code = main(['plan', sys.argv[1]]); "
        "assert not {'ray', 'torch', 'transformers', 'deepspeed'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
