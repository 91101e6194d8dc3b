"""Reads samples/, features/ or frame_cache/, and a checkpoint; writes answers/ and scores/."""

from __future__ import annotations

import time
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from voco.errors import Refused
from voco.evaluate import answering, scores
from voco.job.spec import Job
from voco.model import weights
from voco.run import manifest, units
from voco.run.manifest import Manifest
from voco.store import parquet, schemas, storage
from voco.train.preflight import check_features, check_frames


def run(job: Job, run_id: str) -> Manifest:
    """Answer every question by the cached path, then score it against the bounds when they are given."""
    started = time.time()
    block = job.evaluate
    assert block is not None
    output, checkpoint = storage.resolve(job.output), storage.resolve(job.inputs.checkpoint or "")
    config = weights.read_config(checkpoint)
    try:
        counts = answering.answer_token_counts(answering.reading_layout(config, block), block)
    except ValueError as error:
        raise Refused(f"evaluate.{error}") from error
    features = storage.resolve(job.inputs.features) if job.inputs.features is not None else None
    frames = storage.resolve(job.inputs.frame_cache) if job.inputs.frame_cache is not None else None
    if features is not None:
        if storage.exists(storage.join(checkpoint, weights.COMPRESSOR, "model", "config.json")):
            raise Refused(
                "inputs.features: this checkpoint reads the caches of a frozen compressor: make a frame_cache of the samples "
                "with it (an image is one frame) and give that as inputs.frame_cache"
            )
        check_features(job, config)
    if frames is not None:
        store = check_frames(job, config, config["layout"]["tokens"])
        answering.check_length(config, block, store)
        if store.rejected:
            print(f"{job.name}: {len(store.rejected)} samples have no frame cache and are left out", flush=True)
    samples = [storage.resolve(item.uri) for item in job.inputs.samples]
    answering.check_rows(samples)
    count = answering.list_evaluation_rows(output, samples, block.unit_samples)
    arguments: dict[str, Any] = {"output": output, "checkpoint": checkpoint, "block": block.model_dump()}
    arguments |= {"features": features, "frame_cache": frames}
    if count == 0:
        raise Refused("inputs.samples: no rows to answer")
    upper, lower = read_bounds(job)
    done = units.run_units(output, count, answering.AnswerWorker, arguments, job.resources, in_process=False, label=job.name)
    answers = read_answers(job.output)
    images = sum(record["counts"]["images"] for record in done)
    found: list[dict[str, Any]] = []
    total: dict[str, dict[str, float]] = {}
    for n in counts:
        told = [record["figures"][str(n)] for record in done]
        sums = total[str(n)] = {key: sum(figures[key] for figures in told) for key in told[0]}
        mine = answers.filter(pc.equal(answers["n"], n))
        questions = mine.num_rows
        found += scores.score_rows(
            mine,
            upper,
            lower,
            block.resamples,
            job.seed,
            cache_bytes=round(sums["cache_bytes"] / max(1, images)),
            full_cache_bytes=round(sums["full_cache_bytes"] / max(1, images)),
            prefill_flops=sums["prefill_flops"] / max(1, questions),
            uncached_flops=sums["uncached_flops"] / max(1, questions),
            latency_s=sums["answer_seconds"] / max(1, questions),
            seconds=sums["compress_seconds"] + sums["answer_seconds"],
        )
    table = pa.Table.from_pylist(found, schema=schemas.SCORES)
    entry = parquet.write_table(units.part_uri(output, "scores", 0), [table], schemas.SCORES)
    how = "run for each question" if block.fastv is not None else "compressed once each"
    for row in (one for one in found if one["category"] == scores.ALL):
        asked = f"N={row['n']}: " if len(counts) > 1 else ""
        print(f"{job.name}: {asked}{row['score']:.1%} of {row['questions']} questions, {images} images {how}", flush=True)
    return manifest.write_manifest(
        job,
        run_id,
        started,
        counts={"read": sum(record["counts"]["read"] for record in done), "written": answers.num_rows, "images": images},
        tables={"answers": [entry for record in done for entry in record["tables"]["answers"]], "scores": [entry]},
        statistics=total,
    )


def read_bounds(job: Job) -> tuple[pa.Table | None, pa.Table | None]:
    """The answers of both bounds, or neither. Raises Refused for bounds at several N, or on different questions."""
    if job.inputs.upper is None or job.inputs.lower is None:
        return None, None
    bounds = {"upper": read_answers(job.inputs.upper), "lower": read_answers(job.inputs.lower)}
    for name, table in bounds.items():
        if len(held := pc.unique(table["n"]).to_pylist()) != 1:
            raise Refused(f"inputs.{name}: expected answers at one N, got {len(held)}: {', '.join(map(str, sorted(held)))}")
    scores.join_correct(bounds)
    return bounds["upper"], bounds["lower"]


def read_answers(uri: str) -> pa.Table:
    """The answers of a finished or just written evaluation, in the order of their units."""
    folder = storage.join(storage.resolve(uri), "answers")
    return pa.concat_tables([parquet.read_table(storage.join(folder, name)) for name in storage.list_names(folder)])
