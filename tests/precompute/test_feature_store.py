"""Features by ranges of the index: the values that the files have, whatever their length; each read once, many at a time."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapes
import torch
import world

from voco.errors import Refused
from voco.job.spec import Job
from voco.precompute import features, preflight
from voco.precompute.feature_store import FeatureStore
from voco.run import manifest, units
from voco.store import index, parquet, schemas, storage
from voco.store.s3 import PatientS3
from voco.store.samples import SampleTables, unique_images

WIDE = (576, 1024)  # of CLIP ViT-L/14 at 336 pixels: 1,179,648 bytes an image


def write_features(output: str, tiles: list[list[int]], shape: tuple[int, int], anyres: bool = True) -> dict[str, np.ndarray]:
    """Parts with one image of T random tiles for each number of each list, as FeatureWorker writes them. Returns the values."""
    draw = np.random.default_rng(0)
    facts = {
        "dtype": "float16",
        "shape": list(shape),
        "tower": "t" * 64,
        "config": {"grid_pinpoints": [[1, 1]] if anyres else None},
    }
    metadata = {schemas.FEATURES_METADATA: json.dumps(facts)}
    values: dict[str, np.ndarray] = {}
    for unit, counts in enumerate(tiles):
        names, stored, footer = [], [], []
        for count in counts:
            value = draw.standard_normal((count, *shape)).astype(np.float16)
            names.append(hashlib.sha256(value.tobytes()).hexdigest())
            values[names[-1]] = value
            stored.append(value.tobytes())
        groups = (
            parquet.to_table([{"sha256": name, "features": data}], schemas.FEATURES)
            for name, data in zip(names, stored, strict=True)
        )
        uri = units.part_uri(output, "features", unit)
        entry = parquet.write_table(uri, groups, schemas.FEATURES, metadata, {"sha256": "PLAIN"}, footer)
        index.write_piece(output, unit, index.features_rows(entry, footer[0], names, list(map(len, stored))), metadata)
    index.join_pieces(output, len(tiles), schemas.FEATURES_INDEX)
    return values


@pytest.mark.parametrize(
    ("shape", "tiles"),
    [((1, 1), [[1, 2, 1]]), ((3, 7), [[1] * 20, [], [5, 1, 300]]), (WIDE, [[1, 1], [5, 3]])],
    ids=["two bytes", "small", "CLIP at 336"],
)
def test_a_value_is_the_end_of_its_column_chunk(tmp_path: Path, shape: tuple[int, int], tiles: list[list[int]]) -> None:
    values = write_features(str(tmp_path), tiles, shape)
    store = FeatureStore(str(tmp_path))
    plain: dict[str, bytes] = {}
    for part in sorted((tmp_path / "features").iterdir()):
        with pq.ParquetFile(part) as file:
            assert file.num_row_groups == file.metadata.num_rows, "an image is a row group"
            plain |= {row["sha256"]: row["features"] for row in file.read().to_pylist()}
    assert plain.keys() == values.keys()
    for name, value in values.items():
        read = store(name)
        assert read.dtype == torch.float16
        assert read.shape == value.shape
        assert read.numpy().tobytes() == plain[name] == value.tobytes()
    with pytest.raises(KeyError, match="must read the same samples"):
        store("0" * 64)
    with pytest.raises(KeyError, match="must read the same samples"):
        store.load(["0" * 64])


def test_a_chunk_of_another_form_is_an_error_when_it_is_written(tmp_path: Path) -> None:
    rows = [{"sha256": name * 64, "features": bytes(100)} for name in "ab"]
    for tables in ([parquet.to_table(rows, schemas.FEATURES)], [parquet.to_table(rows[:1], schemas.FEATURES)]):
        footer: list[Any] = []
        entry = parquet.write_table(str(tmp_path / "part.parquet"), tables, schemas.FEATURES, footer=footer)
        length = 100 if len(tables[0]) == 2 else 250
        with pytest.raises(ValueError, match="is no single plain value"):
            index.features_rows(entry, footer[0], ["a" * 64], [length])


def test_a_part_that_is_not_the_one_of_the_index_is_an_error(tmp_path: Path) -> None:
    (name, *_) = write_features(str(tmp_path), [[1, 1]], (3, 7))
    part = tmp_path / "features/part-00000.parquet"
    part.write_bytes(b"x" + part.read_bytes())
    with pytest.raises(ValueError, match=r"no value of 42 bytes at \d+: the file is not the one of index.parquet"):
        FeatureStore(str(tmp_path))(name)


def test_loading_asks_once_for_each_value_and_for_nothing_else(s3_server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a real S3 server: opening reads one file, a value one more of its bytes and four, whichever thread needs it."""
    (s3_server / "values").mkdir()
    values = write_features(str(s3_server / "values/out"), [[1] * 30, [1] * 10], (64, 32), anyres=False)
    requests: list[tuple[str, str, str]] = []
    original = PatientS3._call_s3

    async def counted(self: PatientS3, method: str, *arguments: Any, **named: Any) -> Any:
        requests.append((method, named.get("Key", ""), named.get("Range", "")))
        return await original(self, method, *arguments, **named)

    monkeypatch.setattr(PatientS3, "_call_s3", counted)
    store = FeatureStore("s3://values/out")
    assert {name for _, name, _ in requests} == {"out/index.parquet"}
    requests.clear()
    names = list(values)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(store.load, [names[:25], names[10:], names]))
    assert len(requests) == len(values) == 40
    ranges = [tuple(map(int, item[2].removeprefix("bytes=").split("-"))) for item in requests]
    assert {stop - start + 1 for start, stop in ranges} == {64 * 32 * 2 + 4}
    for name, value in values.items():
        assert torch.equal(store(name), torch.from_numpy(value[0]))
    assert len(requests) == 40, "later calls find them in memory"


