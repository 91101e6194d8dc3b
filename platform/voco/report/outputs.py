"""Collects the finished outputs that a report covers, with their parents, the stages of flows and the trials of sweeps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from voco.errors import Refused
from voco.run import manifest
from voco.run.manifest import Manifest
from voco.store import parquet, storage
from voco.store.schemas import ADDED_TO_SCORES, SCORES


@dataclass(frozen=True)
class Parent:
    """A direct parent of an output, and whether its manifest is still the one that was read."""

    uri: str
    manifest_sha256: str
    state: str  # unchanged, changed or absent


class Output:
    """One finished output directory. Everything but the manifest is read on first use."""

    def __init__(self, uri: str, output_manifest: Manifest) -> None:
        self.uri = uri
        self.manifest = output_manifest
        self.name = output_manifest.name
        self.kind = output_manifest.kind

    @cached_property
    def job(self) -> dict[str, Any]:
        """The job as submitted; empty when `run.json` is gone."""
        return dict(self._run.get("job", {}))

    @cached_property
    def _run(self) -> dict[str, Any]:
        uri = manifest.run_uri(self.uri)
        return dict(storage.read_json(uri)) if storage.exists(uri) else {}

    @cached_property
    def parents(self) -> list[Parent]:
        """The direct parents, each once, with their state now."""
        parents = []
        for parent in {parent["uri"]: parent for parent in self.manifest.parents}.values():  # a job may name an input twice
            sha256 = manifest.manifest_sha256(parent["uri"])
            state = "absent" if sha256 is None else "unchanged" if sha256 == parent["manifest_sha256"] else "changed"
            parents.append(Parent(parent["uri"], parent["manifest_sha256"], state))
        return parents

    def input(self, key: str) -> str | None:
        """The resolved URI of a single input of the job, e.g. `upper`."""
        uri = self.job.get("inputs", {}).get(key)
        return storage.resolve(uri, self._run.get("root")) if isinstance(uri, str) else None

    def samples_inputs(self) -> list[str]:
        """The resolved URIs of the job's `inputs.samples`."""
        root = self._run.get("root")
        return [storage.resolve(item["uri"], root) for item in self.job.get("inputs", {}).get("samples", [])]

    def text_only_inputs(self) -> set[str]:
        """The resolved URIs of `inputs.vocabulary` that are not among `inputs.samples`."""
        root = self._run.get("root")
        vocabulary = {storage.resolve(uri, root) for uri in self.job.get("inputs", {}).get("vocabulary", [])}
        return vocabulary - set(self.samples_inputs())

    def files(self, table: str) -> list[str]:
        """URIs of a table's files, in the order of the manifest."""
        entries = [str(entry["path"]) for entry in self.manifest.tables.get(table, [])]
        return [storage.join(self.uri, path if "/" in path else f"{table}/{path}") for path in entries]

    def read(self, table: str, columns: list[str] | None = None) -> pa.Table | None:
        """A complete table; None when the output has no such table or one of its files is gone.

        Raises Refused for scores of an earlier version that lack other columns than ADDED_TO_SCORES, which are null then.
        """
        files = self.files(table)
        if not files or not all(storage.exists(file) for file in files):
            return None
        complete = pa.concat_tables([parquet.read_table(file, columns) for file in files])
        if table not in ("scores", "trials") or columns is not None:
            return complete
        complete = parquet.with_added_columns(complete, SCORES, ADDED_TO_SCORES)
        if not set(SCORES.names) <= set(complete.column_names):
            raise Refused(f"{self.uri}: {table}/ is of an earlier version: run {self.name} again with --replace")
        return complete


