"""Files of plain values: pyarrow reads what was written, and mapped or fetched values are those that pyarrow reads."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from voco.store import part_files, storage
from voco.store.part_files import PartFiles
from voco.store.plain_parquet import ALIGNMENT, write_plain_table

WIDTH = 24
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("number", pa.int32()),
        ("large", pa.int64()),
        ("time", pa.float64()),
        ("keys", pa.binary(WIDTH)),
        ("values", pa.binary(WIDTH)),
    ]
)


def tables(counts: list[int], nulls: bool = False) -> list[pa.Table]:
    """A table of each count."""
    draw, groups = np.random.default_rng(0), []
    for count in counts:
        numbers = [range(count), [row - (1 << 40) for row in range(count)], [row / 3 for row in range(count)]]
        binary = [[draw.bytes(WIDTH) for _ in range(count)] for _ in range(2)]
        if nulls:
            binary[1][count // 2] = None
        names = [f"\u00e9{row}" * (row % 3) for row in range(count)]
        groups.append(pa.table([names, *map(list, numbers), *binary], schema=SCHEMA))
    return groups


@pytest.fixture(params=["mapped", "local", "s3"])
def written(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a file that is read in each of the three ways; returns its URI."""
    monkeypatch.setattr(part_files, "MAPPED_BYTES", 0 if request.param == "mapped" else 1 << 30)
    if request.param == "s3":
        server = request.getfixturevalue("s3_server")
        name = next(f"plain{number}" for number in itertools.count() if not (server / f"plain{number}").exists())
        (server / name).mkdir()
        uri = f"s3://{name}/file"
    else:
        uri = str(tmp_path / "file")

    def write(groups: list[pa.Table], plain: bool = True, **options: Any) -> str:
        if plain:
            write_plain_table(uri, groups, SCHEMA)
            return uri
        settings = {"compression": "none", "use_dictionary": False, "write_statistics": False, **options}
        with storage.open_write(uri) as handle, pq.ParquetWriter(handle, SCHEMA, **settings) as writer:
            for group in groups:
                writer.write_table(group, row_group_size=max(1, group.num_rows))
        return uri

    return write


def test_pyarrow_reads_every_column_type_and_row_group(tmp_path: Path) -> None:
    uri, groups = str(tmp_path / "file"), tables([1, 3, 0, 200, 7])
    groups[3] = pa.concat_tables([groups[3].slice(0, 50), groups[3].slice(50)])  # two chunks
    groups[4] = pa.concat_tables([groups[4].slice(2, 3), groups[4].slice(0, 1)])  # that begin in the middle
    entry = write_plain_table(uri, groups, SCHEMA, {"voco.facts": "{}"})
    data = Path(uri).read_bytes()
    assert entry == {"path": "file", "rows": 208, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with pq.ParquetFile(uri) as file:
        assert file.schema_arrow.equals(SCHEMA)
        assert file.schema_arrow.metadata == {b"voco.schema_version": b"1", b"voco.facts": b"{}"}
        assert file.metadata.num_rows == 208
        for group, table in enumerate(groups):
            assert file.read_row_group(group).equals(table)
            for number in range(len(SCHEMA)):
                chunk = file.metadata.row_group(group).column(number)
                assert (chunk.compression, chunk.encodings) == ("UNCOMPRESSED", ("PLAIN", "RLE"))
        chunk = file.metadata.row_group(3).column(SCHEMA.names.index("values"))
    assert (chunk.data_page_offset + chunk.total_compressed_size - 200 * WIDTH) % ALIGNMENT == 0


def test_no_rows_and_no_groups(tmp_path: Path) -> None:
    write_plain_table(str(tmp_path / "file"), [], SCHEMA)
    read = pq.read_table(tmp_path / "file")
    assert read.num_rows == 0
    assert read.schema.equals(SCHEMA)


def test_what_cannot_be_plain_is_an_error_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without null, got fixed_size_binary"):
        write_plain_table(str(tmp_path / "file"), tables([5], nulls=True), SCHEMA)
    lists = pa.schema([("media", pa.list_(pa.string()))])
    with pytest.raises(KeyError, match="column media"):
        write_plain_table(str(tmp_path / "file"), [], lists)
    assert not list(tmp_path.iterdir())


def test_values_are_those_of_the_table_for_every_count(written: Callable[..., str]) -> None:
    counts = [*range(1, 140), 1023, 1024]
    groups = tables(counts)
    uri, files = written(groups), PartFiles()
    for group, table in enumerate(groups):
        read = files.read_values(uri, group, ["values", "keys"])
        assert read.equals(table.select(["values", "keys"]))
        assert read["keys"].num_chunks == 1


def test_plain_values_are_not_decoded(written: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    uri = written(tables([50]))
    monkeypatch.setattr(PartFiles, "read_row_group", None)
    assert PartFiles().read_values(uri, 0, ["keys"]).num_rows == 50


@pytest.mark.parametrize(
    ("counts", "nulls", "options"),
    [
        ([50], False, {"compression": "zstd"}),
        ([50], False, {"use_dictionary": True}),
        ([50], True, {}),
        ([5], True, {}),
        ([50_000], False, {"data_page_size": 4096}),
        ([5], False, {}),
    ],
)
def test_other_forms_are_read_by_pyarrow(
    written: Callable[..., str], counts: list[int], nulls: bool, options: dict[str, Any]
) -> None:
    (table,) = tables(counts, nulls)
    uri = written([table], plain=False, **options)
    assert PartFiles().read_values(uri, 0, ["keys", "values"]).equals(table.select(["keys", "values"]))


def test_a_mapped_file_is_not_open_and_its_values_outlive_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_files, "MAPPED_BYTES", 0)
    (table,) = tables([500])
    uri = str(tmp_path / "file")
    write_plain_table(uri, [table], SCHEMA)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    read = [PartFiles().read_values(uri, 0, ["keys"]) for _ in range(20)]
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
    Path(uri).unlink()
    assert all(values.equals(table.select(["keys"])) for values in read)
