"""The report on the whole flow: a sweep's trials, real clips and their caches, answers to less than the video."""

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
import report.report_world as report_world
import report.whole_world as whole_world
import video_world
from PIL import Image
from report.page_tags import Tags, assert_alone

from voco.evaluate.retention import bootstrap
from voco.evaluate.scores import join_correct
from voco.report import html as report_html
from voco.report.answers_section import QUESTIONS_SHOWN
from voco.report.comparison import compare, headline
from voco.report.flow_layout import layout_flow
from voco.report.frames_section import frames_section
from voco.report.outputs import gather_outputs
from voco.report.pictures import BETWEEN, FRAMES_SHOWN, picture
from voco.report.ratio_plot import Point, ratio_plot
from voco.report.sweep_section import sweep_section
from voco.run import manifest
from voco.store import parquet, schemas, storage


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return whole_world.flow(tmp_path_factory.mktemp("flow"))


@pytest.fixture(scope="module")
def page(flow):
    return report_html.render_page(gather_outputs([str(flow)]), "Whole")


def section(page: str, name: str) -> Tags:
    found = re.search(rf'<section id="{name}">.*?</section>', page, re.S)
    assert found is not None
    return Tags(found[0])


def test_the_page_is_one_file_that_asks_for_nothing_and_runs_nothing(page):
    assert_alone(page)
    assert "<script>alert" not in page


def test_one_sweep_brings_its_trials_and_all_that_they_read(flow):
    world = gather_outputs([str(flow / "sft")])
    names = {output.name for output in world.outputs}
    assert {"none-1", "voco-1", "voco-4", "avg-pool-1", "lower-none-1", "answers-voco-4", "base", "align", "cc3m"} <= names
    assert "video" not in names
    held = world.at(str(flow / "sft"))
    assert [name for name, _ in world.trials(held)] == ["none-1", "voco-1", "voco-4", "avg-pool-1"]
    assert world.sweep_of(str(flow / "sft/runs/voco-4/answers")) == (held, "voco-4")
    assert world.sweep_of(str(flow / "base")) is None


def test_a_sweep_that_was_moved_still_has_its_trials(flow, tmp_path):
    moved = shutil.copytree(flow / "sft", tmp_path / "sft")
    world = gather_outputs([str(moved)])
    assert [output.uri for _, output in world.trials(world.at(str(moved)))] == [
        f"{moved}/runs/{name}/train" for name in ("none-1", "voco-1", "voco-4", "avg-pool-1")
    ]
    assert sweep_section(world.at(str(moved)))["plot"]


def test_a_flows_stages_are_found_from_anywhere_and_where_they_were_moved_to(flow, tmp_path, monkeypatch):
    names = [path.parent.name for path in flow.glob("*/manifest.json")]
    stages = [{"name": name, "output": f"run/{name}"} for name in [*names, "later"]]
    run = {"run_id": "demo-0", "root": str(tmp_path), "job": {"flow": {"stages": stages}}}
    shutil.copytree(flow, tmp_path / "run")
    storage.write_json(f"{tmp_path}/run/run.json", run)
    monkeypatch.chdir("/")
    held = gather_outputs([str(tmp_path / "run")])
    assert held.missing == ((f"{tmp_path}/run/later", "not there"),)
    (tmp_path / "run").rename(tmp_path / "moved")
    held = gather_outputs([str(tmp_path / "moved")])
    assert {f"{tmp_path}/moved/{name}" for name in names} <= {output.uri for output in held.outputs}
    assert held.missing == ((f"{tmp_path}/run/later", "not there"),)


def test_the_trials_stand_at_their_ratios_with_the_bounds(flow, page):
    item = sweep_section(gather_outputs([str(flow)]).at(str(flow / "sft")))
    ratios = {(trial["row"]["trial"], trial["part"]): trial["ratio"] for trial in item["trials"]}
    assert ratios == {
        ("none-1", "upper bound"): 1.0, ("none-1", "lower bound"): 1.0, ("voco-1", ""): 64.0, ("voco-4", ""): 16.0,
        ("avg-pool-1", ""): 64.0,
    }  # fmt: skip
    assert item["keys"] == ["compression.method", "compression.tokens"]
    assert item["legend"] == ["VoCo", "average pooling"]
    plot = Tags(item["plot"])
    assert sum(name == "circle" for name, _ in plot.tags) == 3
    assert sum(held.get("class") == "bound" for _, held in plot.tags) == 2
    assert sum(held.get("class") == "whisker" for _, held in plot.tags) == 3
    assert sum(held.get("class", "").startswith("joined") for _, held in plot.tags) == 1  # VoCo's two ratios
    kept = {row["trial"]: row["retention"] for row in (trial["row"] for trial in item["trials"]) if row["retention"] is not None}
    for name in ("voco-1", "voco-4", "avg-pool-1"):
        assert f"{100 * kept[name]:.1f} %" in plot.words
        assert f"{100 * kept[name]:.1f}" in section(page, "sweep").words
    assert "104.0 s" in section(page, "sweep").words


