"""Reads samples/, features/ and a checkpoint (or a new model); writes a checkpoint directory."""

from __future__ import annotations

import time

from voco import manifest, rows, storage
from voco.manifest import Manifest
from voco.spec import Job
from voco.train import launch


def run(job: Job, run_id: str) -> Manifest:
    """Supervised fine-tuning under the job's compression method, on Ray Train workers with DeepSpeed."""
    started = time.time()
    output = storage.resolve(job.output)
    returned = launch.fit(job, run_id, output)
    metrics = rows.read_table(storage.join(output, "metrics.parquet"))
    files = [storage.join("model", name) for name in storage.names(storage.join(output, "model"))]
    return manifest.finish(
        job,
        run_id,
        started,
        counts={"steps": returned["steps"], "text_tokens_cut": returned["cut"]},
        tables={
            "model": [
                {"path": name, "bytes": storage.size(place), "sha256": storage.sha256(place)}
                for name in files
                for place in [storage.join(output, name)]
            ]
        },
        statistics={
            "final_loss": metrics["loss"][-1].as_py(),
            "supervised_tokens": sum(metrics["tokens"].to_pylist()),
            "training_seconds": sum(metrics["seconds"].to_pylist()),
        },
    )
