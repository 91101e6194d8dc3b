"""The work list to `samples/` and `rejects/`: what one unit does on a worker."""

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
from voco.ingest.media.image import LocatedMedia, MediaLimits, MediaSource, read_image
from voco.ingest.media.video import read_video
from voco.ingest.source_row import BadRow
from voco.run import units
from voco.store import parquet, schemas, storage


@dataclass
class UnitFigures:
    """What a unit learns while it reads."""

    rejects: list[dict[str, str]] = field(default_factory=list)
    blobs: list[dict[str, Any]] = field(default_factory=list)  # manifest entries
    figures: statistics.Figures = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)


class WriteSamples:
    """Reads the media of a unit, checks them and writes its parts, in the order of the work list.

    Holds one row group of media (8 MiB, or one larger row) at a time.
    """

    def __init__(
        self,
        output: str,
        media: str | None,
        limits: MediaLimits,
        shard_bytes: int = 256 << 20,
        places: LocatedMedia | None = None,
    ) -> None:
        self.output = output
        self.places = places
        self.root = open_media(media) if media is not None else None
        self.limits = limits
        self.shard_bytes = shard_bytes
        self.decoder = Decoder()
        # Arrow's own pool gives a row group's memory back each time, and getting it again costs as much as hashing does
        pa.set_memory_pool(pa.system_memory_pool())

    def __call__(self, unit: int, listed: pa.Table) -> dict[str, Any]:
        found = UnitFigures()
        samples = self._write("samples", unit, self._groups(listed, found), schemas.SAMPLES)
        refused = iter([(parquet.to_table(found.rejects, schemas.REJECTS), 0)] if found.rejects else [])
        rejects = self._write("rejects", unit, refused, schemas.REJECTS)
        return {
            "tables": {"samples": samples, "rejects": rejects, "blobs": found.blobs},
            "written": int(found.figures.get("conversations", {}).get("sum", 0)),
            "rejected": dict(sorted(Counter(reject["reason"] for reject in found.rejects).items())),
            "spread": found.figures,
            "kinds": dict(sorted(found.kinds.items())),
        }

    def _write(self, table: str, unit: int, groups: Iterator[tuple[pa.Table, int]], schema: pa.Schema) -> list[dict[str, Any]]:
        """Row groups, each with its bytes of media, in parts of about `shard_bytes`; the parts' manifest entries.

        Parts that an earlier attempt left behind them, from media that have changed since, are removed.
        """
        entries: list[dict[str, Any]] = []
        following = next(groups, None)

        def shard(first: tuple[pa.Table, int]) -> Iterator[pa.Table]:
            nonlocal following
            one: tuple[pa.Table, int] | None = first
            held = 0
            while one is not None:
                yield one[0]
                held += one[1]
                one = following = next(groups, None)
                if one is not None and held + one[1] > self.shard_bytes:
                    return

        while following is not None:
            entries.append(parquet.write_table(units.part_uri(self.output, table, unit, len(entries)), shard(following), schema))
        piece = len(entries)
        while storage.exists(left := units.part_uri(self.output, table, unit, piece)):
            storage.delete(left)
            piece += 1
        return entries

    def _groups(self, listed: pa.Table, found: UnitFigures) -> Iterator[tuple[pa.Table, int]]:
        """Row groups of at most 8 MiB of media, made as the files are read, with their bytes; fills `found` on the way."""
        held: list[list[dict[str, Any]]] = []
        indices: list[int] = []
        sizes: list[int] = []
        size = 0
        samples = listed.select(["dataset", "modality", "paths", "place", "sources"]).to_pylist()
        for index, (sample, root) in enumerate(zip(samples, self._roots(samples), strict=False)):
            try:
                media = [self._read(root, sample["modality"], path) for path in sample["paths"]]
            except BadRow as bad:
                lost = {"dataset": sample["dataset"], "reason": bad.reason, "detail": bad.detail}
                found.rejects.extend({**lost, "source": source} for source in sample["sources"])
                continue
            sizes += [len(medium["bytes"]) for medium in media]
            for medium in media:
                if len(medium["bytes"]) > self.limits.inline_max_bytes:
                    found.blobs.append(self._put_aside(medium))
            weight = sum(len(medium["bytes"] or b"") for medium in media)
            if held and size + weight > schemas.ROW_GROUP_BYTES:
                yield _group(listed, indices, held, found), size
                held, indices, size = [], [], 0
            held.append(media)
            indices.append(index)
            size += weight
        if held:
            yield _group(listed, indices, held, found), size
        statistics.add_values(found.figures, "media_bytes", pa.array(sizes, pa.int64()))

    def _roots(self, samples: list[dict[str, Any]]) -> Iterator[MediaSource | None]:
        """What each sample's media are read from, in order."""
        if self.places is None:
            return repeat(self.root)
        return self.places.sources([sample["place"] for sample in samples])

    def _read(self, root: MediaSource | None, modality: str, path: str) -> dict[str, Any]:
        if root is None:
            raise BadRow("missing_media", f"{path}: the job has no inputs.media")
        if modality == "video":
            return read_video(root, path, self.limits, self.decoder)
        return read_image(root, path, self.limits, self.decoder)

    def _put_aside(self, medium: dict[str, Any]) -> dict[str, Any]:
        """Write a medium that is too large for a table to `blobs/`, and take its bytes out of the row."""
        data, name = medium["bytes"], medium["sha256"]
        storage.write_bytes(parquet.blob_uri(self.output, name), data)
        medium["bytes"] = None
        return {"path": name, "rows": 1, "bytes": len(data), "sha256": name}


def _group(listed: pa.Table, indices: list[int], media: list[list[dict[str, Any]]], found: UnitFigures) -> pa.Table:
    """The rows of a group, and what they add to the unit's figures."""
    taken = listed.take(pa.array(indices, pa.int64())).combine_chunks()
    columns = {name: taken[name] for name in schemas.SAMPLES.names if name != "media"}
    columns["media"] = parquet.to_array(media, schemas.SAMPLES.field("media").type)
    table = pa.table([columns[name] for name in schemas.SAMPLES.names], schema=schemas.SAMPLES).combine_chunks()
    _describe(table, found)
    return table


def _describe(table: pa.Table, found: UnitFigures) -> None:
    talks, media = table["conversations"].combine_chunks(), table["media"].combine_chunks().flatten()
    statistics.add_values(found.figures, "conversations", pc.list_value_length(talks))
    turns = talks.flatten().field("turns")
    statistics.add_values(found.figures, "turns", pc.list_value_length(turns))
    places = pc.list_parent_indices(turns)
    text = pa.table({"talk": places, "size": pc.binary_length(turns.flatten().field("text"))})
    statistics.add_values(
        found.figures, "text_bytes", text.group_by("talk").aggregate([("size", "sum")])["size_sum"].cast(pa.int64())
    )
    for name in ("width", "height", "duration_s", "fps", "num_frames"):
        statistics.add_values(found.figures, name, media.field(name))
    for prefix, values in (("modality", table["modality"]), ("format", media.field("format"))):
        for one in pc.value_counts(values).to_pylist():
            found.kinds[f"{prefix}.{one['values']}"] += one["counts"]
