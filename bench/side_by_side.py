"""Shared by all benches: contenders in separate processes, in turn; the machine; the table and `.bench/NAME.json`."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / ".bench"
PEERS = ROOT / ".venv-peers" / "bin" / "python"
QUIET = {
    "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "WANDB_MODE": "disabled",
    "DO_NOT_TRACK": "1", "DAFT_ANALYTICS_ENABLED": "0", "HF_HUB_OFFLINE": "1", "NO_ALBUMENTATIONS_UPDATE": "1",
    "PYTHONWARNINGS": "ignore",
}  # fmt: skip


def call(script: str, *arguments: Any, python: Path | str = sys.executable, timeout: float | None = 600) -> dict[str, Any]:
    """Run `bench/SCRIPT arguments` in a separate process; its last line on stdout is its result, one JSON object."""
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, **QUIET, "PYTHONPATH": path if str(python) == sys.executable else ""}
    command = [str(python), str(ROOT / "bench" / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().rsplit("\n", 1)[-1])
    return result


def in_turn(contenders: dict[str, Callable[[], dict[str, Any]]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """A-B-A-B: every contender once a round, so that other load on the machine affects all of them."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, run in contenders.items():
            results[name].append(run())
            shown = ", ".join(f"{key} {value:.3g}" for key, value in results[name][-1].items() if isinstance(value, float))
            print(f"  round {number + 1}/{rounds} {name}: {shown}", flush=True)
    return results


def median(results: list[dict[str, Any]], key: str) -> float:
    return statistics.median(float(result[key]) for result in results)


def machine() -> dict[str, Any]:
    """Processor, logical cores, memory, load of the last minute and Python's version."""
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
    }
    return {**facts, "load": round(os.getloadavg()[0], 2), "python": platform.python_version()}


def write(
    name: str,
    work: str,
    own: dict[str, float],
    peers: dict[str, dict[str, float]],
    ratio: dict[str, float],
    load: float,
    figures: dict[str, float] | None = None,
) -> None:
    """`.bench/NAME.json` and the table (docs/benchmarks.md). Call it only when the outputs are equal.

    `load` is the machine's load before the bench began; the later load includes the bench. `figures` are the figures of this
    build that have a limit to reach.
    """
    facts = {**machine(), "load_before": round(load, 2)}
    result = {"name": name, "work": work, "ours": own, "peers": peers, "ratio": ratio, "correct": True, "machine": facts}
    if figures is not None:
        result["figures"] = figures
    OUT.mkdir(exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{name}: {work}\n{facts}")
    for contender, values in {"ours": own, **peers}.items():
        print(f"  {contender:24}" + "  ".join(f"{key} {value:,.4g}" for key, value in values.items()))
    print("ratios, ours against")
    for what, value in ratio.items():
        print(f"  {what:44}{value:6.2f}")
    for what, value in (figures or {}).items():
        print(f"  {what:44}{value:10.4g}")
