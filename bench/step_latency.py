"""Part of `make bench-step`: a training step whose data comes from storage with a latency, over the same step from memory.

The product's reader, batches, thread and S3 client read `samples/` and `features/` (1.18 MB an image, as at 7B) from
`object_store.py`; a small model takes forward, loss and backward. The thread is also left out, for comparison. Batches from
storage are compared with those of the same files on disk before anything is timed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

SLOTS, WIDTH = 576, 1024
BATCH, STEPS, ROUNDS = 4, 12, 5  # samples of a step, steps of a block that are timed, blocks
ROWS_PER_GROUP = 16
STREAM_BYTES_PER_S = 90e6


def write_tables(folder: Path, rows: int) -> None:
    """`samples/` and `features/` of random images with one conversation each, and their indexes."""
    from voco.store import index, parquet, schemas

    draw = np.random.default_rng(0)
    names = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(rows)]
    lines = []
    for number, name in enumerate(names):
        words = " ".join(f"w{word}" for word in draw.integers(0, 999, 30))
        turns = [{"role": "user", "text": "what is it?"}, {"role": "assistant", "text": words}]
        talk = {"source_id": str(number), "turns": turns, "placeholder": "before", "answers": [], "choices": [], "category": None}
        medium = {"bytes": b"", "path": "", "format": "jpeg", "sha256": name, "width": 336, "height": 336}
        line = {"sample_id": name[:32], "dataset": "bench", "split": "train", "modality": "image"}
        lines.append({**line, "media": [medium], "conversations": [talk]})
    table = pa.Table.from_pylist(lines, schema=schemas.SAMPLES)
    groups = [table.slice(start, ROWS_PER_GROUP) for start in range(0, rows, ROWS_PER_GROUP)]
    entry = parquet.write_table(str(folder / "take/samples/part-00000.parquet"), groups, schemas.SAMPLES)
    facts = [index.group_facts(group) for group in groups]
    index.write_table_index(str(folder / "take"), [index.samples_rows(facts, [entry])], schemas.SAMPLES_INDEX)
    values = [draw.standard_normal((SLOTS, WIDTH)).astype(np.float16).tobytes() for _ in names]
    images = [{"sha256": name, "features": value} for name, value in zip(names, values, strict=True)]
    metadata = {
        schemas.FEATURES_METADATA: json.dumps({"dtype": "float16", "shape": [SLOTS, WIDTH], "tower": "bench", "config": {}})
    }
    footer: list[pq.FileMetaData] = []
    parts = (parquet.to_table([image], schemas.FEATURES) for image in images)
    uri = str(folder / "features/features/part-00000.parquet")
    part = parquet.write_table(uri, parts, schemas.FEATURES, metadata, {"sha256": "PLAIN"}, footer)
    listed = index.features_rows(part, footer[0], names, [len(value) for value in values])
    index.write_table_index(str(folder / "features"), [listed], schemas.FEATURES_INDEX, metadata)


def model() -> Any:
    import tiny

    from voco.model.voco_llama import VocoLlama

    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 2}
    language_model = tiny.llama(torch.float32, **sizes, num_key_value_heads=2)
    layout = tiny.layout("voco", 1, vision_slots=SLOTS)
    return VocoLlama(language_model, layout, WIDTH, tokenizer=tiny.TOKENIZER)


class Epoch:
    """The steps of one worker over the tables under `root`, opened anew."""

    def __init__(self, root: str, net: Any) -> None:
        from voco.job.config import Training
        from voco.precompute.feature_store import FeatureStore
        from voco.store.samples import SampleTables
        from voco.train.batches import ImageBatches
        from voco.train.sampler import TableMix, epoch_order

        block = Training(epochs=1, global_batch=BATCH, micro_batch=BATCH, learning_rate=1e-3)
        tables = SampleTables([f"{root}/take"])
        self.order = epoch_order(TableMix(tables.sizes, tables.owners, (1.0,)), 0, 0, BATCH)
        self.data = ImageBatches(tables, FeatureStore(f"{root}/features"), net, block)

    def batches(self, first: int, count: int) -> Iterator[Any]:
        for step in range(first, first + count):
            yield self.data.micro_batches(self.order.rank_rows(step, 0, 1), 1).batches[0]


def measure(local: str, remote: str, in_block: int, rounds: int) -> dict[str, float]:
    """Seconds of a step, medians over blocks: from memory, from storage with and without the thread; and the share waited."""
    from step import own_step

    from voco.train.prefetch import Prefetch

    torch.set_num_threads(1)
    net = model()
    count = in_block + 1  # the first step of a block is not timed: nothing computes while it is read
    memory = list(Epoch(local, net).batches(0, 2 * rounds * count))
    for batch, other in zip(memory, Epoch(remote, net).batches(0, 3), strict=False):
        if batch.sample_ids != other.sample_ids or not torch.equal(batch.features, other.features):
            raise SystemExit("storage gives other batches than the disk")
    epoch = Epoch(remote, net)
    own_step(net, memory[0].to("cpu", torch.float32))
    seconds: dict[str, list[float]] = {"memory_s": [], "storage_s": [], "storage_without_thread_s": [], "waited_s": []}
    for number in range(rounds):
        first = 2 * number * count
        seconds["memory_s"].append(timed(net, iter(memory[first : first + count]), count)[0])
        with Prefetch(epoch.batches(first, count)) as steps:
            taken = (steps.take() for _ in range(count))
            took, waited = timed(net, taken, count, with_waits=True)
        seconds["storage_s"].append(took)
        seconds["waited_s"].append(waited)
        seconds["storage_without_thread_s"].append(timed(net, epoch.batches(first + count, count), count)[0])
    ratios = np.array(seconds["storage_s"]) / np.array(seconds["memory_s"])
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    return {**medians, "ratio": float(np.median(ratios))}


def timed(net: Any, batches: Iterator[Any], count: int, with_waits: bool = False) -> tuple[float, float]:
    """Wall seconds of a step from the second on, and of its wait."""
    from step import own_step

    waits, began = [], 0.0
    for number in range(count):
        if number == 1:
            began = time.perf_counter()
        batch, waited = next(batches) if with_waits else (next(batches), 0.0)
        waits.append(waited)
        own_step(net, batch.to("cpu", torch.float32))
    return (time.perf_counter() - began) / (count - 1), sum(waits[1:]) / (count - 1)


def latency(milliseconds: float, in_block: int = STEPS, rounds: int = ROUNDS) -> dict[str, float]:
    """`measure` in a separate process, so that server and proxy take none of its time."""
    from earlier import ROOT, run
    from object_store import serving

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tables(folder / "bucket", 2 * rounds * (in_block + 1) * BATCH)
        with serving(folder, milliseconds / 1000, STREAM_BYTES_PER_S) as store:
            paths = os.pathsep.join(str(ROOT / part) for part in ("platform", "tests", "bench"))
            arguments = (folder / "bucket", "s3://bucket", in_block, rounds)
            printed = run("step_latency.py", *arguments, PYTHONPATH=paths, **store.environment())
            result: dict[str, float] = json.loads(printed.splitlines()[-1])
            return {**result, "requests": float(store.requests)}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