def test_a_ratio_that_is_missing_is_said(flow, tmp_path):
    moved = shutil.copytree(flow / "sft", tmp_path / "sft")
    (moved / "runs/voco-4/train/model/config.json").unlink()
    assert sweep_section(gather_outputs([str(moved)]).at(str(moved)))["left_out"] == ["voco-4: its compression ratio is missing"]
    (moved / "trials/part-00000.parquet").unlink()
    assert "its trials' table is missing" in section(report_html.render_page(gather_outputs([str(moved)]), "t"), "sweep").words


def test_points_stand_where_their_values_are():
    def places(*points):
        tags = Tags(ratio_plot("t", "y", points, [("upper", 100.0), ("lower", 0.0)])).tags
        circles = [(float(held["cx"]), float(held["cy"])) for name, held in tags if name == "circle"]
        lines = [float(held["y1"]) for _, held in tags if held.get("class") == "bound"]
        return circles, lines

    circles, (upper, lower) = places(
        *(Point(f"{ratio}", "a", ratio, value, None, None) for ratio, value in ((16, 75.0), (64, 50.0), (256, 25.0)))
    )
    across, down = zip(*circles, strict=True)
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.2)  # factors of four on a log axis
    assert (np.array(down) - upper) / (lower - upper) == pytest.approx([0.25, 0.5, 0.75], abs=0.01)
    (one, two), _ = places(Point("1", "a", 64, 50, 40, 60), Point("2", "b", 64, 50, 40, 60))
    assert one[0] < two[0]  # side by side, not on one another
    with pytest.raises(ValueError, match="above 0"):
        places(Point("1", "a", 0.0, 50, None, None))


def test_a_frames_bytes_are_the_formulas(flow, page):
    item = frames_section(gather_outputs([str(flow)]).at(str(flow / "frames")))
    assert item["formula"] == 2 * 2 * 2 * 8 * 1 * 4  # keys and values, layers, kv_heads, head_dim, N, float32
    assert item["equal"] is True
    assert (item["frames"], item["media"]) == (4 * 64, 64)
    assert item["each"] == item["stored"] / item["frames"] > item["measured"]
    words = section(page, "frames").words
    assert "2 × 2 layers × 2 heads × 8 numbers × N=1 × 4 bytes of float32" in words
    assert "exactly the bytes of the formula" in words


def test_bytes_that_are_not_the_formulas_are_said(flow, tmp_path):
    moved = shutil.copytree(flow / "frames", tmp_path / "frames")
    place = f"{moved}/manifest.json"
    held = storage.read_json(place)
    storage.write_json(place, {**held, "statistics": {**held["statistics"], "bytes_per_frame": 300}})
    run = storage.read_json(f"{moved}/run.json")
    run["job"]["frame_cache"] = {"frames": 4}
    storage.write_json(f"{moved}/run.json", run)
    assert "not those of the formula" in section(report_html.render_page(gather_outputs([str(moved)]), "t"), "frames").words
    assert "4 of each" in section(report_html.render_page(gather_outputs([str(moved)]), "t"), "frames").words
    shutil.rmtree(moved / "frame_cache")
    storage.write_json(place, {**held, "statistics": {}})
    assert "cannot be checked" in section(report_html.render_page(gather_outputs([str(moved)]), "t"), "frames").words


