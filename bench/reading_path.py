"""From a job file to an optimizer step: every file of ours whose functions `voco run` of a small image SFT calls, and its lines.

`python bench/reading_path.py [TREE]` traces the driver and the workers of the build in TREE, by default this one. Files that only
define something, such as a schema, are not counted; files of which the run calls a single function are.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
TEXT = {"template": "question_answer"}
MODEL = {"llama": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "vocabulary": 320}}
TOWER = {"name": "efficientnet_lite0", "image_size": 32}
JOBS = [
    {"name": "features", "kind": "features", "features": {"tower": TOWER}},
    {
        "name": "sft",
        "kind": "image_sft",
        "model": {**MODEL, "tower": TOWER},
        "compression": {"method": "voco", "tokens": 2},
        "image_sft": {
            "epochs": 1,
            "global_batch": 16,
            "micro_batch": 8,
            "learning_rate": 2e-3,
            "precision": "fp32",
            "text": TEXT,
        },
    },
]
# every Python process reads this at its start; class bodies and modules themselves are not functions
HOOK = """
import os, sys, threading
roots, seen = tuple(os.environ["TRACE_ROOTS"].split(":")), set()
def on_event(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_flags & 3 == 3 and code.co_filename not in seen and code.co_filename.startswith(roots):
        seen.add(code.co_filename)
        with open(os.environ["TRACE_LOG"], "a") as log:
            log.write(code.co_filename + chr(10))
sys.setprofile(on_event)
threading.setprofile(on_event)
"""


def main() -> None:
    tree = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT).resolve()
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "platform")]
    import world

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        world.write_samples(str(work / "samples"), world.sample_rows(40))
        (work / "hook").mkdir()
        (work / "hook" / "sitecustomize.py").write_text(HOOK)
        source = {"samples": [{"uri": "samples"}]}
        for job, inputs in zip(JOBS, [source, {**source, "features": "features"}], strict=True):
            content = {**job, "inputs": inputs, "output": job["name"]}
            (work / "job.yaml").write_text(yaml.safe_dump(content))
            run(tree, work, traced=job is JOBS[-1])
        files = list(dict.fromkeys((work / "trace.log").read_text().splitlines()))
    counts = {file: Path(file).read_text().count("\n") for file in files}
    for file, lines in counts.items():
        print(f"{lines:4} {Path(file).relative_to(tree)}")
    print(f"{len(counts)} files, {sum(counts.values()):,} lines")


def run(tree: Path, work: Path, traced: bool) -> None:
    paths = [*([work / "hook"] if traced else []), tree / "platform", tree]
    settings = {"PYTHONPATH": ":".join(map(str, paths)), "WANDB_MODE": "disabled", "RAY_AUTH_MODE": "disabled"}
    settings |= {"TRACE_LOG": str(work / "trace.log"), "TRACE_ROOTS": f"{tree / 'platform'}:{tree / 'pipelines'}"}
    subprocess.run([sys.executable, "-m", "pipelines", "run", "job.yaml"], cwd=work, env=os.environ | settings, check=True)


if __name__ == "__main__":
    main()
