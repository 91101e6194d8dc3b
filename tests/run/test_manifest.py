"""Outputs name their run; a flow with --replace runs changed stages again and keeps the rest."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ingest import source  # tests/ingest/source.py

import pipelines
from voco.errors import Refused
from voco.job.load import build_job
from voco.job.spec import Job
from voco.run import manifest
from voco.store import storage


def flow(folder: Path, output: Path, second: str = "b") -> Job:
    def stage(name: str, dataset: str) -> dict[str, object]:
        inputs = {"annotations": f"{folder}/mix.json", "media": f"{folder}/images"}
        return {"name": name, "kind": "ingest", "inputs": inputs, "ingest": {"format": "llava_json", "dataset": dataset}}

    stages = [stage("one", "a"), stage("two", second)]
    return build_job("f.yaml", {"name": "line", "kind": "flow", "output": str(output), "flow": {"stages": stages}})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source.write(tmp_path / "source", *source.good(30, 5))
    return tmp_path / "source"


def written(output: Path) -> dict[str, int]:
    """When each stage's manifest was written, in ns."""
    return {name: (output / name / "manifest.json").stat().st_mtime_ns for name in ("one", "two")}


def test_a_finished_flow_is_left_alone_and_only_a_changed_stage_runs_again(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = pipelines.run(flow(folder, output))
    assert set(done.statistics["stage_seconds"]) == {"one", "two"}
    assert [parent["uri"] for parent in done.parents] == [str(output / "one"), str(output / "two")]
    first = written(output)
    assert pipelines.run(flow(folder, output)) == done
    with pytest.raises(Refused, match="holds run"):
        pipelines.run(flow(folder, output, second="c"))
    assert written(output) == first
    again = pipelines.run(flow(folder, output, second="c"), replace=True)
    assert again.run_id != done.run_id
    now = written(output)
    assert now["one"] == first["one"]
    assert now["two"] != first["two"]


def test_a_replacing_flow_that_was_killed_continues_to_replace(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    pipelines.run(flow(folder, output))
    new = flow(folder, output, second="c")
    assert manifest.claim_output(new, manifest.job_run_id(new), replace=True) is None  # here the driver dies
    assert pipelines.run(new).run_id == manifest.job_run_id(new)


def test_a_job_killed_while_it_clears_another_runs_files_clears_them_when_run_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill comes when the manifest is gone and other files are not: no file of the old run may pass for the new run's."""
    output = tmp_path / "out"
    pipelines.run(source.job(folder, output))
    new = source.job(folder, output, dataset="other")
    real, deleted = storage.delete, []

    def delete(uri: str) -> None:
        if deleted and not uri.rsplit("/", 1)[-1].startswith(".write-probe"):
            raise KeyboardInterrupt
        deleted.extend([uri] if not uri.rsplit("/", 1)[-1].startswith(".write-probe") else [])
        real(uri)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "delete", delete)
        with pytest.raises(KeyboardInterrupt):
            pipelines.run(new, replace=True)
    assert (output / "units").is_dir()
    assert manifest.output_run_id(str(output)) == manifest.job_run_id(new)
    pipelines.run(new)
    table = pq.read_table(output / "samples", columns=["dataset"])
    assert set(table["dataset"].to_pylist()) == {"other"}


def test_files_left_by_killed_writes_are_gone_when_the_job_ends(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    job = source.job(folder, output)
    done = pipelines.run(job)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("samples/part-00000.parquet", "units/00000.json", "manifest.json"):
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", killed)
            with pytest.raises(KeyboardInterrupt):
                storage.write_bytes(f"{output}/{name}", b"half")
    assert len(list(output.rglob("*.partial"))) == 3
    assert storage.list_names(f"{output}/units") == ["00000.json"]
    (output / "manifest.json").unlink()
    assert pipelines.run(job).tables == done.tables
    assert not list(output.rglob("*.partial"))


def test_a_stale_input_is_refused(folder: Path, tmp_path: Path) -> None:
    """An output whose parent was replaced since is no input: it comes from other data."""
    first = pipelines.run(flow(folder, tmp_path / "out"))
    assert first.parents
    parent = tmp_path / "out" / "one" / "manifest.json"
    parent.write_text(parent.read_text() + "\n")
    with pytest.raises(Refused, match=r"inputs\.outputs\[0\]: .*out is stale: line: its parent .*one has manifest"):
        manifest.input_state("inputs.outputs[0]", str(tmp_path / "out"))


def test_an_output_of_a_changed_parent_is_refused_and_can_be_replaced(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    job = flow(folder, output)
    pipelines.run(job)
    parent = output / "one" / "manifest.json"
    parent.write_text(parent.read_text() + "\n")
    with pytest.raises(Refused, match=r"its parent .*one has manifest"):
        pipelines.run(job)
    assert pipelines.run(job, replace=True).run_id == manifest.job_run_id(job)
    pipelines.run(job)


def test_foreign_outputs_are_refused(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("x")
    with pytest.raises(Refused, match="holds files that no job wrote"):
        pipelines.run(source.job(folder, output), replace=True)
    (output / "mine.txt").unlink()
    pipelines.run(source.job(folder, output))
    with pytest.raises(Refused, match="holds run"):
        pipelines.run(source.job(folder, output, split="test"))
    assert pipelines.run(source.job(folder, output, split="test"), replace=True).name == "ingest-test"


def test_missing_inputs_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"inputs\.annotations: .* does not exist"):
        manifest.job_run_id(source.job(tmp_path / "none", tmp_path / "out"))
    with pytest.raises(Refused, match="is a placeholder"):
        manifest.job_run_id(source.job("s3://YOUR-BUCKET/x", tmp_path / "out"))
