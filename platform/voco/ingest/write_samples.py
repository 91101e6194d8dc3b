"""Writes `samples/` and `rejects/` from the work list: the work of one unit on a worker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, repeat
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from voco.ingest import statistics
from voco.ingest.media.archive import open_media
from voco.ingest.media.decoder import Decoder
from voco.ingest.media.image import image_medium
from voco.ingest.media.read_ahead import Find, Medium, read_ahead
from voco.ingest.media.source import LocatedMedia, MediaLimits, MediaSource
from voco.ingest.media.video import find_video, video_medium
from voco.ingest.source_row import BadRow
from voco.run import units
from voco.store import parquet, schemas, storage
from voco.store.index import group_facts, join_pieces, samples_rows, write_piece
from voco.store.samples import blob_uri


@dataclass
class UnitFigures:
    """What a unit collects for its record while it reads."""

    rejects: list[dict[str, str]] = field(default_factory=list)
    blobs: list[dict[str, Any]] = field(default_factory=list)  # manifest entries
    figures: statistics.Figures = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    groups: list[dict[str, Any]] = field(default_factory=list)  # `group_facts` of each row group


class WriteSamples:
    """Reads and checks the media of a unit and writes its parts, in the order of the work list.

    Keeps one row group of media (ROW_GROUP_BYTES, or one larger row) in memory, and from S3 what `read_ahead` states.
    """

    def __init__(
        self,
        output: str,
        media: str | None,
        limits: MediaLimits,
        shard_bytes: int,
        located: LocatedMedia | None,
    ) -> None:
        self.output = output
        self.located = located
        self.root = open_media(media) if media is not None else None
        self.limits = limits
        self.shard_bytes = shard_bytes
        self.decoder = Decoder()
        # Arrow's own pool returns the memory of each row group, and allocating it again costs as much as hashing does
        pa.set_memory_pool(pa.system_memory_pool())

    def __call__(self, unit: int, listed: pa.Table) -> dict[str, Any]:
        """Write the parts of one unit, given as its rows of the work list. Returns the unit's record."""
        collected = UnitFigures()
        rows = listed.select(["dataset", "modality", "paths", "place", "sources"]).to_pylist()
        with closing(self._readings(rows)) as readings:
            groups = self._groups(listed, rows, readings, collected)
            samples = self._write("samples", unit, groups, schemas.SAMPLES)
        write_piece(self.output, unit, samples_rows(collected.groups, samples))
        rejected = iter([(parquet.to_table(collected.rejects, schemas.REJECTS), 0)] if collected.rejects else [])
        rejects = self._write("rejects", unit, rejected, schemas.REJECTS)
        return {
            "tables": {"samples": samples, "rejects": rejects, "blobs": collected.blobs},
            "written": int(collected.figures.get("conversations", {}).get("sum", 0)),
            "rejected": dict(sorted(Counter(reject["reason"] for reject in collected.rejects).items())),
            "spread": collected.figures,
            "kinds": dict(sorted(collected.kinds.items())),
        }

    def _write(self, table: str, unit: int, groups: Iterator[tuple[pa.Table, int]], schema: pa.Schema) -> list[dict[str, Any]]:
        """Write row groups, each with its bytes of media, in parts of about `shard_bytes`. Returns the manifest entries.

        Deletes parts beyond the last one, which an earlier attempt may have written from other media.
        """
        entries: list[dict[str, Any]] = []
        following = next(groups, None)

        def shard(first: tuple[pa.Table, int]) -> Iterator[pa.Table]:
            nonlocal following
            group: tuple[pa.Table, int] | None = first
            written = 0
            while group is not None:
                yield group[0]
                written += group[1]
                group = following = next(groups, None)
                if group is not None and written + group[1] > self.shard_bytes:
                    return

        while following is not None:
            entries.append(parquet.write_table(units.part_uri(self.output, table, unit, len(entries)), shard(following), schema))
        piece = len(entries)
        while storage.exists(stale := units.part_uri(self.output, table, unit, piece)):
            storage.delete(stale)
            piece += 1
        return entries

    def _groups(
        self,
        listed: pa.Table,
        samples: list[dict[str, Any]],
        readings: Iterator[list[Callable[[], Medium]]],
        collected: UnitFigures,
    ) -> Iterator[tuple[pa.Table, int]]:
        """Row groups of at most ROW_GROUP_BYTES of media, each with its bytes. Reads the media and fills `collected`."""
        pending: list[list[dict[str, Any]]] = []
        indices: list[int] = []
        sizes: list[int] = []
        size = 0
        for index, (sample, reads) in enumerate(zip(samples, readings, strict=True)):
            try:
                media = [self._medium(sample["modality"], *read()) for read in reads]
            except BadRow as bad:
                reject = {"dataset": sample["dataset"], "reason": bad.reason, "detail": bad.detail}
                collected.rejects.extend({**reject, "source": source} for source in sample["sources"])
                continue
            sizes += [len(medium["bytes"]) for medium in media]
            for medium in media:
                if len(medium["bytes"]) > self.limits.inline_max_bytes:
                    collected.blobs.append(self._write_blob(medium))
            weight = sum(len(medium["bytes"] or b"") for medium in media)
            if pending and size + weight > schemas.ROW_GROUP_BYTES:
                yield _group(listed, indices, pending, collected), size
                pending, indices, size = [], [], 0
            pending.append(media)
            indices.append(index)
            size += weight
        if pending:
            yield _group(listed, indices, pending, collected), size
        statistics.add_values(collected.figures, "media_bytes", pa.array(sizes, pa.int64()))

    def _readings(self, samples: list[dict[str, Any]]) -> Generator[list[Callable[[], Medium]]]:
        """For each sample, in order, the calls that read its media. Media in S3 are read ahead."""
        limit = self.limits.max_media_bytes
        source = self.root if self.located is None else self.located
        with closing(self._finds(samples)) as finds:
            ahead = source is not None and source.concurrent
            with closing(read_ahead(finds, limit) if ahead else (partial(find, limit) for find in finds)) as reads:
                for sample in samples:
                    yield list(islice(reads, len(sample["paths"])))

    def _finds(self, samples: list[dict[str, Any]]) -> Generator[Find]:
        """The call for each medium that reads at most so many bytes of it."""
        if self.located is not None:
            roots: Iterator[MediaSource | None] = self.located.sources([sample["place"] for sample in samples])
        else:
            roots = repeat(self.root)
            if self.root is not None:
                self.root.expect([path for sample in samples for path in sample["paths"]])
        for sample, root in zip(samples, roots, strict=False):
            for path in sample["paths"]:
                yield partial(_find, root, sample["modality"], path)

    def _medium(self, modality: str, name: str, data: bytes) -> dict[str, Any]:
        return (video_medium if modality == "video" else image_medium)(name, data, self.limits, self.decoder)

    def _write_blob(self, medium: dict[str, Any]) -> dict[str, Any]:
        """Write a medium that is too large for a table to `blobs/` and remove its bytes from the row."""
        data, name = medium["bytes"], medium["sha256"]
        storage.write_bytes(blob_uri(self.output, name), data)
        medium["bytes"] = None
        return {"path": name, "rows": 1, "bytes": len(data), "sha256": name}


