"""`index.parquet`: equal to a plain reading of the parts, equal bytes however the units were cut, searched exactly."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import world
from ingest.source import good, job, row, write

import pipelines
from voco.errors import JobFailed, Refused
from voco.run import manifest
from voco.store import index, parquet, samples, schemas, storage
from voco.store.s3 import PatientS3


def plain_index(output: Path) -> list[dict[str, Any]]:
    """The rows of the index by reading every row of every part with pyarrow."""
    rows = []
    for part in sorted((output / "samples").glob("*.parquet")):
        with pq.ParquetFile(part) as file:
            for group in range(file.num_row_groups):
                listed = file.read_row_group(group).to_pylist()
                texts = [turn["text"] for item in listed for talk in item["conversations"] for turn in talk["turns"]]
                sizes = {tuple(n for medium in item["media"] for n in (medium["height"], medium["width"])) for item in listed}
                rows.append(
                    {
                        "part": part.name,
                        "part_bytes": part.stat().st_size,
                        "row_group": group,
                        "rows": len(listed),
                        "conversations": sum(len(item["conversations"]) for item in listed),
                        "tokens_at_most": sum(len(text.encode()) for text in texts) + len(texts),
                        "views_at_most": max(len(item["media"]) for item in listed),
                        "image_rows": sum(item["modality"] == "image" for item in listed),
                        "video_rows": sum(item["modality"] == "video" for item in listed),
                        "sizes": sorted(map(list, sizes)),
                        "first_id": listed[0]["sample_id"],
                        "first_asks": all(talk["turns"][-1]["role"] == "user" for talk in listed[0]["conversations"]),
                    }
                )
    return rows


def test_an_ingest_writes_the_index_of_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several units, parts and row groups; bytes beyond ASCII, rows of text, rejected rows and a unit without any sample."""
    listed, images = good(40, 12)
    listed += [row(number, "gone.jpg", "<image>\nHi", "Ho") for number in range(5)]
    listed += [row(number, None, f"ünïcode {number}", "日本") for number in range(90, 95)]
    write(tmp_path, listed, images)
    monkeypatch.setattr(schemas, "ROW_GROUP_BYTES", 3000)
    limits = {"unit_rows": 4, "shard_bytes": 1 << 20, "max_missing_share": 1.0, "max_reject_share": 1.0}
    done = pipelines.run(job(tmp_path, tmp_path / "out", **limits))
    stored = index.read_table_index(str(tmp_path / "out"), schemas.SAMPLES_INDEX).to_pylist()
    assert stored == plain_index(tmp_path / "out")
    assert len({item["part"] for item in stored}) > 3
    assert max(item["row_group"] for item in stored) > 0
    entry = done.tables["index"][0]
    assert entry["sha256"] == hashlib.sha256((tmp_path / "out/index.parquet").read_bytes()).hexdigest()
    assert (entry["path"], entry["rows"]) == ("index.parquet", len(stored))


def test_facts_of_rows_with_several_media_and_with_none(tmp_path: Path) -> None:
    rows = world.sample_rows(6, text_every=0)
    several = {**rows[0], "media": [{**rows[0]["media"][0], "height": 7}, rows[1]["media"][0]]}
    world.write_samples(str(tmp_path / "a"), [several, *rows[2:5]], rows_per_group=3)
    world.write_samples(str(tmp_path / "b"), [{**rows[0], "media": [], "modality": "text"}, {**rows[1], "modality": "video"}])
    tables = samples.SampleTables([str(tmp_path / "a"), str(tmp_path / "b")])
    assert tables.most_views == 2
    assert tables.has_videos
    assert not samples.SampleTables([str(tmp_path / "a")]).has_videos
    assert sorted(map(tuple, tables.media_sizes())) == [(), ((7, 32), (32, 32)), ((32, 32),), ((32, 32),), ((32, 32),)]
    assert list(tables.first_rows()) == [(rows[0]["sample_id"], False), (rows[0]["sample_id"], False)]
    assert tables.groups_with_media() == [0, 1, 2]


def test_an_output_without_a_sample_has_an_index(tmp_path: Path) -> None:
    write(tmp_path, [], {})
    pipelines.run(job(tmp_path, tmp_path / "out", allow_empty=True))
    tables = samples.SampleTables([str(tmp_path / "out")])
    assert (tables.sizes, tables.most_views, list(tables.first_rows()), list(tables.rows(["sample_id"]))) == ((), 0, [], [])


@pytest.mark.parametrize("damage", ["missing", "earlier"])
def test_an_output_of_an_earlier_version_is_refused_with_what_to_run(tmp_path: Path, damage: str) -> None:
    output = world.write_samples(str(tmp_path / "out"), world.sample_rows(3))
    Path(output, "index.parquet").unlink()
    if damage == "earlier":
        earlier = pa.schema([field for field in schemas.FRAME_INDEX if field.name != "part_bytes"])
        parquet.write_table(f"{output}/index.parquet", [earlier.empty_table()], earlier)
    with pytest.raises(
        Refused, match=r"out: has no index\.parquet of this version: run the job that made it again, with --replace"
    ):
        samples.SampleTables([output])


