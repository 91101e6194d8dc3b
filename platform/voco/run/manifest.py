"""The two records of an output: `run.json`, written first, names its run; `manifest.json`, written last, finishes it
(docs/data.md). An output without a manifest is unfinished: submitted again, its job continues.

Parents are recorded by the hash of their manifests.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import time
from typing import Any

from pydantic import BaseModel

from voco.errors import Refused
from voco.job.run_id import compute_run_id
from voco.job.spec import Flow, Job, Sweep
from voco.job.trials import inner_jobs
from voco.store import storage

SCHEMA_VERSION = 1
MIN_FREE_BYTES = 256 << 20  # free disk below which no job starts


class Manifest(BaseModel):
    """The record of a finished output. `tables` has {path, rows, bytes, sha256} of every file, by table."""

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
    """Versions of the packages that shape an output's bytes; absent packages are left out."""
    versions = {}
    for package in ("voco", "ray", "torch", "transformers", "deepspeed", "pyarrow"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def manifest_uri(output: str) -> str:
    return storage.join(output, "manifest.json")


def run_uri(output: str) -> str:
    return storage.join(output, "run.json")


def read_manifest(output: str) -> Manifest | None:
    """The manifest of a finished output, or None."""
    uri = manifest_uri(output)
    return Manifest.model_validate(storage.read_json(uri)) if storage.exists(uri) else None


def manifest_sha256(output: str) -> str | None:
    uri = manifest_uri(output)
    return hashlib.sha256(storage.read_bytes(uri)).hexdigest() if storage.exists(uri) else None


def input_states(job: Job) -> dict[str, str]:
    """Each external input URI of a job, with what identifies its state: manifest hash, or size and hash of a file.

    Media folders are not fingerprinted, archives are. Raises Refused for an input that is missing or unfinished.
    """
    states: dict[str, str] = {}
    for index, stage in enumerate(job.stages):
        prefix = "" if stage is job else f"flow.stages[{index}]."
        for key, uri in stage.uris().items():
            if not uri.startswith("@"):
                states[uri] = input_state(f"{prefix}{key}", uri)
    return states


def input_state(key: str, uri: str) -> str:
    """What identifies the state of the input at a key path. Raises Refused when it is a placeholder, missing or unfinished."""
    if storage.is_placeholder(uri):
        raise Refused(f"{key}: {uri} is a placeholder; put your own location there")
    resolved = storage.resolve(uri)
    if not storage.exists(resolved):
        raise Refused(f"{key}: {uri} does not exist")
    if is_source_file(key, uri):
        mark = storage.fingerprint(resolved)
        return f"{mark['size']}:{mark.get('sha256') or mark.get('etag')}"
    if key.endswith("inputs.media"):
        return "media"
    manifest = read_manifest(resolved)
    if manifest is None:
        raise Refused(f"{key}: {uri} has no manifest.json: it is not a finished output of a job")
    stale = changed_parent(manifest)
    if stale is not None:
        raise Refused(f"{key}: {uri} is stale: {stale}")
    return str(manifest_sha256(resolved))


def is_source_file(key: str, uri: str) -> bool:
    """True for inputs that are fingerprinted themselves: annotation files and archives, not folders of media."""
    archive = key.endswith("inputs.media") and uri.lower().endswith(".zip")
    return archive or key.endswith(("inputs.annotations", "inputs.answers"))


def output_run_id(output: str) -> str | None:
    """The run id of an output, finished or not; None for a directory that no job has written."""
    uri = run_uri(output)
    return str(storage.read_json(uri)["run_id"]) if storage.exists(uri) else None


def claim_output(job: Job, run_id: str, replace: bool = False) -> Manifest | None:
    """Claim an output for a run. Returns its manifest when this run already finished it.

    Raises Refused when the output belongs to another run (and `replace` is off), has files that no job wrote, cannot be
    written, or has a parent that changed since. Replacing a flow or a sweep keeps the outputs of its stages and trials:
    each of them is replaced only if its own run changed.
    """
    output = job.output_uri
    uri = run_uri(output)
    earlier = storage.read_json(uri) if storage.exists(uri) else {}
    owner = earlier.get("run_id")
    if owner is None and storage.list_names(output):
        raise Refused(f"output: {job.output} holds files that no job wrote; use another output")
    if owner not in (None, run_id) and not replace:
        raise Refused(f"output: {job.output} holds run {owner}, this job is {run_id}; use another output, or --replace")
    finished = read_manifest(output) if owner == run_id else None
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
    contains_outputs = isinstance(job.block, Flow | Sweep)
    # a replacing flow that was killed continues to replace when it is submitted again
    replacing = contains_outputs and (replace or (owner == run_id and bool(earlier.get("replace"))))
    # `root` is the directory that the job's local paths are relative to
    record = {"run_id": run_id, "replace": replacing, "root": os.getcwd(), "job": job.model_dump(exclude_none=True)}
    if finished is not None or owner not in (None, run_id) or bool(earlier.get("clearing")):
        _clear(output, record, keep_outputs=contains_outputs)
    storage.write_json(uri, record)
    return None


def _clear(output: str, record: dict[str, Any], keep_outputs: bool) -> None:
    """Remove an earlier run's files. `run.json` comes first: after a kill it says that old files may remain."""
    storage.write_json(run_uri(output), {**record, "clearing": True})
    names = ["manifest.json"] if keep_outputs else [name for name in storage.list_names(output) if name != "run.json"]
    for name in sorted(names, key=lambda name: name != "manifest.json"):
        storage.delete(storage.join(output, name))


def is_replacing(output: str) -> bool:
    """True for a flow or sweep that was started with `replace`."""
    return bool(storage.read_json(run_uri(output)).get("replace"))


def changed_parent(manifest: Manifest) -> str | None:
    """A message about a direct parent that now has another manifest; None if there is none. A missing parent is fine."""
    for parent in manifest.parents:
        now = manifest_sha256(parent["uri"])
        if now is not None and now != parent["manifest_sha256"]:
            return (
                f"{manifest.name}: its parent {parent['uri']} has manifest {now[:12]}, "
                f"but it was computed from {parent['manifest_sha256'][:12]}; use --replace to run it again"
            )
    return None


def write_manifest(job: Job, run_id: str, started: float, **fields: Any) -> Manifest:
    """Write the manifest, which finishes the output. `started` is `time.time()` of the start."""
    parents, source = [], []
    for key, uri in job.uris().items():
        resolved = storage.resolve(uri)
        if is_source_file(key, uri):
            source.append(storage.fingerprint(resolved))
        elif key != "inputs.media":
            parents.append({"uri": resolved, "manifest_sha256": str(manifest_sha256(resolved))})
    for inner in inner_jobs(job):
        resolved = inner.output_uri
        parents.append({"uri": resolved, "manifest_sha256": str(manifest_sha256(resolved))})
    manifest = Manifest(
        kind=job.kind,
        name=job.name,
        run_id=run_id,
        spec_sha256=hashlib.sha256(job.model_dump_json(exclude_none=True).encode()).hexdigest(),
        parents=parents,
        source=source,
        versions=package_versions(),
        seconds=round(time.time() - started, 3),
        **fields,
    )
    output = job.output_uri
    storage.delete_partials(output)
    storage.write_json(manifest_uri(output), manifest.model_dump())
    return manifest


def job_run_id(job: Job) -> str:
    """The run id of a job whose inputs exist."""
    return compute_run_id(job, input_states(job))
