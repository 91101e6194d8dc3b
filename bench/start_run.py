"""Run by start.py under each build's source: writes the tables, opens them, reads a few rows and values of them."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHAPE = (576, 1024)  # of CLIP ViT-L/14 at 336 pixels: 1,179,648 bytes an image
IMAGE_BYTES = 131_072  # encoded, in `samples/`
BLOCK = 1 << 16  # of zeros that become a hole of the file
FACTS = {"dtype": "float16", "shape": list(SHAPE), "tower": "t" * 64, "config": {}}
FRAME_FACTS = {"shape": [32, 32, 2, 128], "dtype": "bfloat16", "model_dtype": "bfloat16"}
KB = 1024
GROUPS = 32  # row groups of a part of `samples/`: 256 MiB of media
READY, OPENED = "ready", "opened"  # lines to the parent, which counts requests between them and answers with a line


def make_samples(folder: str, parts: str, groups: str, rows: str) -> dict[str, Any]:
    """Parts of `groups` row groups of `rows` images and two conversations each, with the index of this build."""
    from voco.store import index, parquet, schemas

    _write_holes()
    entries: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []

    def tables(part: int) -> Iterator[Any]:
        for group in range(int(groups)):
            table = _sample_rows(part, group, int(rows))
            facts.append(index.group_facts(table))
            yield table

    for part in range(int(parts)):
        entries.append(parquet.write_table(f"{folder}/samples/part-{part:05d}.parquet", tables(part), schemas.SAMPLES))
    index.write_table_index(folder, [index.samples_rows(facts, entries)], schemas.SAMPLES_INDEX)
    return {"bytes": sum(entry["bytes"] for entry in entries)}


def make_features(folder: str, parts: str, images: str, per_group: str) -> dict[str, Any]:
    """Parts of `images` values, `per_group` in a row group: 1 as this build writes them, 7 as the earlier one did."""
    from voco.store import index, parquet, schemas

    _write_holes()
    metadata = {schemas.FEATURES_METADATA: json.dumps(FACTS, sort_keys=True)}
    names = []
    for part in range(int(parts)):
        rows = [{"sha256": name, "features": _value(name)} for name in _names(part, int(images))]
        names += [row["sha256"] for row in rows]
        size = int(per_group)
        groups = (parquet.to_table(rows[at : at + size], schemas.FEATURES) for at in range(0, len(rows), size))
        footer: list[Any] = []
        encodings = {"sha256": "PLAIN"} if size == 1 else None
        uri = f"{folder}/features/part-{part:05d}.parquet"
        entry = parquet.write_table(uri, groups, schemas.FEATURES, metadata, encodings, footer)
        if size == 1:
            lengths = [len(row["features"]) for row in rows]
            listed = index.features_rows(entry, footer[0], [row["sha256"] for row in rows], lengths)
            index.write_piece(folder, part, listed, metadata)
    if int(per_group) == 1:
        index.join_pieces(folder, int(parts), schemas.FEATURES_INDEX)
    return {"names": names[:: max(1, len(names) // 16)]}


def make_full(folder: str, images: str, unit: str) -> dict[str, Any]:
    """The indexes alone of features and samples of so many images, and of frame caches of so many units of 64 videos."""
    import pyarrow as pa

    from voco.store import index, parquet, schemas

    count, size = int(images), int(unit)
    metadata = {schemas.FEATURES_METADATA: json.dumps(FACTS, sort_keys=True)}
    length = 2 * SHAPE[0] * SHAPE[1]

    def features() -> Iterator[pa.Table]:
        for part, start in enumerate(range(0, count, size)):
            numbers = range(min(size, count - start))
            digests = [hashlib.sha256(f"{part}-{number}".encode()).digest() for number in numbers]
            offsets = [4 + 50 + number * (length + 171) for number in numbers]
            columns = [digests, [f"part-{part:05d}.parquet"] * len(numbers), numbers, offsets, [length] * len(numbers)]
            yield _table(columns, schemas.FEATURES_INDEX)

    index.write_table_index(f"{folder}/features", features(), schemas.FEATURES_INDEX, metadata)
    facts = index.group_facts(_sample_rows(0, 0, 64))

    def samples() -> Iterator[pa.Table]:
        for start in range(0, count, size):
            groups = -(-size // 64)
            part = {"path": f"part-{start // size:05d}.parquet", "rows": 64 * groups, "bytes": 262_000_000 + start}
            yield index.samples_rows([facts] * groups, [part])

    index.write_table_index(f"{folder}/samples", samples(), schemas.SAMPLES_INDEX)

    def frames() -> Iterator[pa.Table]:
        for part in range(count // 64):
            ids = [hashlib.sha256(f"{part}-{video}".encode()).hexdigest()[:32] for video in range(64)]
            columns = [ids, [0] * 64, [f"part-{part:05d}.parquet"] * 64, range(64), [8] * 64, [537_000_000 + part] * 64]
            yield _table(columns, schemas.FRAME_INDEX)

    frame_metadata = {schemas.FRAME_CACHE_METADATA: json.dumps(FRAME_FACTS), schemas.REJECTED_METADATA: "[]"}
    index.write_table_index(f"{folder}/frames", frames(), schemas.FRAME_INDEX, frame_metadata)
    return {name: os.path.getsize(f"{folder}/{name}/index.parquet") for name in ("features", "samples", "frames")} | {
        "parts": 2 * -(-count // size),
        "frame_parts": count // 64,
        "table_rows": parquet.read_table(f"{folder}/features/index.parquet", ["row_group"]).num_rows,
    }


def open_samples(uri: str) -> dict[str, Any]:
    """Open, read one row group of every part, and measure what the second half of the parts keeps in memory."""
    from voco.store.samples import SampleTables

    return _open_samples(lambda: SampleTables([uri]), lambda tables: tables.sizes, uri)


def earlier_open_samples(uri: str) -> dict[str, Any]:
    from voco.train.sample_tables import SampleTables

    return _open_samples(lambda: SampleTables([uri], [1.0]), lambda tables: tables.mix.sizes, uri)


def open_features(uri: str, names: str) -> dict[str, Any]:
    """Open, and read these images one by one."""
    from voco.precompute.feature_store import FeatureStore

    return _open_features(lambda: FeatureStore(uri), uri, json.loads(names))


def earlier_open_features(uri: str, names: str) -> dict[str, Any]:
    from voco.features import FeatureStore

    return _open_features(lambda: FeatureStore(uri), uri, json.loads(names))


def open_only(kind: str, uri: str) -> dict[str, Any]:
    """Open one table and read nothing of it."""
    from voco.precompute.feature_store import FeatureStore
    from voco.precompute.frame_store import FrameStore
    from voco.store.samples import SampleTables

    _warm(uri)
    before, started = _resident(), time.monotonic()
    store: Any = {"features": FeatureStore, "frames": FrameStore, "samples": lambda uri: SampleTables([uri])}[kind](uri)
    seconds = time.monotonic() - started
    print(OPENED, flush=True)
    sys.stdin.readline()
    size = len(store.sizes) if kind == "samples" else len(store.keys) if kind == "features" else len(store)
    return {"seconds": seconds, "mib": (_resident() - before) / KB / KB, "rows": size}


def _open_samples(open_tables: Callable[[], Any], sizes_of: Callable[[Any], Any], uri: str) -> dict[str, Any]:
    _warm(uri)
    before, started = 0, time.monotonic()
    tables = open_tables()
    seconds = time.monotonic() - started
    print(OPENED, flush=True)
    sys.stdin.readline()
    sizes = list(sizes_of(tables))
    digest, parts = hashlib.sha256(), range(0, len(sizes), GROUPS)
    half = len(parts) // 2  # after these, all that is the process's and not a part's is in memory
    for number, group in enumerate(parts):
        if number == half:
            before = _resident()
        digest.update(json.dumps(tables.read(group), sort_keys=True).encode())
    mib = (_resident() - before) / KB / KB
    return {"seconds": seconds, "mib": mib, "parts": len(parts) - half, "sizes": sizes, "rows": digest.hexdigest()}


def _open_features(open_store: Callable[[], Any], uri: str, names: list[str]) -> dict[str, Any]:
    _warm(uri)
    started = time.monotonic()
    store = open_store()
    seconds = time.monotonic() - started
    print(OPENED, flush=True)
    sys.stdin.readline()
    digest = hashlib.sha256(b"".join(store(name).numpy().tobytes() for name in names)).hexdigest()
    return {"seconds": seconds, "values": digest}


def _names(part: int, images: int) -> list[str]:
    return [hashlib.sha256(f"{part}-{number}".encode()).hexdigest() for number in range(images)]


def _value(name: str) -> bytes:
    """Numbers at the start that belong to the image, then zeros, which take no room on disk."""
    return bytes.fromhex(name) * 64 + bytes(2 * SHAPE[0] * SHAPE[1] - 64 * 32)


def _sample_rows(part: int, group: int, rows: int) -> Any:
    from voco.store import parquet, schemas

    listed = []
    for row in range(rows):
        name = hashlib.sha256(f"{part}-{group}-{row}".encode()).hexdigest()
        medium: dict[str, Any] = dict.fromkeys(schemas.MEDIUM.names)
        medium |= {
            "bytes": bytes.fromhex(name) + bytes(IMAGE_BYTES - 32),
            "path": f"coco/train2017/{name[:12]}.jpg",
            "format": "jpeg",
        }
        medium |= {"sha256": name, "width": 640, "height": 480}
        turns = [{"role": role, "text": f"{role} {name} " * 6} for role in ("user", "assistant")]
        talk = {"source_id": name[:9], "turns": turns, "placeholder": "before", "answers": [], "choices": []}
        talk |= {"category": None, "extra": None}
        facts = {"sample_id": name[:32], "dataset": "mix", "split": "train", "modality": "image"}
        listed.append({**facts, "media": [medium], "conversations": [talk, talk]})
    return parquet.to_table(listed, schemas.SAMPLES)


def _table(columns: list[Any], schema: Any) -> Any:
    import pyarrow as pa

    return pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema)


def _write_holes() -> None:
    """Let the writer skip blocks of zeros, so that tables of tens of gigabytes fit on a small disk."""
    from voco.store import storage

    zeros = bytes(BLOCK)

    def write(self: Any, data: Any) -> int:
        with memoryview(data).cast("B") as view:
            self.digest.update(view[:64])
            for start in range(0, len(view), BLOCK):
                block = view[start : start + BLOCK]
                if len(block) == BLOCK and block == zeros:
                    self.raw.seek(BLOCK, os.SEEK_CUR)
                else:
                    self.raw.write(block)
            self.size += len(view)
            return len(view)

    storage.Hashing.write = write  # type: ignore[method-assign]


def _warm(uri: str) -> None:
    """Start the client first, so that its memory and its own requests are not counted."""
    name = "voco.storage" if sys.argv[1].startswith("earlier") else "voco.store.storage"
    assert importlib.import_module(name).exists(uri)
    print(READY, flush=True)
    sys.stdin.readline()


def _resident() -> int:
    """Bytes in memory that are in use: what the allocators keep is given back first."""
    import pyarrow as pa

    gc.collect()
    pa.default_memory_pool().release_unused()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * KB


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