def test_a_clip_is_a_strip_of_its_own_frames_in_order():
    row = video_world.sample_rows(1)[0]
    shown = picture(row)
    assert shown.wide
    assert shown.note == "4.0 s, 2 fps, 8 frames, 64 x 64; shown: 0, 1, 2, 3 s"
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown.uri.split(",")[1]))).convert("L")).astype(float)
    assert strip.shape == (64, 4 * 64 + 3 * BETWEEN)
    shades = [strip[:, at * (64 + BETWEEN) + 32].mean() for at in range(4)]
    rises = row["conversations"][0]["turns"][1]["text"] == "brighter"
    assert shades == sorted(shades, reverse=not rises)
    assert len(set(shades)) == 4
    data = video_world.encode(list(range(20, 240, 10)))  # 22 seconds
    medium = {**row["media"][0], "bytes": data}
    assert picture({**row, "media": [medium]}).width == FRAMES_SHOWN * (64 + BETWEEN) - BETWEEN


def test_data_shows_captions_and_clips_and_says_what_it_cannot_show(page):
    held = section(page, "data")
    assert "four shapes on a pale ground" in held.words
    for name in ("cc3m", "webvid", "clips", "clips-test", "shapes", "ingest-test"):
        assert f"{name} " in held.words
    assert held.words.count("video not shown: not a video that can be opened") == 1
    assert held.words.count("video not shown: its bytes are not in the table (4.0 s, 2 fps, 8 frames, 64 x 64)") == 1
    assert sum(held.get("class") == "strip" for name, held in held.tags if name == "img") == 3 + 3 + 1


def test_each_kind_of_training_has_axes_of_its_own(page):
    held = section(page, "training")
    titles = [attributes["aria-label"] for name, attributes in held.tags if name == "svg"]
    assert titles == [
        f"{kind}: training loss by step" for kind in ("Alignment", "Image SFT", "Trials of the sweep sft", "Video SFT")
    ]
    assert sum(attributes.get("class", "").startswith("mean") for _, attributes in held.tags) == 7
    table = held.words[held.words.index("tokens/s") :]
    for name in ("alignAlignment", "baseImage SFT", "voco-4Trials of the sweep sft", "videoVideo SFT"):
        assert name in table


def test_benchmarks_stand_apart_and_variants_have_names(flow):
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


def test_order_is_worth_a_paired_difference_by_category(flow, page):
    clips = compare(gather_outputs([str(flow)]))[1]
    found = {(one.other, one.category): one for one in clips.differences}
    assert set(found) == {(other, name) for other in ("frames shuffled", "one frame only") for name in ("all", "kind", "order")}
    tables = {
        name: parquet.read_table(str(flow / place / "answers/part-00000.parquet"))
        for name, place in (("in order", "answers-video"), ("shuffled", "answers-shuffled"))
    }
    samples, categories, correct = join_correct(tables)
    order = categories == "order"
    drawn = bootstrap({name: values[order] for name, values in correct.items()}, samples[order], 2000, 0)
    one = found["frames shuffled", "order"]
    assert one.value == pytest.approx(drawn.scores["in order"] - drawn.scores["shuffled"])
    assert (one.low, one.high) == drawn.difference("in order", "shuffled")
    assert one.settled
    assert one.questions == whole_world.CLIPS
    words = section(page, "comparison").words
    assert f"{100 * one.value:+.1f}{100 * one.low:+.1f} to {100 * one.high:+.1f}" in words
    assert sum(held.get("class") == "settled" for _, held in section(page, "comparison").tags) >= 1


def test_variants_of_another_checkpoint_are_not_paired(flow, tmp_path):
    copy = Path(shutil.copytree(flow / "answers-shuffled", tmp_path / "answers-shuffled"))
    scores = parquet.read_table(str(copy / "scores/part-00000.parquet")).to_pylist()
    moved = [{**row, "checkpoint": "/another"} for row in scores]
    table = report_world.pa.Table.from_pylist(moved, schema=schemas.SCORES)
    parquet.write_table(str(copy / "scores/part-00000.parquet"), [table], schemas.SCORES)
    (comparison,) = compare(gather_outputs([str(copy), str(flow / "answers-video")]))[-1:]
    assert comparison.benchmark == "clips"
    assert comparison.differences == []


def test_clips_stand_beside_their_answers(page):
    held = section(page, "answers")
    pictures = [attributes for name, attributes in held.tags if name == "img"]
    assert sum(one.get("class") == "strip" for one in pictures) == QUESTIONS_SHOWN
    assert len(pictures) == 2 * QUESTIONS_SHOWN
    marks = [attributes for name, attributes in held.tags if name == "span" and attributes.get("class") == "mark"]
    assert len(marks) == (6 + 3) * QUESTIONS_SHOWN


