"""W&B's own offline files, read back: what a run records, exactly once over attempts killed by a signal, and no secret."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from wandb_world import (  # tests/wandb_world.py
    RUN,
    SECRETS,
    attempt,
    attempts,
    environment,
    files,
    items,
    of,
    png,
    raw_job,
    steps,
)

from voco.job.load import build_job
from voco.job.spec import Job
from voco.run import manifest, wandb_records, wandb_tracking
from voco.store import storage

LOG_ALL = """
import psutil
run.log_steps(rows(0, 5))
pictures = [open(name, "rb").read() for name in ("red.png", "blue.png")]
facts = {"question": "which colour?", "references": ["red", "scarlet"], "prediction": "red", "correct": 1.0, "category": "colour"}
run.log_predictions([
    {**facts, "image": pictures[0]},
    {**facts, "image": pictures[1], "references": ["blue"], "correct": None},
    {**facts, "image": None, "correct": 0.0, "category": ""},
    {**facts, "image": b"no picture"},
])
run.log_steps(rows(3, 8))  # from 5 on
run.log_summary({"score": 0.75, "retention": {"low": 0.5}, "upper": None})
done = __import__("voco.run.manifest", fromlist=["x"]).Manifest.model_validate_json(open("out/manifest.json").read())
run.log_output(done, job.output)
processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
assert any(process.name() == "wandb-core" for process in processes)
assert not [line for process in processes for line in process.net_connections("inet")]
run.finish(0)
run.finish(1)  # once is enough
"""


@pytest.fixture(scope="module")
def logged_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Job]:
    """A run that logs everything, with secrets in its environment. Returns its home folder and the job."""
    home = tmp_path_factory.mktemp("whole")
    raw = raw_job(home, str(home / "out"))
    job = build_job("job.yaml", raw)
    (home / "red.png").write_bytes(png((250, 5, 5)))
    (home / "blue.png").write_bytes(png((5, 5, 250)))
    manifest.claim_output(job, RUN)
    manifest.write_manifest(job, RUN, time.time())
    done = attempt(raw, LOG_ALL, home, **SECRETS)
    assert (done.stdout, done.stderr) == ("", ""), "W&B is quiet"
    return home, job


def test_a_run_says_what_it_is_and_what_it_came_from(logged_run: tuple[Path, Job]) -> None:
    home, job = logged_run
    (records,) = attempts(job.output)
    (run,) = of(records, "run")
    assert (run.run_id, run.run_group, run.job_type) == (RUN, "flow-11223344", "image_sft")
    assert (run.display_name, run.project, run.host) == ("voco1-sft", "voco-tests", "")
    config = items(run.config.update)
    assert config["image_sft"]["learning_rate"] == 0.001
    assert config["compression"] == {"method": "voco", "tokens": 1}
    parents = [
        {"uri": str(home / name), "manifest_sha256": manifest.manifest_sha256(str(home / name))}
        for name in ("samples", "features")
    ]
    assert sorted(config["parents"], key=str) == sorted(parents, key=str)
    assert [line.exit_code for line in of(records, "exit")] == [0]


def test_curves_have_every_step_once_and_the_summary_has_the_figures(logged_run: tuple[Path, Job]) -> None:
    (records,) = attempts(logged_run[1].output)
    lines = steps(records)
    assert [line["step"] for line in lines] == list(range(8)) == [line["_step"] for line in lines]
    assert [line["loss"] for line in lines] == [1 / (1 + step) for step in range(8)]
    assert {"epoch", "lr", "grad_norm", "tokens", "seconds"} < set(lines[0])
    assert "sample_ids_sha256" not in lines[0]
    assert [line["tokens_per_s"] for line in lines] == [100.0 + step for step in range(8)]
    assert [line.get("val_loss") for line in lines] == [None, None, None, -1.0, None, None, None, -5.0], "where it is known"
    assert "mfu" not in lines[0]
    summary: dict[str, Any] = {}
    for update in of(records, "summary"):
        summary |= items(update.update)
    assert summary["score"] == 0.75
    assert summary["retention"] == {"low": 0.5} or summary["retention/low"] == 0.5
    assert "upper" not in summary


def test_predictions_are_a_table_with_small_pictures(logged_run: tuple[Path, Job]) -> None:
    home, job = logged_run
    (records,) = attempts(job.output)
    (artifact,) = [item for item in of(records, "artifact") if item.type == "run_table"]
    paths = {item.path: Path(item.local_path) for item in artifact.manifest.contents}
    assert all(path.is_relative_to(home / "out" / "wandb") for path in paths.values()), "nothing in the home directory"
    table = json.loads(paths["predictions.table.json"].read_text())
    assert tuple(table["columns"]) == wandb_tracking.PREDICTIONS
    assert [line[1:] for line in table["data"]] == [
        ["which colour?", "red | scarlet", "red", 1.0, "colour"],
        ["which colour?", "blue", "red", None, "colour"],
        ["which colour?", "red | scarlet", "red", 0.0, ""],
        ["which colour?", "red | scarlet", "red", 1.0, "colour"],
    ]
    assert [line[0] is None for line in table["data"]] == [False, False, True, True]
    for line, colour in zip(table["data"], [(250, 5, 5), (5, 5, 250)], strict=False):
        picture = Image.open(paths[line[0]["path"]])
        assert (picture.format, picture.size) == ("JPEG", (256, 128))
        seen = picture.getpixel((100, 100))
        assert isinstance(seen, tuple)
        assert all(abs(a - b) < 12 for a, b in zip(seen, colour, strict=True))
    assert "predictions/path" in items([item for line in of(records, "history") for item in line.item])


def test_the_output_is_an_artifact_with_its_lineage_and_no_weights(logged_run: tuple[Path, Job]) -> None:
    _, job = logged_run
    (records,) = attempts(job.output)
    (artifact,) = [item for item in of(records, "artifact") if item.type != "run_table"]
    assert (artifact.name, artifact.type) == ("voco1-sft", "image_sft")
    written = manifest.read_manifest(job.output)
    assert written is not None
    assert len(written.parents) == 2
    hashed = manifest.manifest_sha256(job.output)
    facts = {"uri": job.output, "run_id": RUN, "manifest_sha256": hashed, "parents": written.parents}
    assert json.loads(artifact.metadata) == facts
    ((path, local),) = [(item.path, Path(item.local_path)) for item in artifact.manifest.contents]
    assert path == "manifest.json"
    assert local.read_bytes() == (Path(job.output) / "manifest.json").read_bytes()
    assert not of(records, "use_artifact")


def test_neither_secrets_nor_facts_of_the_machine_are_recorded(logged_run: tuple[Path, Job]) -> None:
    home, job = logged_run
    paths = files(Path(job.output) / "wandb") + files(home / ".cache") + files(home / ".config")
    assert len(paths) > 5
    for path in paths:
        content = path.read_bytes()
        assert not [value for value in SECRETS.values() if value.encode() in content], path
    names = {path.name for path in paths}
    assert not names & {"wandb-metadata.json", "requirements.txt", "output.log", "diff.patch", "code"}
    assert not (home / ".local").exists()
    (records,) = attempts(job.output)
    assert not [kind for kind in ("environment", "output", "output_raw", "stats") if of(records, kind)]


# ---- attempts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pause", [0.0, 0.4, 1.6])
def test_no_step_is_logged_twice_after_sigkill(tmp_path: Path, pause: float) -> None:
    """Killed at step 58 with a checkpoint at 50: however many steps had reached the file, it ends with each of them once."""
    raw = raw_job(tmp_path, str(tmp_path / "out"))
    killed = f"""
    run.log_steps(rows(0, 50)); run.flush()
    for step in range(50, 58): run.log_steps(rows(step, step + 1))
    time.sleep({pause}); os.kill(os.getpid(), signal.SIGKILL)
    """
    attempt(raw, killed, tmp_path, exit_code=-signal.SIGKILL)
    before = [line["step"] for line in steps(attempts(raw["output"])[0])] if pause > 1 else []
    assert before == (list(range(58)) if pause > 1 else []), "the kill came past the checkpoint"
    resumed = """
    run.log_steps(rows(0, 50))  # the checkpoint's history
    for step in range(50, 80): run.log_steps(rows(step, step + 1))
    run.finish(0)
    """
    attempt(raw, resumed, tmp_path)
    both = attempts(raw["output"])
    assert len(both) == 2
    assert [len(of(records, "exit")) for records in both] == [0, 1]
    assert {run.run_id for records in both for run in of(records, "run")} == {RUN}
    lines = [line for records in both for line in steps(records)]
    assert sorted(line["step"] for line in lines) == list(range(80))
    assert all(line["loss"] == 1 / (1 + line["step"]) for line in lines)
    assert {line["attempt"] for line in lines} == {0, 1}, "one run over all attempts"
    attempt(raw, "assert run.recorded == set(range(80)); run.log_steps(rows(0, 80)); run.finish(0)", tmp_path)
    assert sum(len(steps(records)) for records in attempts(raw["output"])) == 80
    listed = subprocess.run(
        [str(Path(sys.executable).parent / "wandb"), "sync", "--dry-run"],
        env=environment(tmp_path),
        cwd=tmp_path / "out",
        capture_output=True,
        text=True,
    )
    assert "3 run(s)" in listed.stdout + listed.stderr, "wandb's own tool takes the directories"


def test_a_file_cut_or_damaged_anywhere_gives_the_records_before(tmp_path: Path) -> None:
    raw = raw_job(tmp_path, str(tmp_path / "out"))
    attempt(raw, "run.log_steps(rows(0, 300)); run.log_summary({'long': 'x' * 70000}); run.finish(0)", tmp_path)
    (file,) = (tmp_path / "out" / "wandb").glob(f"offline-run-*/run-{RUN}.wandb")
    data = file.read_bytes()
    every = list(wandb_records.read_records(data))
    assert len(data) > 4 * wandb_records.BLOCK, "records cross blocks, and one is longer than a block"
    assert every[-1][1] == len(data)
    assert {"long"} < set().union(*(items(update.update) for update in of([record for record, _ in every], "summary")))
    draw = random.Random(5)
    ends = [end for _, end in every]
    for cut in [0, 1, 7, 8, *ends[::40], *(draw.randrange(len(data)) for _ in range(60))]:
        got = list(wandb_records.read_records(data[:cut]))
        assert [end for _, end in got] == [end for end in ends if end <= cut]
        assert got == every[: len(got)]
    for offset in (draw.randrange(wandb_records.HEADER, len(data)) for _ in range(30)):
        hurt = data[:offset] + bytes([data[offset] ^ 0x40]) + data[offset + 1 :]
        assert len(list(wandb_records.read_records(hurt))) <= sum(end <= offset for end in ends) or data[offset] == 0
    with pytest.raises(ValueError, match="record file"):
        list(wandb_records.read_records(b"PAR1" * 10))


def test_a_cut_attempt_is_sealed_and_the_next_fills_in_what_it_lacks(tmp_path: Path) -> None:
    raw = raw_job(tmp_path, str(tmp_path / "out"))
    attempt(raw, "run.log_steps(rows(0, 40)); run.finish(0)", tmp_path)
    (file,) = (tmp_path / "out" / "wandb").glob(f"offline-run-*/run-{RUN}.wandb")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    still_open = file.open("ab")  # as a wandb-core that outlives its worker by a moment
    attempt(raw, "assert 5 < len(run.recorded) < 35; run.log_steps(rows(0, 60)); run.finish(0)", tmp_path)
    still_open.write(data[len(data) // 2 :])
    still_open.close()
    both = attempts(raw["output"])
    assert sorted(line["step"] for records in both for line in steps(records)) == list(range(60))
    assert list(wandb_records.read_records(file.read_bytes()))[-1][1] == file.stat().st_size


def test_s3_outputs_get_the_files_and_no_step_twice(s3_server: Path, tmp_path: Path) -> None:
    (s3_server / "bucket").mkdir(exist_ok=True)
    (tmp_path / "red.png").write_bytes(png((250, 5, 5)))
    raw = raw_job(tmp_path, "s3://bucket/sft")
    killed = """
    run.log_steps(rows(0, 20)); time.sleep(1.6); run.flush(); run.log_steps(rows(20, 30)); time.sleep(1.6)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    attempt(raw, killed, tmp_path, exit_code=-signal.SIGKILL)
    assert [line["step"] for line in steps(attempts(raw["output"])[0])] == list(range(20))
    resumed = """
    assert run.recorded == set(range(20))
    run.log_steps(rows(0, 20)); run.log_steps(rows(20, 40))
    facts = {"question": "?", "references": [], "prediction": "", "correct": 0.0, "category": ""}
    run.log_predictions([{**facts, "image": open("red.png", "rb").read()}])
    run.finish(0)
    """
    assert attempt(raw, resumed, tmp_path).stderr == ""
    both = attempts(raw["output"])
    assert sorted(line["step"] for records in both for line in steps(records)) == list(range(40))
    own = tmp_path / f"voco-wandb-{os.getuid()}"
    assert not list(own.iterdir()), "the local copy is gone"
    (artifact,) = [item for records in both for item in of(records, "artifact")]
    for item in artifact.manifest.contents:  # wandb's absolute paths, and where the same files lie on S3
        name = Path(item.local_path).relative_to(own / RUN).as_posix()
        assert len(storage.read_bytes(f"s3://bucket/sft/{name}")) == item.size


