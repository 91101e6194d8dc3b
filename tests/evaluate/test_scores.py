"""The rule that marks an answer, and the rows of the scores table, on real Arrow tables."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from voco.errors import Refused
from voco.evaluate.metrics import get_metric
from voco.evaluate.scores import score_rows
from voco.store import schemas


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
    }
    return pa.table(row, schema=schemas.ANSWERS)


@pytest.fixture
def three():
    generator = np.random.default_rng(4)
    return tuple(_answers(name, generator.random(400) < p) for name, p in (("voco", 0.6), ("none", 0.8), ("none", 0.3)))


def test_rows_fit_the_table_and_hold_the_means_of_each_category(three):
    method, upper, lower = three
    rows = score_rows(method, upper, lower, 200, 3, cache_bytes=96, full_cache_bytes=6144, latency_s=0.01, seconds=2.5)
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
    rows, expected = score_rows(method, upper, lower, 200, 3), score_rows(*colour, 200, 3)
    assert [row["category"] for row in rows] == ["all", "colour", "shape"]
    for row, other in zip(rows, [*expected, None], strict=True):
        names = ("score", "score_low", "retention", "retention_high", "share_of_upper", "lower_bound", "upper_bound")
        assert [row[name] for name in names] == ([other[name] for name in names] if other else [None] * 7)
        assert (row["questions"], row["samples"]) == (200, 200)
    rows = score_rows(_without(method, "colour"), None, None, 200, 3, latency_s=0.5)
    assert [(row["score"], row["questions"], row["latency_s"]) for row in rows] == [(None, n, 0.5) for n in (400, 200, 200)]


def _without(table, category):
    """The table without references of a category."""
    unmarked = pc.if_else(pc.equal(table["category"], category), None, table["correct"])
    return table.set_column(table.column_names.index("correct"), "correct", unmarked)


def test_the_join_is_by_key_never_by_order(three):
    method, upper, lower = three
    straight = score_rows(method, upper, lower, 100, 0)
    mixed = [table.take(np.random.default_rng(seed).permutation(table.num_rows)) for seed, table in enumerate(three)]
    assert score_rows(*mixed, 100, 0) == straight


def test_an_upper_bound_scored_against_itself_keeps_everything(three):
    _, upper, lower = three
    row = score_rows(upper, upper, lower, 100, 0)[0]
    assert (row["retention"], row["retention_low"], row["retention_high"]) == pytest.approx((1, 1, 1))


def test_without_bounds_there_is_no_retention(three):
    row = score_rows(three[0], None, None, 100, 0)[0]
    assert row["score"] is not None
    assert row["retention"] is None
    assert row["upper_bound"] is None
    assert row["share_of_upper_low"] is None


def test_other_questions_are_refused(three):
    method, upper, lower = three
    with pytest.raises(Refused, match=r"upper and method.*: 0 only in upper, 1 only in method"):
        score_rows(method, upper.slice(1), lower, 100, 0)
    with pytest.raises(Refused, match="answered more than once"):
        score_rows(pa.concat_tables([method, method.slice(0, 1)]), upper, lower, 100, 0)
    with pytest.raises(Refused, match="at least one"):
        score_rows(method.slice(0, 0), None, None, 100, 0)


def test_mixed_answers_and_unknown_measures_are_errors(three):
    with pytest.raises(Refused, match="expected one method, got 2"):
        score_rows(pa.concat_tables([three[0], three[1]]), None, None, 100, 0)
    with pytest.raises(ValueError, match="got gpu_hours"):
        score_rows(three[0], None, None, 100, 0, gpu_hours=3)
