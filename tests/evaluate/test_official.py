"""Official figures of an evaluation: from real tables of samples and answers to the manifest's statistics and the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import world

from voco.evaluate.aggregate import write_scores
from voco.evaluate.answering import FIGURES
from voco.evaluate.official import official_lines, official_statistics, question_facts
from voco.job.load import build_job
from voco.job.spec import Job
from voco.run import units
from voco.store import parquet, schemas

IMAGES = 4  # each with two questions


def job(root: Path, benchmark: str, **block: Any) -> Job:
    inputs = {"samples": [{"uri": str(root / "samples")}], "checkpoint": str(root / "model"), "features": str(root / "features")}
    given = {"name": "ask", "kind": "evaluate", "inputs": inputs, "output": str(root / "out")}
    return build_job("job", {**given, "evaluate": {"benchmark": benchmark, **block}})


def statistics_of(evaluation: Job, table: pa.Table) -> dict[str, Any]:
    return official_statistics(evaluation, table, question_facts(evaluation))


def answers(root: Path, replies: list[str], truth: list[str], n: int = 1, **columns: Any) -> pa.Table:
    """A samples table of real images, and the answers to its questions; `columns` has a list for each further column."""
    rows = world.sample_rows(IMAGES, evaluation=True, text_every=0)
    talks = [(row, talk, index) for row in rows for index, talk in enumerate(row["conversations"])]
    for (_, talk, _), choices in zip(talks, columns.pop("choices", [[]] * len(talks)), strict=True):
        talk["choices"] = choices
    world.write_samples(str(root / "samples"), rows, rows_per_group=2)
    table = [
        {
            "sample_id": row["sample_id"], "conversation_index": index, "source_id": f"{number}", "category": "none", "n": n,
            "prediction": replies[number], "references": [truth[number]], "correct": float(replies[number] == truth[number]),
            **{name: values[number] for name, values in columns.items()},
        }
        for number, (row, _, index) in enumerate(talks)
    ]  # fmt: skip
    return pa.Table.from_pylist(table, schema=schemas.ANSWERS)


def test_pope_is_the_mean_f1_of_its_categories(tmp_path: Path) -> None:
    """Popular: one hit, one false alarm: F1 2/3. Random: one hit, one miss: F1 2/3. The mean mark is 6 / 8."""
    replies = ["yes", "yes", "no", "no", "yes", "no", "no", "no"]
    truth = ["yes", "no", "no", "no", "yes", "yes", "no", "no"]
    table = answers(tmp_path, replies, truth, category=["popular"] * 4 + ["random"] * 4)
    statistics = statistics_of(job(tmp_path, "pope"), table)
    assert (statistics["official"]["metric"], statistics["official"]["headline"]) == ("pope", "f1")
    figures = statistics["official"]["figures"]["1"]
    assert figures["f1"] == figures["popular/f1"] == pytest.approx(2 / 3)
    assert figures["popular/recall"] == figures["random/precision"] == 1.0
    (line,) = official_lines(job(tmp_path, "pope"), statistics)
    assert line.startswith("ask: official pope: f1 0.6667, accuracy 0.7500, precision 0.7500, recall 0.7500, yes_ratio 0.3750")


def test_pairs_of_mme_are_those_of_an_image(tmp_path: Path) -> None:
    replies, truth = ["Yes", "No"] * 3 + ["Yes", "Yes"], ["Yes", "No"] * IMAGES
    table = answers(tmp_path, replies, truth, category=["OCR"] * 8)
    figures = statistics_of(job(tmp_path, "mme"), table)["official"]["figures"]["1"]
    assert figures["OCR/accuracy"] == pytest.approx(87.5)
    assert figures["OCR/accuracy_plus"] == pytest.approx(75.0)
    assert figures["perception"] == pytest.approx(162.5)


def test_an_evaluation_writes_its_published_figure_and_the_retention_of_it(tmp_path: Path) -> None:
    """MME with its samples' images and bounds: perception 325 of two subtasks, between 100 (always yes) and 400."""
    truth = ["Yes", "No"] * IMAGES
    replies = {"method": ["Yes", "No"] * 3 + ["Yes", "Yes"], "upper": truth, "lower": ["Yes"] * 8}
    tables = {
        name: answers(tmp_path, reply, truth, category=["OCR"] * 4 + ["count"] * 4, method=[name] * 8)
        for name, reply in replies.items()
    }
    mme = job(tmp_path, "mme")
    parquet.write_table(units.part_uri(mme.output_uri, "answers", 0), [tables["method"]], schemas.ANSWERS)
    record = {"counts": {"read": 4, "images": 4}, "tables": {"answers": []}, "figures": {"1": dict.fromkeys(FIGURES, 0.0)}}
    rows, fields = write_scores(mme, [record], [1], (tables["upper"], tables["lower"]))
    overall = parquet.read_table(units.part_uri(mme.output_uri, "scores", 0)).to_pylist()[0]
    assert overall == rows[0]
    assert (overall["metric"], overall["official_name"], overall["category"]) == ("mme", "perception", "all")
    assert overall["official"] == fields["statistics"]["official"]["figures"]["1"]["perception"] == pytest.approx(325)
    assert (overall["official_lower_bound"], overall["official_upper_bound"]) == (100, 400)
    assert overall["retention"] == pytest.approx(225 / 300)
    assert overall["share_of_upper"] == pytest.approx(325 / 400)
    assert overall["score"] == pytest.approx(7 / 8)
    assert [row["official"] for row in rows[1:]] == pytest.approx([200, 125])  # OCR, count


