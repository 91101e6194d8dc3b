"""Rows to token samples: equal to building every sample of a table, and no text is tokenised that is not taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import world

from voco.job.config import Training
from voco.sequence import chat_template
from voco.sequence.sequence import build_sample
from voco.store.samples import SampleTables, images_of
from voco.train.batches import TrainingSamples

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
