"""Units in an actor pool of Ray Data: the same bytes as in this process, even when a worker process dies."""

import json
import os
import signal
import zipfile
from pathlib import Path

import pytest
from ingest.clips import clip
from ingest.source import good, job, part_hashes, row, write

import pipelines
from voco.ingest.media.source import MediaLimits
from voco.ingest.write_samples import WriteSamples
from voco.job.resources import Resources
from voco.run import units
from voco.store.index import join_pieces
from voco.store.schemas import SAMPLES_INDEX

pytestmark = pytest.mark.ray
LAX = {"max_missing_share": 1.0, "max_reject_share": 1.0}


@pytest.fixture
def source(tmp_path) -> Path:
    listed, images = good(400, 60)
    listed += [row(1, "gone.jpg", "<image>\nHi", "Ho"), 3, row(2, "text.jpg", "<image>\nHi", "Ho")]
    write(tmp_path, listed, {**images, "text.jpg": b"no image"})
    pipelines.run(job(tmp_path, tmp_path / "here", unit_rows=10, **LAX))
    return tmp_path


def test_actor_pool_writes_the_same_bytes(ray_local, source, capsys) -> None:
    ingest_job = job(source, source / "out", workers=2, unit_rows=10, in_process_rows=0, **LAX)
    done = pipelines.run(ingest_job)
    assert part_hashes(source / "out") == part_hashes(source / "here")
    assert done.counts["read"] == 403
    shown = capsys.readouterr().out
    assert "unit 10/10" in shown
    assert "rows/s" in shown


def test_a_killed_worker_process_costs_nothing(ray_local, source) -> None:
    output = source / "out"
    marker = source / "killed"

    class Dying(WriteSamples):
        """Kills its own process at unit 3, the first time, after the unit's samples part is written."""

        def _write(self, table, unit, groups, schema):
            written = super()._write(table, unit, groups, schema)
            if unit == 3 and not marker.exists():
                marker.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return written

    (output / "work").mkdir(parents=True)
    (output / "work" / "list-00000.parquet").write_bytes((source / "here" / "work" / "list-00000.parquet").read_bytes())
    limits = MediaLimits("header", 1 << 28, 10**8, 200.0, 1 << 28)
    arguments = {
        "output": str(output), "media": str(source / "images"), "limits": limits, "shard_bytes": 256 << 20, "located": None,
    }  # fmt: skip
    records = units.run_units(str(output), 10, Dying, arguments, Resources(workers=2), False, "test")
    assert int(marker.read_text()) != os.getpid()
    assert [record["unit"] for record in records] == list(range(10))
    join_pieces(str(output), 10, SAMPLES_INDEX)
    unbroken = {name: sha for name, sha in part_hashes(source / "here").items() if "listing" not in name}
    assert part_hashes(output) == unbroken


def test_videos_and_archives_in_the_actor_pool(ray_local, tmp_path) -> None:
    """Each worker has its own decoder process and archive index: the same bytes as in this process."""
    (tmp_path / "images").mkdir()
    listed = [{"q": "What moves?", "a": f"Bar {index}", "video_id": f"v_{index}"} for index in range(6)]
    (tmp_path / "mix.json").write_text(json.dumps(listed))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as packed:
        for index in range(5):
            packed.writestr(f"v_{index}.mp4", clip(seed=index) if index else b"no video")
    for output, where in (("here", {}), ("out", {"workers": 2, "in_process_rows": 0})):
        ingest_job = job(tmp_path, tmp_path / output, format="video_chatgpt", unit_rows=2, **where, **LAX)
        inputs = ingest_job.inputs.model_copy(update={"media": str(tmp_path / "images.zip")})
        done = pipelines.run(ingest_job.model_copy(update={"inputs": inputs}))
        assert done.counts["rejected"] == {"missing_media": 1, "unsupported_format": 1}
    assert len(part_hashes(tmp_path / "out")) > 3
    assert part_hashes(tmp_path / "out") == part_hashes(tmp_path / "here")