def test_half_a_pair_is_no_figure_and_no_failure(tmp_path: Path) -> None:
    table = answers(tmp_path, ["Yes"] * 8, ["Yes"] * 8, category=["OCR"] * 8).slice(1)
    statistics = statistics_of(job(tmp_path, "mme"), table)
    assert statistics["official"]["figures"] == {}
    (line,) = official_lines(job(tmp_path, "mme"), statistics)
    assert line == (
        "ask: no official figures: mme: OCR: expected two questions with the same image or question_id, got 1 about 0.png"
    )


def test_mmbench_reads_the_choices_of_the_samples(tmp_path: Path) -> None:
    """Items 0 and 1 with rotations; an answer in words is matched by the question's own options."""
    ids = ["0", "1000000", "1", "1000001", "2", "3", "4", "5"]
    choices = [["red", "blue"], ["blue", "red"]] * 4
    replies = ["A", "the red", "B", "A", "blue", "green", "A", "A"]
    truth = ["A", "B", "A", "B", "B", "A", "A", "A"]
    table = answers(tmp_path, replies, truth, source_id=ids, choices=choices)
    marks = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    table = table.set_column(table.schema.get_field_index("correct"), "correct", pa.array(marks))
    figures = statistics_of(job(tmp_path, "mmbench-dev"), table)["official"]["figures"]["1"]
    assert figures["circular_accuracy"] == pytest.approx(4 / 6)
    assert figures["accuracy"] == pytest.approx(5 / 8)
    assert figures["unmatched"] == pytest.approx(1 / 8)
    assert figures["items"] == 6


def test_each_n_has_its_figures(tmp_path: Path) -> None:
    truth = ["yes", "no"] * IMAGES
    table = pa.concat_tables([answers(tmp_path, truth, truth, n=4), answers(tmp_path, ["yes"] * 8, truth, n=1)])
    statistics = statistics_of(job(tmp_path, "pope"), table)
    assert {n: figures["f1"] for n, figures in statistics["official"]["figures"].items()} == {"1": pytest.approx(2 / 3), "4": 1.0}
    first, second = official_lines(job(tmp_path, "pope"), statistics)
    assert first.startswith("ask: N=1: official pope: f1 0.6667")
    assert second.startswith("ask: N=4: official pope: f1 1.0000")


def test_a_set_whose_figure_is_the_score_has_no_other(tmp_path: Path) -> None:
    table = answers(tmp_path, ["red"] * 8, ["red"] * 8)
    assert statistics_of(job(tmp_path, "gqa"), table) == {}
    assert statistics_of(job(tmp_path, "msvd-qa"), table) == {}
    assert official_lines(job(tmp_path, "gqa"), {}) == []
    assert "official" in statistics_of(job(tmp_path, "scenes", metric="vqa"), table)


def test_questions_without_references_have_no_figures(tmp_path: Path) -> None:
    table = answers(tmp_path, ["yes"] * 8, ["yes"] * 8)
    table = table.set_column(table.schema.get_field_index("correct"), "correct", pa.nulls(8, pa.float64()))
    assert statistics_of(job(tmp_path, "pope"), table) == {}
