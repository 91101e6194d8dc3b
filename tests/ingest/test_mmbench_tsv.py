"""MMBench's TSV: options, answers, and base64 images that are read from the file by their offset."""

from __future__ import annotations

import base64
import csv
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from ingest import source

import pipelines
from voco.errors import Refused
from voco.ingest.evaluation_row import LETTER
from voco.ingest.formats.mmbench_tsv import TsvImages, field_text, read
from voco.ingest.source_row import BadRow, Reject, SourceRow
from voco.job import spec
from voco.job.config import Ingest
from voco.job.load import build_job

TEST = Ingest(format="mmbench_tsv", dataset="mmb", split="test", max_text_bytes=3000)
COLUMNS = (
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "comment",
    "split",
)


def picture(seed: int, size: tuple[int, int] = (48, 32)) -> str:
    return base64.b64encode(source.image(seed, size=size)).decode()


def row(number: int, **keys: str) -> dict[str, str]:
    defaults = {"question": f"Which is it? {number}", "A": "cat", "B": "dog", "answer": "B", "category": "animals"}
    return {**dict.fromkeys(COLUMNS, ""), "index": str(number), **defaults, "image": picture(number), **keys}


def write(path: Path, rows: list[dict[str, str]]) -> str:
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
    return str(path)


def images(uri: str, items: list[SourceRow | Reject]) -> list[bytes]:
    """What a worker reads for each row, with a source that was pickled as on the way to the worker."""
    media = pickle.loads(pickle.dumps(TsvImages(uri)))
    locations = [item.location for item in items if isinstance(item, SourceRow)]
    return [medium.read("x", 1 << 20) for medium in media.sources(locations)]


def test_a_row_as_llava_asks_it(tmp_path) -> None:
    rows = [
        row(
            241, hint='Líne one,\n"quoted"\ttab', C="bird", D="nan", **{"l2-category": "logic", "comment": "NaN", "split": "dev"}
        ),
        row(242, hint="nan", B="none", C="lost", answer="a"),
    ]
    path = write(tmp_path / "mmb.tsv", rows)
    parsed = list(read(path, TEST, None))
    first, second = (item.conversation for item in parsed if isinstance(item, SourceRow))
    assert first == {
        "source_id": "241", "placeholder": "before", "answers": ["B"], "choices": ["cat", "dog", "bird"], "category": "animals",
        "turns": [{"role": "user", "text": 'Líne one,\n"quoted"\ttab\nWhich is it? 241\nA. cat\nB. dog\nC. bird\n' + LETTER}],
        "extra": '{"l2-category":"logic","split":"dev"}',
    }  # fmt: skip
    assert (second["choices"], second["answers"]) == (["cat"], ["A"])
    assert second["turns"][0]["text"] == f"Which is it? 242\nA. cat\n{LETTER}"
    assert images(path, parsed) == [source.image(241), source.image(242)]


def test_turned_questions_share_their_image(tmp_path) -> None:
    rows = [row(1), row(1000001, A="dog", B="cat", answer="A", image=picture(1)), row(2000001, image="1"), row(2)]
    parsed = list(read(write(tmp_path / "mmb.tsv", rows), TEST, None))
    media = [(item.paths, item.location) for item in parsed if isinstance(item, SourceRow)]
    assert media[:3] == [(("1",), media[0][1])] * 3
    assert media[3][0] == ("2",)


