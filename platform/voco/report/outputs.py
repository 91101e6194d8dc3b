"""Finding what there is to report: finished outputs, the flows and parents that they belong to, and what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from voco.errors import Refused
from voco.run import manifest
from voco.run.manifest import Manifest
from voco.store import parquet, storage


@dataclass(frozen=True)
class Parent:
    """A direct parent of an output, and what became of it."""

    uri: str
    manifest_sha256: str
    state: str  # unchanged, changed or absent


class Output:
    """One finished output directory. Nothing but the manifest is read before it is asked for."""

    def __init__(self, uri: str, found: Manifest) -> None:
        self.uri = uri
        self.manifest = found
        self.name = found.name
        self.kind = found.kind

    @cached_property
    def job(self) -> dict[str, Any]:
        """The job as sent; empty when `run.json` is gone."""
        return dict(self._run.get("job", {}))

    @cached_property
    def _run(self) -> dict[str, Any]:
        place = storage.join(self.uri, "run.json")
        return dict(storage.read_json(place)) if storage.exists(place) else {}

    @cached_property
    def parents(self) -> list[Parent]:
        found = []
        for parent in {parent["uri"]: parent for parent in self.manifest.parents}.values():  # one may be read twice
            now = manifest.manifest_sha256(parent["uri"])
            state = "absent" if now is None else "unchanged" if now == parent["manifest_sha256"] else "changed"
            found.append(Parent(parent["uri"], parent["manifest_sha256"], state))
        return found

    def input(self, key: str) -> str | None:
        """The resolved URI of a single input of the job, e.g. `upper`."""
        uri = self.job.get("inputs", {}).get(key)
        return storage.resolve(uri, self._run.get("root")) if isinstance(uri, str) else None

    def samples_inputs(self) -> list[str]:
        """The resolved URIs of the job's `inputs.samples`."""
        root = self._run.get("root")
        return [storage.resolve(item["uri"], root) for item in self.job.get("inputs", {}).get("samples", [])]

    def text_only_inputs(self) -> set[str]:
        """The resolved URIs of `inputs.vocabulary` that the job reads for nothing else."""
        root = self._run.get("root")
        return {storage.resolve(uri, root) for uri in self.job.get("inputs", {}).get("vocabulary", [])} - set(
            self.samples_inputs()
        )

    def files(self, table: str) -> list[str]:
        """URIs of a table's files, in the order of the manifest."""
        entries = [str(entry["path"]) for entry in self.manifest.tables.get(table, [])]
        return [storage.join(self.uri, path if "/" in path else f"{table}/{path}") for path in entries]

    def read(self, table: str, columns: list[str] | None = None) -> pa.Table | None:
        """A whole table without its media; None when the output has no such table or a file of it is gone."""
        files = self.files(table)
        if not files or not all(storage.exists(file) for file in files):
            return None
        return pa.concat_tables([parquet.read_table(file, columns) for file in files])


@dataclass(frozen=True)
class OutputGraph:
    """Every finished output that a report is about, parents before children, and every piece that is not there."""

    outputs: tuple[Output, ...]
    missing: tuple[tuple[str, str], ...]  # name or URI, what is wrong with it

    def of_kind(self, kind: str) -> list[Output]:
        return [output for output in self.outputs if output.kind == kind]

    def at(self, uri: str) -> Output | None:
        return next((output for output in self.outputs if output.uri == uri), None)

    def sweep_of(self, uri: str) -> tuple[Output, str] | None:
        """The sweep that an output is a trial's part of, and the trial's name; None for what no sweep made."""
        for sweep in self.of_kind("sweep"):
            if uri.startswith(storage.join(sweep.uri, "runs") + "/"):
                return sweep, uri.removeprefix(storage.join(sweep.uri, "runs") + "/").split("/")[0]
        return None

    def trials(self, sweep: Output) -> list[tuple[str, Output]]:
        """Name and training output of each trial of a sweep that is there, in the order of the sweep's axes."""
        runs = storage.join(sweep.uri, "runs") + "/"
        names = [parent.uri.split("/runs/")[-1].split("/")[0] for parent in sweep.parents if parent.uri.endswith("/train")]
        held = [(name, self.at(f"{runs}{name}/train")) for name in dict.fromkeys(names)]
        return [(name, output) for name, output in held if output is not None]


def gather_outputs(uris: list[str]) -> OutputGraph:
    """The outputs at `uris`, the stages of flows, the trials of sweeps, and all their parents, as far as they exist.

    Raises Refused when none of them is finished.
    """
    todo = [storage.resolve(uri) for uri in uris]
    found: dict[str, Output] = {}
    missing: dict[str, str] = {}
    while todo:
        uri = todo.pop(0)
        if uri in found or uri in missing:
            continue
        stages = _stages(uri)
        read = manifest.read_manifest(uri)
        todo.extend(stages)
        if read is None and not stages:
            missing[uri] = "unfinished: it has no manifest" if storage.list_names(uri) else "not there"
        elif read is not None and read.kind != "flow":
            found[uri] = Output(uri, read)
            todo.extend(parent["uri"] for parent in read.parents)
            todo.extend(_trial_outputs(uri) if read.kind == "sweep" else [])
    if not found:
        raise Refused(f"report: expected a finished output of a job, found none in {', '.join(uris)}")
    return OutputGraph(_parents_first(list(found.values())), tuple(missing.items()))


def _stages(uri: str) -> list[str]:
    """Outputs of a flow's stages: those that its job names, and any finished directory under it, where it may lie by now."""
    place = storage.join(uri, "run.json")
    run = storage.read_json(place) if storage.exists(place) else {}
    stages = [stage for stage in (run.get("job", {}).get("flow") or {}).get("stages", []) if stage.get("output")]
    if not stages and storage.exists(storage.join(uri, "manifest.json")):
        return []
    names = [name for name in storage.list_names(uri) if not name.startswith(".")]
    under = [place for name in names if storage.exists(storage.join(place := storage.join(uri, name), "manifest.json"))]
    named = [storage.resolve(stage["output"], run.get("root")) for stage in stages]
    moved = [storage.join(uri, stage["name"]) in under for stage in stages]
    kept = [place for place, gone in zip(named, moved, strict=True) if not gone or storage.exists(f"{place}/manifest.json")]
    return kept + [place for place in under if place not in kept]


def _trial_outputs(uri: str) -> list[str]:
    """Finished outputs of a sweep's trials where they lie now: its parents' URIs are gone when the sweep was moved."""
    runs = storage.join(uri, "runs")
    under = [
        storage.join(runs, trial, part)
        for trial in storage.list_names(runs)
        for part in storage.list_names(storage.join(runs, trial))
    ]
    return [place for place in under if storage.exists(storage.join(place, "manifest.json"))]


def _parents_first(outputs: list[Output]) -> tuple[Output, ...]:
    """Stable order in which every output comes after its parents."""
    by_uri = {output.uri: output for output in outputs}
    placed: dict[str, Output] = {}

    def place(output: Output) -> None:
        if output.uri in placed:
            return
        for parent in output.manifest.parents:
            if parent["uri"] in by_uri:
                place(by_uri[parent["uri"]])
        placed[output.uri] = output

    for output in outputs:
        place(output)
    return tuple(placed.values())
