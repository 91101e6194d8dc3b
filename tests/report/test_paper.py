"""Our figures beside the paper's: its own retention rates by our rule, and a page with both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report import official_world, report_world

from voco.errors import Refused
from voco.report.comparison import Comparison, compare, headline
from voco.report.html import render_page
from voco.report.judged import read_judged_figures, video_rows
from voco.report.outputs import OutputGraph, gather_outputs
from voco.report.paper import (
    ORDER_1,
    ORDER_3,
    TABLE_3,
    Evaluated,
    EvaluatedFigures,
    evaluated_figures,
    paper_rows,
    retained,
    whole_set,
)

# Table 1's own row "rate" of VoCo-LLaMA and of average pooling
PUBLISHED_RATES = {"voco": (82.5, 87.5, 81.2, 88.4, 80.0, 81.0, 85.2), "avg_pool": (65.0, 79.6, 68.1, 81.0, 63.8, 25.8, 65.2)}


@pytest.mark.parametrize("method", PUBLISHED_RATES)
def test_the_papers_rates_follow_from_its_scores(method: str) -> None:
    """Within the rounding of scores to one digit."""
    figures: EvaluatedFigures = {(benchmark, "voco", 1, False): Evaluated(50.0) for benchmark in ORDER_1}
    rates = {row.benchmark: row.paper_retention for row in paper_rows(figures) if (row.table, row.method) == (1, method)}
    assert [rates[name] for name in ORDER_1] == pytest.approx(PUBLISHED_RATES[method], abs=0.11)


def test_only_what_was_evaluated_is_compared() -> None:
    figures: EvaluatedFigures = {
        ("POPE", "upper", 0, False): Evaluated(86.0), ("POPE", "lower", 0, False): Evaluated(56.0),
        ("POPE", "voco", 1, False): Evaluated(80.0), ("POPE", "voco", 1, True): Evaluated(70.0),
    }  # fmt: skip
    rows = paper_rows(figures)
    assert {(row.table, row.benchmark) for row in rows} == {(1, "POPE"), (3, "POPE")}  # tables 2 and 4 do not have it
    assert [(row.method, row.tokens, row.figure, row.retention) for row in rows if row.table == 1] == [
        ("upper", 0, 86.0, 100.0), ("voco", 1, 80.0, pytest.approx(80.0)), ("avg_pool", 1, None, None),
        ("q_former", 1, None, None), ("lower", 0, 56.0, 0.0),
    ]  # fmt: skip
    assert paper_rows({("GQA", "voco", 1, True): Evaluated(56.0)})[-1].figure == 56.0
    assert paper_rows({}) == []
    assert retained(1.0, 2.0, 2.0) is None


def test_the_page_shows_both_and_what_is_missing(tmp_path: Path) -> None:
    report_world.ingest(tmp_path)
    report_world.features(tmp_path)
    report_world.training(tmp_path, "base", "none", 0.4)
    table = report_world.answers("eval-voco", "voco", 0.3, checkpoint=str(tmp_path / "base"), benchmark="pope")
    report_world.evaluation(tmp_path, "eval-voco", "base", table, {})
    page = render_page(gather_outputs([str(tmp_path / "eval-voco")]), "test")
    section = page[page.index('id="paper"') :]
    assert "Beside the paper" in section
    assert "81.4" in section
    assert 'class="missing">missing<' in section
    assert "GQA" not in section.split("</table>")[0]


def test_table_3_has_the_papers_side_only() -> None:
    """Another encoder at 224 pixels: our figure of the same benchmark, method and N does not belong beside it."""
    rows = [row for row in paper_rows({(name, "voco", 1, False): Evaluated(50.0) for name in ORDER_3}) if row.table == 3]
    assert [(row.method, row.tokens, row.paper) for row in rows if row.benchmark == "TextVQA"] == [
        ("LLaMA-VID", 16, 50.8), ("LLaMA-VID", 4, 49.1), ("LLaMA-VID", 1, 49.0), ("voco", 1, 52.7),
    ]  # fmt: skip
    assert len(rows) == len(TABLE_3) * len(ORDER_3)
    assert {(row.figure, row.retention, row.paper_retention) for row in rows} == {(None, None, None)}
    assert {row.label for row in rows} == {"LLaMA-VID", "VoCo"}


@pytest.mark.parametrize(
    ("benchmark", "name"),
    [
        ("pope", "POPE"), ("pope-adversarial", None), ("mmbench-dev-en", "MMBench"), ("mmbench-cn-dev", None),
        ("gqa-testdev-balanced", "GQA"), ("vqav2-test", "VQAv2"), ("textvqa-val", "TextVQA"), ("sqa-img", "SQA-I"),
        ("seed-bench-video", None), ("msvd-qa", None), ("vizwiz", None),
    ],
)  # fmt: skip
def test_a_part_of_a_set_is_not_beside_the_paper(benchmark: str, name: str | None) -> None:
    assert whole_set(benchmark) == name


World = tuple[Path, dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("official")
    return root, official_world.flow(root)


def graph(world: World) -> OutputGraph:
    root, scores = world
    return gather_outputs([str(root / name) for name in scores])


def test_published_figures_and_their_retention_stand_beside_the_paper(world: World) -> None:
    """Percent for POPE and MMBench, a sum for MME; retention is the evaluation's, of that figure and not of the mean mark."""
    figures = evaluated_figures(graph(world), compare(graph(world)))
    for name, benchmark, scale in (("pope", "POPE", 100), ("mme", "MME", 1), ("mmbench", "MMBench", 100)):
        row, upper, lower = (world[1][f"{name}-{role}"][0] for role in ("voco", "upper", "lower"))
        assert figures[benchmark, "voco", 1, False].figure == pytest.approx(scale * row["official"])
        assert figures[benchmark, "upper", 0, False].figure == pytest.approx(scale * row["official_upper_bound"])
        rate = 100 * (row["official"] - lower["official"]) / (upper["official"] - lower["official"])
        assert figures[benchmark, "voco", 1, False].retention == pytest.approx(rate)
        by_mean = 100 * (row["score"] - lower["score"]) / (upper["score"] - lower["score"])
        assert abs(rate - by_mean) > 0.3


