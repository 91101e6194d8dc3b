"""`make bench-ingest-remote`, also a part of `make bench-ingest`: media in S3 to Parquet by one worker, beside the earlier build.

`rclone serve s3` answers on loopback, 30 ms after each request and at 90 MB/s a stream (bench/object_store.py). Cases: a folder
of JPEGs, the same as a zip and as tar shards, and a WebVid-like folder of mp4 files. No figure is stated before the tables of
both builds are compared. The server, its proxy and the worker share the machine's cores, and a request costs a worker's thread of
Python about 4 ms.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import earlier
import ingest_runs
import pyarrow as pa
import pyarrow.parquet as pq
import source
from object_store import ObjectStore, serving
from side_by_side import OUT, in_turn, median, write

IMAGES, VIDEOS, SHARDS = 250, 60, 2
LATENCY_S, BYTES_PER_S = 0.03, 90e6
CASES = {"images": IMAGES, "zip": IMAGES, "tar": IMAGES, "videos": VIDEOS}
COLUMNS = ("sample_id", "modality", "conversations", "media")
WORK = (
    f"{IMAGES} JPEGs of 100 kB, as a folder, a zip and {SHARDS} tar shards, and {VIDEOS} mp4 files in S3 -> Parquet on disk; one "
    f"worker, {LATENCY_S * 1000:.0f} ms a request, {BYTES_PER_S / 1e6:.0f} MB/s a stream"
)


def make_source(folder: Path, scratch: Path) -> None:
    """Every case's annotations and media under `folder`."""
    source.llava(folder, IMAGES)
    images = sorted((folder / "images").iterdir())
    with zipfile.ZipFile(folder / "images.zip", "w") as packed:
        for image in images:
            packed.write(image, image.name)
    (folder / "shards").mkdir()
    for shard in range(SHARDS):
        with tarfile.open(folder / "shards" / f"{shard:05d}.tar", "w") as packed_shard:
            for image in images[shard::SHARDS]:
                packed_shard.add(image, image.name)
                text = f"A caption of {image.stem}.".encode()
                member = tarfile.TarInfo(f"{image.stem}.txt")
                member.size = len(text)
                packed_shard.addfile(member, io.BytesIO(text))
    ingest_runs.make_videos(folder, scratch / "encoded")
    source.videos(folder, VIDEOS, [file.read_bytes() for file in sorted((scratch / "encoded").iterdir())])


def rows(out: Path) -> pa.Table:
    """The samples of an output, in order."""
    return pa.concat_tables(pq.read_table(part, columns=list(COLUMNS)) for part in sorted((out / "samples").glob("*.parquet")))


def run_once(store: ObjectStore, case: str, folder: Path | None, out: Path) -> dict[str, Any]:
    """A case by the source in `folder` (None: ours), with its rate and its requests for each medium."""
    store.reset()
    shutil.rmtree(out, ignore_errors=True)
    printed = earlier.run("ingest_s3_run.py", case, out, folder=folder, **store.environment())
    result: dict[str, Any] = json.loads(printed.strip().rsplit("\n", 1)[-1])
    count = CASES[case]
    if result["written"] != count:
        raise SystemExit(f"{case}: {result['written']} of {count} rows are written")
    figures = {"rate": count / result["seconds"], "requests": store.requests / count, "cpu_ms": 1e3 * result["cpu_s"] / count}
    return {**figures, "peak_mib": result["peak_mib"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=CASES, help="these cases only, and write no file")
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    load = os.getloadavg()[0]
    builds: dict[str, Path | None] = {"ours": None, "earlier": earlier.source()}
    cases = options.only or list(CASES)
    with tempfile.TemporaryDirectory(dir=OUT) as directory:
        scratch = Path(directory)
        make_source(scratch / "store" / "bucket" / "source", scratch)
        with serving(scratch / "store", LATENCY_S, BYTES_PER_S) as store:
            runs: dict[str, Callable[[], dict[str, Any]]] = {
                f"{build} {case}": lambda build=build, case=case: run_once(
                    store, case, builds[build], scratch / f"{build}-{case}"
                )
                for case in cases
                for build in builds
            }
            results = in_turn(runs, options.rounds)
        for case in cases:
            if not rows(scratch / f"ours-{case}").equals(rows(scratch / f"earlier-{case}")):
                raise SystemExit(f"{case}: the tables of the two builds differ")
            print(f"  {case}: equal tables")
    figures = {
        build: {
            f"{case}_{name}": median(results[f"{build} {case}"], key)
            for case in cases
            for name, key in (("per_s", "rate"), ("requests", "requests"), ("cpu_ms", "cpu_ms"), ("peak_mib", "peak_mib"))
        }
        for build in builds
    }
    ratio = {f"earlier build, {case}": figures["ours"][f"{case}_per_s"] / figures["earlier"][f"{case}_per_s"] for case in cases}
    if options.only is not None:
        print(json.dumps({**figures, "ratio": ratio}, indent=1))
        return
    limit = {"s3_images_over_earlier": ratio["earlier build, images"]}
    write("ingest_s3", WORK, figures["ours"], {"earlier build": figures["earlier"]}, ratio, load, limit)


if __name__ == "__main__":
    sys.exit(main())
