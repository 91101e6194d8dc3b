"""The one reader of `samples/`: addresses, rows in the order of a list, ids, first rows, and media under `blobs/`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import world

from voco.store import parquet, samples, schemas, storage

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """Twelve rows in two parts of row groups of three; every fifth is text, and the second image is under `blobs/`."""
    output, rows = str(tmp_path_factory.mktemp("samples")), world.sample_rows(12)
    (large,) = rows[2]["media"]
    storage.write_bytes(samples.blob_uri(output, large["sha256"]), large["bytes"])
    stored = [*rows[:2], {**rows[2], "media": [{**large, "bytes": None}]}, *rows[3:]]
    entries = []
    for part, start in enumerate((0, 6)):
        groups = [parquet.to_table([complete(row) for row in stored[at : at + 3]], schemas.SAMPLES) for at in (start, start + 3)]
        entries.append(parquet.write_table(f"{output}/samples/part-{part:05d}.parquet", groups, schemas.SAMPLES))
    world.write_samples_index(output, entries)
    return output, rows


def complete(row: dict[str, Any]) -> dict[str, Any]:
    """The row with every key of its schema."""
    media = [{name: medium.get(name) for name in schemas.MEDIUM.names} for medium in row["media"]]
    conversations = [{"extra": None, **conversation} for conversation in row["conversations"]]
    return {**row, "media": media, "conversations": conversations}


def names(rows: Any) -> list[str]:
    return [row["sample_id"] for row in rows]


def test_addresses_lead_to_their_rows_in_any_order(table: tuple[str, list[dict[str, Any]]], monkeypatch: Any) -> None:
    output, rows = table
    addresses = list(samples.row_addresses([output]))
    assert names(addresses) == names(rows)
    assert names(samples.row_addresses([output], with_media=True)) == names(row for row in rows if row["media"])
    assert names(samples.read_at(addresses[::-1], ["sample_id"])) == names(rows[::-1])
    reads: list[int] = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, group, **options: reads.append(group) or original(self, group, **options)
    )
    assert names(samples.read_at(addresses[1:8])) == names(rows[1:8])
    assert reads == [0, 1, 0], "each row group once"


def test_media_bytes_come_from_the_row_or_from_blobs(table: tuple[str, list[dict[str, Any]]]) -> None:
    output, rows = table
    encoded = [row["media"][0]["bytes"] for row in rows if row["media"]]
    read = samples.read_at(samples.row_addresses([output]), ["sample_id", "media"], media=True)
    assert [row["media"][0]["bytes"] for row in read if row["media"]] == encoded
    images = list(samples.unique_images([output, output]))
    assert [samples.read_images([image])[0] for image in images] == list(
        zip((image["sha256"] for image in images), encoded, strict=True)
    )
    assert samples.read_images(images[:2]) == [samples.read_images([image])[0] for image in images[:2]]


def test_rows_by_id_and_first_rows_skip_missing_parts(table: tuple[str, list[dict[str, Any]]]) -> None:
    output, rows = table
    parts = [f"{output}/samples/gone.parquet", *samples.part_uris([output])]
    ids = {rows[7]["sample_id"], rows[1]["sample_id"], "f" * 32}
    assert names(samples.read_ids(parts, ids, ["sample_id"])) == [rows[1]["sample_id"], rows[7]["sample_id"]]
    assert names(samples.read_first(parts, 2)) == names([rows[1], rows[3]])  # of rows 0, 1, 3 and 4; row 0 is text
    assert samples.first_sample(parts)["sample_id"] == rows[1]["sample_id"]  # type: ignore[index]
    assert samples.first_sample(parts[:1]) is None


@pytest.mark.parametrize(("share_vision", "sizes"), [(True, (3, 3, 3, 3)), (False, (5, 5, 6, 5))])
def test_tables_number_their_row_groups_through(
    table: tuple[str, list[dict[str, Any]]], share_vision: bool, sizes: tuple[int, ...]
) -> None:
    output, rows = table
    tables = samples.SampleTables([output, output], share_vision)
    assert (tables.sizes, tables.owners) == (sizes * 2, (0,) * 4 + (1,) * 4)
    assert names(tables.read(5)) == names(rows[3:6])
    assert names(tables.rows(["sample_id"])) == names(rows + rows)


def test_no_other_module_knows_where_samples_are() -> None:
    files = [*(ROOT / "platform" / "voco").rglob("*.py"), *(ROOT / "pipelines").glob("*.py")]
    joins = [file.name for file in files if re.search(r"join\([^\n]*[\"']samples[\"']|/samples[/\"']", file.read_text())]
    assert set(joins) <= {"samples.py"}
