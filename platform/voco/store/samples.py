"""The row groups of a training mix, numbered through, and how many samples each holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from voco.sequence.anyres import Size
from voco.store import parquet, storage
from voco.train.sampler import TableMix

IMAGES = [f"media.list.element.{name}" for name in ("sha256", "width", "height")]
COLUMNS = ["sample_id", *IMAGES, "conversations"]


class SampleTables:
    """Row groups of one or more `samples/` tables, numbered through.

    A sample is a whole row when `share_vision`, else one conversation of it (the papers' batch mix).
    """

    def __init__(self, uris: Sequence[str], weights: Sequence[float], share_vision: bool = True) -> None:
        self.files: list[pq.ParquetFile] = []
        self.groups: list[tuple[int, int]] = []  # file, row group in it
        sizes: list[int] = []
        owners: list[int] = []
        for table, uri in enumerate(uris):
            folder = storage.join(uri, "samples")
            for name in storage.list_names(folder):
                file = parquet.open_parquet(storage.join(folder, name))
                for group in range(file.num_row_groups):
                    self.groups.append((len(self.files), group))
                    sizes.append(_samples_in(file, group, share_vision))
                    owners.append(table)
                self.files.append(file)
        self.mix = TableMix(tuple(sizes), tuple(owners), tuple(weights))

    def read(self, group: int, columns: Sequence[str] = COLUMNS) -> list[dict[str, Any]]:
        """The rows of one row group as Python values, without media bytes unless they are asked for."""
        file, number = self.groups[group]
        found: list[dict[str, Any]] = self.files[file].read_row_group(number, columns=list(columns)).to_pylist()
        return found

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Every row of every table, in order."""
        for group in range(len(self.groups)):
            yield from self.read(group, columns)


def _samples_in(file: pq.ParquetFile, group: int, share_vision: bool) -> int:
    if share_vision:
        return int(file.metadata.row_group(group).num_rows)
    talks = file.read_row_group(group, columns=["conversations.list.element.source_id"])["conversations"]
    return sum(len(talk) for talk in talks.to_pylist())


def images_of(row: dict[str, Any]) -> list[str]:
    """Content hashes of a row's images."""
    return [one["sha256"] for one in row["media"] or []]


def sizes_of(row: dict[str, Any]) -> list[Size]:
    """Height and width of a row's images."""
    return [(one["height"], one["width"]) for one in row["media"] or []]


# A row of `samples/` tables, by the place where it stands.
ROW_ADDRESS = pa.schema([("part", pa.string()), ("group", pa.int32()), ("row", pa.int32())])


def list_rows(samples: list[str], with_media: bool = False) -> Iterator[dict[str, Any]]:
    """Every row of the `samples/` tables, or every one that has media, as rows of `SAMPLE_LIST`, with their `sample_id`."""
    for uri in samples:
        folder = storage.join(uri, "samples")
        for name in storage.list_names(folder):
            place = storage.join(folder, name)
            with parquet.open_parquet(place) as file:
                for group in range(file.num_row_groups):
                    held = file.read_row_group(group, columns=["sample_id", "modality"])
                    for row, modality in enumerate(held["modality"].to_pylist()):
                        if modality != "text" or not with_media:
                            yield {"part": place, "group": group, "row": row, "sample_id": held["sample_id"][row].as_py()}
