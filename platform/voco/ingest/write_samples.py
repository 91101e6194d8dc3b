"""Writes `samples/` and `rejects/` from the work list: the work of one unit on a worker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from voco.ingest import statistics
from voco.ingest.media.archive import open_media
from voco.ingest.media.decoder import Decoder
from voco.ingest.media.image import read_image
from voco.ingest.media.source import LocatedMedia, MediaLimits, MediaSource
from voco.ingest.media.video import read_video
from voco.ingest.source_row import BadRow
from voco.run import units
from voco.store import parquet, schemas, storage
from voco.store.samples import blob_uri


@dataclass
class UnitFigures:
    """What a unit collects for its record while it reads."""

    rejects: list[dict[str, str]] = field(default_factory=list)
    blobs: list[dict[str, Any]] = field(default_factory=list)  # manifest entries
    figures: statistics.Figures = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)


class WriteSamples:
    """Reads and checks the media of a unit and writes its parts, in the order of the work list.

    Keeps one row group of media (ROW_GROUP_BYTES, or one larger row) in memory.
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
        samples = self._write("samples", unit, self._groups(listed, collected), schemas.SAMPLES)
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

    def _groups(self, listed: pa.Table, collected: UnitFigures) -> Iterator[tuple[pa.Table, int]]:
        """Row groups of at most ROW_GROUP_BYTES of media, each with its bytes. Reads the media and fills `collected`."""
        pending: list[list[dict[str, Any]]] = []
        indices: list[int] = []
        sizes: list[int] = []
        size = 0
        samples = listed.select(["dataset", "modality", "paths", "place", "sources"]).to_pylist()
        for index, (sample, root) in enumerate(zip(samples, self._roots(samples), strict=False)):
            try:
                media = [self._read(root, sample["modality"], path) for path in sample["paths"]]
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

    def _roots(self, samples: list[dict[str, Any]]) -> Iterator[MediaSource | None]:
        """The source of each sample's media, in order."""
        if self.located is None:
            return repeat(self.root)
        return self.located.sources([sample["place"] for sample in samples])

    def _read(self, root: MediaSource | None, modality: str, path: str) -> dict[str, Any]:
        if root is None:
            raise BadRow("missing_media", f"{path}: the job has no inputs.media")
        if modality == "video":
            return read_video(root, path, self.limits, self.decoder)
        return read_image(root, path, self.limits, self.decoder)

    def _write_blob(self, medium: dict[str, Any]) -> dict[str, Any]:
        """Write a medium that is too large for a table to `blobs/` and remove its bytes from the row."""
        data, name = medium["bytes"], medium["sha256"]
        storage.write_bytes(blob_uri(self.output, name), data)
        medium["bytes"] = None
        return {"path": name, "rows": 1, "bytes": len(data), "sha256": name}


def _group(listed: pa.Table, indices: list[int], media: list[list[dict[str, Any]]], collected: UnitFigures) -> pa.Table:
    """The rows of a group. Adds them to the unit's figures."""
    rows = listed.take(pa.array(indices, pa.int64())).combine_chunks()
    columns = {name: rows[name] for name in schemas.SAMPLES.names if name != "media"}
    columns["media"] = parquet.to_array(media, schemas.SAMPLES.field("media").type)
    table = pa.table([columns[name] for name in schemas.SAMPLES.names], schema=schemas.SAMPLES).combine_chunks()
    _add_figures(table, collected)
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