@dataclass(frozen=True)
class OutputGraph:
    """Every finished output that a report covers, parents before children, and the outputs that are missing."""

    outputs: tuple[Output, ...]
    missing: tuple[tuple[str, str], ...]  # (URI, reason)

    def of_kind(self, kind: str) -> list[Output]:
        """The outputs of one kind of job, in order."""
        return [output for output in self.outputs if output.kind == kind]

    def at(self, uri: str) -> Output | None:
        """The finished output at a resolved URI; None when there is none."""
        return next((output for output in self.outputs if output.uri == uri), None)

    def sweep_of(self, uri: str) -> tuple[Output, str] | None:
        """The sweep and the trial's name of an output that a sweep's trial wrote; None for any other."""
        for sweep in self.of_kind("sweep"):
            if uri.startswith(storage.join(sweep.uri, "runs") + "/"):
                return sweep, uri.removeprefix(storage.join(sweep.uri, "runs") + "/").split("/")[0]
        return None

    def trials(self, sweep: Output) -> list[tuple[str, Output]]:
        """Name and training output of each trial of a sweep that still exists, in the order of the sweep's axes."""
        runs = storage.join(sweep.uri, "runs") + "/"
        names = [parent.uri.split("/runs/")[-1].split("/")[0] for parent in sweep.parents if parent.uri.endswith("/train")]
        outputs = [(name, self.at(f"{runs}{name}/train")) for name in dict.fromkeys(names)]
        return [(name, output) for name, output in outputs if output is not None]


def gather_outputs(uris: list[str]) -> OutputGraph:
    """The outputs at `uris`, the stages of flows, the trials of sweeps, and all their parents that still exist.

    Raises Refused when none of them is finished.
    """
    todo = [storage.resolve(uri) for uri in uris]
    outputs: dict[str, Output] = {}
    missing: dict[str, str] = {}
    while todo:
        uri = todo.pop(0)
        if uri in outputs or uri in missing:
            continue
        stages = _stage_outputs(uri)
        output_manifest = manifest.read_manifest(uri)
        todo.extend(stages)
        if output_manifest is None and not stages:
            missing[uri] = "unfinished: it has no manifest" if storage.list_names(uri) else "does not exist"
        elif output_manifest is not None and output_manifest.kind != "flow":
            outputs[uri] = Output(uri, output_manifest)
            todo.extend(parent["uri"] for parent in output_manifest.parents)
            todo.extend(_trial_outputs(uri) if output_manifest.kind == "sweep" else [])
    if not outputs:
        raise Refused(f"report: expected a finished output of a job, got none in {', '.join(uris)}")
    return OutputGraph(_parents_first(list(outputs.values())), tuple(missing.items()))


def _stage_outputs(uri: str) -> list[str]:
    """Outputs of a flow's stages: those that its job names, and every finished directory inside a flow that was moved."""
    run_uri = manifest.run_uri(uri)
    run = storage.read_json(run_uri) if storage.exists(run_uri) else {}
    stages = [stage for stage in (run.get("job", {}).get("flow") or {}).get("stages", []) if stage.get("output")]
    if not stages and storage.exists(manifest.manifest_uri(uri)):
        return []
    inside = [storage.join(uri, name) for name in storage.list_names(uri) if not name.startswith(".")]
    inside = [directory for directory in inside if storage.exists(manifest.manifest_uri(directory))]
    named = []
    for stage in stages:
        output = storage.resolve(stage["output"], run.get("root"))
        moved = storage.join(uri, stage["name"]) in inside
        if not moved or storage.exists(manifest.manifest_uri(output)):
            named.append(output)
    return named + [directory for directory in inside if directory not in named]


def _trial_outputs(uri: str) -> list[str]:
    """Finished outputs of a sweep's trials inside the sweep, whose manifest names other URIs after it was moved."""
    runs = storage.join(uri, "runs")
    directories = [
        storage.join(runs, trial, name)
        for trial in storage.list_names(runs)
        for name in storage.list_names(storage.join(runs, trial))
    ]
    return [directory for directory in directories if storage.exists(manifest.manifest_uri(directory))]


def _parents_first(outputs: list[Output]) -> tuple[Output, ...]:
    """Stable order in which every output comes after its parents."""
    by_uri = {output.uri: output for output in outputs}
    ordered: dict[str, Output] = {}

    def add(output: Output) -> None:
        if output.uri in ordered:
            return
        for parent in output.manifest.parents:
            if parent["uri"] in by_uri:
                add(by_uri[parent["uri"]])
        ordered[output.uri] = output

    for output in outputs:
        add(output)
    return tuple(ordered.values())
