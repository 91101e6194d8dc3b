"""`make bench-loader`: from ingest's Parquet to batches that a tower takes, ours beside LLaVA's transform, codecs and loaders.

Each contender runs in a process of its own, in turn, on one core, or on two where its name says so. Before anything is counted,
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
    "ours": OWN, "codecs": PEERS, "webdataset": OWN, "hf_datasets": PEERS, "litdata": PEERS,
    "ours_two": OWN, "ray_data_two": OWN, "beside": OWN, "beside_two": OWN,
}  # fmt: skip


def prepare(folder: Path, count: int) -> None:
    """The same images as ours, as tar shards and as litdata's chunks."""
    raw = ingest_runs.job(source.llava(folder / "source", count), folder / "parquet", in_process_rows=count)
    ingest_runs.run_job(raw)
    shutil.rmtree(folder / "source")
    call("loader_runs.py", "make_tar", folder, count)
    call("loader_runs.py", "make_litdata", folder, count, python=PEERS)


def check(results: dict[str, list[dict[str, Any]]]) -> None:
    """Whoever told what it gave must have given what the others gave. Raises SystemExit."""
    told = {name: runs[0]["told"] for name, runs in results.items() if "told" in runs[0]}
    for what in ("bytes", "fast", "half", "llava"):
        if len({given[what] for given in told.values()}) != 1:
            raise SystemExit(f"{what} differ: { {name: given[what][:8] for name, given in told.items()} }")
    print(f"  the same bytes and pixels: {', '.join(told)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=COUNT, help="images; fewer for a quick look")
    asked = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=OUT) as scratch:
        folder = Path(scratch)
        prepare(folder, asked.count)
        runs = {
            name: lambda name=name, python=python: call("loader_runs.py", name, folder, asked.count, python=python)
            for name, python in CONTENDERS.items()
        }
        results = in_turn(runs, asked.rounds)
        check(results)
    figures = {name: {key: median(each, key) for key in each[0] if key != "told"} for name, each in results.items()}
    ours, two = figures.pop("ours"), figures.pop("ours_two")
    pair = {"codec alone": figures.pop("beside"), "codec alone, two cores": figures.pop("beside_two")}
    codec, same = figures["codecs"], "the same codec"
    pairs = {
        "LLaVA's transform, fast decoder": (ours, "fast_normalised", codec, "llava"),
        "LLaVA's transform, parity decoder": (ours, "llava", codec, "llava"),
        "libjpeg-turbo + OpenCV area": (ours, "fast", codec, "area"),
        "webdataset, parity decoder": (ours, "llava", figures["webdataset"], "llava"),
        f"webdataset, {same}": (ours, "fast", figures["webdataset"], "fast"),
        f"datasets streaming, {same}": (ours, "fast", figures["hf_datasets"], "fast"),
        f"litdata, {same}": (ours, "fast", figures["litdata"], "fast"),
    }
    ratio = {name: each["wall"] for name, each in pair.items()}
    ratio |= {f"{name}, by processor time": each["cpu"] for name, each in pair.items()}
    for unit, told in (("s", ""), ("cpu_s", ", by processor time")):
        for name, (mine, what, theirs, other) in pairs.items():
            ratio[name + told] = mine[f"{what}_per_{unit}"] / theirs[f"{other}_per_{unit}"]
    ratio[f"Ray Data, {same}, two cores"] = two["fast_per_s"] / figures["ray_data_two"]["fast_per_s"]
    write("loader", WORK, ours | {f"two_{key}": value for key, value in two.items()}, figures, ratio, load)


if __name__ == "__main__":
    main()
