"""The rule that marks an answer, and the rows of the scores table, on real Arrow tables."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from voco.errors import Refused
from voco.evaluate.aggregate import mean_tokens
from voco.evaluate.metrics import get_metric
from voco.evaluate.scores import check_bound_metrics, read_answers, score_rows
from voco.store import parquet, schemas

GQA = get_metric("gqa")


@pytest.mark.parametrize(
    ("prediction", "references", "correct"),
    [
        ("red", ["red"], 1.0),
        ("  Red. ", ["red"], 1.0),
        ("red...", ["RED."], 1.0),
        ("two", ["two", "2"], 1.0),
        ("2", ["two", "2"], 1.0),
        ("a red", ["red"], 0.0),
        ("red, blue", ["red"], 0.0),
        ("3.5", ["35"], 0.0),
        ("", ["red"], 0.0),
        ("red", [], 0.0),
    ],
)
def test_exact_match_is_the_gqa_rule(prediction, references, correct):
    assert get_metric("gqa").mark(prediction, references) == correct


def _answers(method, correct, n=1, checkpoint="c"):
    """Answers to two questions about each of several samples: the first of category colour, the second of shape."""
    count = len(correct)
    row = {
        "sample_id": [f"{index // 2:032x}" for index in range(count)],
        "conversation_index": [index % 2 for index in range(count)],
        "source_id": [str(index) for index in range(count)],
        "benchmark": ["scenes"] * count,
        "category": [("colour", "shape")[index % 2] for index in range(count)],
        "method": [method] * count,
        "n": [n] * count,
        "checkpoint": [checkpoint] * count,
        "prompt": ["?"] * count,
        "prediction": ["x"] * count,
        "references": [["x"]] * count,
        "correct": np.asarray(correct, dtype=float),
        "new_tokens": [1] * count,
        "cache_hit": [False] * count,
        "margin": [0.5] * count,
        "tokens_read": [1] * count,
    }
    return pa.table(row, schema=schemas.ANSWERS)


@pytest.fixture
def three():
    generator = np.random.default_rng(4)
    return tuple(_answers(name, generator.random(400) < p) for name, p in (("voco", 0.6), ("none", 0.8), ("none", 0.3)))


def test_rows_fit_the_table_and_hold_the_means_of_each_category(three):
    method, upper, lower = three
    rows = score_rows(GQA, method, upper, lower, 200, 3, cache_bytes=96, full_cache_bytes=6144, latency_s=0.01, seconds=2.5)
    table = pa.Table.from_pylist(rows, schema=schemas.SCORES)
    assert table.column_names == schemas.SCORES.names
    assert [row["category"] for row in rows] == ["all", "colour", "shape"]
    correct = {name: table["correct"].to_numpy() for name, table in (("m", method), ("u", upper), ("l", lower))}
    for row, chosen in zip(rows, (slice(None), slice(0, None, 2), slice(1, None, 2)), strict=True):
        m, u, low = (correct[name][chosen].mean() for name in ("m", "u", "l"))
        assert (row["score"], row["upper_bound"], row["lower_bound"]) == pytest.approx((m, u, low))
        assert row["retention"] == pytest.approx((m - low) / (u - low))
        assert row["share_of_upper"] == pytest.approx(m / u)
        for name in ("score", "retention", "share_of_upper"):
            assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
        assert (row["method"], row["n"], row["seed"], row["cache_bytes"], row["prefill_flops"]) == ("voco", 1, 3, 96, None)
        assert row["samples"] == 200
    assert [row["questions"] for row in rows] == [400, 200, 200]


def test_questions_without_references_have_no_part_in_a_score(three):
    """Half of the questions: the score of the other half. A category of none has no score, and no set of none divides by zero."""
    method, upper, lower = (_without(table, "shape") for table in three)
    colour = [table.filter(pc.equal(table["category"], "colour")) for table in three]
    rows, expected = score_rows(GQA, method, upper, lower, 200, 3), score_rows(GQA, *colour, 200, 3)
    assert [row["category"] for row in rows] == ["all", "colour", "shape"]
    for row, other in zip(rows, [*expected, None], strict=True):
        names = ("score", "score_low", "retention", "retention_high", "share_of_upper", "lower_bound", "upper_bound")
        assert [row[name] for name in names] == ([other[name] for name in names] if other else [None] * 7)
        assert (row["questions"], row["samples"]) == (200, 200)
    rows = score_rows(GQA, _without(method, "colour"), None, None, 200, 3, latency_s=0.5)
    assert [(row["score"], row["questions"], row["latency_s"]) for row in rows] == [(None, n, 0.5) for n in (400, 200, 200)]


def _without(table, category):
    """The table without references of a category."""
    unmarked = pc.if_else(pc.equal(table["category"], category), None, table["correct"])
    return table.set_column(table.column_names.index("correct"), "correct", unmarked)


def test_the_join_is_by_key_never_by_order(three):
    method, upper, lower = three
    straight = score_rows(GQA, method, upper, lower, 100, 0)
    mixed = [table.take(np.random.default_rng(seed).permutation(table.num_rows)) for seed, table in enumerate(three)]
    assert score_rows(GQA, *mixed, 100, 0) == straight


def test_an_upper_bound_scored_against_itself_keeps_everything(three):
    _, upper, lower = three
    row = score_rows(GQA, upper, upper, lower, 100, 0)[0]
    assert (row["retention"], row["retention_low"], row["retention_high"]) == pytest.approx((1, 1, 1))


def test_without_bounds_there_is_no_retention(three):
    row = score_rows(GQA, three[0], None, None, 100, 0)[0]
    assert row["score"] is not None
    assert row["retention"] is None
    assert row["upper_bound"] is None
    assert row["share_of_upper_low"] is None


def test_other_questions_are_refused(three):
    method, upper, lower = three
    with pytest.raises(Refused, match=r"upper and method.*: 0 only in upper, 1 only in method"):
        score_rows(GQA, method, upper.slice(1), lower, 100, 0)
    with pytest.raises(Refused, match="answered more than once"):
        score_rows(GQA, pa.concat_tables([method, method.slice(0, 1)]), upper, lower, 100, 0)
    with pytest.raises(Refused, match="at least one"):
        score_rows(GQA, method.slice(0, 0), None, None, 100, 0)


def test_mixed_answers_and_unknown_measures_are_errors(three):
    with pytest.raises(Refused, match="expected one method, got 2"):
        score_rows(GQA, pa.concat_tables([three[0], three[1]]), None, None, 100, 0)
    with pytest.raises(ValueError, match="got gpu_hours"):
        score_rows(GQA, three[0], None, None, 100, 0, gpu_hours=3)


def _yes_no(method, replies, categories=("popular", "random")):
    """Answers of POPE to four questions about each of two samples, labels yes, yes, no, no."""
    count = len(replies)
    table = _answers(method, np.zeros(count)).to_pydict()
    table["sample_id"] = [f"{index // 4:032x}" for index in range(count)]
    table["conversation_index"] = [index % 4 for index in range(count)]
    table["category"] = [categories[index // 4 % 2] for index in range(count)]
    table["prediction"], table["references"] = list(replies), [["yes"], ["yes"], ["no"], ["no"]] * (count // 4)
    marks = [get_metric("pope").mark(reply, truth) for reply, truth in zip(replies, table["references"], strict=True)]
    return pa.table({**table, "correct": marks}, schema=schemas.ANSWERS)


FACTS = {f"{index:032x}": (f"{index}.jpg", [[]] * 4) for index in range(40)}


def test_retention_is_that_of_the_published_figure():
    """F1 of the method 2/3 and 1/2, of the upper bound 1, of the lower bound 0: retention 7/12, by mean marks another figure."""
    method = ["yes", "no", "no", "no", "yes", "no", "yes", "no"]
    upper, lower = ["yes", "yes", "no", "no"] * 2, ["no"] * 8
    tables = [_yes_no(name, replies * 10) for name, replies in (("voco", method), ("none", upper), ("none", lower))]
    rows = score_rows(get_metric("pope"), *tables, 200, 3, FACTS)
    overall, popular, random = rows
    assert [row["category"] for row in rows] == ["all", "popular", "random"]
    assert {row["metric"] for row in rows} == {"pope"}
    assert {row["official_name"] for row in rows} == {"f1"}
    assert [row["official"] for row in rows] == pytest.approx([7 / 12, 2 / 3, 1 / 2])
    assert [row["retention"] for row in rows] == pytest.approx([7 / 12, 2 / 3, 1 / 2])
    assert [row["share_of_upper"] for row in rows] == pytest.approx([7 / 12, 2 / 3, 1 / 2])
    assert (overall["official_upper_bound"], overall["official_lower_bound"]) == (1.0, 0.0)
    assert (overall["score"], overall["upper_bound"], overall["lower_bound"]) == (5 / 8, 1.0, 0.5)
    assert overall["official_low"] <= overall["official"] <= overall["official_high"]
    assert (popular["retention_low"], popular["retention_high"]) == pytest.approx((2 / 3, 2 / 3))  # all images are the same
    assert popular["questions"] == random["questions"] == 40


def test_where_the_mean_mark_is_published_the_official_figure_is_the_score(three):
    for row in score_rows(GQA, *three, 100, 0):
        assert (row["metric"], row["official_name"]) == ("gqa", "accuracy")
        for official, own in (("official", "score"), ("official_low", "score_low"), ("official_upper_bound", "upper_bound")):
            assert row[official] == row[own]


def test_half_a_pair_of_mme_has_a_score_and_no_retention():
    tables = [_yes_no(name, ["yes"] * 7 + ["no"], ("OCR", "OCR")).slice(1) for name in ("voco", "none", "none")]
    row = score_rows(get_metric("mme"), *tables, 100, 0, FACTS)[0]
    assert row["score"] == pytest.approx(4 / 7)
    assert [row[name] for name in ("official_name", "official", "retention", "share_of_upper")] == [None] * 4


def test_bounds_marked_by_another_metric_are_refused(tmp_path, three):
    for name, metric in (("same", "gqa"), ("other", "exact")):
        rows = score_rows(get_metric(metric), *three, 100, 0)
        table = pa.Table.from_pylist(rows, schema=schemas.SCORES)
        parquet.write_table(str(tmp_path / name / "scores" / "part-00000.parquet"), [table], schemas.SCORES)
    earlier = table.drop_columns(["metric"])
    parquet.write_table(str(tmp_path / "earlier" / "scores" / "part-00000.parquet"), [earlier], earlier.schema)
    check_bound_metrics(GQA, {"upper": str(tmp_path / "same"), "lower": None})
    with pytest.raises(Refused, match=r"inputs\.lower: .*/other: expected answers marked by gqa, got exact; evaluate both"):
        check_bound_metrics(GQA, {"upper": str(tmp_path / "same"), "lower": str(tmp_path / "other")})
    for name in ("earlier", "none"):
        with pytest.raises(Refused, match=r"inputs\.upper: .*do not name the metric that marked them; evaluate it again"):
            check_bound_metrics(GQA, {"upper": str(tmp_path / name), "lower": None})


def test_answers_of_an_earlier_version_are_read_beside_new_ones(tmp_path):
    """A run that was begun before margins were noted continues, and its parts have other columns."""
    new = _answers("voco", [1.0, 0.0])
    for number, table in enumerate((new.drop_columns(list(schemas.ADDED_TO_ANSWERS)), new)):
        parquet.write_table(str(tmp_path / "answers" / f"part-{number:05d}.parquet"), [table], table.schema)
    assert read_answers(str(tmp_path))["tokens_read"].to_pylist() == [None, None, 1, 1]
    (tmp_path / "answers" / "part-00001.parquet").unlink()
    assert mean_tokens(read_answers(str(tmp_path))) is None