def test_pieces_give_the_same_bytes_however_they_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "GROUP_ROWS", 7)
    digests = [hashlib.sha256(bytes([number])).digest() for number in range(50)]
    columns = [digests, ["part"] * 50, range(50), range(1000, 1050), [9] * 50]
    rows = pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schemas.FEATURES_INDEX, strict=True)],
        schemas.FEATURES_INDEX,
    )
    written = []
    for name, cuts in (("a", [0, 50]), ("b", [0, 3, 3, 20, 21, 50])):
        for unit, (start, stop) in enumerate(itertools.pairwise(cuts)):
            index.write_piece(str(tmp_path / name), unit, rows.slice(start, stop - start), {"voco.features": "{}"})
        index.join_pieces(str(tmp_path / name), len(cuts) - 1, schemas.FEATURES_INDEX)
        written.append((tmp_path / name / "index.parquet").read_bytes())
    assert written[0] == written[1]
    assert pq.ParquetFile(tmp_path / "a/index.parquet").num_row_groups == 8
    table = index.read_table_index(str(tmp_path / "b"), schemas.FEATURES_INDEX)
    assert table.to_pylist() == rows.to_pylist()
    assert index.facts_of(table, "voco.features") == {}
    index.write_piece(str(tmp_path / "b"), 2, rows.slice(3, 17), {"voco.features": "[]"})
    with pytest.raises(JobFailed, match="unit 2 wrote other file metadata than unit 0"):
        index.join_pieces(str(tmp_path / "b"), 5, schemas.FEATURES_INDEX)


@pytest.mark.parametrize("width", [3, 8, 32])
def test_keys_are_searched_exactly(width: int) -> None:
    """Keys that agree in their first eight bytes, with zeros at the end, and keys that are not there."""
    draw = np.random.default_rng(width)
    everything = {bytes(key) for key in draw.integers(0, 3, (400, width), dtype=np.uint8)}
    everything |= (
        {bytes(8) + bytes(key) for key in draw.integers(0, 256, (50, width - 8), dtype=np.uint8)} if width > 8 else set()
    )
    listed = sorted(everything)
    draw.shuffle(listed)
    stored, absent = listed[::2], listed[1::2]
    keys = index.Keys(np.array(stored, dtype=f"S{width}"))
    order = keys.take_order()
    for key in listed:
        position = keys.position(key)
        assert (position is not None) == (key in set(stored))
        assert position is None or stored[order[position]] == key
    assert keys.has(np.array(listed, dtype=f"S{width}")).tolist() == [key in set(stored) for key in listed]
    assert keys.position(b"x" * (width + 1)) is None
    assert len(keys) == len(stored) > len(absent) - 2
    empty = index.Keys(np.array([], dtype=f"S{width}"))
    assert (empty.position(stored[0]), empty.has(np.array(stored[:2])).tolist()) == (None, [False, False])


def test_a_digest_set_is_a_set() -> None:
    draw, seen, digests = np.random.default_rng(0), set(), index.DigestSet()
    for count in draw.integers(0, 40, 60):
        batch = [bytes(31) + bytes([number]) for number in draw.integers(0, 256, count)]
        expected = []
        for digest in batch:
            expected.append(digest not in seen)
            seen.add(digest)
        assert digests.add(np.array(batch, dtype="S32")).tolist() == expected
        assert len(digests) == len(seen)


def test_opening_reads_the_index_and_reading_reads_chunks(s3_server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of the product's client at a real server, by object and range: none for parts before a row is read."""
    (s3_server / "tables").mkdir()
    rows = world.sample_rows(200)
    for number, medium in enumerate(medium for item in rows for medium in item["media"]):
        medium["bytes"] = bytes([number % 256]) * 100_000  # so that the columns before and after are no neighbours
    world.write_samples(str(s3_server / "tables/out"), rows, rows_per_group=20)
    requests: list[tuple[str, str, str]] = []
    original = PatientS3._call_s3

    async def counted(self: PatientS3, method: str, *arguments: Any, **named: Any) -> Any:
        requests.append((method, named.get("Key", "").rsplit("/", 1)[-1], named.get("Range", "")))
        return await original(self, method, *arguments, **named)

    monkeypatch.setattr(PatientS3, "_call_s3", counted)
    tables = samples.SampleTables(["s3://tables/out"])
    assert requests == [("head_object", "index.parquet", ""), ("get_object", "index.parquet", "")]
    requests.clear()
    assert [item["sample_id"] for item in tables.read(3)] == [item["sample_id"] for item in rows[60:80]]
    ranges = [tuple(map(int, item[2].removeprefix("bytes=").split("-"))) for item in requests]
    assert [item[:2] for item in requests] == [("get_object", "part-00000.parquet")] * 3, "the footer, and two runs of columns"
    assert sum(stop - start for start, stop in ranges[1:]) < 20_000, "of a row group of 1.6 MB"
    requests.clear()
    tables.read(4)
    assert len(requests) == 2, "the footer is in memory"
    assert list(tables.rows(["sample_id"])) == [{"sample_id": item["sample_id"]} for item in rows]
    requests.clear()
    images = list(samples.unique_images(["s3://tables/out"]))
    assert [image["sha256"] for image in images] == list(
        dict.fromkeys(samples.images_of(item)[0] for item in rows if item["media"])
    )
    assert {name for method, name, _ in requests if method != "get_object"} == {"index.parquet"}
    assert manifest.read_manifest("s3://tables/out") is not None
    assert storage.exists("s3://tables/out/index.parquet")
