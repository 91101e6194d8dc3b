"""The comparison as text tables, and numbers with units."""

import pytest

from voco.report.table import bytes_text, flops_text, seconds_text, text_table, text_tables

ROW = {
    "benchmark": "scenes", "category": "all", "method": "voco", "n": 1, "label": "VoCo, N=1", "role": "compared",
    "score": 0.485, "score_low": 0.47, "score_high": 0.5, "retention": 0.6112, "retention_low": None, "retention_high": None,
    "share_of_upper": None, "upper_bound": 0.6, "share_of_upper_low": None, "share_of_upper_high": None,
    "official_name": "accuracy", "official": 0.485, "official_low": 0.47, "official_high": 0.5,
    "cache_bytes": 4096, "latency_s": None,
}  # fmt: skip


def test_columns_are_aligned_and_missing_figures_are_shown():
    other = {**ROW, "label": "lower bound", "role": "lower", "retention": None, "score": 1.0, "official": 1.0}
    lines = text_table([ROW, other]).split("\n")
    head = "method score % 95 % retention % 95 % of upper % 95 % cache/view s/question"
    assert " ".join(lines[0].split()) == head
    assert lines[2].startswith("VoCo, N=1       48.5  47.0 to 50.0         61.1")
    assert lines[2].count("missing") == 2
    assert lines[3].split()[2:4] == ["100.0", "47.0"]
    assert lines[3].count("missing") == 1  # only the latency: a bound has no retention
    assert {line.find("4.0 KiB") for line in lines[2:]} != {-1}


def test_plain_rows_of_scores_work_and_categories_and_benchmarks_get_columns():
    plain = {key: value for key, value in ROW.items() if key not in ("label", "role")}
    head, _, first, second = text_table([plain, {**plain, "category": "count", "benchmark": "gqa"}]).split("\n")
    assert head.startswith("benchmark  category  method")
    assert first.split()[:4] == ["scenes", "all", "voco", "N=1"]
    assert second.split()[:2] == ["gqa", "count"]
    assert text_table([]) == "no scores"


def test_retention_without_bounds_is_not_missing_and_needs_no_column():
    unbounded = {**ROW, "label": "base", "retention": None, "upper_bound": None}
    assert text_table([ROW, unbounded]).split("\n")[-1].split()[5:] == ["-", "-", "4.0", "KiB", "missing"]
    assert "retention" not in text_table([unbounded])


def test_each_benchmark_has_a_table_under_its_name():
    images = {**ROW, "view": "image", "questions": 1200, "samples": 400}
    clips = {**images, "benchmark": "clips", "view": "frame", "retention": None, "upper_bound": None, "samples": 40}
    first, second = text_tables([images, clips, {**images, "label": "base"}]).split("\n\n")
    assert first.split("\n")[0] == "scenes: 1,200 questions about 400 images"
    assert len(first.split("\n")) == 5
    assert "cache/image" in first
    assert second.split("\n")[0] == "clips: 1,200 questions about 40 videos"
    assert second.split("\n")[1].split() == ["method", "score", "%", "95", "%", "cache/frame", "s/question"]
    assert text_tables([]) == "no scores"


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (bytes_text, 96, "96 B"), (bytes_text, 1536, "1.5 KiB"), (bytes_text, 317_000_000, "302 MiB"),
        (bytes_text, None, "missing"),
        (seconds_text, 0.0021, "2.1 ms"), (seconds_text, 12.34, "12.3 s"), (seconds_text, 150, "2 min 30 s"),
        (seconds_text, 2e-5, "20 µs"), (seconds_text, 0, "0 s"), (seconds_text, 9000, "2.5 h"), (seconds_text, None, "missing"),
        (flops_text, 1.2e12, "1.2 TFLOP"), (flops_text, 34.0, "34 FLOP"), (flops_text, None, "missing"),
    ],
)  # fmt: skip
def test_numbers(function, value, text):
    assert function(value) == text
