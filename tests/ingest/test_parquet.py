"""Parquet with images inside: the columns of Hugging Face datasets, through a whole ingest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest.source import image

import pipelines
from voco.errors import Refused
from voco.ingest.formats import parquet
from voco.ingest.source_row import Reject, SourceRow
from voco.job.config import Ingest
from voco.job.load import build_job

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
BLOCK = Ingest(format="parquet", dataset="set")
TEST = BLOCK.model_copy(update={"split": "test"})


def write(file: Path, rows: list[dict[str, Any]], image_type: pa.DataType = IMAGE, column: str = "image") -> str:
    table = pa.Table.from_pylist([{name: value for name, value in row.items() if name != column} for row in rows])
    table = table.append_column(column, pa.array([row.get(column) for row in rows], image_type))
    pq.write_table(table, file, row_group_size=2)
    return str(file)


def picture(seed: int) -> dict[str, Any]:
    return {"bytes": image(seed), "path": "x.jpg"}


def rows_of(uri: str, block: Ingest = BLOCK) -> list[SourceRow | Reject]:
    return list(parquet.read(uri, block, None))


def test_training_rows_in_every_layout(tmp_path) -> None:
    turns = {
        "messages": [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "Ada"}],
        "conversations": [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "Ada"}],
        "texts": [{"user": "Who?", "assistant": "Ada", "source": "a"}],
    }
    for name, value in turns.items():
        (row,) = rows_of(write(tmp_path / f"{name}.parquet", [{name: value, "image": picture(1)}]))
        assert isinstance(row, SourceRow), row
        assert (row.turns, len(row.paths), row.location) == ((("user", "Who?"), ("assistant", "Ada")), 1, f"{name}.parquet:0:0")


def test_a_list_of_images(tmp_path) -> None:
    message = [{"role": "user", "content": "<image><image>Which?"}, {"role": "assistant", "content": "The first"}]
    uri = write(tmp_path / "x.parquet", [{"messages": message, "images": [picture(1), picture(2)]}], pa.list_(IMAGE), "images")
    (row,) = rows_of(uri)
    assert isinstance(row, SourceRow), row
    assert (len(set(row.paths)), row.turns[0][1]) == (2, "Which?")


SHORT = "Answer the question using a single word or phrase."


LETTER = "Answer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("columns", "text", "answers", "choices", "category"),
    [
        ({"question_id": "7", "question": "Q?", "answer": "yes", "category": "popular"}, f"Q?\n{SHORT}", ["yes"], [], "popular"),
        ({"question_id": 7, "question": "Q?", "answers": [{"answer": "a"}, {"answer": "b"}]}, f"Q?\n{SHORT}", ["a", "b"], [], ""),
        ({"id": "a", "question": "Q?", "answers": ["red"]}, f"Q?\n{SHORT}", ["red"], [], ""),
        (
            {"index": 1, "question": "Q?", "hint": "Look.", "A": "red", "B": "blue", "C": "nan", "answer": "B"},
            f"Look.\nQ?\nA. red\nB. blue\n{LETTER}", ["B"], ["red", "blue"], "",
        ),
        (
            {"id": "a", "question": "Q?", "choices": ["red", "blue"], "answer": 1},
            f"Q?\nA. red\nB. blue\n{LETTER}", ["B"], ["red", "blue"], "",
        ),
    ],
    ids=["POPE", "VQAv2", "TextVQA", "MMBench", "ScienceQA"],
)  # fmt: skip
def test_evaluation_columns(tmp_path, columns, text, answers, choices, category) -> None:
    (row,) = rows_of(write(tmp_path / "x.parquet", [{**columns, "image": picture(1)}]), TEST)
    assert isinstance(row, SourceRow), row
    talk = row.conversation
    assert [turn["text"] for turn in talk["turns"]] == [text]
    assert (talk["answers"], talk["choices"], talk["category"]) == (answers, choices, category)
    assert talk["source_id"] == str(next(iter(columns.values())))


def test_a_folder_is_ingested_and_equal_images_become_one_sample(tmp_path) -> None:
    """Two files, row groups of two rows; every image's bytes arrive unchanged."""
    (tmp_path / "set").mkdir()
    for file, seeds in (("b.parquet", [1, 2, 3]), ("a.parquet", [4, 1, 4, 5, 6])):
        rows = [
            {"question_id": f"{file}{n}", "question": f"Q{n}?", "answer": "yes", "image": picture(s)} for n, s in enumerate(seeds)
        ]
        write(tmp_path / "set" / file, rows)
    raw = {
        "name": "hf", "kind": "ingest", "output": str(tmp_path / "out"), "inputs": {"annotations": str(tmp_path / "set")},
        "ingest": {"format": "parquet", "dataset": "set", "split": "test", "validate": "full"},
    }  # fmt: skip
    done = pipelines.run(build_job("hf.yaml", raw))
    assert (done.counts["read"], done.counts["written"], done.counts["samples"]) == (8, 8, 6)
    table = pa.concat_tables([pq.read_table(file) for file in sorted((tmp_path / "out" / "samples").glob("*.parquet"))])
    encoded = {medium["bytes"] for row in table.to_pylist() for medium in row["media"]}
    assert encoded == {image(seed) for seed in range(1, 7)}


def test_what_cannot_be_read(tmp_path) -> None:
    paths_only = write(tmp_path / "x.parquet", [{"question": "Q?", "answer": "a", "image": {"bytes": None, "path": "a.jpg"}}])
    (row,) = rows_of(paths_only, TEST)
    assert (row.reason, "a.jpg" in row.detail) == ("missing_media", True)
    with pytest.raises(Refused, match=r"expected a column `question`, or one of .*, got caption"):
        rows_of(write(tmp_path / "y.parquet", [{"caption": "a", "image": picture(1)}]))
    (tmp_path / "z.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(Refused, match="expected a complete Parquet file"):
        rows_of(str(tmp_path / "z.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match=r"expected a \.parquet file or a folder"):
        rows_of(str(tmp_path / "empty"))
