"""The whole flow, tiny, through the real Jobs API on a real cluster with a token; killed twice, and submitted again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import flow_world
import psutil
import pytest
import wandb_world

from voco.commands import costs, show
from voco.commands.rates import Rates
from voco.demo import cluster
from voco.job.load import load_job
from voco.run import manifest
from voco.store import parquet

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ANSWERS = ["answers-upper", "answers-lower", "answers-voco1"]
STAGES = ["scenes", "scenes-test", "features", "base", "voco1", "frames", *ANSWERS, "report"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("flow")
    flow_world.write(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")  # of the cluster's drivers and workers
        cluster.start(root / ".demo", cpus=4)
    yield root
    cluster.stop(root / ".demo")


def submit(root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines", "submit", "flow.yaml"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def process_of(root: Path, *words: str) -> psutil.Process:
    """A process of this test's own cluster, by how its command line starts (after the interpreter, for Python)."""
    running = cluster.read_cluster(root / ".demo")
    assert running is not None
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        for process in cluster.members(running.mark):
            try:
                line = process.cmdline()
                if line[: len(words)] == list(words) or line[1 : len(words) + 1] == list(words):
                    return process
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.1)
    raise AssertionError(f"no process with {words}")


def wait_for_checkpoint(root: Path, deadline_s: float = 400) -> None:
    end = time.monotonic() + deadline_s
    folder = root / "out/base/checkpoints"
    while not list(folder.glob("step-*/progress.json")):
        assert time.monotonic() < end, "no checkpoint"
        time.sleep(0.05)


def test_the_flow_survives_kills_and_ends_complete(root):
    first = submit(root)
    wait_for_checkpoint(root)
    process_of(root, "-m", "pipelines", "run").send_signal(signal.SIGKILL)  # the driver itself, not its shell
    out, _ = first.communicate(timeout=240)
    assert first.returncode == 1, out
    assert "Traceback" not in out.splitlines()[-1]
    assert manifest.read_manifest(str(root / "out/base")) is None

    second = submit(root)
    worker = process_of(root, "ray::RayTrainWorker")
    time.sleep(3)  # it is loading or training
    worker.send_signal(signal.SIGKILL)
    out, _ = second.communicate(timeout=800)
    assert second.returncode == 0, out[-4000:]
    assert "scenes: done already" in out
    assert "features: done already" in out
    assert "continues at step" in out
    for name in STAGES:
        assert manifest.read_manifest(str(root / "out" / name)) is not None, name

    third = submit(root)
    out, _ = third.communicate(timeout=120)
    assert third.returncode == 0
    assert "done already" in out
    assert "image_sft as" not in out  # nothing was done again

    check_tables(root)
    check_costs(root)
    check_wandb(root)


def check_costs(root: Path) -> None:
    """The bytes of `voco plan` are those of the stages' files, within a tenth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        estimates = costs.stage_estimates(load_job("flow.yaml"), Rates())
    features = manifest.read_manifest(str(root / "out/features"))
    assert estimates["features"].written == pytest.approx(sum(entry["bytes"] for entry in features.tables["features"]), rel=0.1)
    frames = manifest.read_manifest(str(root / "out/frames"))
    assert frames.counts["written"] == 40
    entries = frames.tables["frame_cache"] + frames.tables["index"]
    assert estimates["frames"].written == pytest.approx(sum(entry["bytes"] for entry in entries), rel=0.1)
    checkpoint = max((root / "out/base/checkpoints").glob("step-*"))
    saved = sum(file.stat().st_size for file in checkpoint.glob("rank-*.safetensors"))
    models = [root / f"out/base/{folder}model/model.safetensors" for folder in ("", "initial/")]  # it starts from a new model
    steps = manifest.read_manifest(str(root / "out/base")).counts["steps"]
    assert estimates["base"].steps == steps
    saves = -(-steps // flow_world.SFT["save_every"])
    assert estimates["base"].written == pytest.approx(saves * saved + sum(file.stat().st_size for file in models), rel=0.1)


def check_wandb(root: Path) -> None:
    """What W&B recorded of a flow that was killed twice: each step once, predictions with images, every output by name."""
    run_ids = {name: manifest.read_manifest(str(root / "out" / name)).run_id for name in STAGES}
    flow = manifest.read_manifest(str(root / "out"))
    tries = wandb_world.attempts(str(root / "out/base"), run_ids["base"])
    assert len(tries) >= 2  # the killed attempt and the one that continued
    steps = [line["step"] for records in tries for line in wandb_world.steps(records)]
    metrics = parquet.read_table(str(root / "out/base/metrics.parquet"))
    assert sorted(steps) == metrics["step"].to_pylist()
    logged = {line["step"]: line["loss"] for records in tries for line in wandb_world.steps(records)}
    assert [logged[step] for step in range(len(logged))] == pytest.approx(metrics["loss"].to_pylist(), abs=1e-5)
    assert {run.run_group for records in tries for run in wandb_world.of(records, "run")} == {flow.run_id}

    (answers,) = wandb_world.attempts(str(root / "out/answers-voco1"), run_ids["answers-voco1"])
    (table,) = [item for item in wandb_world.of(answers, "artifact") if item.type == "run_table"]
    pictures = [item.path for item in table.manifest.contents if item.path.endswith((".png", ".jpg", ".jpeg"))]
    assert len(pictures) > 3
    (records,) = wandb_world.attempts(str(root / "out"), flow.run_id)
    outputs = {item.name: json.loads(item.metadata) for item in wandb_world.of(records, "artifact")}
    assert set(outputs) == {*STAGES, "tiny"}
    parents = {parent["uri"]: parent["manifest_sha256"] for parent in outputs["voco1"]["parents"]}
    assert (
        parents[str(root / "out/base")] == manifest.manifest_sha256(str(root / "out/base")) == outputs["base"]["manifest_sha256"]
    )


def check_tables(root: Path) -> None:
    answers = parquet.read_table(str(root / "out/answers-voco1/answers/part-00000.parquet"))
    assert answers.num_rows == 40 * 8
    hits = answers["cache_hit"].to_pylist()
    assert hits.count(False) == 40  # each image compressed once, its other questions hit
    (score,) = [row for row in read_scores(root, "answers-voco1") if row["category"] == "all"]
    assert score["questions"] == 320
    assert score["samples"] == 40
    # fp32: 2 layers, 2 key-value heads of width 8, keys and values; one <voco> against BOS, 4 slots, separator, <voco>
    assert score["cache_bytes"] == 2 * 2 * 2 * 8 * 4
    assert score["full_cache_bytes"] == 7 * score["cache_bytes"]
    (lower,) = [row for row in read_scores(root, "answers-lower") if row["category"] == "all"]
    assert lower["method"] == "lower_bound"
    assert score["lower_bound"] == lower["score"]
    metrics = parquet.read_table(str(root / "out/base/metrics.parquet"))
    assert metrics["step"].to_pylist() == list(range(metrics.num_rows))  # none twice, none lost
    page = (root / "out/report/report.html").read_text()
    assert f"{100 * score['score']:.1f}" in page  # the score that the table holds
    shown = show.show_output(str(root / "out/voco1"))
    assert re.search(r"vision +x4 +positions 1\.\.4", shown)  # BOS is at 0
    assert "</s>]" in shown  # trained text is marked up to its end


def read_scores(root: Path, name: str):
    return parquet.read_table(str(root / "out" / name / "scores/part-00000.parquet")).to_pylist()
