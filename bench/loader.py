"""`make bench-loader`: from ingest's Parquet to batches for a tower: our loader, LLaVA's transform, codecs and other loaders.

Each contender runs in a separate process, in turn, on one core, or on two if its name ends in `_two`. Before any timing counts,
all must give the same bytes in the same order and the same pixels, bit for bit, from the start and from the middle.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import ingest_runs
import source
from side_by_side import OUT, PEERS, call, in_turn, median, write

COUNT = 4_000
WORK = "4,000 JPEGs 640x480 of 100 KB -> batches of 64 at 336x336: one core and one decoding thread each, or two"
OWN = sys.executable
CONTENDERS = {
    "voco": OWN, "codecs": PEERS, "webdataset": OWN, "hf_datasets": PEERS, "litdata": PEERS,
    "voco_two": OWN, "ray_data_two": OWN, "interleaved": OWN, "interleaved_two": OWN,
}  # fmt: skip


def prepare(folder: Path, count: int) -> None:
    """The same images as Parquet, as tar shards and as litdata's chunks."""
    raw = ingest_runs.job(source.llava(folder / "source", count), folder / "parquet", in_process_rows=count)
    ingest_runs.run_job(raw)
    shutil.rmtree(folder / "source")
    call("loader_runs.py", "make_tar", folder, count)
    call("loader_runs.py", "make_litdata", folder, count, python=PEERS)


def check(results: dict[str, list[dict[str, Any]]]) -> None:
    """All contenders that report digests must report the same ones. Raises SystemExit."""
    digests = {name: runs[0]["digests"] for name, runs in results.items() if "digests" in runs[0]}
    for kind in ("bytes", "fast", "half", "llava"):
        if len({hashes[kind] for hashes in digests.values()}) != 1:
            raise SystemExit(f"{kind} differ: { {name: hashes[kind][:8] for name, hashes in digests.items()} }")
    print(f"  the same bytes and pixels: {', '.join(digests)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=COUNT, help="images; fewer for a quick look")
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=OUT) as scratch:
        folder = Path(scratch)
        prepare(folder, options.count)
        runs = {
            name: lambda name=name, python=python: call("loader_runs.py", name, folder, options.count, python=python)
            for name, python in CONTENDERS.items()
        }
        results = in_turn(runs, options.rounds)
        check(results)
    figures = {name: {key: median(runs, key) for key in runs[0] if key != "digests"} for name, runs in results.items()}
    loader, two = figures.pop("voco"), figures.pop("voco_two")
    alone = {"codec alone": figures.pop("interleaved"), "codec alone, two cores": figures.pop("interleaved_two")}
    codec, same = figures["codecs"], "the same codec"
    pairs = {
        "LLaVA's transform, fast decoder": (loader, "fast_normalised", codec, "llava"),
        "LLaVA's transform, parity decoder": (loader, "llava", codec, "llava"),
        "libjpeg-turbo + OpenCV area": (loader, "fast", codec, "area"),
        "webdataset, parity decoder": (loader, "llava", figures["webdataset"], "llava"),
        f"webdataset, {same}": (loader, "fast", figures["webdataset"], "fast"),
        f"datasets streaming, {same}": (loader, "fast", figures["hf_datasets"], "fast"),
        f"litdata, {same}": (loader, "fast", figures["litdata"], "fast"),
    }
    ratio = {name: ratios["wall"] for name, ratios in alone.items()}
    ratio |= {f"{name}, by processor time": ratios["cpu"] for name, ratios in alone.items()}
    for unit, suffix in (("s", ""), ("cpu_s", ", by processor time")):
        for name, (own, own_figure, peer, peer_figure) in pairs.items():
            ratio[name + suffix] = own[f"{own_figure}_per_{unit}"] / peer[f"{peer_figure}_per_{unit}"]
    ratio[f"Ray Data, {same}, two cores"] = two["fast_per_s"] / figures["ray_data_two"]["fast_per_s"]
    write("loader", WORK, loader | {f"two_{key}": value for key, value in two.items()}, figures, ratio, load)


if __name__ == "__main__":
    main()
