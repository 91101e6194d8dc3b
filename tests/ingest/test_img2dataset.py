"""img2dataset itself downloads from a real server with dead links; ingest reads the shards that it writes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from ingest.shards import job
from ingest.source import image, table
from ingest.web_server import serving

import pipelines

PEERS = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not PEERS.exists(), reason=f"no {PEERS.parents[1].name}: `make env-peers` installs it with img2dataset"),
]

SCRIPT = """
import sys
from img2dataset import download
if __name__ == "__main__":  # its workers import this file again
    download(
        url_list=sys.argv[1], output_folder=sys.argv[2], input_format="tsv", url_col="url", caption_col="caption",
        output_format="webdataset", resize_mode="no", disable_all_reencoding=True, number_sample_per_shard=10,
        processes_count=1, thread_count=4, timeout=5, save_additional_columns=["page"],
    )
"""
DEAD = {3: "/status/404", 7: "/garbage/x", 12: "/loop", 20: "/robots/noai", 28: "/status/500"}
PAGE = 15  # the server sends a page instead of the image


def test_shards_of_img2dataset_are_read_unchanged(tmp_path) -> None:
    """Every image is byte-equal to the server's, with its caption. A failed download is a gap, which img2dataset counts too."""
    with serving() as web:
        urls = {index: web + DEAD.get(index, f"/image/{index}.jpg") for index in range(30)}
        urls[PAGE] = f"{web}/status/200"
        lines = [f'{url}\ta kite, number {index} — "quoted"\thttps://page/{index}' for index, url in urls.items()]
        (tmp_path / "urls.tsv").write_text("\n".join(["url\tcaption\tpage", *lines]) + "\n")
        (tmp_path / "script").mkdir()
        (tmp_path / "script" / "fetch.py").write_text(SCRIPT)
        command = [str(PEERS), str(tmp_path / "script" / "fetch.py"), str(tmp_path / "urls.tsv"), str(tmp_path / "shards")]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["NO_ALBUMENTATIONS_UPDATE"] = "1"
        process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    statistics = [json.loads(file.read_text()) for file in sorted((tmp_path / "shards").glob("*_stats.json"))]
    done = pipelines.run(job(tmp_path / "shards", tmp_path / "out", validate="full"))
    gaps = sum(stats["failed_to_download"] for stats in statistics)
    assert (gaps, sum(stats["count"] for stats in statistics)) == (len(DEAD), len(urls))
    assert done.counts == {
        "read": len(urls) - gaps, "written": len(urls) - gaps - 1, "samples": len(urls) - gaps - 1,
        "rejected": {"unsupported_format": 1},
    }  # fmt: skip
    samples = {json.loads(sample["conversations"][0]["extra"])["url"]: sample for sample in table(tmp_path / "out", "samples")}
    assert set(samples) == {url for index, url in urls.items() if index not in DEAD and index != PAGE}
    for index, url in urls.items():
        if url in samples:
            (medium,), (talk,) = samples[url]["media"], samples[url]["conversations"]
            assert medium["bytes"] == image(index)
            assert talk["turns"][1]["text"] == f'a kite, number {index} — "quoted"'
            extra = json.loads(talk["extra"])
            assert (extra["sha256"], extra["page"]) == (medium["sha256"], f"https://page/{index}")
