"""The same rows as a set of all keys gives, whatever the sizes of batches and buckets."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from voco.store import distinct

SCHEMA = pa.schema([("name", pa.string()), ("number", pa.int32())])


@pytest.mark.parametrize(("rows", "kinds"), [(0, 1), (1, 1), (50, 1), (1000, 300), (1000, 100_000)])
def test_the_first_row_of_each_key(rows: int, kinds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distinct, "BATCH_ROWS", 7)
    monkeypatch.setattr(distinct, "BUCKETS", 5)
    draw = random.Random(rows)
    listed = [{"name": f"{draw.randrange(kinds)}", "number": number, "unused": "x"} for number in range(rows)]
    seen: set[str] = set()
    expected = []
    for row in listed:
        if row["name"] not in seen:
            seen.add(row["name"])
            expected.append({"name": row["name"], "number": row["number"]})
    assert list(distinct.distinct_rows(iter(listed), "name", SCHEMA)) == expected


def test_other_batches_give_the_same_rows() -> None:
    listed = [{"name": f"{number % 4000}", "number": number} for number in range(9000)]
    assert [row["number"] for row in distinct.distinct_rows(listed, "name", SCHEMA)] == list(range(4000))


def test_an_error_of_the_source_is_raised() -> None:
    def broken():  # type: ignore[no-untyped-def]
        yield {"name": "a", "number": 1}
        raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        list(distinct.distinct_rows(broken(), "name", SCHEMA))
