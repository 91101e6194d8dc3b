"""Rows to token samples: equal to building every sample of a table, and no text is tokenised that is not taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
import world

from voco.job.config import Training
from voco.model.batch import collate, with_teacher
from voco.sequence import chat_template
from voco.sequence.sequence import build_sample
from voco.store.samples import SampleTables, images_of
from voco.train.batches import ImageBatches, SampleRows, TrainingSamples

BLOCK = Training(epochs=1, global_batch=4, micro_batch=4, learning_rate=1e-3, max_tokens=64)


@pytest.fixture(params=[True, False], ids=["share_vision", "each conversation"])
def reader(request: pytest.FixtureRequest, tmp_path) -> TrainingSamples:
    uri = world.write_samples(str(tmp_path / "out"), world.sample_rows(24))
    tables = SampleTables([uri], share_vision=request.param)
    block = BLOCK.model_copy(update={"share_vision": request.param})
    return TrainingSamples(tables, tiny.tokenizer(), tiny.layout("voco"), block, images_of)


def every(reader: TrainingSamples) -> list[tuple[int, int]]:
    return [(group, row) for group, size in enumerate(reader.tables.sizes) for row in range(size)]


def test_samples_are_those_of_the_table_in_any_order(reader: TrainingSamples) -> None:
    """The slow, obvious form builds each row's samples one after the other."""
    expected: list[Any] = []
    for group in range(len(reader.tables.sizes)):
        for row in reader.tables.read(group):
            talks = [talk["turns"] for talk in row["conversations"]]
            for part in [talks] if reader.block.share_vision else [[turns] for turns in talks]:
                expected.append(
                    build_sample(row["sample_id"], part, images_of(row), reader.tokenizer, reader.layout, max_tokens=64)
                )
    rows = every(reader)
    assert len(expected) == len(rows)
    for index in np.random.default_rng(0).permutation(len(rows)).tolist():
        (sample,) = reader.take(np.array([rows[index]]))
        assert (sample.sample_id, sample.ids.tolist()) == (expected[index].sample_id, expected[index].ids.tolist())
        assert sample.predict_id.tolist() == expected[index].predict_id.tolist()


def test_only_the_rows_that_are_taken_are_tokenised(reader: TrainingSamples, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight workers that share a row group each pay for their own rows."""
    count = 0
    encode = chat_template.encode_parts

    def counting(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return encode(*arguments)

    monkeypatch.setattr("voco.sequence.sequence.encode_parts", counting)
    share = np.array(every(reader)[3::8])
    taken = reader.take(share)
    conversations = sum(int(sample.conversation.max()) + 1 for sample in taken)
    assert count == conversations
    reader.take(share)
    assert count == conversations  # within the window a sample is built once


class Features:
    """The features of an image: its hash's first bytes. Reads are noted; only what was loaded may be used."""

    def __init__(self) -> None:
        self.loaded: list[list[str]] = []

    def load(self, names: Any) -> None:
        self.loaded.append(list(names))

    def __call__(self, sha256: str) -> torch.Tensor:
        assert sha256 in self.loaded[-1]
        return torch.full((tiny.VISION_SLOTS, tiny.FEATURES), int(sha256[:2], 16) / 16, dtype=torch.float16)


def test_a_step_loads_each_image_once_and_its_teacher_reads_the_same_rows(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = world.write_samples(str(tmp_path / "out"), world.sample_rows(24))
    tables, features = SampleTables([uri], share_vision=False), Features()
    block = BLOCK.model_copy(update={"share_vision": False, "max_tokens": 40})
    reads: list[int] = []
    read_table = SampleTables.read_table

    def noted(self: SampleTables, group: int, columns: Any) -> Any:
        reads.append(group)
        return read_table(self, group, columns)

    monkeypatch.setattr(SampleTables, "read_table", noted)
    data = ImageBatches(tables, features, tiny.model("voco"), block, tiny.layout("none"))
    rows = np.array([(group, row) for group, size in enumerate(tables.sizes) for row in range(size)])
    first, second = data.micro_batches(rows[:20], 2), data.micro_batches(rows[20:], 2)
    assert sorted(reads) == list(range(len(tables.sizes))), "student and teacher share what is read"
    assert all(len(names) == len(set(names)) for names in features.loaded)
    assert sum(len(batch.sample_ids) for batch in first.batches) == 20
    for step, own in ((first, rows[:20]), (second, rows[20:])):
        # cut tokens are those of the step's samples, whichever thread prepares the steps between
        assert step.cut == sum(sample.cut for sample in data.samples.take(own))
        for batch in step.batches:
            assert torch.equal(batch.teacher.predict_id, batch.predict_id)
            assert batch.teacher.features is batch.features
            assert batch.features.dtype == torch.float16, "stored type until it is on the device"
            on_device = batch.to("cpu", torch.float32)
            assert (on_device.features.dtype, on_device.teacher.features.dtype) == (torch.float32, torch.float32)
            assert torch.equal(on_device.features, batch.features.float())
    assert first.cut + second.cut > 0


def test_batches_of_a_token_budget_have_every_sample_once_and_a_filler(tmp_path) -> None:
    uri = world.write_samples(str(tmp_path / "out"), world.sample_rows(24))
    tables = SampleTables([uri])
    data = ImageBatches(tables, Features(), tiny.model("voco"), BLOCK, tiny.layout("none"))
    rows = np.array([(group, row) for group, size in enumerate(tables.sizes) for row in range(size)])
    step = data.token_batches(rows, 256)
    assert sorted(name for batch in step.batches for name in batch.sample_ids) == sorted(step.sample_ids)
    lengths = [batch.ids.shape[1] for batch in step.batches]
    assert len(lengths) > 1
    assert all(length <= 256 or len(batch.sample_ids) == 1 for length, batch in zip(lengths, step.batches, strict=True))
    assert max(lengths) - min(lengths) < 0.2 * max(lengths)
    filler = step.filler
    assert filler is not None
    assert (len(filler.predict_id), len(filler.teacher.predict_id), len(filler.features)) == (0, 0, 0)
    empty = data.token_batches(np.full((4, 2), -1), 256)
    assert [len(batch.predict_id) for batch in empty.batches] == [0]


def test_row_groups_beyond_the_limit_are_dropped_but_never_those_of_the_step(tmp_path) -> None:
    uri = world.write_samples(str(tmp_path / "out"), world.sample_rows(24), rows_per_group=2)
    rows = SampleRows(SampleTables([uri]), share_vision=True, limit=3)
    rows.load(range(5))
    assert len({rows.part(group, 1)[0]["sample_id"] for group in range(5)}) == 5
    rows.load([6, 7])
    assert list(rows._groups) == [4, 6, 7]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_a_pinned_batch_has_the_same_values_on_the_device(reader: TrainingSamples) -> None:
    features = Features()
    samples = reader.take(np.array(every(reader)[:6]))
    features.load([name for sample in samples for name in sample.media])
    batch = collate(samples, features, (tiny.VISION_SLOTS, tiny.FEATURES))
    batch = with_teacher(batch, batch)
    pinned = batch.pinned()
    assert pinned.features.is_pinned()
    assert pinned.teacher.features is pinned.features
    moved, plain = pinned.to("cuda", torch.bfloat16), batch.to("cpu", torch.bfloat16)
    torch.cuda.synchronize()
    for name in ("ids", "position", "features", "vision_at", "predict_at", "predict_id"):
        assert torch.equal(getattr(moved, name).cpu(), getattr(plain, name)), name