def test_the_comparison_shows_score_and_published_figure(world: World) -> None:
    pope, mme, *_, clips = compare(graph(world))
    assert (pope.official, mme.official, clips.official) == ("f1 %", "perception", "")
    row = next(row for row in mme.rows if row["method"] == "voco")
    text = headline(mme)
    assert f"the published figure, perception, is {row['official']:,.1f} (95 % interval {row['official_low']:,.1f} to" in text
    assert f"reaches {row['official_upper_bound']:,.1f}, the lower bound {row['official_lower_bound']:,.1f};" in text
    assert "Its score is" in text
    assert "published figure" not in headline(clips)


def test_judged_figures_are_shown_with_judge_and_date(world: World) -> None:
    """70 % by 57 verdicts, three replies without one; the second judge has not finished."""
    comparisons = compare(graph(world))
    done, other = read_judged_figures(graph(world), comparisons)
    assert (done.judge, done.label, done.n, done.problem) == ("gpt-3.5-turbo (gpt-3.5-turbo-0613)", "VoCo, N=2", 2, "")
    assert (done.figures["questions"], done.figures["unparsable"]) == (60, 3)
    assert (other.judge, other.figures) == ("other/judge", {})
    assert "not finished" in other.problem
    two, eight = video_rows(comparisons, [done, other])
    assert (two.benchmark, two.tokens, two.paper, two.judged, two.rule) == (
        "MSVD-QA", 2, ((72.3, 3.9), (72.6, 3.9)), done, "exact",
    )  # fmt: skip
    assert two.score == world[1]["msvd-voco"][0]["score"]
    assert (eight.tokens, eight.paper, eight.judged, eight.score) == (8, ((73.4, 3.9), (73.5, 3.9)), None, None)
    page = render_page(graph(world), "test")
    section = page[page.index('id="judged"') : page.index('id="training"')]
    assert f"{100 * done.figures['accuracy']:.1f} / {done.figures['score']:.1f}" in section
    assert done.dates in section
    assert "by a rule, not<br>the paper's figure" in section


def test_verdicts_on_other_answers_are_no_figure(world: World) -> None:
    """The evaluation now has another number of questions than were judged."""
    comparisons = compare(graph(world))
    for row in comparisons[-1].rows:
        row["questions"] -= 1
    done, _ = read_judged_figures(graph(world), comparisons)
    assert "of other answers" in done.problem
    assert video_rows(comparisons, [done])[0].judged is None


def test_scores_of_an_earlier_version_are_read_without_what_was_added_and_else_refused(tmp_path: Path) -> None:
    scores = official_world.flow(tmp_path)
    file = str(tmp_path / "pope-voco" / "scores" / "part-00000.parquet")

    def compare_without(column: str) -> list[Comparison]:
        table = official_world.parquet.read_table(file).drop_columns([column])
        official_world.parquet.write_table(file, [table], table.schema)
        return compare(gather_outputs([str(tmp_path / name) for name in scores]))

    rows = [row for comparison in compare_without("mean_tokens") for row in comparison.rows]
    assert len(rows) > 1
    assert all(row["mean_tokens"] is None for row in rows if row["output"].endswith("pope-voco"))
    with pytest.raises(Refused, match="pope-voco: scores/ is of an earlier version: run pope-voco again with --replace"):
        compare_without("official")
