"""Mapped values are those that pyarrow reads; chunks of any other form are left to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from voco.store.part_files import PartFiles
from voco.store.plain_values import mapped_values

WIDTH = 24


def write(path: Path, counts: list[int], nulls: bool = False, **options: Any) -> list[pa.Table]:
    """A file with a row group of each count."""
    draw, tables = np.random.default_rng(0), []
    settings = {"compression": "none", "use_dictionary": False, "write_statistics": False, **options}
    schema = pa.schema([("name", pa.string()), ("keys", pa.binary(WIDTH)), ("values", pa.binary(WIDTH))])
    with pq.ParquetWriter(path, schema, **settings) as writer:
        for count in counts:
            columns = [[draw.bytes(WIDTH) for _ in range(count)] for _ in range(2)]
            if nulls:
                columns[1][count // 2] = None
            tables.append(pa.table([["n"] * count, *columns], schema=schema))
            writer.write_table(tables[-1], row_group_size=max(1, count))
    return tables


def test_values_are_those_of_the_table_for_every_count(tmp_path: Path) -> None:
    counts = [*range(1, 140), 1023, 1024]
    tables = write(tmp_path / "file", counts)
    metadata = pq.read_metadata(tmp_path / "file")
    for group, table in enumerate(tables):
        mapped = mapped_values(str(tmp_path / "file"), metadata, group, ["values", "keys"])
        assert mapped is not None
        assert mapped.equals(table.select(["values", "keys"]))


@pytest.mark.parametrize(
    ("counts", "options"),
    [([50], {"compression": "zstd"}), ([50], {"use_dictionary": True}), ([50], {"nulls": True}), ([5], {"nulls": True})],
)
def test_other_forms_are_read_by_pyarrow(tmp_path: Path, counts: list[int], options: dict[str, Any]) -> None:
    (table,) = write(tmp_path / "file", counts, **options)
    assert mapped_values(str(tmp_path / "file"), pq.read_metadata(tmp_path / "file"), 0, ["keys", "values"]) is None
    assert PartFiles().read_values(str(tmp_path / "file"), 0, ["keys", "values"]).equals(table.select(["keys", "values"]))


def test_several_pages_are_read_by_pyarrow(tmp_path: Path) -> None:
    (table,) = write(tmp_path / "file", [50_000], data_page_size=4096)
    assert mapped_values(str(tmp_path / "file"), pq.read_metadata(tmp_path / "file"), 0, ["keys"]) is None
    assert PartFiles().read_values(str(tmp_path / "file"), 0, ["keys"]).equals(table.select(["keys"]))
