"""Row groups by ranges: the same as pyarrow's own reading, from disk and from S3, from many threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from voco.store import part_files, storage
from voco.store.part_files import PartFiles, join_ranges, read_in_order

COLUMNS = (None, ["b"], ["c.list.element.x", "a"], ["c"], [])


@pytest.fixture(scope="module")
def parts(s3_server: Path) -> list[str]:
    """Four files of three row groups with nulls, lists of structs, strings and large values, on disk; in S3 under `s3://parts`."""
    (s3_server / "parts").mkdir()
    for part in range(4):
        rows = [
            {
                "a": None if row % 7 == 0 else row * part,
                "b": bytes([row]) * (200_000 if row % 5 == 0 else 3),
                "c": [{"x": f"{part}-{row}", "y": row / 3}] * (row % 3),
            }
            for row in range(30)
        ]
        pq.write_table(pa.Table.from_pylist(rows), s3_server / f"parts/{part}.parquet", row_group_size=10)
    return [str(s3_server / f"parts/{part}.parquet") for part in range(4)]


@pytest.mark.parametrize("tail", [64, 1 << 17])
@pytest.mark.parametrize("root", ["disk", "s3"])
def test_row_groups_are_those_of_pyarrow(parts: list[str], root: str, tail: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_files, "TAIL_BYTES", tail)
    files = PartFiles(limit=2)
    for part in parts:
        uri = part if root == "disk" else f"s3://parts/{Path(part).name}"
        with pq.ParquetFile(part) as plain:
            for group in range(3):
                for columns in COLUMNS:
                    expected = plain.read_row_group(group, columns=columns)
                    assert files.read_row_group(uri, group, columns).equals(expected)
                    assert files.read_row_group(uri, group, columns, Path(part).stat().st_size).equals(expected)
    assert len(files._parts) == 2, "nothing else stays"


def test_many_threads_read_at_once_and_open_a_part_once(parts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = part_files._read_footer
    monkeypatch.setattr(part_files, "_read_footer", lambda uri, size: opened.append(uri) or original(uri, size))
    files = PartFiles()
    work = [(f"s3://parts/{Path(part).name}", group) for part in parts for group in range(3)] * 4
    with ThreadPoolExecutor(12) as pool:
        read = list(pool.map(lambda item: files.read_row_group(*item, ["a", "b"]), work))
    for (uri, group), table in zip(work, read, strict=True):
        assert table.equals(pq.ParquetFile(parts[int(uri[-9])]).read_row_group(group, columns=["a", "b"]))
    assert len(opened) == 4


def test_what_is_no_parquet_file_or_is_not_there(tmp_path: Path, parts: list[str]) -> None:
    storage.write_bytes(str(tmp_path / "short.parquet"), b"PAR1")
    storage.write_bytes(str(tmp_path / "cut.parquet"), Path(parts[0]).read_bytes()[:-100])
    files = PartFiles()
    for name in ("short", "cut"):
        with pytest.raises(ValueError, match=f"{name}.parquet: not a Parquet file of"):
            files.read_row_group(str(tmp_path / f"{name}.parquet"), 0)
    for uri in (str(tmp_path / "gone.parquet"), "s3://parts/gone.parquet"):
        with pytest.raises(FileNotFoundError):
            files.read_row_group(uri, 0)
    assert not files._parts


def test_ranges_are_joined_over_small_gaps() -> None:
    assert join_ranges([(0, 10), (10, 5), (25, 5), (131, 1)], gap=10) == [(0, 30), (131, 1)]
    assert join_ranges([]) == []


def test_results_come_in_order_and_few_wait() -> None:
    """The second item ends before the first; no more than `threads` items are begun before the first result is used."""
    second, begun = threading.Event(), []

    def work(item: int) -> int:
        begun.append(item)
        if item == 0:
            assert second.wait(20)
        if item == 1:
            second.set()
        return item * item

    results = read_in_order(work, range(50), threads=3)
    assert next(results) == 0
    assert max(begun) <= 3
    assert list(results) == [item * item for item in range(1, 50)]
    with pytest.raises(ZeroDivisionError):
        list(read_in_order(lambda item: 1 // item, [2, 1, 0]))
