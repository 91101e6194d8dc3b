"""The bootstrap of published figures: by sums against the obvious way, which rebuilds the answers of every resample."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from voco.errors import Refused
from voco.evaluate.figure_bootstrap import add_copy, bootstrap_figure, draws_by_rows, draws_by_sums, resampling_units
from voco.evaluate.metrics import MarkedAnswer, Metric, get_metric, mark_answer, mean_mark, official_figures, published_name
from voco.evaluate.metrics.mmbench import ROTATION
from voco.evaluate.metrics.mme import COGNITION, PERCEPTION
from voco.evaluate.retention import retention, share_of_upper
from voco.job.tables import METRICS

OWN = [name for name, row in METRICS.items() if row.module is None]
SKILLS = {"method": 0.6, "upper": 0.8, "lower": 0.3}
Question = dict[str, Any]  # an answer without prediction and mark, with its `sample` and `wrong`, another answer


def yes_no(sample: str, category: str, label: str, question_id: str) -> Question:
    wrong = "No" if label == "yes" else "Yes"
    return {
        "sample": sample, "image": f"{sample}.jpg", "category": category, "references": [label], "wrong": wrong,
        "question_id": question_id, "choices": [],
    }  # fmt: skip


def pope(images: int = 40) -> list[Question]:
    """Images with one to nine questions, most of them in one or two of three categories; a fourth is about one image only."""
    draw = np.random.default_rng(1)
    names = ["adversarial", "popular", "random"]
    return [
        yes_no(
            f"coco{image}",
            "rare" if image == 0 else names[image % 3 - number % 2],
            ["yes", "no"][draw.integers(2)],
            f"{image}-{number}",
        )
        for image in range(images)
        for number in range(draw.integers(1, 10))
    ]


def mme(images: int = 5, subtasks: tuple[str, ...] = (*PERCEPTION[:6], *COGNITION[:2])) -> list[Question]:
    """Two questions about each image; the first image of every subtask is the same file, and so one sample."""
    return [
        yes_no("shared" if image == 0 else f"{name}{image}", name, label, f"{name}/{image}")
        for name in subtasks
        for image in range(images)
        for label in ("yes", "no")
    ]


def mmbench(items: int = 30) -> list[Question]:
    """Items with one to four rotations; every rotation is a sample by itself, as rows of a table with images are."""
    draw = np.random.default_rng(2)
    return [
        {
            "sample": f"row{item + rotation * ROTATION:08}", "image": f"{item}.jpg", "category": ["logic", "colour"][item % 2],
            "references": ["ABCD"[rotation]], "wrong": "ABCD"[rotation - 1], "question_id": str(item + rotation * ROTATION),
            "choices": ["red", "blue", "green", "grey"],
        }
        for item in range(items)
        for rotation in range(draw.integers(1, 5))
    ]  # fmt: skip


def scienceqa(images: int = 30) -> list[Question]:
    return [
        {
            "sample": f"s{image}", "image": f"{image}.png" if image % 3 else None, "category": ["biology", "physics"][image % 2],
            "references": ["A"], "wrong": "B", "question_id": f"{image}-{number}", "choices": [],
        }
        for image in range(images)
        for number in range(1 + image % 4)
    ]  # fmt: skip


QUESTIONS = {"pope": pope(), "mme": mme(), "mmbench": mmbench(), "scienceqa": scienceqa()}


def answered(name: str, questions: list[Question], skill: float, seed: int) -> list[MarkedAnswer]:
    """The questions with a right answer in a share `skill` of them, marked by the metric."""
    draw, metric = np.random.default_rng(seed), get_metric(name)
    rows = []
    for question in questions:
        prediction = question["references"][0].capitalize() if draw.random() < skill else question["wrong"]
        mark = mark_answer(metric, prediction, question["references"], question["choices"])
        rows.append({**question, "prediction": prediction, "mark": mark})
    return rows


def samples(questions: list[Question]) -> np.ndarray[Any, Any]:
    return np.array([question["sample"] for question in questions])


def further_item(answer: MarkedAnswer, copy: int) -> MarkedAnswer:
    """A copy of an answer of MMBench, whose ids are numbers: another item, with the same rotation."""
    return {**answer, "question_id": str(int(answer["question_id"]) + 1000 * copy)}


RENAME = {"mmbench": further_item}


@pytest.mark.parametrize("name", QUESTIONS)
def test_sums_equal_the_rebuilt_answers(name: str) -> None:
    """Every draw of every method, and the figure itself."""
    metric, questions = get_metric(name), QUESTIONS[name]
    for method, skill in SKILLS.items():
        rows = answered(name, questions, skill, len(method))
        units = resampling_units(metric, rows, samples(questions))
        fast = draws_by_sums(metric, metric.headline, rows, units, 60, 5)
        slow = draws_by_rows(metric, metric.headline, rows, units, 60, 5, RENAME.get(name, add_copy))
        np.testing.assert_allclose(fast, slow, rtol=1e-12)
        assert np.ptp(fast) > 0
        assert metric.sums is not None
        values, figure = metric.sums(rows)
        assert figure(values.sum(axis=0, keepdims=True))[0] == pytest.approx(official_figures(metric, rows)[metric.headline])
        mean = np.mean([row["mark"] for row in rows])
        assert abs(official_figures(metric, rows)[metric.headline] - mean) > 1e-3, "a mean would do as well"


@pytest.mark.parametrize(
    ("name", "questions", "figure"),
    [
        ("mme", mme(subtasks=COGNITION[1:3]), "cognition"),
        ("scienceqa", [{**question, "image": None} for question in scienceqa()], "accuracy"),
        ("pope", [{**question, "category": None} for question in pope()], "f1"),
    ],
)
def test_a_part_of_a_set_has_its_first_figure(name: str, questions: list[Question], figure: str) -> None:
    metric, rows = get_metric(name), answered(name, questions, 0.6, 1)
    label, drawn = bootstrap_figure(metric, {"method": rows}, samples(questions), 40, 3)
    assert label == figure
    assert drawn.scores["method"] == official_figures(metric, rows)[figure]
    units = resampling_units(metric, rows, samples(questions))
    np.testing.assert_allclose(drawn.draws["method"], draws_by_rows(metric, figure, rows, units, 40, 3), rtol=1e-12)


def test_draws_are_paired_and_both_retentions_follow() -> None:
    """The same resamples for method and bounds: retention of a draw is that of the three figures of one resample."""
    metric, questions = get_metric("pope"), QUESTIONS["pope"]
    answers = {method: answered("pope", questions, skill, 7) for method, skill in SKILLS.items()}
    name, drawn = bootstrap_figure(metric, answers, samples(questions), 400, 9)
    assert name == "f1"
    units = resampling_units(metric, answers["upper"], samples(questions))
    slow = {method: draws_by_rows(metric, "f1", rows, units, 400, 9) for method, rows in answers.items()}
    rates = [retention(m, low, up) for m, low, up in zip(slow["method"], slow["lower"], slow["upper"], strict=True)]
    assert drawn.retention("method", "lower", "upper") == pytest.approx(np.quantile(np.array(rates), [0.025, 0.975]))
    shares = [share_of_upper(m, up) for m, up in zip(slow["method"], slow["upper"], strict=True)]
    assert drawn.share_of_upper("method", "upper") == pytest.approx(np.quantile(np.array(shares), [0.025, 0.975]))


def test_pairs_and_rotations_stay_whole() -> None:
    """A group in several samples joins them: rotations of an item here, and both questions of an image in two samples."""
    questions = QUESTIONS["mmbench"]
    units = resampling_units(get_metric("mmbench"), questions, samples(questions))
    items = [int(question["question_id"]) % ROTATION for question in questions]
    assert len(set(units.tolist())) == len(set(items)) < len(questions)
    assert all(len({unit for unit, other in zip(units, items, strict=True) if other == item}) == 1 for item in items)
    pairs = [{**row, "sample": f"{number:03}", "mark": 1.0} for number, row in enumerate(mme(2))]
    assert len(set(resampling_units(get_metric("mme"), pairs, samples(pairs)).tolist())) == len(pairs) / 2
    assert resampling_units(get_metric("pope"), pairs, samples(pairs)).tolist() == list(range(len(pairs)))


def test_the_order_of_rows_does_not_matter() -> None:
    metric, questions = get_metric("mmbench"), QUESTIONS["mmbench"]
    rows = answered("mmbench", questions, 0.7, 0)
    order = np.random.default_rng(0).permutation(len(rows))
    straight = bootstrap_figure(metric, {"m": rows}, samples(rows), 50, 1)[1].draws["m"]
    mixed = [rows[index] for index in order]
    np.testing.assert_allclose(bootstrap_figure(metric, {"m": mixed}, samples(mixed), 50, 1)[1].draws["m"], straight)


def test_a_metric_of_a_package_is_resampled_by_its_rows() -> None:
    """The share of images without a wrong answer: a copy of an image is another image."""

    def perfect(answers: Any) -> dict[str, float]:
        images: dict[str, bool] = {}
        for row in answers:
            images[row["image"]] = images.get(row["image"], True) and bool(row["mark"])
        return {"perfect": sum(images.values()) / len(images), "images": len(images)}

    metric = Metric("perfect", lambda *_: 0.0, aggregate=perfect, headline="perfect")
    rows = answered("pope", QUESTIONS["pope"], 0.8, 2)
    about = samples(rows)
    name, drawn = bootstrap_figure(metric, {"m": rows}, about, 300, 4)
    right = np.array([all(row["mark"] for row in rows if row["sample"] == label) for label in np.unique(about)])
    generator = np.random.default_rng(4)
    expected = [right[generator.integers(len(right), size=len(right))].mean() for _ in range(300)]
    assert name == "perfect"
    np.testing.assert_allclose(drawn.draws["m"], expected)
    by_count = draws_by_rows(metric, "images", rows, resampling_units(metric, rows, about), 20, 0)
    assert set(by_count.tolist()) == {float(len(right))}


@pytest.mark.parametrize("name", OWN)
def test_every_metric_says_how_its_published_figure_is_resampled(name: str) -> None:
    """It is the mean mark, and then on any marks, or it has sums."""
    metric = get_metric(name)
    assert metric.publishes_mean != (metric.sums is not None)
    draw = np.random.default_rng(3)
    rows = [
        {**row, "prediction": row["wrong"], "mark": float(draw.random()), "image": None if number % 3 else row["image"]}
        for number, row in enumerate(mme())
    ]
    figures = official_figures(metric, rows)
    same = figures[published_name(metric, figures)] == pytest.approx(mean_mark(rows), abs=1e-9)
    assert same == metric.publishes_mean


def test_an_incomplete_set_has_no_figure() -> None:
    rows = answered("mme", QUESTIONS["mme"], 0.5, 0)[1:]
    with pytest.raises(Refused, match="expected two questions"):
        bootstrap_figure(get_metric("mme"), {"m": rows}, samples(rows), 10, 0)


@pytest.mark.parametrize(("name", "questions"), [("pope", pope(1800)), ("mme", mme(85, (*PERCEPTION, *COGNITION)))])
def test_a_whole_set_takes_seconds(name: str, questions: list[Question]) -> None:
    """POPE's 9,000 questions about 500 images would take a minute by rows."""
    answers = {method: answered(name, questions, skill, 7) for method, skill in SKILLS.items()}
    started = time.process_time()
    bootstrap_figure(get_metric(name), answers, samples(questions), 1000, 0)
    print(f"{name}: {len(questions):,} questions, 3 methods, 1,000 resamples: {time.process_time() - started:.2f} s")
    assert time.process_time() - started < 10
