"""Whether two commits write the same bytes: the tests' tiny mission flow, once with each build, compared file by file.

`python bench/unchanged.py COMMIT [WORK]` runs COMMIT in a separate worktree, then this tree, at the same paths, and prints a
line for each stage. A second call with the same WORK keeps COMMIT's run. It fails when a part, a weight, a figure or a run id
differs. Seconds differ in any two runs, and so do file names and hashes that contain them; those are left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).parents[1]
TIMES = {"seconds", "wait", "latency_s", "train_seconds", "time", "wall_s"}  # columns that no two runs share, and rates
TIMES |= {"samples_per_s", "tokens_per_s", "mfu", "memory_bytes"}
EXACT = ("samples", "features", "frame_cache", "model", "initial")  # whole files are equal, byte for byte
TABLES = ("answers", "scores", "trials", "metrics", "summary")  # rows are equal, without the columns of times
RUN_IDS = """
import json, sys
from voco.job.load import load_job, resolve_stage
from voco.job.trials import inner_jobs
from voco.run import manifest
flow = load_job(sys.argv[1])
jobs, outputs, ids = [flow], {}, {}
for stage in flow.stages:
    jobs.append(resolve_stage(stage, outputs))
    outputs[stage.name] = stage.output
    jobs += inner_jobs(jobs[-1])
for job in jobs:
    ids[job.output_uri.split("/run/")[1]] = manifest.job_run_id(job)
print(json.dumps(ids))
"""


def main() -> None:
    commit = sys.argv[1]
    work = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp(prefix="unchanged-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    before, after, run = work / "before", work / "after", work / "run"
    tree = work / "tree"
    if not before.exists():
        if not tree.exists():
            subprocess.run(["git", "worktree", "add", "--detach", tree, commit], cwd=ROOT, check=True)
        write_data(run)
        run_flow(tree, run)
        subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
        run.rename(before)
    if not after.exists():
        run.mkdir()
        for name in ("data", "flow.yaml"):
            subprocess.run(["cp", "-r", "--preserve=all", before / name, run / name], check=True)
        run_flow(ROOT, run)
        run.rename(after)
    different = compare(before / "out", after / "out") + compare_run_ids(before, run)
    print("all equal" if not different else f"{len(different)} differ: {', '.join(different)}")
    sys.exit(bool(different))


def write_data(run: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    import mission_world

    run.mkdir()
    mission_world.write_data(run / "data")
    (run / "flow.yaml").write_text(yaml.safe_dump(mission_world.flow("data", "out", {"workers": 2}), sort_keys=False))


def run_flow(tree: Path, run: Path) -> None:
    settings = {"PYTHONPATH": f"{tree / 'platform'}:{tree}", "WANDB_MODE": "offline", "RAY_AUTH_MODE": "disabled"}
    settings |= {"OMP_NUM_THREADS": "1"}
    with (run.parent / "run.log").open("a") as log:
        command = [sys.executable, "-m", "pipelines", "run", "flow.yaml"]
        subprocess.run(command, cwd=run, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT, check=True)


def compare(before: Path, after: Path) -> list[str]:
    """Names of files that differ. Prints the number of equal files for each stage and kind."""
    different: list[str] = []
    equal: dict[str, int] = {}
    for kind, key in (*((kind, whole_file) for kind in EXACT), *((kind, rows_without_times) for kind in TABLES)):
        names = [{str(file.relative_to(root)) for file in files_of(root, kind)} for root in (before, after)]
        different += sorted(names[0] ^ names[1])
        for name in sorted(names[0] & names[1]):
            if key(before / name, before) == key(after / name, after):
                stage = name.split(f"/{kind}/")[0]
                equal[f"{stage}/{kind}"] = equal.get(f"{stage}/{kind}", 0) + 1
            else:
                different.append(name)
    for label, count in sorted(equal.items()):
        print(f"{label}: {count} files equal")
    return different


def files_of(root: Path, kind: str) -> list[Path]:
    """Files of the directories named `kind`, which are beside an output's `run.json`, or inside one that is."""
    folders = [file.parent / kind for file in root.rglob("run.json")]
    folders += [file.parent / "compressor" / kind for file in root.rglob("run.json")]
    files = {file for folder in folders for file in folder.rglob("*") if file.is_file()}
    return sorted(file for file in files if file.name not in ("run.json", "manifest.json"))


def whole_file(file: Path, _root: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def rows_without_times(file: Path, _root: Path) -> object:
    if file.suffix != ".parquet":
        return file.read_bytes()
    table = pq.read_table(file)
    return table.select([name for name in table.column_names if name not in TIMES]).to_pylist()


def compare_run_ids(before: Path, run: Path) -> list[str]:
    """Outputs of the earlier build whose run id this build computes otherwise, from the same inputs at the same paths."""
    before.rename(run)
    try:
        environment = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
        command = [sys.executable, "-c", RUN_IDS, "flow.yaml"]
        ids = json.loads(subprocess.run(command, cwd=run, env=environment, stdout=subprocess.PIPE, check=True).stdout)
        recorded = {name: json.loads((run / name / "run.json").read_text())["run_id"] for name in ids}
    finally:
        run.rename(before)
    print(f"run ids: {sum(ids[name] == recorded[name] for name in ids)} of {len(ids)} equal")
    return [f"{name}/run_id" for name in ids if ids[name] != recorded[name]]


if __name__ == "__main__":
    main()
