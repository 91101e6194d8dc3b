"""The report on the complete flow: a sweep's trials, real clips and their caches, and answers to fewer or shuffled frames."""

from __future__ import annotations

import base64
import io
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import report.full_flow_world as full_flow_world
import report.report_world as report_world
import video_world
from PIL import Image
from report.page_tags import Tags, assert_self_contained

from voco.evaluate.retention import bootstrap
from voco.evaluate.scores import join_correct
from voco.report import html as report_html
from voco.report.answers_section import QUESTIONS_SHOWN
from voco.report.comparison import compare, headline
from voco.report.flow_layout import layout_flow
from voco.report.frames_section import frames_section
from voco.report.outputs import gather_outputs
from voco.report.pictures import FRAME_GAP, FRAMES_SHOWN, picture
from voco.report.ratio_plot import RatioPoint, ratio_plot
from voco.report.sweep_section import sweep_section
from voco.report.training_section import training_section
from voco.run import manifest
from voco.store import parquet, schemas, storage


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return full_flow_world.flow(tmp_path_factory.mktemp("flow"))


@pytest.fixture(scope="module")
def page(flow):
    return report_html.render_page(gather_outputs([str(flow)]), "Full")


def section(page: str, name: str) -> Tags:
    match = re.search(rf'<section id="{name}">.*?</section>', page, re.S)
    assert match is not None
    return Tags(match[0])


def test_the_page_is_a_file_that_loads_nothing_and_runs_nothing(page):
    assert_self_contained(page)
    assert "<script>alert" not in page


def test_a_sweep_brings_its_trials_and_all_their_inputs(flow):
    graph = gather_outputs([str(flow / "sft")])
    names = {output.name for output in graph.outputs}
    assert {"none-1", "voco-1", "voco-4", "avg-pool-1", "lower-none-1", "answers-voco-4", "base", "align", "cc3m"} <= names
    assert "video" not in names
    sweep = graph.at(str(flow / "sft"))
    assert [name for name, _ in graph.trials(sweep)] == ["none-1", "voco-1", "voco-4", "avg-pool-1"]
    assert graph.sweep_of(str(flow / "sft/runs/voco-4/answers")) == (sweep, "voco-4")
    assert graph.sweep_of(str(flow / "base")) is None


def test_a_sweep_that_was_moved_still_has_its_trials(flow, tmp_path):
    moved = shutil.copytree(flow / "sft", tmp_path / "sft")
    graph = gather_outputs([str(moved)])
    assert [output.uri for _, output in graph.trials(graph.at(str(moved)))] == [
        f"{moved}/runs/{name}/train" for name in ("none-1", "voco-1", "voco-4", "avg-pool-1")
    ]
    assert sweep_section(graph.at(str(moved)))["plot"]


def test_a_flows_stages_are_read_from_any_directory_and_after_a_move(flow, tmp_path, monkeypatch):
    names = [path.parent.name for path in flow.glob("*/manifest.json")]
    stages = [{"name": name, "output": f"run/{name}"} for name in [*names, "later"]]
    run = {"run_id": "demo-0", "root": str(tmp_path), "job": {"flow": {"stages": stages}}}
    shutil.copytree(flow, tmp_path / "run")
    storage.write_json(f"{tmp_path}/run/run.json", run)
    monkeypatch.chdir("/")
    graph = gather_outputs([str(tmp_path / "run")])
    assert graph.missing == ((f"{tmp_path}/run/later", "does not exist"),)
    (tmp_path / "run").rename(tmp_path / "moved")
    graph = gather_outputs([str(tmp_path / "moved")])
    assert {f"{tmp_path}/moved/{name}" for name in names} <= {output.uri for output in graph.outputs}
    assert graph.missing == ((f"{tmp_path}/run/later", "does not exist"),)


def test_trials_are_plotted_at_their_ratios_with_the_bounds(flow, page):
    item = sweep_section(gather_outputs([str(flow)]).at(str(flow / "sft")))
    ratios = {(trial["row"]["trial"], trial["bound"]): trial["ratio"] for trial in item["trials"]}
    assert ratios == {
        ("none-1", "upper bound"): 1.0, ("none-1", "lower bound"): 1.0, ("voco-1", ""): 64.0, ("voco-4", ""): 16.0,
        ("avg-pool-1", ""): 64.0,
    }  # fmt: skip
    assert item["keys"] == ["compression.method", "compression.tokens"]
    assert item["legend"] == ["VoCo", "average pooling"]
    plot = Tags(item["plot"])
    assert sum(name == "circle" for name, _ in plot.tags) == 3
    classes = [attributes.get("class", "") for _, attributes in plot.tags]
    assert classes.count("bound") == 2
    assert classes.count("whisker") == 3
    assert sum(name.startswith("joined") for name in classes) == 1  # VoCo's two ratios
    retention = {trial["row"]["trial"]: trial["row"]["retention"] for trial in item["trials"] if not trial["bound"]}
    for name in ("voco-1", "voco-4", "avg-pool-1"):
        assert f"{100 * retention[name]:.1f} %" in plot.words
        assert f"{100 * retention[name]:.1f}" in section(page, "sweep").words
    assert "104.0 s" in section(page, "sweep").words


