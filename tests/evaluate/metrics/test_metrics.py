"""What holds for every metric, which one a benchmark has by default, and the run ids that follow from it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from voco.errors import Refused
from voco.evaluate.metrics import Metric, accuracy_figures, figure_text, get_metric, mark_answer, official_figures
from voco.job.benchmarks import BENCHMARK_METRICS, default_metric
from voco.job.load import build_job
from voco.job.run_id import compute_run_id, hashed_content
from voco.job.tables import METRICS

FEWEST_CASES = 40
OWN = [name for name, row in METRICS.items() if row.module is None]
TABLES = [name for name in OWN if Path(__file__).with_name(f"test_{name}.py").exists()]


@pytest.mark.parametrize("name", TABLES)
def test_every_rule_has_its_table_of_cases(name: str) -> None:
    spec = importlib.util.spec_from_file_location(f"cases_{name}", Path(__file__).with_name(f"test_{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(module.CASES) >= FEWEST_CASES
    assert len({str(case) for case in module.CASES}) == len(module.CASES)
    assert {0.0, 1.0} <= {case[-1] for case in module.CASES}


def test_there_is_a_table_for_each_image_and_video_rule() -> None:
    assert len(TABLES) >= 13


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("prediction", ["", " ", "\n\t"])
@pytest.mark.parametrize("reference", ["", ".", "...", "a", "A", "no"])
def test_an_empty_prediction_is_wrong_unless_the_rule_says_otherwise(name: str, prediction: str, reference: str) -> None:
    """POPE reads it as yes, and `...` too: every label but `no` is yes there."""
    expected = float(name == "pope" and reference != "no")
    assert mark_answer(get_metric(name), prediction, [reference]) == expected


@pytest.mark.parametrize("name", OWN)
def test_a_metric_names_itself_and_its_published_figure(name: str) -> None:
    metric = get_metric(name)
    answer = {"prediction": "A", "references": ["A"], "mark": 1.0, "category": "OCR", "image": "a.png", "question_id": 1}
    assert metric.name == name
    assert metric.headline in official_figures(metric, [answer, answer])
    assert mark_answer(metric, "A", []) is None
    assert metric.mark("A", [], *([[]] if metric.reads_choices else [])) == 0.0


def test_answers_without_a_mark_are_in_no_figure() -> None:
    rows = [{"mark": 1.0, "category": "a"}, {"mark": None, "category": "b"}, {"mark": 0.0, "category": None}]
    assert official_figures(get_metric("gqa"), rows) == {"accuracy": 0.5, "a/accuracy": 1.0, "none/accuracy": 0.0}
    assert official_figures(get_metric("gqa"), rows[1:2]) == {}


def test_one_category_has_no_figure_beside_the_total() -> None:
    assert accuracy_figures([{"mark": 0.5, "category": "a"}]) == {"accuracy": 0.5}


def test_a_metric_of_a_package_needs_a_name_and_a_mark_only() -> None:
    metric = Metric("contains", lambda prediction, references: any(reference in prediction for reference in references))
    mark = mark_answer(metric, "a red kite", ["kite"], ["kite", "boat"])
    assert mark == 1.0
    assert isinstance(mark, float)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.859883, "0.8599"), (1.0, "1.0000"), (0.0, "0.0000"), (1, "1"), (0, "0"), (1487.2, "1,487.20"), (200.0, "200")],
)
def test_figures_for_people(value: float, text: str) -> None:
    assert figure_text(value) == text


@pytest.mark.parametrize(
    ("benchmark", "metric"),
    [
        ("gqa", "gqa"), ("GQA-testdev-balanced", "gqa"),
        ("vqav2", "vqa"), ("VQAv2", "vqa"), ("vqa-v2", "vqa"), ("vqav2_val", "vqa"), ("vizwiz-val", "vqa"), ("VizWiz", "vqa"),
        ("textvqa", "textvqa"), ("TextVQA-val", "textvqa"),
        ("pope", "pope"), ("pope-adversarial", "pope"), ("POPE/random", "pope"),
        ("mme", "mme"), ("MME", "mme"), ("mmbench", "mmbench"), ("mmbench-cn-dev", "mmbench"),
        ("MMBench_DEV_EN_20230712", "mmbench"),
        ("seed", "seed"), ("seed-bench", "seed"), ("SEED-Bench-image", "seed"), ("scienceqa", "scienceqa"),
        ("sqa-img", "scienceqa"),
        ("msvd-qa", "exact"), ("MSRVTT-QA", "exact"), ("activitynet-qa-test", "exact"),
        ("scenes", "gqa"), ("clips", "gqa"), ("mme-realworld", "gqa"),
        ("mm-vet", "gqa"), ("popeye", "gqa"), ("", "gqa"), ("val", "gqa"),
    ],
)  # fmt: skip
def test_the_metric_of_a_benchmark(benchmark: str, metric: str) -> None:
    assert default_metric(benchmark) == metric


def test_the_table_of_benchmarks_names_metrics() -> None:
    assert set(BENCHMARK_METRICS.values()) <= set(METRICS)
    with pytest.raises(Refused, match=r"metrics: expected one of gqa, vqa, .*, got vga"):
        get_metric("vga")


def job(**block: Any) -> Any:
    inputs = {"samples": [{"uri": "samples"}], "checkpoint": "model", "features": "features"}
    return build_job("job", {"name": "e", "kind": "evaluate", "inputs": inputs, "output": "out", "evaluate": block})


def run_id(**block: Any) -> str:
    return compute_run_id(job(**block), {})


def test_run_ids_under_gqa_are_those_of_before() -> None:
    """The ids are those of commit 6bf8f8a, when every benchmark without a metric had gqa."""
    assert "metric" not in hashed_content(job(benchmark="scenes"))["evaluate"]
    assert run_id(benchmark="gqa") == "e-7e7bcc68"
    assert run_id(benchmark="scenes") == "e-8b191857"
    assert run_id(benchmark="pope", metric="gqa") == "e-96c65c8b"


def test_a_benchmark_with_its_own_rule_has_a_new_run_id() -> None:
    """Its marks are others than before; naming the rule changes nothing."""
    assert run_id(benchmark="pope") == run_id(benchmark="pope", metric="pope")
    assert run_id(benchmark="pope") not in ("e-276ed441", run_id(benchmark="pope", metric="gqa"))
