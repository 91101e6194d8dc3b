"""Marked answers to rows of `scores/`: joins methods by question, and computes bounds, retention and intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from voco.errors import Refused
from voco.evaluate.figure_bootstrap import bootstrap_figure
from voco.evaluate.metrics import Metric
from voco.evaluate.official import QuestionFacts, marked_answers
from voco.evaluate.retention import Resampled, bootstrap, retention, share_of_upper
from voco.store import parquet, schemas, storage
from voco.store.schemas import ALL

# Values of the column `method` of answers that are not a method's own: the lower bound, a compressing model that reads all vision
# tokens, or as many <voco> as a question needs, and videos read with fewer frames or out of order, by `evaluate.frames`.
LOWER_BOUND = "lower_bound"
READ_WHOLE = "voco_uncompressed"
READ_ADAPTIVE = "voco_adaptive"
FRAME_METHODS = {"shuffled": "shuffled_frames", "one": "one_frame"}
MEASURES = (
    "checkpoint",
    "mean_tokens",
    "cache_bytes",
    "full_cache_bytes",
    "prefill_flops",
    "uncached_flops",
    "latency_s",
    "seconds",
)


def read_answers(uri: str) -> pa.Table:
    """The answers of an evaluation, finished or not, in the order of its units."""
    folder = storage.join(storage.resolve(uri), "answers")
    parts = [parquet.read_table(storage.join(folder, name)) for name in storage.list_names(folder)]
    return parquet.with_added_columns(
        pa.concat_tables(parts, promote_options="default"), schemas.ANSWERS, schemas.ADDED_TO_ANSWERS
    )


def join_correct(tables: dict[str, pa.Table]) -> tuple[NDArray[np.str_], NDArray[np.str_], dict[str, NDArray[np.float64]]]:
    """The answers of several methods to the same questions, joined by (sample_id, conversation_index), never by order.

    Returns sample_id (Q,), category (Q,) of the first table, and `correct` (Q,) of each, ordered by the key. Questions without
    references, whose `correct` is null, are left out.
    Raises Refused when a table has a question twice or the sets of questions differ.
    """
    joined = join_answers(tables)
    first = next(iter(joined.values()))
    samples, categories = (np.asarray(first[column].to_pylist(), dtype=np.str_) for column in ("sample_id", "category"))
    return samples, categories, {name: table["correct"].to_numpy().astype(np.float64) for name, table in joined.items()}


def join_answers(tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """The tables with the same questions in the same order, those with references; raises as `join_correct`."""
    sorted_tables = {name: table.sort_by(_BY_KEY) for name, table in tables.items()}
    keys = {name: _keys(table) for name, table in sorted_tables.items()}
    first, *others = keys
    for name, questions in keys.items():
        if len(set(questions)) != len(questions):
            raise Refused(f"answers of {name}: {len(questions) - len(set(questions))} questions are answered more than once")
    for name in others:
        if keys[name] != keys[first]:
            only_first, only_other = len(set(keys[first]) - set(keys[name])), len(set(keys[name]) - set(keys[first]))
            raise Refused(
                f"answers of {name} and {first} are not to the same questions: {only_other} only in {name}, "
                f"{only_first} only in {first}; evaluate both on the same samples"
            )
    marked = ~np.isnan([table["correct"].to_numpy() for table in sorted_tables.values()]).any(axis=0)  # null is NaN
    return {name: table.filter(pa.array(marked)) for name, table in sorted_tables.items()}


_BY_KEY = [("sample_id", "ascending"), ("conversation_index", "ascending")]


def _keys(table: pa.Table) -> list[tuple[str, int]]:
    return list(zip(table["sample_id"].to_pylist(), table["conversation_index"].to_pylist(), strict=True))


def score_rows(
    metric: Metric,
    answers: pa.Table,
    upper: pa.Table | None,
    lower: pa.Table | None,
    resamples: int,
    seed: int,
    facts: QuestionFacts | None = None,
    **measures: Any,
) -> list[dict[str, Any]]:
    """Rows of the scores table for one checkpoint: category "all" first, then each category by name.

    A row is about its questions with references. Where there are none, it counts all questions and has no score.

    metric: what marked all three tables
    answers, upper, lower: tables of schemas.ANSWERS about the same questions; without both bounds there is no retention
    facts: of the answers' samples, where the metric's published figure is not the mean mark
    measures: values of the columns in `MEASURES`; the same in every row, None when left out
    Raises Refused for questions that differ, and for answers of more than one checkpoint, benchmark, method or n.
    """
    unknown = sorted(set(measures) - set(MEASURES))
    if unknown:
        raise ValueError(f"expected measures among {', '.join(MEASURES)}, got {', '.join(unknown)}")
    identity = {column: _single(answers, column) for column in ("checkpoint", "benchmark", "method", "n")}
    bounds = {} if upper is None or lower is None else {"upper": upper, "lower": lower}
    joined = join_answers({"method": answers, **bounds})
    samples, categories = (np.asarray(joined["method"][name].to_pylist(), dtype=np.str_) for name in ("sample_id", "category"))
    answered = {column: np.asarray(answers[column].to_pylist(), dtype=np.str_) for column in ("sample_id", "category")}
    rows = []
    for category in [ALL, *sorted(set(answered["category"].tolist()) - {ALL})]:  # a category named "all" is no second row
        chosen = _in_category(categories, category)
        about, figures = samples[chosen], {}
        if len(about):
            tables = {name: table.filter(pa.array(chosen)) for name, table in joined.items()}
            figures = _row_figures(metric, tables, about, facts or {}, resamples, seed)
        else:
            about = answered["sample_id"][_in_category(answered["category"], category)]
        counts = {"questions": len(about), "samples": len(np.unique(about))}
        row = {**identity, "category": category, "metric": metric.name, "seed": seed, **figures, **counts, **measures}
        rows.append({column: row.get(column) for column in schemas.SCORES.names})
    return rows


def _row_figures(
    metric: Metric, tables: dict[str, pa.Table], samples: NDArray[np.str_], facts: QuestionFacts, resamples: int, seed: int
) -> dict[str, Any]:
    """Score and official figure of `method` with their intervals, bounds of both, and retention of the official figure.

    An incomplete set has no official figure, and no retention: `evaluate.limit`, for example, can cut a pair of MME.
    """
    correct = {name: table["correct"].to_numpy() for name, table in tables.items()}
    marks = bootstrap(correct, samples, resamples, seed)
    figures: dict[str, Any] = _with_bounds("score", "lower_bound", "upper_bound", marks)
    if metric.publishes_mean:
        name, official = metric.headline, marks
    else:
        try:
            rows = {name: marked_answers(table, facts) for name, table in tables.items()}
            name, official = bootstrap_figure(metric, rows, samples, resamples, seed)
        except Refused:
            return figures
    figures |= {"official_name": name, **_with_bounds("official", "official_lower_bound", "official_upper_bound", official)}
    return figures | (_retention(official) if "upper" in tables else {})


def _in_category(categories: NDArray[np.str_], category: str) -> NDArray[np.bool_]:
    """(Q,) which questions are in the category."""
    return np.ones(len(categories), dtype=bool) if category == ALL else categories == category


def _single(answers: pa.Table, column: str) -> Any:
    if answers.num_rows == 0:
        raise Refused("answers: expected at least one answered question, got none")
    values = answers[column].unique().to_pylist()
    if len(values) != 1:
        raise Refused(f"answers: expected one {column}, got {len(values)}: {', '.join(map(str, values[:4]))}")
    return values[0]


def _with_bounds(name: str, lower: str, upper: str, resampled: Resampled) -> dict[str, float | None]:
    """A figure of `method` as columns: its value, its interval, and where there are bounds, their values."""
    low, high = resampled.score("method") or (None, None)
    bounds = {column: resampled.scores.get(role) for column, role in ((lower, "lower"), (upper, "upper"))}
    return {name: resampled.scores["method"], f"{name}_low": low, f"{name}_high": high, **bounds}


def _retention(resampled: Resampled) -> dict[str, float | None]:
    """Both published definitions, each with its interval."""
    score, upper, lower = (resampled.scores[name] for name in ("method", "upper", "lower"))
    retention_low, retention_high = resampled.retention("method", "lower", "upper") or (None, None)
    share_low, share_high = resampled.share_of_upper("method", "upper") or (None, None)
    return {
        "retention": retention(score, lower, upper),
        "retention_low": retention_low,
        "retention_high": retention_high,
        "share_of_upper": share_of_upper(score, upper),
        "share_of_upper_low": share_low,
        "share_of_upper_high": share_high,
    }


def check_bound_metrics(metric: Metric, bounds: dict[str, str | None]) -> None:
    """Refuse bounds, by the input's key, that another metric than the answers' has marked, and those that do not say which."""
    for name, uri in bounds.items():
        if uri is None:
            continue
        folder = storage.join(storage.resolve(uri), "scores")
        files = [storage.join(folder, file) for file in storage.list_names(folder)]
        tables = [parquet.read_table(file) for file in files]
        marked = {rule for table in tables if "metric" in table.column_names for rule in table["metric"].to_pylist()}
        if not marked:
            raise Refused(f"inputs.{name}: {uri}: its scores/ do not name the metric that marked them; evaluate it again")
        if marked != {metric.name}:
            other = ", ".join(sorted(marked))
            expected = f"inputs.{name}: {uri}: expected answers marked by {metric.name}, got {other}"
            raise Refused(f"{expected}; evaluate both with the same evaluate.metric")