BAD: dict[str, tuple[dict[str, str], str, str]] = {
    "no image": ({"image": ""}, "missing_media", "image: the field is empty"),
    "an image of no row": ({"image": "77"}, "missing_media", "no row above has index '77'"),
    "no index": ({"index": ""}, "bad_record", "index: expected a value"),
    "no question": ({"question": "NaN"}, "empty_text", "the question has no text"),
    "no options": ({"A": "none"}, "bad_record", "A: expected an option"),
    "no answer": ({"answer": "nan"}, "bad_record", "no answer"),
    "a letter of no option": ({"answer": "C"}, "bad_record", "the letter of one of 2 options, got 'C'"),
    "a word for an answer": ({"answer": "AB"}, "bad_record", "got 'AB'"),
    "a NUL": ({"hint": "a\0b"}, "bad_record", "has a NUL character"),
    "a long text": ({"hint": "x" * 3000}, "text_too_large", "bytes of text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_rejected(tmp_path, name: str) -> None:
    keys, reason, detail = BAD[name]
    parsed = list(read(write(tmp_path / "mmb.tsv", [row(1), row(2, **keys), row(3)]), TEST, None))
    assert isinstance(parsed[1], Reject)
    assert (parsed[1].reason, parsed[1].source) == (reason, "mmb.tsv:1")
    assert detail in parsed[1].detail
    assert isinstance(parsed[2], SourceRow)


def test_a_row_with_too_few_fields(tmp_path) -> None:
    path = write(tmp_path / "mmb.tsv", [row(1)])
    with open(path, "a") as file:
        file.write("5\tWhat?\n")
    bad = list(read(path, TEST, None))[1]
    assert isinstance(bad, Reject)
    assert bad.detail == "expected 14 fields, got 2"


@pytest.mark.parametrize("head", ["", "question\tA\n", "index\tindex\tquestion\tA\timage\n", "a,b\n"])
def test_a_file_without_the_columns_is_refused(tmp_path, head: str) -> None:
    (tmp_path / "mmb.tsv").write_text(head)
    with pytest.raises(Refused, match=r"inputs\.annotations: .*mmb.tsv: expected a header with index, question, A, image"):
        list(read(str(tmp_path / "mmb.tsv"), TEST, None))


def test_csvs_limit_is_as_before(tmp_path) -> None:
    before = csv.field_size_limit()
    large = source.image(3, "BMP", (400, 200))
    path = write(tmp_path / "mmb.tsv", [row(1, image=base64.b64encode(large).decode())])
    parsed = list(read(path, TEST, None))
    assert len(large) > before
    assert images(path, parsed) == [large]
    assert csv.field_size_limit() == before
    with pytest.raises(BadRow, match="media_too_large"):
        next(TsvImages(path).sources([parsed[0].location])).read("x", len(large) - 1)


@pytest.mark.parametrize(
    ("value", "text"), [("NaN", ""), ("None", ""), ("nan ", ""), ("none of them", "none of them"), (" n ", "n")]
)
def test_empty_fields(value: str, text: str) -> None:
    assert field_text(value) == text


def job(folder: Path, **inputs: str) -> spec.Job:
    raw: dict[str, Any] = {
        "name": "mmb", "kind": "ingest", "output": str(folder / "out"),
        "inputs": {"annotations": str(folder / "mmb.tsv"), **inputs},
        "ingest": {"format": "mmbench_tsv", "dataset": "mmb", "split": "test", "max_reject_share": 1.0},
    }  # fmt: skip
    return build_job("test.yaml", raw)


def test_a_whole_job(tmp_path) -> None:
    broken = base64.b64encode(source.image(9)[:200]).decode()
    rows = [row(1), row(1000001, A="dog", B="cat", answer="A", image="1"), row(2, image=broken), row(3, image="?" * 80), row(4)]
    write(tmp_path / "mmb.tsv", [*rows, row(5, answer=""), row(1)])
    done = pipelines.run(job(tmp_path))
    assert (done.counts["read"], done.counts["written"]) == (7, 3)
    assert done.counts["rejected"] == {"bad_record": 1, "corrupt_media": 2, "duplicate": 1}
    samples = {sample["media"][0]["path"]: sample for sample in source.table(tmp_path / "out", "samples")}
    assert {path: [talk["answers"] for talk in sample["conversations"]] for path, sample in samples.items()} == {
        "1": [["B"], ["A"]], "4": [["B"]],
    }  # fmt: skip
    assert [samples[path]["media"][0]["bytes"] for path in ("1", "4")] == [source.image(1), source.image(4)]
    assert json.loads(samples["4"]["conversations"][0]["extra"]) == {}


def test_a_separate_media_input_is_refused(tmp_path) -> None:
    write(tmp_path / "mmb.tsv", [row(1)])
    with pytest.raises(Refused, match=r"inputs\.media: expected nothing: mmbench_tsv"):
        pipelines.run(job(tmp_path, media=str(tmp_path)))