def test_a_missing_ratio_is_reported(flow, tmp_path):
    moved = shutil.copytree(flow / "sft", tmp_path / "sft")
    (moved / "runs/voco-4/train/model/config.json").unlink()
    assert sweep_section(gather_outputs([str(moved)]).at(str(moved)))["left_out"] == ["voco-4: its compression ratio is missing"]
    (moved / "trials/part-00000.parquet").unlink()
    assert "the table of trials is missing" in section(report_html.render_page(gather_outputs([str(moved)]), "t"), "sweep").words


def test_points_are_drawn_at_their_values():
    def circles_and_bounds(*points):
        tags = Tags(ratio_plot("t", "y", points, [("upper", 100.0), ("lower", 0.0)])).tags
        circles = [(float(attributes["cx"]), float(attributes["cy"])) for name, attributes in tags if name == "circle"]
        lines = [float(attributes["y1"]) for _, attributes in tags if attributes.get("class") == "bound"]
        return circles, lines

    circles, (upper, lower) = circles_and_bounds(
        *(RatioPoint(f"{ratio}", "a", ratio, value, None, None) for ratio, value in ((16, 75.0), (64, 50.0), (256, 25.0)))
    )
    xs, ys = zip(*circles, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)  # factors of four on a log axis
    assert (np.array(ys) - upper) / (lower - upper) == pytest.approx([0.25, 0.5, 0.75], abs=0.01)
    (first, second), _ = circles_and_bounds(RatioPoint("1", "a", 64, 50, 40, 60), RatioPoint("2", "b", 64, 50, 40, 60))
    assert first[0] < second[0]  # side by side, without overlap
    with pytest.raises(ValueError, match="above 0"):
        circles_and_bounds(RatioPoint("1", "a", 0.0, 50, None, None))


def test_a_frames_bytes_equal_the_formula(flow, page):
    item = frames_section(gather_outputs([str(flow)]).at(str(flow / "frames")))
    assert item["formula"] == 2 * 2 * 2 * 8 * 1 * 4  # keys and values, layers, kv_heads, head_dim, N, float32
    assert item["equal"] is True
    assert (item["frames"], item["media"]) == (4 * 64, 64)
    assert item["stored_per_frame"] == item["stored"] / item["frames"] > item["measured"]
    words = section(page, "frames").words
    assert "2 × 2 layers × 2 heads × 8 numbers × N=1 × 4 bytes of float32" in words
    assert "exactly that of the formula" in words


def test_bytes_that_differ_from_the_formula_are_reported(flow, tmp_path):
    moved = shutil.copytree(flow / "frames", tmp_path / "frames")
    path = f"{moved}/manifest.json"
    original = storage.read_json(path)
    storage.write_json(path, {**original, "statistics": {**original["statistics"], "bytes_per_frame": 300}})
    run = storage.read_json(f"{moved}/run.json")
    run["job"]["frame_cache"] = {"frames": 4}
    storage.write_json(f"{moved}/run.json", run)
    words = section(report_html.render_page(gather_outputs([str(moved)]), "t"), "frames").words
    assert "differs from the formula" in words
    assert "4 per video" in words
    shutil.rmtree(moved / "frame_cache")
    storage.write_json(path, {**original, "statistics": {}})
    assert "cannot be checked" in section(report_html.render_page(gather_outputs([str(moved)]), "t"), "frames").words


def test_a_clip_is_a_strip_of_its_own_frames_in_order():
    row = video_world.sample_rows(1)[0]
    shown = picture(row)
    assert shown.wide
    assert shown.note == "4.0 s, 2 fps, 8 frames, 64 x 64; shown: 0, 1, 2, 3 s"
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown.uri.split(",")[1]))).convert("L")).astype(float)
    assert strip.shape == (64, 4 * 64 + 3 * FRAME_GAP)
    shades = [strip[:, frame * (64 + FRAME_GAP) + 32].mean() for frame in range(4)]
    rises = row["conversations"][0]["turns"][1]["text"] == "brighter"
    assert shades == sorted(shades, reverse=not rises)
    assert len(set(shades)) == 4
    data = video_world.encode(list(range(20, 240, 10)))  # 22 seconds
    medium = {**row["media"][0], "bytes": data}
    assert picture({**row, "media": [medium]}).width == FRAMES_SHOWN * (64 + FRAME_GAP) - FRAME_GAP


