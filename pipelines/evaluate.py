"""Reads samples/, features/ or frame_cache/, and a checkpoint; writes answers/ and scores/."""

from __future__ import annotations

import time
from typing import Any

import pyarrow as pa

from voco import manifest, rows, storage, work
from voco.errors import Refused
from voco.evaluate import answering, scores
from voco.manifest import Manifest
from voco.model import weights
from voco.spec import Job
from voco.train.check import check_features, check_frames


def run(job: Job, run_id: str) -> Manifest:
    """Answer every question by the cached path, then score it against the bounds when they are given."""
    started = time.time()
    block = job.evaluate
    assert block is not None
    output, checkpoint = storage.resolve(job.output), storage.resolve(job.inputs.checkpoint or "")
    try:
        answering.layout_for(checkpoint, block.read_as)
    except ValueError as error:
        raise Refused(f"evaluate.{error}") from error
    config = weights.read_config(checkpoint)
    features = storage.resolve(job.inputs.features) if job.inputs.features is not None else None
    frames = storage.resolve(job.inputs.frame_cache) if job.inputs.frame_cache is not None else None
    if features is not None:
        if storage.exists(storage.join(checkpoint, weights.COMPRESSOR, "model", "config.json")):
            raise Refused(
                "inputs.features: this checkpoint reads the caches of a frozen compressor: make a frame_cache of the samples "
                "with it (an image is one frame) and give that as inputs.frame_cache"
            )
        check_features(job, config)
    rejected = check_frames(job, config, config["layout"]["tokens"]).rejected if frames is not None else set()
    if rejected:
        print(f"{job.name}: {len(rejected)} samples have no frame cache and are left out", flush=True)
    units = answering.write_list(output, [storage.resolve(item.uri) for item in job.inputs.samples], block.unit_samples)
    arguments: dict[str, Any] = {"output": output, "checkpoint": checkpoint, "block": block.model_dump()}
    arguments |= {"features": features, "frame_cache": frames}
    if units == 0:
        raise Refused("inputs.samples: no rows to answer")
    done = work.run(output, units, answering.AnswerWorker, arguments, job.resources, in_process=False, label=job.name)
    answers, upper, lower = (answers_of(uri) for uri in (job.output, job.inputs.upper, job.inputs.lower))
    assert answers is not None
    total = {key: sum(record["figures"][key] for record in done) for key in done[0]["figures"]}
    images, questions = sum(record["counts"]["images"] for record in done), answers.num_rows
    found = scores.score_rows(
        answers,
        upper,
        lower,
        block.resamples,
        job.seed,
        cache_bytes=round(total["cache_bytes"] / max(1, images)),
        full_cache_bytes=round(total["full_cache_bytes"] / max(1, images)),
        prefill_flops=total["prefill_flops"] / questions,
        latency_s=total["answer_seconds"] / questions,
        seconds=total["compress_seconds"] + total["answer_seconds"],
    )
    table = pa.Table.from_pylist(found, schema=rows.SCORES)
    entry = rows.write_table(work.part(output, "scores", 0), [table], rows.SCORES)
    print(f"{job.name}: {found[0]['score']:.1%} of {questions} questions, {images} images compressed once each", flush=True)
    return manifest.finish(
        job,
        run_id,
        started,
        counts={"read": sum(record["counts"]["read"] for record in done), "written": questions, "images": images},
        tables={"answers": [entry for record in done for entry in record["tables"]["answers"]], "scores": [entry]},
        statistics=total,
    )


def answers_of(uri: str | None) -> pa.Table | None:
    """The answers of a finished or just written evaluation, in the order of their units."""
    if uri is None:
        return None
    folder = storage.join(storage.resolve(uri), "answers")
    return pa.concat_tables([rows.read_table(storage.join(folder, name)) for name in storage.names(folder)])
