"""The report on a small finished flow: its content, missing pieces, and that hostile text stays text."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import report.page_tags as page_tags
import report.report_world as report_world
from report.page_tags import Tags

from voco.errors import Refused
from voco.report import html as report_html
from voco.report import plots
from voco.report.answers_section import QUESTIONS_SHOWN, choose_questions
from voco.report.comparison import compare, headline
from voco.report.flow_layout import direct_parents
from voco.report.outputs import gather_outputs
from voco.run import manifest
from voco.store import storage
from voco.store.schemas import ALL


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return report_world.flow(tmp_path_factory.mktemp("flow"))


@pytest.fixture(scope="module")
def page(flow, tmp_path_factory):
    to = str(tmp_path_factory.mktemp("page") / "report.html")
    assert report_html.write_report([str(flow)], to, "A <title>") == to
    return Path(to).read_text()


def test_the_page_is_a_file_that_loads_nothing_and_runs_nothing(page):
    page_tags.assert_self_contained(page)


def test_hostile_text_stays_text(page):
    text = "".join(Tags(page).text)
    assert report_world.HOSTILE.replace("\x1b", "") in text.replace("\x1b", "")
    assert "<script>alert" not in page
    assert "<title>A &lt;title&gt;</title>" in page


def test_every_section_has_its_content(page):
    tags = Tags(page)
    text = " ".join("".join(tags.text).split())
    for part in (
        "Overview",
        "Data",
        "Training",
        "Comparison",
        "Answers side by side",
        "Run facts",
        "missing_media",
        "363",
        "360",
    ):
        assert part in text
    pictures = [attributes for name, attributes in tags.tags if name == "img"]
    assert len(pictures) == 2 + QUESTIONS_SHOWN  # one of the three samples cannot be decoded
    assert "cannot be decoded" in text
    marks = [attributes["title"] for name, attributes in tags.tags if name == "span" and attributes.get("class") == "mark"]
    assert len(marks) == 5 * QUESTIONS_SHOWN
    assert set(marks) == {"right", "wrong"}
    lines = [attributes.get("class", "") for name, attributes in tags.tags if name == "polyline"]
    assert sum(kind.startswith("mean") for kind in lines) == 4 * 7  # four runs: the loss, and six small plots
    assert "paired difference" in text


def test_a_flow_gives_its_stages_parents_first(flow):
    graph = gather_outputs([str(flow)])
    names = [output.name for output in graph.outputs]
    assert sorted(names) == sorted(path.parent.name for path in flow.glob("*/manifest.json"))
    for output in graph.outputs:
        assert all(parent.state == "unchanged" for parent in output.parents)
        assert all(names.index(graph.at(parent.uri).name) < names.index(output.name) for parent in output.parents)


def test_an_output_brings_its_parents(flow):
    names = {output.name for output in gather_outputs([str(flow / "eval-voco")]).outputs}
    assert names == {"eval-voco", "eval-upper", "eval-lower", "voco", "none", "base", "features-test", "ingest-test"}


def test_roles_order_and_bounds_of_the_comparison(flow):
    comparison = compare(gather_outputs([str(flow)]))[0]
    assert [row["stage"] for row in comparison.rows] == ["eval-upper", "eval-base", "eval-voco", "eval-avg-pool", "eval-lower"]
    assert [row["role"] for row in comparison.rows] == ["upper", "compared", "compared", "compared", "lower"]
    assert comparison.bound("upper") == comparison.rows[0]["score"] == comparison.rows[2]["upper_bound"]
    assert comparison.categories == ["colour", "count", "presence"]
    difference = comparison.differences[0]
    assert difference.value == pytest.approx(comparison.rows[2]["score"] - comparison.rows[3]["score"])
    assert difference.low < difference.value < difference.high
    assert difference.significant
    assert f"{100 * comparison.rows[2]['score']:.1f} % of 360 questions" in headline(comparison)
    assert "above average pooling" in headline(comparison)


def test_the_same_outputs_give_the_same_bytes(flow, page):
    assert report_html.render_page(gather_outputs([str(flow)]), "A <title>") == page


def _copy(flow, tmp_path):
    """A copy of the flow; its parents are still at the original paths."""
    return Path(shutil.copytree(flow, tmp_path / "copy"))


def test_missing_pieces_are_shown_as_missing(flow, tmp_path):
    copy = _copy(flow, tmp_path)
    for path in (
        "voco/metrics.parquet",
        "eval-voco/answers/part-00000.parquet",
        "eval-base/scores/part-00000.parquet",
        "run.json",
    ):
        (copy / path).unlink()
    shutil.rmtree(copy / "avg-pool")
    (copy / "avg-pool").mkdir()
    (copy / "avg-pool" / "run.json").write_text('{"run_id": "x", "job": {}}')
    graph = gather_outputs([str(copy), str(copy / "avg-pool"), str(copy / "nowhere")])
    text = Tags(report_html.render_page(graph, "t")).words
    assert "metrics are missing" in text
    assert "eval-base: scores are missing" in text
    assert "answers are missing" in text
    assert "avg-pool (unfinished: it has no manifest)" in text
    assert "nowhere (does not exist)" in text


def test_a_changed_or_absent_parent_is_reported(tmp_path):
    report_world.ingest(tmp_path)
    report_world.features(tmp_path)
    path = f"{tmp_path}/ingest-test/manifest.json"
    storage.write_json(path, {**storage.read_json(path), "seconds": 1.0})
    assert gather_outputs([f"{tmp_path}/features-test"]).outputs[-1].parents[0].state == "changed"
    shutil.rmtree(tmp_path / "ingest-test")
    graph = gather_outputs([f"{tmp_path}/features-test"])
    assert graph.outputs[0].parents[0].state == "absent"
    page = report_html.render_page(graph, "t")
    assert 'class="stage absent"' in page
    assert "No scores: these outputs contain no finished evaluation" in page
    assert "These outputs contain no training output" in page


def test_nothing_finished_is_refused(tmp_path):
    with pytest.raises(Refused, match="expected a finished output"):
        gather_outputs([str(tmp_path / "none")])


def test_the_choice_of_questions_ignores_results_and_takes_no_sample_twice():
    category = {(f"s{index // 3}", index % 3): ("a", "b", "c")[index % 3] for index in range(90)}
    chosen = choose_questions(category, 12)
    assert len({sample for sample, _ in chosen}) == 12
    assert [category[key] for key in chosen] == ["a", "b", "c"] * 4
    assert choose_questions(dict(reversed(category.items())), 12) == chosen
    assert len(choose_questions({("s", index): "a" for index in range(5)}, 12)) == 1


def test_there_is_no_arrow_where_a_longer_path_leads_to_the_same_stage():
    parents = {"a": [], "b": ["a"], "c": ["a", "b"]}
    assert direct_parents("c", parents) == ["b"]


def test_a_mean_is_over_a_window_and_ticks_are_round():
    assert plots.smooth(np.array([0.0, 3.0, 0.0, 3.0])) == pytest.approx([1.5, 1.0, 2.0, 1.5])
    assert plots.nice_ticks(0, 73) == [0, 20, 40, 60, 80]
    assert plots.nice_ticks(1, 1)[0] < 1
    x, y = plots.downsample(np.arange(1000.0), np.arange(1000.0), 100)
    assert len(x) == 100
    assert x[0] == y[0] == 4.5


def test_the_pipeline_writes_page_summary_and_manifest(flow, tmp_path, capsys):
    from pipelines import report

    inputs = {"outputs": [str(flow / "eval-voco"), str(flow / "eval-avg-pool")]}
    job = report_world.job(tmp_path, "report", "report", inputs=inputs, report={})
    done = report.run(job, manifest.job_run_id(job))
    printed = capsys.readouterr().out
    assert "VoCo, N=1" in printed
    assert f"{job.output}/report.html" in printed
    assert manifest.read_manifest(job.output) == done
    output = gather_outputs([job.output]).at(job.output)
    summary = output.read("summary").to_pylist()
    assert storage.read_json(f"{job.output}/summary.json") == summary
    assert "score %" in storage.read_bytes(f"{job.output}/summary.txt").decode()
    assert [row["role"] for row in summary if row["category"] == "all"] == ["upper", "compared", "compared", "lower"]
    assert "average pooling" in Path(job.output, "report.html").read_text()


def test_outputs_and_report_can_be_on_s3(flow, s3_server):
    (s3_server / "bucket").mkdir()
    for name in ("eval-voco", "ingest-test"):
        storage.put_directory(flow / name, f"s3://bucket/{name}")
    to = report_html.write_report(["s3://bucket/eval-voco", "s3://bucket/ingest-test"], "s3://bucket/report.html", "On S3")
    page = storage.read_bytes(to).decode()
    assert "On S3" in page
    assert "s3://bucket/eval-voco" in page
    assert page.count("data:image/png") >= 2 + QUESTIONS_SHOWN


def parents(root):
    """The inputs of evaluations of the checkpoints `none` and `voco`."""
    root.mkdir(exist_ok=True)
    report_world.ingest(root)
    report_world.features(root)
    report_world.training(root, "base", "none", 0.5)
    for method in ("none", "voco"):
        report_world.training(root, method, method, 0.5)


def test_an_evaluation_of_several_n_has_a_row_for_each(tmp_path):
    """Each row has its own answers: the differences equal those of one evaluation per N."""
    apart, together = tmp_path / "apart", tmp_path / "together"
    tables = {n: report_world.answers("eval-voco", "voco", skill, n=n) for n, skill in ((1, 0.2), (2, 0.35), (4, 0.4))}
    fast = report_world.answers("eval-fastv", "fastv", 0.1, n=64)
    for root in (apart, together):
        parents(root)
        report_world.evaluation(root, "eval-fastv", "none", fast, {})
    report_world.evaluation(together, "eval-voco", "voco", pa.concat_tables(tables.values()), {})
    for n, table in tables.items():
        report_world.evaluation(apart, f"eval-voco{n}", "voco", table, {})
    ((joint,), (separate,)) = (
        compare(gather_outputs([str(path) for path in sorted(root.glob("eval-*"))])) for root in (together, apart)
    )
    labels = ["VoCo, N=1", "VoCo, N=2", "VoCo, N=4", "FastV, N=64"]
    assert sorted(row["label"] for row in joint.rows) == sorted(labels)
    assert {row["label"]: (row["score"], row["cache_bytes"]) for row in joint.rows} == {
        row["label"]: (row["score"], row["cache_bytes"]) for row in separate.rows
    }
    assert not joint.unpaired
    assert len(joint.differences) == 3 + 3  # each pair of N, and each N against FastV
    assert sorted(map(repr, joint.differences)) == sorted(map(repr, separate.differences))
    to = report_html.write_report([str(path) for path in together.glob("eval-*")], str(tmp_path / "r.html"), "r")
    text = Tags(Path(to).read_text()).words
    assert all(label in text for label in labels)
    assert "7 GFLOP without a cache" in text


def test_frame_variants_at_several_n_have_different_labels(tmp_path):
    parents(tmp_path)
    for method in ("voco", "shuffled_frames"):
        tables = [report_world.answers(method, method, 0.1 * n, n=n, checkpoint="video") for n in (1, 2)]
        report_world.evaluation(tmp_path, f"eval-{method[:4]}", "voco", pa.concat_tables(tables), {})
    (comparison,) = compare(gather_outputs([str(path) for path in tmp_path.glob("eval-*")]))
    assert {row["label"] for row in comparison.rows} == {
        "VoCo, N=1", "VoCo, N=2", "frames shuffled, N=1", "frames shuffled, N=2",
    }  # fmt: skip
    overall = [difference for difference in comparison.differences if difference.category == ALL]
    pairs = {(difference.label, difference.other) for difference in overall if difference.other_method != "voco"}
    assert pairs == {("VoCo, N=1", "frames shuffled, N=1"), ("VoCo, N=2", "frames shuffled, N=2")}