def test_data_shows_captions_and_clips_and_reports_what_it_cannot_show(page):
    data = section(page, "data")
    assert "four shapes on a pale ground" in data.words
    for name in ("cc3m", "webvid", "clips", "clips-test", "shapes", "ingest-test"):
        assert f"{name} " in data.words
    assert data.words.count("video not shown: not a video that can be opened") == 1
    assert data.words.count("video not shown: its bytes are not in the table (4.0 s, 2 fps, 8 frames, 64 x 64)") == 1
    assert sum(attributes.get("class") == "strip" for name, attributes in data.tags if name == "img") == 3 + 3 + 1


def test_each_kind_of_training_has_its_own_axes(flow, page):
    training = section(page, "training")
    titles = [attributes["aria-label"] for name, attributes in training.tags if attributes.get("class") == "plot"]
    assert titles == [
        f"{kind}: training loss by step" for kind in ("Alignment", "Image SFT", "Trials of the sweep sft", "Video SFT")
    ]
    plots = training_section(gather_outputs([str(flow)]))["groups"]
    means = [sum(attributes.get("class", "").startswith("mean") for _, attributes in Tags(group["plot"]).tags) for group in plots]
    assert means == [1, 1, 4, 1]
    small = [len(group["small"]) for group in plots]
    assert small == [6, 7, 7, 7]  # no MFU on a CPU, and the alignment has no validation
    table = training.words[training.words.index("supervised tokens") :]
    for name in ("alignAlignment", "baseImage SFT", "voco-4Trials of the sweep sft", "videoVideo SFT"):
        assert name in table


def test_benchmarks_are_compared_separately_and_frame_variants_have_labels(flow):
    scenes, clips = compare(gather_outputs([str(flow)]))
    assert [row["label"] for row in scenes.rows] == [
        "upper bound", "VoCo, N=4", "uncompressed, base", "VoCo, N=1", "average pooling, N=1", "lower bound",
    ]  # fmt: skip
    assert [row["label"] for row in clips.rows] == ["VoCo, N=1", "frames shuffled", "one frame only"]
    assert (scenes.view, scenes.bounded, clips.view, clips.bounded) == ("image", True, "frame", False)
    words = headline(clips)
    assert "frames shuffled" in words
    assert "one frame only" in words
    assert "bounds" not in words


def test_frame_variants_have_paired_differences_by_category(flow, page):
    clips = compare(gather_outputs([str(flow)]))[1]
    by_key = {(difference.other, difference.category): difference for difference in clips.differences}
    assert set(by_key) == {(other, name) for other in ("frames shuffled", "one frame only") for name in ("all", "kind", "order")}
    tables = {
        name: parquet.read_table(str(flow / stage / "answers/part-00000.parquet"))
        for name, stage in (("in order", "answers-video"), ("shuffled", "answers-shuffled"))
    }
    samples, categories, correct = join_correct(tables)
    order = categories == "order"
    resampled = bootstrap({name: values[order] for name, values in correct.items()}, samples[order], 2000, 0)
    difference = by_key["frames shuffled", "order"]
    assert difference.value == pytest.approx(resampled.scores["in order"] - resampled.scores["shuffled"])
    assert (difference.low, difference.high) == resampled.difference("in order", "shuffled")
    assert difference.significant
    assert difference.questions == full_flow_world.CLIPS
    comparison = section(page, "comparison")
    assert f"{100 * difference.value:+.1f}{100 * difference.low:+.1f} to {100 * difference.high:+.1f}" in comparison.words
    assert sum(attributes.get("class") == "significant" for _, attributes in comparison.tags) >= 1


def test_frame_variants_of_another_checkpoint_are_not_paired(flow, tmp_path):
    copy = Path(shutil.copytree(flow / "answers-shuffled", tmp_path / "answers-shuffled"))
    scores = parquet.read_table(str(copy / "scores/part-00000.parquet")).to_pylist()
    moved = [{**row, "checkpoint": "/another"} for row in scores]
    table = report_world.pa.Table.from_pylist(moved, schema=schemas.SCORES)
    parquet.write_table(str(copy / "scores/part-00000.parquet"), [table], schemas.SCORES)
    (comparison,) = compare(gather_outputs([str(copy), str(flow / "answers-video")]))[-1:]
    assert comparison.benchmark == "clips"
    assert comparison.differences == []


