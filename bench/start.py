"""`make bench-start`: what opening tables in S3 costs before the first step, ours and the build of bench/earlier.py.

A real S3 server behind a proxy that waits and counts (bench/object_store.py) has `samples/` and `features/` with rows, row groups
and values of real size; zeros in them take no room on disk. A fresh process of each build opens them, then reads a row group of
every part and values of some images, which must be equal. The earlier build reads at every row group of features/, so it opens a
few hundred images and its figures for 350,000 are counted up from them. This build opens indexes of 350,000 images and of
5,468 parts of frame caches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import earlier
from object_store import ObjectStore, serving
from side_by_side import ROOT, write
from start_run import GROUPS, OPENED, READY

IMAGES, UNIT = 350_000, 2_000  # of LLaVA-665k, and of a work unit, which is a part
FEATURE_PARTS, FEATURE_IMAGES = 2, 70
SAMPLE_PARTS, GROUP_ROWS = 16, 64
LIMITS = {"open_bytes": 2.0, "open_requests_per_part": 0.05, "frame_requests_per_part": 0.01, "part_mib": 0.1}


class Opening:
    """A child of start_run.py that opens a table; requests and bytes between its two lines are those of opening."""

    def __init__(self, store: ObjectStore, folder: Path | None, *arguments: str) -> None:
        variables = earlier.environment(folder or ROOT, **store.environment())
        command = [sys.executable, str(ROOT / "bench" / "start_run.py"), *arguments]
        child = subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdin is not None
        assert child.stdout is not None
        self.figures: dict[str, Any] = {}
        for line in child.stdout:
            if line.strip() == READY:
                store.reset()
            elif line.strip() == OPENED:
                self.figures = {"requests": store.requests, "bytes": store.sent}
            else:
                self.figures |= json.loads(line) if line.startswith("{") else {}  # a library may print, too
                continue
            child.stdin.write("\n")
            child.stdin.flush()
        if child.wait():
            raise RuntimeError(f"{' '.join(command)}: exit code {child.returncode}")


def run(store: ObjectStore, bucket: Path) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """The figures of each build, and those of ours that have limits. Raises AssertionError where the two read other values."""
    source = earlier.source()
    make = lambda *arguments: json.loads(earlier.run("start_run.py", *arguments).splitlines()[-1])  # noqa: E731
    make("make_samples", bucket / "mix", SAMPLE_PARTS, GROUPS, GROUP_ROWS)
    names = make("make_features", bucket / "ours", FEATURE_PARTS, FEATURE_IMAGES, 1)["names"]
    assert names == make("make_features", bucket / "theirs", FEATURE_PARTS, FEATURE_IMAGES, 7)["names"]
    full = make("make_full", bucket / "full", IMAGES, UNIT)

    samples = Opening(store, None, "open_samples", "s3://bucket/mix").figures
    earlier_samples = Opening(store, source, "earlier_open_samples", "s3://bucket/mix").figures
    assert samples["sizes"] == earlier_samples["sizes"] == [GROUP_ROWS] * GROUPS * SAMPLE_PARTS
    assert samples["rows"] == earlier_samples["rows"], "the same samples"
    print(
        f"  samples, {SAMPLE_PARTS} parts:",
        *(_shown(name, table) for name, table in (("ours", samples), ("134c529", earlier_samples))),
    )

    features = Opening(store, None, "open_features", "s3://bucket/ours", json.dumps(names)).figures
    earlier_features = Opening(store, source, "earlier_open_features", "s3://bucket/theirs", json.dumps(names)).figures
    assert features["values"] == earlier_features["values"], "the same values"
    for name, table in (("ours", features), ("134c529", earlier_features)):
        print(f"  features, {FEATURE_PARTS * FEATURE_IMAGES} images:", _shown(name, table))

    opened = {
        kind: Opening(store, None, "open_only", kind, f"s3://bucket/full/{kind}").figures
        for kind in ("features", "samples", "frames")
    }
    assert opened["features"]["rows"] == full["table_rows"] == IMAGES
    both = {key: opened["features"][key] + opened["samples"][key] for key in ("requests", "bytes", "seconds", "mib")}
    figures = {
        "open_bytes": both["bytes"] / (full["features"] + full["samples"]),
        "open_requests_per_part": both["requests"] / full["parts"],
        "frame_requests_per_part": opened["frames"]["requests"] / full["frame_parts"],
        "part_mib": samples["mib"] / samples["parts"],
    }
    parts = IMAGES / UNIT
    scale = IMAGES / (FEATURE_PARTS * FEATURE_IMAGES)
    current = {"requests": both["requests"], "gb": both["bytes"] / 1e9, "seconds": both["seconds"], "mib": both["mib"]}
    before = {
        "requests": earlier_features["requests"] * scale + earlier_samples["requests"] / SAMPLE_PARTS * parts,
        "gb": (earlier_features["bytes"] * scale + earlier_samples["bytes"] / SAMPLE_PARTS * parts) / 1e9,
        "seconds": earlier_features["seconds"] * scale + earlier_samples["seconds"] / SAMPLE_PARTS * parts,
        "part_mib": earlier_samples["mib"] / earlier_samples["parts"],
    }
    return current | {"part_mib": figures["part_mib"]}, before, figures


def _shown(name: str, table: dict[str, Any]) -> str:
    return f"{name} {table['requests']} requests, {table['bytes'] / 1e6:,.1f} MB, {table['seconds']:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=10, help="of the object store, in ms")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory, serving(Path(directory), options.latency / 1000) as store:
        current, before, figures = run(store, Path(directory) / "bucket")
    work = f"open samples/ and features/ of {IMAGES:,} images in S3 ({options.latency:.0f} ms); the earlier build's counted up"
    ratio = {key: before[key] / current[key] for key in ("requests", "gb", "seconds", "part_mib")}
    write("start", work, current, {"134c529": before}, ratio, load, figures)
    missed = [name for name, limit in LIMITS.items() if figures[name] > limit]
    if missed:
        raise SystemExit(f"over the limit: {', '.join(f'{name} {figures[name]:.3g}, at most {LIMITS[name]}' for name in missed)}")


if __name__ == "__main__":
    main()
