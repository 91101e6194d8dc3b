"""What stages export: counts of units, and the series of a real run at the endpoint that Prometheus scrapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from voco.run import units
from voco.run.prometheus import GAUGES, TAGS, StageMetrics, current_stage, stage_metrics

ROOT = Path(__file__).parents[2]
INTERVAL_S = 4  # between two reports of a process to its node, instead of Ray's 10
ROWS_OF_RAY = {"ray_node_cpu_utilization", "ray_node_cpu_count", "ray_node_mem_used", "ray_node_mem_total", "ray_resources"}
ROWS_OF_RAY |= {"ray_node_disk_utilization_percentage", "ray_node_network_receive_speed", "ray_object_store_memory"}


class Recorded(StageMetrics):
    """Keeps what it would export."""

    def __init__(self) -> None:
        super().__init__("a", "a-1", "ingest")
        self.values: dict[tuple[str, ...], float] = {}

    def set(self, name: str, value: float | None, **tags: str) -> None:
        assert set(tags) == set(GAUGES[name][1])
        if value is not None:
            self.values[name, *tags.values()] = value


def test_a_stage_inside_another_is_the_current_one() -> None:
    assert current_stage().run == ""
    with stage_metrics("flow", "flow-1", "flow"):
        with stage_metrics("in", "in-1", "ingest") as inner:
            assert current_stage() is inner
        assert current_stage().kind == "flow"
        with pytest.raises(RuntimeError), stage_metrics("in", "in-1", "ingest"):
            raise RuntimeError("failed")
        assert current_stage().kind == "flow"
    assert current_stage().run == ""


def test_rows_and_rejects_add_up() -> None:
    stage = Recorded()
    stage.count_rows(3, 0, {"bad_row": 3})  # of the listing
    for record in (
        {"written": 5, "rejected": {"missing_media": 2, "corrupt_media": 1}},
        {"written": 7, "rejected": {}},
        {"written": 1, "rejected": {"missing_media": 1}},
    ):
        stage.count_rows(*units.row_counts(record), units.reject_reasons(record))
    assert stage.values == {
        ("voco_rows_read",): 20,
        ("voco_rows_written",): 13,
        ("voco_rejects", "bad_row"): 3,
        ("voco_rejects", "missing_media"): 3,
        ("voco_rejects", "corrupt_media"): 1,
    }
    assert stage.values["voco_rows_read",] == 13 + 7


@pytest.mark.parametrize(
    ("record", "rows", "reasons"),
    [
        ({"counts": {"read": 9, "written": 8}, "bad": ["a: not an image"]}, (9, 8), {"corrupt_media": 1}),
        ({"counts": {"read": 9, "written": 40, "rejected": 2}, "rejects": [{"reason": "corrupt_media"}, {"reason": "too_large"}]},
         (9, 40), {"corrupt_media": 1, "too_large": 1}),
        ({"counts": {"read": 4, "written": 4, "images": 2}}, (4, 4), {}),
    ],
    ids=["features", "frame_cache", "evaluate"],
)  # fmt: skip
def test_records_of_every_kind_are_counted(record: dict[str, Any], rows: tuple[int, int], reasons: dict[str, int]) -> None:
    assert units.row_counts(record) == rows
    assert dict(units.reject_reasons(record)) == reasons


def test_without_a_ray_nothing_is_imported_or_exported() -> None:
    code = (
        "import sys; from voco.run import prometheus\n"
        "with prometheus.stage_metrics('a', 'a-1', 'ingest') as stage: stage.count_rows(1, 1, {'x': 1})\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "platform")}, check=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a real features job and a real training showed at the node's endpoint, and after the training."""
    root = tmp_path_factory.mktemp("exported")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    paths = os.pathsep.join(str(ROOT / name) for name in ("platform", "", "tests"))
    environment |= {
        "PYTHONPATH": paths,
        "RAY_metrics_report_interval_ms": f"{1000 * INTERVAL_S}",
        "RAY_gcs_server_port_wait_time_s": "120",  # instead of 20: a busy machine needs longer
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }
    command = [sys.executable, str(ROOT / "tests/run/exporting_run.py"), str(root), f"{INTERVAL_S}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads((root / "series.json").read_text()))


def of_kind(series: list[Any], kind: str) -> dict[str, float]:
    """Values by name of our series of one kind of stage."""
    return {name: value for name, value, labels in series if name.startswith("ray_voco_") and labels["kind"] == kind}


@pytest.mark.ray
def test_prometheus_sees_a_real_run(exported: dict[str, Any]) -> None:
    seen = exported["seen"]
    for name, _, labels in seen:
        if name.startswith("ray_voco_"):
            assert set(TAGS) <= set(labels), labels
            assert labels["SessionName"].startswith("session_")  # by which the dashboard tells clusters apart
    features = of_kind(seen, "features")
    assert features["ray_voco_units_done"] == features["ray_voco_units_total"] >= 1
    assert features["ray_voco_rows_read"] == features["ray_voco_rows_written"] > 0
    training = of_kind(seen, "image_sft")
    expected = {"ray_voco_stage_running"} | {f"ray_{name}" for name in GAUGES if name.startswith("voco_train_")}
    # a CPU has no peak to compare with, and the job has no inputs.val
    expected -= {f"ray_voco_train_{name}" for name in ("mfu", "val_loss", "val_score")}
    assert expected <= set(training), expected - set(training)
    assert 1 <= training["ray_voco_train_step"] <= training["ray_voco_train_steps_total"] == 400
    assert 0 <= training["ray_voco_train_wait_share"] <= 1
    assert training["ray_voco_train_loss"] > 0
    assert abs(time.time() - training["ray_voco_train_last_step_time"]) < 600
    assert {name for name, *_ in seen} >= ROWS_OF_RAY


@pytest.mark.ray
def test_series_end_with_the_process_that_set_them(exported: dict[str, Any]) -> None:
    """And with their stage, though the driver lives: on this the alerts rely."""
    assert {name for name, *_ in exported["left"] if name.startswith("ray_voco_")} == set()
    assert "ray_node_cpu_count" in {name for name, *_ in exported["left"]}


@pytest.mark.ray
def test_a_stage_that_sets_nothing_for_a_while_keeps_its_series(exported: dict[str, Any]) -> None:
    """Ray alone drops a gauge that was set once, after two of its reports."""
    assert of_kind(exported["idle"], "ingest") == {
        "ray_voco_stage_running": 1, "ray_voco_rows_read": 10, "ray_voco_rows_written": 9, "ray_voco_rejects": 1,
    }  # fmt: skip


@pytest.mark.ray
def test_the_dashboards_series_of_ray_are_scraped(exported: dict[str, Any]) -> None:
    """Those of its C++ parts have no list in Python; `tests/cluster/test_watching.py` checks the names of all others."""
    labels = [labels for name, _, labels in exported["seen"] if name == "ray_resources"]
    assert {item["State"] for item in labels} >= {"USED", "AVAILABLE"}
    assert {item["Name"] for item in labels} >= {"CPU"}
    assert all("Location" in labels for name, _, labels in exported["seen"] if name == "ray_object_store_memory")
