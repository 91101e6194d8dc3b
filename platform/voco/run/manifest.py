"""What a job leaves beside its output: `run.json` first, so that an output names its run, and `manifest.json` last.

An output without a manifest is unfinished; sent again, its job continues. Parents are held by the hash of their manifests.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import time
from typing import Any

from pydantic import BaseModel

from voco.errors import Refused
from voco.job import spec
from voco.job.spec import Job
from voco.store import storage

SCHEMA_VERSION = 1
MIN_FREE_BYTES = 256 << 20  # below it no job starts to write


class Manifest(BaseModel):
    """The record of a finished output. `tables` holds {path, rows, bytes, sha256} of every file, by table."""

    schema_version: int = SCHEMA_VERSION
    kind: str
    name: str
    run_id: str
    spec_sha256: str
    counts: dict[str, Any] = {}  # read, written, rejected {reason: n}
    tables: dict[str, list[dict[str, Any]]] = {}
    parents: list[dict[str, str]] = []  # uri, manifest_sha256
    source: list[dict[str, Any]] = []  # uri, size, etag or sha256
    statistics: dict[str, Any] = {}
    versions: dict[str, str] = {}
    seconds: float = 0.0


def package_versions() -> dict[str, str]:
    """Versions of what shapes the bytes of an output; packages that are absent are left out."""
    found = {}
    for package in ("voco", "ray", "torch", "transformers", "deepspeed", "pyarrow"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_manifest(output: str) -> Manifest | None:
    """The manifest of a finished output, or None."""
    uri = storage.join(output, "manifest.json")
    return Manifest.model_validate(storage.read_json(uri)) if storage.exists(uri) else None


def manifest_sha256(output: str) -> str | None:
    uri = storage.join(output, "manifest.json")
    return hashlib.sha256(storage.read_bytes(uri)).hexdigest() if storage.exists(uri) else None


def input_states(job: Job) -> dict[str, str]:
    """Each outside input URI of a job, with what identifies its state: manifest hash, or size and hash of a file.

    Media folders are not fingerprinted, archives are. Raises Refused for an input that is missing or unfinished.
    """
    stages = job.flow.stages if job.flow is not None else [job]
    states: dict[str, str] = {}
    for index, stage in enumerate(stages):
        prefix = f"flow.stages[{index}]." if job.flow is not None else ""
        for key, uri in stage.uris().items():
            if not uri.startswith("@"):
                states[uri] = input_state(f"{prefix}{key}", uri)
    return states


def input_state(key: str, uri: str) -> str:
    """What identifies the state of the input at a key path; Refused when it is a placeholder, missing or unfinished."""
    if storage.is_placeholder(uri):
        raise Refused(f"{key}: {uri} is a placeholder; put your own location there")
    place = storage.resolve(uri)
    if not storage.exists(place):
        raise Refused(f"{key}: {uri} does not exist")
    if is_source_file(key, uri):
        mark = storage.fingerprint(place)
        return f"{mark['size']}:{mark.get('sha256') or mark.get('etag')}"
    if key.endswith("inputs.media"):
        return "media"
    found = read_manifest(place)
    if found is None:
        raise Refused(f"{key}: {uri} has no manifest.json: it is not a finished output of a job")
    stale = changed_parent(found)
    if stale is not None:
        raise Refused(f"{key}: {uri} is stale: {stale}")
    return str(manifest_sha256(place))


def is_source_file(key: str, uri: str) -> bool:
    """True for the inputs that are fingerprinted as they are: annotation files and archives, not folders of media."""
    archive = key.endswith("inputs.media") and uri.lower().endswith(".zip")
    return archive or key.endswith(("inputs.annotations", "inputs.answers"))


def output_run_id(output: str) -> str | None:
    """The run id that an output holds, finished or not; None for an output that no job has written."""
    held = storage.join(output, "run.json")
    return str(storage.read_json(held)["run_id"]) if storage.exists(held) else None


def claim_output(job: Job, run_id: str, replace: bool = False) -> Manifest | None:
    """Claim an output for a run. Returns its manifest when this run already finished it.

    Raises Refused when the output holds another run (and `replace` is off), holds files of no run, cannot be written,
    or has a parent that changed since. Replacing a flow or a sweep leaves the outputs of its stages and trials: each then
    replaces its own if its run is another one, so what is equal is kept.
    """
    output = storage.resolve(job.output)
    held = storage.join(output, "run.json")
    before = storage.read_json(held) if storage.exists(held) else {}
    other = before.get("run_id")
    if other is None and storage.list_names(output):
        raise Refused(f"output: {job.output} holds files that no job wrote; use another output")
    if other not in (None, run_id) and not replace:
        raise Refused(f"output: {job.output} holds run {other}, this job is {run_id}; use another output, or --replace")
    finished = read_manifest(output) if other == run_id else None
    if finished is not None:
        changed = changed_parent(finished)
        if changed is None:
            return finished
        if not replace:
            raise Refused(changed)
    free = storage.free_bytes(output)
    if free is not None and free < MIN_FREE_BYTES:
        raise Refused(f"output: {job.output} has {free >> 20} MiB of free disk, expected {MIN_FREE_BYTES >> 20} or more")
    storage.check_writable(output)
    # A flow that was replacing when it was killed goes on replacing when it is sent again.
    holds_others = job.kind in ("flow", "sweep")
    again = holds_others and (replace or (other == run_id and bool(before.get("replace"))))
    clearing = finished is not None or other not in (None, run_id) or bool(before.get("clearing"))
    # `root` is what the job's local paths are relative to
    record = {"run_id": run_id, "replace": again, "root": os.getcwd(), "job": job.model_dump(exclude_none=True)}
    if clearing:
        # claimed first, so that a kill meanwhile leaves an output that names a run, and says that old files are in it
        storage.write_json(held, {**record, "clearing": True})
        old = ["manifest.json"] if holds_others else [name for name in storage.list_names(output) if name != "run.json"]
        for name in sorted(old, key=lambda name: name != "manifest.json"):
            storage.delete(storage.join(output, name))
    storage.write_json(held, record)
    return None


def is_replacing(output: str) -> bool:
    """True for a flow or sweep that was begun with `replace`."""
    return bool(storage.read_json(storage.join(output, "run.json")).get("replace"))


def changed_parent(manifest: Manifest) -> str | None:
    """What to say of a direct parent that is there with another manifest; one that is gone is no reason to stop."""
    for parent in manifest.parents:
        now = manifest_sha256(parent["uri"])
        if now is not None and now != parent["manifest_sha256"]:
            return (
                f"{manifest.name}: its parent {parent['uri']} has manifest {now[:12]}, "
                f"but it was made from {parent['manifest_sha256'][:12]}; use --replace to make it again"
            )
    return None


def write_manifest(job: Job, run_id: str, started: float, **fields: Any) -> Manifest:
    """Write the manifest, which makes the output finished. `started` is `time.time()` of the start."""
    parents, source = [], []
    for key, uri in job.uris().items():
        place = storage.resolve(uri)
        if is_source_file(key, uri):
            source.append(storage.fingerprint(place))
        elif key != "inputs.media":
            parents.append({"uri": place, "manifest_sha256": str(manifest_sha256(place))})
    inner = job.flow.stages if job.flow is not None else []
    if job.sweep is not None:
        from voco.job.trials import sweep_trials

        inner = [one for trial in sweep_trials(job) for one in (trial.train, *trial.evaluations)]
    for stage in inner:
        place = storage.resolve(stage.output)
        parents.append({"uri": place, "manifest_sha256": str(manifest_sha256(place))})
    text = job.model_dump_json(exclude_none=True)
    manifest = Manifest(
        kind=job.kind,
        name=job.name,
        run_id=run_id,
        spec_sha256=hashlib.sha256(text.encode()).hexdigest(),
        parents=parents,
        source=source,
        versions=package_versions(),
        seconds=round(time.time() - started, 3),
        **fields,
    )
    output = storage.resolve(job.output)
    storage.delete_partials(output)
    storage.write_json(storage.join(output, "manifest.json"), manifest.model_dump())
    return manifest


def job_run_id(job: Job) -> str:
    """The run id of a job whose inputs are there."""
    return spec.compute_run_id(job, input_states(job))
