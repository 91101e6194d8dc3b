"""Attempts of a tracked job, each in a separate process, and the records in their W&B files."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import shapes
from PIL import Image

from voco.run import wandb_records
from voco.store import storage

ROOT = Path(__file__).parents[1]
SECRETS = {"AWS_SECRET_ACCESS_KEY": "aws-secret-0123456789", "WANDB_API_KEY": "0123456789abcdef" * 2 + "feedbeef"}
RUN = "voco1-sft-0a1b2c3d"

START = """
import json, os, signal, sys, time
from voco.job.load import build_job
from voco.run import wandb_tracking
os.environ[wandb_tracking.GROUP] = "flow-11223344"
job = build_job("job.yaml", json.loads(sys.argv[1]))
def rows(first, end):
    return [{"step": s, "epoch": 0, "loss": 1 / (1 + s), "tokens": 7 * s, "sample_ids_sha256": "ff", "lr": 1e-3,
             "grad_norm": 0.5, "seconds": 0.25, "tokens_per_s": 100.0 + s, "mfu": None, "attempt": int(s >= 58),
             "val_loss": 2.0 - s if s % 4 == 3 else None} for s in range(first, end)]
run = wandb_tracking.start_tracking(wandb_tracking.tracked_job(job, "voco1-sft-0a1b2c3d"))
"""


def raw_job(folder: Path, output: str, **blocks: Any) -> dict[str, Any]:
    """A training job whose two inputs are finished outputs."""
    for name in ("samples", "features"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "manifest.json").write_text(f'{{"name": "{name}"}}')
    return {
        "name": "voco1-sft",
        "kind": "image_sft",
        "output": output,
        "inputs": {"samples": [{"uri": str(folder / "samples")}], "features": str(folder / "features")},
        "compression": {"method": "voco", "tokens": 1},
        "model": {"pretrained": "llama", "tower": shapes.tower("clip", path="clip", image_size=336)},
        "image_sft": {"epochs": 1, "global_batch": 8, "micro_batch": 8, "learning_rate": 0.001},
        "tracking": {"project": "voco-tests"},
        **blocks,
    }


def command(raw: dict[str, Any], script: str) -> list[str]:
    return [sys.executable, "-c", START + textwrap.dedent(script), json.dumps(raw)]


def environment(home: Path, **variables: str) -> dict[str, str]:
    home.mkdir(exist_ok=True)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return {**inherited, "PYTHONPATH": str(ROOT / "platform"), "HOME": str(home), "TMPDIR": str(home), **variables}


def attempt(
    raw: dict[str, Any], script: str, home: Path, exit_code: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """One attempt in a separate process."""
    done = subprocess.run(
        command(raw, script), env=environment(home, **variables), cwd=home, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == exit_code, done.stderr
    return done


def attempts(output: str, run: str = RUN) -> list[list[Any]]:
    """The records of each attempt, in order of time; an attempt killed before it opened its file has none."""
    folder = storage.join(output, "wandb")
    files = [storage.join(folder, name, f"run-{run}.wandb") for name in storage.list_names(folder) if "offline-run" in name]
    files = [uri for uri in files if storage.exists(uri)]
    assert files
    return [[record for record, _ in wandb_records.read_records(storage.read_bytes(uri))] for uri in files]


def of(records: list[Any], kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def items(records: Any) -> dict[str, Any]:
    return {"/".join([*([item.key] if item.key else []), *item.nested_key]): json.loads(item.value_json) for item in records}


def steps(records: list[Any]) -> list[dict[str, Any]]:
    """The training steps in the records: metrics by name."""
    return [values for line in of(records, "history") if "step" in (values := items(line.item))]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (640, 320), colour).save(buffer, "PNG")
    return buffer.getvalue()
