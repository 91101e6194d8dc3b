"""Our figures beside the paper's: its own retention rates by our rule, and a page with both."""

from __future__ import annotations

from pathlib import Path

import pytest
from report import report_world

from voco.report.html import render_page
from voco.report.outputs import gather_outputs
from voco.report.paper import ORDER_1, EvaluatedFigures, paper_rows, retained

# Table 1's own row "rate" of VoCo-LLaMA and of average pooling
PUBLISHED_RATES = {"voco": (82.5, 87.5, 81.2, 88.4, 80.0, 81.0, 85.2), "avg_pool": (65.0, 79.6, 68.1, 81.0, 63.8, 25.8, 65.2)}


@pytest.mark.parametrize("method", PUBLISHED_RATES)
def test_the_papers_rates_follow_from_its_scores(method: str) -> None:
    """Within the rounding of scores to one digit."""
    figures: EvaluatedFigures = {(benchmark, "voco", 1, False): 50.0 for benchmark in ORDER_1}
    rates = {row.benchmark: row.paper_retention for row in paper_rows(figures) if (row.table, row.method) == (1, method)}
    assert [rates[name] for name in ORDER_1] == pytest.approx(PUBLISHED_RATES[method], abs=0.11)


def test_only_what_was_evaluated_is_compared() -> None:
    figures: EvaluatedFigures = {
        ("POPE", "upper", 0, False): 86.0, ("POPE", "lower", 0, False): 56.0, ("POPE", "voco", 1, False): 80.0,
        ("POPE", "voco", 1, True): 70.0,
    }  # fmt: skip
    rows = paper_rows(figures)
    assert {row.benchmark for row in rows} == {"POPE"}  # tables 2 and 4 do not have it
    assert [(row.method, row.tokens, row.figure, row.retention) for row in rows] == [
        ("upper", 0, 86.0, 100.0), ("voco", 1, 80.0, pytest.approx(80.0)), ("avg_pool", 1, None, None),
        ("q_former", 1, None, None), ("lower", 0, 56.0, 0.0),
    ]  # fmt: skip
    assert paper_rows({("GQA", "voco", 1, True): 56.0})[-1].figure == 56.0
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