def test_values_beyond_the_limit_are_read_again_but_not_within_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = write_features(str(tmp_path), [[1] * 6], (4, 4), anyres=False)
    reads: list[int] = []
    original = storage.read_range
    monkeypatch.setattr(storage, "read_range", lambda *arguments: reads.append(arguments[2]) or original(*arguments))
    store = FeatureStore(str(tmp_path), limit=3 * 4 * 4 * 2)
    for step in (1, 2):
        store.load(values)
        assert store._values.bytes == 3 * 4 * 4 * 2
        for name, value in values.items():
            assert torch.equal(store(name), torch.from_numpy(value[0]))
        assert len(reads) <= 6 * step
    assert len(reads) > 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples `a` and `b`, and features that a real worker made of `a`."""
    folder = tmp_path_factory.mktemp("features")
    for name, first in (("a", 0), ("b", 100)):
        world.write_samples(str(folder / name), world.sample_rows(12, first=first), rows_per_group=5)
    output = str(folder / "features")
    count = features.list_images(output, [str(folder / "a")], 4)
    worker = features.FeatureWorker(output, shapes.TOWER, 3, threads=2)
    for unit in range(count):
        worker(unit, units.WorkList(output).read(unit))
    index.join_pieces(output, count, schemas.FEATURES_INDEX)
    world.finish(output, "features")
    return folder


def test_a_worker_writes_every_image_of_the_list_and_its_index(root: Path) -> None:
    store, worker = FeatureStore(str(root / "features")), features.FeatureWorker("", shapes.TOWER, 3, threads=1)
    images = list(unique_images([str(root / "a")]))
    assert len(store.keys) == len(images) == 9
    rows = {row["media"][0]["sha256"]: row["media"][0]["bytes"] for row in world.sample_rows(12) if row["media"]}
    for image in images:
        fresh = worker.tower(worker.tower.tiles(rows[image["sha256"]])[0])[0]
        assert (store(image["sha256"]).float() - fresh.float()).abs().max() <= 1e-3 * max(1.0, float(fresh.abs().max()))


def check(root: Path, *samples: str) -> list[int]:
    """The row groups that the preflight reads of these samples. Raises what it raises."""
    read: list[int] = []
    tables = SampleTables([str(root / name) for name in samples])
    original = tables.read_table
    tables.read_table = lambda group, columns: read.append(group) or original(group, columns)  # type: ignore[assignment, method-assign]
    job: Job = world.sft_job(str(root / samples[0]), str(root / "features"), str(root / "out"))
    store = FeatureStore(str(root / "features"))
    preflight.check_images(job, {"preprocessing": store.tower, "tower": shapes.TOWER}, tables)
    return read


def test_features_of_the_very_samples_are_complete_and_others_are_compared(root: Path) -> None:
    assert sorted(check(root, "a")) == [0, 1, 2], "nothing says that they were made from `a`"
    with pytest.raises(Refused, match="features lacks 9 of 9 images; make it from these samples"):
        check(root, "b")
    record = manifest.read_manifest(str(root / "features"))
    assert record is not None
    parent = {"uri": str(root / "a"), "manifest_sha256": str(manifest.manifest_sha256(str(root / "a")))}
    uri = manifest.manifest_uri(str(root / "features"))
    storage.write_json(uri, record.model_copy(update={"parents": [parent]}).model_dump())
    assert check(root, "a") == []
    with pytest.raises(Refused, match="features lacks 9 of 9 images"):
        check(root, "a", "b")
    storage.write_json(uri, record.model_copy(update={"parents": [{**parent, "manifest_sha256": "0"}]}).model_dump())
    assert sorted(check(root, "a")) == [0, 1, 2], "another state of `a`"
    storage.write_json(uri, record.model_dump())
