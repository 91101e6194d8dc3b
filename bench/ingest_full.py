"""The 665,298 rows of bench/mix665k.py through the complete ingest job: rows per second, the driver's peak memory, exact counts.

python bench/ingest_full.py [--share 0.01] [--workers 2]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mix665k
import yaml
from side_by_side import OUT, QUIET, ROOT, machine

DRIVER = """
import sys, time
from pathlib import Path
from pipelines import cli
started = time.monotonic()
code = cli.main(["run", sys.argv[1]])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print("DRIVER", time.monotonic() - started, int(peak.split()[1]) / 1024, flush=True)
sys.exit(code)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of every source")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "source"
        started = time.monotonic()
        expected = mix665k.write(folder, options.share)
        size = (folder / "mix.json").stat().st_size
        print(f"wrote {expected['read']:,} rows, {size / 1e6:,.0f} MB of JSON, in {time.monotonic() - started:.0f} s", flush=True)
        job = {
            "name": "full-size", "kind": "ingest", "output": f"{directory}/out",
            "inputs": {"annotations": f"{folder}/mix.json", "media": f"{folder}/images"},
            "resources": {"workers": options.workers}, "tracking": {"wandb": False},
            "ingest": {"format": "llava_json", "dataset": "mix665k", "unit_rows": 20_000},
        }  # fmt: skip
        (Path(directory) / "job.yaml").write_text(yaml.safe_dump(job))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | QUIET
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
        run = subprocess.run(
            [sys.executable, "-c", DRIVER, f"{directory}/job.yaml"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        print(run.stdout)
        if run.returncode:
            return run.returncode
        _, seconds, peak = run.stdout.splitlines()[-1].split()
        counts = json.loads((Path(directory) / "out" / "manifest.json").read_text())["counts"]
    rows = {"read": counts["read"], "written": counts["written"], **counts["rejected"]}
    correct = rows == expected
    rate = counts["read"] / float(seconds)
    print(f"{counts['read']:,} rows in {float(seconds):.0f} s: {rate:,.0f} rows/s; driver's peak {float(peak):,.0f} MiB")
    print("the counts are exact" if correct else f"WRONG: expected {expected}, got {rows}")
    result = {
        "name": "ingest-full", "work": f"{counts['read']:,} rows, {size / 1e6:,.0f} MB of JSON", "correct": correct,
        "ours": {"seconds": float(seconds), "rows_per_s": rate, "driver_peak_mib": float(peak), "samples": counts["samples"]},
        "peers": {}, "ratio": {}, "machine": machine(),
    }  # fmt: skip
    OUT.mkdir(exist_ok=True)
    (OUT / "ingest-full.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
