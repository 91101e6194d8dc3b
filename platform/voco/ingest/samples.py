"""The work list to `samples/` and `rejects/`: what one unit does on a worker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

import pyarrow as pa

from voco import rows, storage, work
from voco.ingest import spread
from voco.ingest.archive import open_media
from voco.ingest.items import BadRow
from voco.ingest.media import Limits, MediaSource, Places, read_image
from voco.ingest.video_media import read_video
from voco.ingest.video_probe import VideoProbe


class WriteSamples:
    """Reads the media of a unit, checks them and writes its two parts, in the order of the work list.

    Holds one row group of media (8 MiB, or one larger row) at a time.
    """

    def __init__(self, output: str, media: str | None, limits: Limits, places: Places | None = None) -> None:
        self.output = output
        self.places = places
        self.root = open_media(media) if media is not None else None
        self.limits = limits
        self.probe = VideoProbe()

    def __call__(self, unit: int, listed: pa.Table) -> dict[str, Any]:
        rejects: list[dict[str, str]] = []
        figures: dict[str, dict[str, float]] = {}
        kinds: Counter[str] = Counter()
        groups = self._groups(listed, rejects, figures, kinds)
        tables = {"samples": self._write("samples", unit, groups, rows.SAMPLES)}
        refused = pa.Table.from_pylist(rejects, schema=rows.REJECTS)
        tables["rejects"] = self._write("rejects", unit, iter([refused] if rejects else []), rows.REJECTS)
        return {
            "tables": tables,
            "written": int(figures.get("conversations", {}).get("sum", 0)),
            "rejected": dict(sorted(Counter(reject["reason"] for reject in rejects).items())),
            "spread": figures,
            "kinds": dict(sorted(kinds.items())),
        }

    def _write(self, table: str, unit: int, groups: Iterator[pa.Table], schema: pa.Schema) -> list[dict[str, Any]]:
        """The part's manifest entry, or nothing when no row is in it; a part of an earlier attempt is then removed."""
        uri = work.part(self.output, table, unit)
        first = next(groups, None)
        if first is None:
            storage.delete(uri)
            return []
        return [rows.write_table(uri, chain([first], groups), schema)]

    def _groups(
        self, listed: pa.Table, rejects: list[dict[str, str]], figures: dict[str, dict[str, float]], kinds: Counter[str]
    ) -> Iterator[pa.Table]:
        """Row groups of at most 8 MiB of media, made as the files are read; fills the other three on the way."""
        held: list[list[dict[str, Any]]] = []
        indices: list[int] = []
        size = 0
        samples = listed.select(["dataset", "modality", "paths", "place", "sources"]).to_pylist()
        for index, (sample, root) in enumerate(zip(samples, self._roots(samples), strict=False)):
            try:
                media = [self._read(root, sample["modality"], path) for path in sample["paths"]]
            except BadRow as bad:
                lost = {"dataset": sample["dataset"], "reason": bad.reason, "detail": bad.detail}
                rejects.extend({**lost, "source": source} for source in sample["sources"])
                continue
            weight = sum(len(medium["bytes"]) for medium in media)
            if held and size + weight > rows.ROW_GROUP_BYTES:
                yield _group(listed, indices, held)
                held, indices, size = [], [], 0
            held.append(media)
            indices.append(index)
            size += weight
            _describe(figures, kinds, sample["modality"], media, listed["conversations"][index].as_py())
        if held:
            yield _group(listed, indices, held)

    def _roots(self, samples: list[dict[str, Any]]) -> Iterator[MediaSource | None]:
        """What each sample's media are read from, in order."""
        if self.places is None:
            return repeat(self.root)
        return self.places.sources([sample["place"] for sample in samples])

    def _read(self, root: MediaSource | None, modality: str, path: str) -> dict[str, Any]:
        if root is None:
            raise BadRow("missing_media", f"{path}: the job has no inputs.media")
        if modality == "video":
            return read_video(root, path, self.limits, self.probe)
        return read_image(root, path, self.limits)


def _group(listed: pa.Table, indices: list[int], media: list[list[dict[str, Any]]]) -> pa.Table:
    taken = listed.take(pa.array(indices, pa.int64()))
    columns = {name: taken[name] for name in rows.SAMPLES.names if name != "media"}
    columns["media"] = pa.array(media, rows.SAMPLES.field("media").type)
    return pa.table([columns[name] for name in rows.SAMPLES.names], schema=rows.SAMPLES)


def _describe(
    figures: dict[str, dict[str, float]],
    kinds: Counter[str],
    modality: str,
    media: list[dict[str, Any]],
    conversations: list[dict[str, Any]],
) -> None:
    kinds[f"modality.{modality}"] += 1
    spread.add(figures, "conversations", len(conversations))
    for talk in conversations:
        spread.add(figures, "turns", len(talk["turns"]))
        spread.add(figures, "text_bytes", sum(len(turn["text"].encode()) for turn in talk["turns"]))
    for medium in media:
        kinds[f"format.{medium['format']}"] += 1
        spread.add(figures, "media_bytes", len(medium["bytes"]))
        for name in ("width", "height", "duration_s", "fps", "num_frames"):
            if medium[name] is not None:
                spread.add(figures, name, medium[name])