def test_clips_are_shown_beside_their_answers(page):
    answers = section(page, "answers")
    pictures = [attributes for name, attributes in answers.tags if name == "img"]
    assert sum(attributes.get("class") == "strip" for attributes in pictures) == QUESTIONS_SHOWN
    assert len(pictures) == 2 * QUESTIONS_SHOWN
    marks = [attributes for name, attributes in answers.tags if name == "span" and attributes.get("class") == "mark"]
    assert len(marks) == (6 + 3) * QUESTIONS_SHOWN


def test_the_pipeline_prints_a_table_for_each_benchmark(flow, tmp_path, capsys):
    from pipelines import report

    inputs = {"outputs": [str(flow / name) for name in ("sft", "answers-base", "answers-video", "answers-shuffled")]}
    job = report_world.job(tmp_path, "report", "report", inputs=inputs, report={})
    report.run(job, manifest.job_run_id(job))
    printed = capsys.readouterr().out
    scenes, clips, *_ = printed.split("\n\n")
    assert scenes.startswith("scenes: 360 questions about 120 images\n")
    assert len(scenes.split("\n")) == 3 + 6
    assert clips.startswith("clips: 120 questions about 60 videos\n")
    assert "VoCo, N=1 is " in clips
    summary = storage.read_json(f"{job.output}/summary.json")
    keys = [(row["output"], row["category"]) for row in summary]
    assert len(keys) == len(set(keys))
    assert {row["view"] for row in summary if row["benchmark"] == "clips"} == {"frame"}


def boxes(page: str) -> list[tuple[str, float, float, float, float]]:
    """Name, left, top, right and bottom of each box of the flow."""
    matches = re.findall(
        r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" rx="8"/><text class="stage-name"[^>]*>([^<]*)<', page
    )
    return [(name, float(x), float(y), float(x) + float(w), float(y) + float(h)) for x, y, w, h, name in matches]


def test_the_flow_has_a_box_per_stage_and_trials_inside_their_sweeps(flow, page):
    drawn = boxes(page)
    assert sorted(name for name, *_ in drawn) == sorted(path.parent.name for path in flow.glob("*/manifest.json"))
    for index, (name, left, top, right, bottom) in enumerate(drawn):
        for other, near, high, far, low in drawn[index + 1 :]:
            assert right <= near or far <= left or bottom <= high or low <= top, (name, other)
    picture = re.search(r'<svg class="flow".*?</svg>', page, re.S)
    assert picture is not None
    for trial in ("none-1", "voco-1", "voco-4", "avg-pool-1"):
        assert f">{trial}</text>" in picture[0]


def test_arrows_do_not_cross_boxes():
    parents = {"a": [], "b": ["a"], "c": ["b"], "d": ["c"], "x": ["a"], "y": ["x", "d"], "z": ["x"], "w": ["z", "y"]}
    layout = layout_flow(parents, 100, dict.fromkeys(parents, 40) | {"b": 120})
    for arrow in layout.arrows:
        for (x1, y1), (x2, y2) in itertools.pairwise(arrow):
            assert y1 <= y2
            for left, top in layout.boxes.values():
                if x1 == x2:  # straight down past a layer
                    assert not (left < x1 < left + 100 and y1 < top + 40 and y2 > top + 0.001 and y2 - y1 > 0), (x1, y1, y2)
    assert {name: round(top) for name, (_, top) in layout.boxes.items()}["w"] == max(
        round(top) for _, top in layout.boxes.values()
    )


def test_boxes_without_arrows_are_in_rows_below():
    layout = layout_flow({"a": [], "b": ["a"], **{f"x{index}": [] for index in range(7)}}, 100, {"a": 40, "b": 40} | {
        f"x{index}": 40 for index in range(7)
    })  # fmt: skip
    tops = [layout.boxes[f"x{index}"][1] for index in range(7)]
    assert tops[0] == tops[4] > layout.boxes["b"][1] + 40
    assert tops[5] == tops[6] >= tops[0] + 40
    assert layout.height >= tops[6] + 40
    assert layout.width >= layout.boxes["x4"][0] + 100
    assert layout_flow({"a": []}, 100, {"a": 40}).boxes == {"a": (6, 6)}


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not on PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_chromium_shows_it_without_console_messages(page, tmp_path, width):
    path = tmp_path / "report.html"
    path.write_text(page)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += f"--disable-component-update --disable-sync --enable-logging=stderr --user-data-dir={tmp_path / 'profile'} "
    command = ["chromium", *flags.split(), f"--screenshot={tmp_path / 'shot.png'}", f"--window-size={width},1600"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=100, check=True)
    assert "CONSOLE" not in done.stderr
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("L"))
    assert shot.shape[1] == width
    assert (shot.std(axis=1) > 1).mean() > 0.5  # most pixel rows of the first page are not blank
