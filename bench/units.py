"""Work in units at the mission's size: what a unit of a long work list costs to read, and what resuming 200,000 units takes.

python bench/units.py [--latency 30]

A real S3 server behind a proxy that waits before each answer (bench/object_store.py) has the same work lists of 1,000 and of
20,000 units as this build and as 134c529 write them. A fresh process reads one unit; requests and bytes are counted. Then an
output of 200,000 units, 300 of them pending, is resumed: its finished units are counted and its records are read to the end, from
a local disk and from the server. The earlier build reads its records one request after the other: it is measured at 500 units.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import earlier
from object_store import serving
from side_by_side import write
from units_run import PENDING, ROWS, TOTAL

LENGTHS = (1_000, 20_000)  # units of the work lists


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=30, help="of the object store, in ms")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    builds = {"ours": None, "134c529": earlier.source()}

    def run(build: str, name: str, *arguments: object, **variables: str) -> dict[str, Any]:
        child = name if build == "ours" else f"earlier_{name}"
        printed = earlier.run("units_run.py", child, *arguments, folder=builds[build], **variables)
        result: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return result

    with tempfile.TemporaryDirectory() as directory, serving(Path(directory), options.latency / 1000) as store:
        bucket = Path(directory) / "bucket"
        reads: dict[str, dict[int, dict[str, float]]] = {}
        rows: dict[tuple[int, int], set[str]] = {}
        for build in builds:
            reads[build] = {}
            for length in LENGTHS:
                seconds = run(build, "write_list", bucket / build / str(length), length)["seconds"]
                print(f"  {build}: a list of {length:,} units written in {seconds:.1f} s", flush=True)
                taken = []
                for unit in (length // 4, length // 2, length // 2 + 300):
                    store.reset()
                    result = run(build, "read_unit", f"s3://bucket/{build}/{length}", unit, **store.environment())
                    rows.setdefault((length, unit), set()).add(result["rows"])
                    gets = [entry for entry in store.log if "/work/" in entry[1]]
                    taken.append((result["seconds"], len(gets), sum(entry[3] for entry in gets)))
                reads[build][length] = dict(
                    zip(("seconds", "requests", "bytes"), map(statistics.median, zip(*taken, strict=True)), strict=True)
                )
                print(f"  {build}: a unit of {length:,}: {reads[build][length]}", flush=True)
        assert all(len(hashes) == 1 for hashes in rows.values()), "the builds read different rows"

        run("ours", "write_records", bucket / "records")
        run("134c529", "write_records", bucket / "earlier-records")
        resumed = {}
        for storage, root, variables in (("local", str(bucket), {}), ("s3", "s3://bucket", store.environment())):
            store.reset()
            resumed[storage] = run("ours", "resume", f"{root}/records", **variables)
            resumed[storage]["requests"] = store.requests
            resumed[f"{storage} 134c529"] = run("134c529", "resume", f"{root}/earlier-records", **variables)
        for name, facts in resumed.items():
            print(f"  {name}: {facts}", flush=True)
        assert all(resumed[storage]["pending"] == PENDING for storage in ("local", "s3"))
        assert all(resumed[storage]["written"] == (TOTAL - PENDING) * 500 for storage in ("local", "s3"))

    def growth(build: str, what: str) -> float:
        return reads[build][LENGTHS[1]][what] / reads[build][LENGTHS[0]][what]

    figures = {
        "unit_20k_over_1k": max(growth("ours", "bytes"), growth("ours", "requests")),
        "unit_20k_over_1k_s": growth("ours", "seconds"),
    }
    for storage in ("local", "s3"):
        figures[f"count_200k_{storage}_s"] = resumed[storage]["count_s"]
        figures[f"records_200k_{storage}_s"] = resumed[storage]["records_s"]
        figures[f"records_200k_{storage}_mib"] = resumed[storage]["mib"]
    own = {f"{what}_{length}": value for length in LENGTHS for what, value in reads["ours"][length].items()}
    peer = {f"{what}_{length}": value for length in LENGTHS for what, value in reads["134c529"][length].items()}
    peer |= {f"records_500_{storage}_s": resumed[f"{storage} 134c529"]["records_s"] for storage in ("local", "s3")}
    ratio = {
        f"growth of a unit's {what}, 134c529's over ours": growth("134c529", what) / growth("ours", what)
        for what in ("seconds", "bytes")
    }
    work = f"a unit of {ROWS} rows from lists of 1,000 and 20,000 units on S3 with {options.latency:.0f} ms; 200,000 records"
    write("units", work, own, {"134c529": peer}, ratio, load, figures)


if __name__ == "__main__":
    main()
