"""Predictions of a set whose answers are not published, in the form that its server or its judge takes: `predictions/`.

    VQAv2            [{"question_id": 262144000, "answer": "yes"}, ...]
    VizWiz           [{"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"}, ...]
    MM-Vet           {"v1_0": "x = -1", ...}
    LLaVA-Bench      a line {"question_id": 0, "prompt": "...", "text": "...", "answer_id": "...", "model_id": "...",
                     "metadata": {}}
    any other        a line {"question_id": 17, "prediction": "..."}

The forms are those of LLaVA's scripts convert_vqav2_for_submission.py, convert_vizwiz_for_submission.py,
convert_mmvet_for_eval.py and llava/eval/model_vqa.py. Questions are in the order of their ids, since the reviews of LLaVA-Bench
join question and answer by the line. The servers of VQAv2 and VizWiz compare an answer as it is where all ten annotators agree,
so answers go there in lower case, without a full stop at the end, as the annotators' answers are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from voco.evaluate.scores import read_answers
from voco.job.spec import Job
from voco.store import storage
from voco.store.samples import MEDIA_PATH, SampleTables

Answer = dict[str, Any]  # a row of `answers/`; `image` is the file name of the question's image
FOLDER = "predictions"


@dataclass(frozen=True)
class PredictionForm:
    """The file that a benchmark takes: `text(answers)` is its content, and `extension` ends its name."""

    text: Callable[[list[Answer]], str]
    extension: str = "json"


def _vqav2(answers: list[Answer]) -> str:
    return json.dumps([{"question_id": question_id(row), "answer": short_answer(row)} for row in answers])


def _vizwiz(answers: list[Answer]) -> str:
    return json.dumps([{"image": row["image"], "answer": short_answer(row)} for row in answers])


def _mmvet(answers: list[Answer]) -> str:
    """LLaVA's ids are the numbers of MM-Vet's own, v1_0, v1_1 and so on."""
    keys = (f"v1_{row['source_id']}" if row["source_id"].isdecimal() else row["source_id"] for row in answers)
    return json.dumps({key: row["prediction"] for key, row in zip(keys, answers, strict=True)}, indent=2)


def _llava_bench(answers: list[Answer]) -> str:
    lines = (
        {
            "question_id": question_id(row), "prompt": row["prompt"], "text": row["prediction"], "answer_id": _answer_id(row),
            "model_id": row["checkpoint"].rstrip("/").rsplit("/", 1)[-1], "metadata": {},
        }
        for row in answers
    )  # fmt: skip
    return _json_lines(lines)


def _any(answers: list[Answer]) -> str:
    return _json_lines({"question_id": question_id(row), "prediction": row["prediction"]} for row in answers)


def _json_lines(rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# By the letters and digits at the start of `evaluate.benchmark`: `vqav2-test-dev`, `VizWiz`, `mm-vet`, `llava-bench-in-the-wild`
FORMS = {
    "vqav2": PredictionForm(_vqav2),
    "vizwiz": PredictionForm(_vizwiz),
    "mmvet": PredictionForm(_mmvet),
    "llavabench": PredictionForm(_llava_bench, "jsonl"),
}
ANY_SET = PredictionForm(_any, "jsonl")


def prediction_form(benchmark: str) -> PredictionForm:
    """The form of a benchmark, by its name."""
    name = re.sub("[^a-z0-9]", "", benchmark.lower())
    return next((form for start, form in FORMS.items() if name.startswith(start)), ANY_SET)


def question_id(row: Answer) -> int | str:
    """The question's id as its set writes it: a number, or a string that is none."""
    text: str = row["source_id"]
    return int(text) if text.isdecimal() and str(int(text)) == text else text


def short_answer(row: Answer) -> str:
    """The prediction in lower case, in one line, without full stops at its end."""
    return " ".join(row["prediction"].lower().split()).rstrip(". ")


def _answer_id(row: Answer) -> str:
    """An id of 22 characters, as LLaVA's are, that is the same in every run."""
    content = json.dumps([row[key] for key in ("checkpoint", "method", "n", "sample_id", "conversation_index")])
    return hashlib.sha256(content.encode()).hexdigest()[:22]


def _by_id(row: Answer) -> tuple[Any, ...]:
    """Ids in the order in which people count: v1_9 before v1_10."""
    parts = re.split(r"(\d+)", row["source_id"])
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], row["sample_id"], row["conversation_index"]


def write_predictions(job: Job) -> list[dict[str, Any]]:
    """Write the predictions of questions without references, a file for each N. Returns the manifest entries, none without such
    questions.
    """
    answers = read_answers(job.output_uri)
    answers = answers.filter(pc.equal(pc.list_value_length(answers["references"]), 0))
    if not answers.num_rows:
        return []
    counts = sorted(pc.unique(answers["n"]).to_pylist())
    images = _image_names(job)
    return [_write(job, answers.filter(pc.equal(answers["n"], n)), images, f"-n{n}" if len(counts) > 1 else "") for n in counts]


def _write(job: Job, answers: pa.Table, images: dict[str, str], suffix: str) -> dict[str, Any]:
    form = prediction_form(job.block.benchmark)
    rows = sorted(({**row, "image": images.get(row["sample_id"], "")} for row in answers.to_pylist()), key=_by_id)
    data = form.text(rows).encode()
    name = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', job.block.benchmark).lstrip('.')}{suffix}.{form.extension}"
    storage.write_bytes(storage.join(job.output_uri, FOLDER, name), data)
    return {"path": name, "rows": len(rows), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _image_names(job: Job) -> dict[str, str]:
    """The file name of each sample's first medium, by sample id."""
    rows = SampleTables(job.resolved_inputs.sample_uris).rows(["sample_id", MEDIA_PATH])
    return {row["sample_id"]: row["media"][0]["path"].rsplit("/", 1)[-1] for row in rows if row["media"]}


def prediction_lines(job: Job, entries: list[dict[str, Any]]) -> list[str]:
    """A line for each file of predictions."""
    folder = storage.join(job.output, FOLDER)
    return [
        f"{job.name}: predictions of {entry['rows']:,} questions without references: {folder}/{entry['path']}"
        for entry in entries
    ]