@pytest.mark.ray
def test_rank_zero_killed_inside_a_ray_worker(ray_local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.delenv("WANDB_MODE")
    job = wandb_tracking.tracked_job(build_job("job.yaml", raw_job(tmp_path, str(tmp_path / "out"))), RUN)

    class Worker:
        def __init__(self, job: wandb_tracking.TrackedJob) -> None:
            self.run = wandb_tracking.start_tracking(job)

        def train(self, first: int, end: int) -> int:
            keys = ("epoch", "loss", "tokens", "lr", "grad_norm", "seconds")
            self.run.log_steps([{"step": step, **dict.fromkeys(keys, 0.5)} for step in range(first, end)])
            return os.getpid()

        def finish(self) -> None:
            self.run.finish(0)

    remote = ray.remote(num_cpus=0)(Worker)
    first = remote.remote(job)
    pid = ray.get(first.train.remote(0, 30))
    assert pid != os.getpid()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(first.train.remote(30, 31))
    second = remote.remote(job)
    ray.get(second.train.remote(0, 20))
    ray.get(second.train.remote(20, 50))
    ray.get(second.finish.remote())
    both = attempts(str(tmp_path / "out"))
    assert sorted(line["step"] for records in both for line in steps(records)) == list(range(50))
    ray.kill(second)