def test_the_pipeline_prints_a_table_for_each_benchmark(flow, tmp_path, capsys):
    from pipelines import report

    inputs = {"outputs": [str(flow / name) for name in ("sft", "answers-base", "answers-video", "answers-shuffled")]}
    made = report_world.job(tmp_path, "report", "report", inputs=inputs, report={})
    report.run(made, manifest.job_run_id(made))
    printed = capsys.readouterr().out
    scenes, clips, *_ = printed.split("\n\n")
    assert scenes.startswith("scenes: 360 questions about 120 images\n")
    assert len(scenes.split("\n")) == 3 + 6
    assert clips.startswith("clips: 120 questions about 60 videos\n")
    assert "VoCo, N=1 is " in clips
    summary = storage.read_json(f"{made.output}/summary.json")
    keys = [(row["output"], row["category"]) for row in summary]
    assert len(keys) == len(set(keys))
    assert {row["view"] for row in summary if row["benchmark"] == "clips"} == {"frame"}


def boxes(page: str) -> list[tuple[str, float, float, float, float]]:
    """Name, left, top, right and bottom of each box of the flow."""
    found = re.findall(
        r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" rx="8"/><text class="stage-name"[^>]*>([^<]*)<', page
    )
    return [(name, float(x), float(y), float(x) + float(w), float(y) + float(h)) for x, y, w, h, name in found]


def test_the_flow_has_one_box_a_stage_and_the_trials_in_their_sweeps(flow, page):
    drawn = boxes(page)
    assert sorted(name for name, *_ in drawn) == sorted(path.parent.name for path in flow.glob("*/manifest.json"))
    for index, (name, left, top, right, bottom) in enumerate(drawn):
        for other, near, high, far, low in drawn[index + 1 :]:
            assert right <= near or far <= left or bottom <= high or low <= top, (name, other)
    picture = re.search(r'<svg class="flow".*?</svg>', page, re.S)
    assert picture is not None
    for trial in ("none-1", "voco-1", "voco-4", "avg-pool-1"):
        assert f">{trial}</text>" in picture[0]


def test_arrows_keep_out_of_the_boxes_that_they_pass():
    parents = {"a": [], "b": ["a"], "c": ["b"], "d": ["c"], "x": ["a"], "y": ["x", "d"], "z": ["x"], "w": ["z", "y"]}
    drawing = layout_flow(parents, 100, dict.fromkeys(parents, 40) | {"b": 120})
    for arrow in drawing.arrows:
        for (x1, y1), (x2, y2) in itertools.pairwise(arrow):
            assert y1 <= y2
            for left, top in drawing.boxes.values():
                if x1 == x2:  # straight down past a layer
                    assert not (left < x1 < left + 100 and y1 < top + 40 and y2 > top + 0.001 and y2 - y1 > 0), (x1, y1, y2)
    assert {name: round(top) for name, (_, top) in drawing.boxes.items()}["w"] == max(
        round(top) for _, top in drawing.boxes.values()
    )


def test_boxes_without_arrows_stand_in_rows_below():
    drawing = layout_flow({"a": [], "b": ["a"], **{f"x{index}": [] for index in range(7)}}, 100, {"a": 40, "b": 40} | {
        f"x{index}": 40 for index in range(7)
    })  # fmt: skip
    tops = [drawing.boxes[f"x{index}"][1] for index in range(7)]
    assert tops[0] == tops[4] > drawing.boxes["b"][1] + 40
    assert tops[5] == tops[6] >= tops[0] + 40
    assert drawing.height >= tops[6] + 40
    assert drawing.width >= drawing.boxes["x4"][0] + 100
    assert layout_flow({"a": []}, 100, {"a": 40}).boxes == {"a": (6, 6)}


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not on PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_chromium_shows_it_without_a_word_of_complaint(page, tmp_path, width):
    place = tmp_path / "report.html"
    place.write_text(page)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += f"--disable-component-update --disable-sync --enable-logging=stderr --user-data-dir={tmp_path / 'profile'} "
    command = ["chromium", *flags.split(), f"--screenshot={tmp_path / 'shot.png'}", f"--window-size={width},1600"]
    done = subprocess.run([*command, place.as_uri()], capture_output=True, text=True, timeout=100, check=True)
    assert "CONSOLE" not in done.stderr
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("L"))
    assert shot.shape[1] == width
    assert (shot.std(axis=1) > 1).mean() > 0.5  # something is drawn on most lines of the first page