def with_index(fields: dict[str, Any], output: str, count: int) -> dict[str, Any]:
    """The fields of a manifest with the index of `samples/`, which this writes from what `count` units wrote."""
    return fields | {"tables": fields["tables"] | {"index": [join_pieces(output, count, schemas.SAMPLES_INDEX)]}}


def _find(root: MediaSource | None, modality: str, path: str, limit: int) -> Medium:
    if root is None:
        raise BadRow("missing_media", f"{path}: the job has no inputs.media")
    return find_video(root, path, limit) if modality == "video" else (path, root.read(path, limit))


def _group(listed: pa.Table, indices: list[int], media: list[list[dict[str, Any]]], collected: UnitFigures) -> pa.Table:
    """The rows of a group. Adds them to the unit's figures."""
    rows = listed.take(pa.array(indices, pa.int64())).combine_chunks()
    columns = {name: rows[name] for name in schemas.SAMPLES.names if name != "media"}
    columns["media"] = parquet.to_array(media, schemas.SAMPLES.field("media").type)
    table = pa.table([columns[name] for name in schemas.SAMPLES.names], schema=schemas.SAMPLES).combine_chunks()
    _add_figures(table, collected)
    collected.groups.append(group_facts(table))
    return table


def _add_figures(table: pa.Table, collected: UnitFigures) -> None:
    conversations, media = table["conversations"].combine_chunks(), table["media"].combine_chunks().flatten()
    statistics.add_values(collected.figures, "conversations", pc.list_value_length(conversations))
    turns = conversations.flatten().field("turns")
    statistics.add_values(collected.figures, "turns", pc.list_value_length(turns))
    text = pa.table({"conversation": pc.list_parent_indices(turns), "size": pc.binary_length(turns.flatten().field("text"))})
    statistics.add_values(
        collected.figures, "text_bytes", text.group_by("conversation").aggregate([("size", "sum")])["size_sum"].cast(pa.int64())
    )
    for name in ("width", "height", "duration_s", "fps", "num_frames"):
        statistics.add_values(collected.figures, name, media.field(name))
    for prefix, values in (("modality", table["modality"]), ("format", media.field("format"))):
        for entry in pc.value_counts(values).to_pylist():
            collected.kinds[f"{prefix}.{entry['values']}"] += entry["counts"]
