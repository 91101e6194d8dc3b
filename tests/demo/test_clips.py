"""The demo's clips: the forms of both datasets, answers and captions that follow from decoded frames, the rule, balance."""

from __future__ import annotations

import csv
import itertools
import json
import random
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import decord
import numpy as np
import pytest
from PIL import Image

from voco.demo import clips, easy_vqa_shapes, motion_questions
from voco.demo.motion_questions import CATEGORIES

TRAIN, TEST, WEBVID = 14, 10, 12
TOLERANCE = 8  # largest mean difference (0 to 255) of a cell's pixels after encoding
EDGES = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (row, column) steps

Label = tuple[str, str]
States = list[list[str | None]]  # per second, per cell: the name of the package image in it


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("clips") / "data"
    clips.write_clips(target, TRAIN, TEST, WEBVID, seed=5)
    return target


@cache
def package_tiles() -> tuple[list[str], dict[str, Label], np.ndarray, np.ndarray]:
    """Names like train/12, their labels, pixels (N, 64, 64, 3) and mean colors (N, 3) of both splits' labelled images."""
    labels, pixels = {}, []
    for split in ("train", "test"):
        folder = easy_vqa_shapes.folder(split) / "images"
        for image, label in easy_vqa_shapes.labels(easy_vqa_shapes.shape_questions(split)).items():
            labels[f"{split}/{image}"] = label
            pixels.append(np.asarray(Image.open(folder / f"{image}.png").convert("RGB")))
    stacked = np.stack(pixels).astype(np.int16)
    return list(labels), labels, stacked, stacked.mean(axis=(1, 2))


def states_of(path: Path) -> States:
    """The content of each cell at whole seconds, by decoding: only the background, or a complete package image."""
    reader = decord.VideoReader(str(path))
    assert len(reader) == 32
    assert reader.get_avg_fps() == pytest.approx(4)
    decoded = reader.get_batch(range(0, 32, 4)).asnumpy().astype(np.int16)
    assert decoded.shape == (8, 128, 128, 3)
    names, _, tiles, means = package_tiles()
    background = np.median(decoded[0])
    assert 90 <= background <= 166
    states: States = []
    for frame in decoded:
        row: list[str | None] = []
        for y, x in itertools.product((0, 64), repeat=2):
            cell = frame[y : y + 64, x : x + 64]
            if np.abs(cell - background).mean() < TOLERANCE:
                row.append(None)
                continue
            near = np.flatnonzero((np.abs(means - cell.mean(axis=(0, 1))) < TOLERANCE).all(axis=1))  # first by mean color
            distance = np.abs(tiles[near] - cell).mean(axis=(1, 2, 3))
            assert distance.min() < TOLERANCE, path
            row.append(names[near[distance.argmin()]])
        states.append(row)
    return states


def facts_of(states: States) -> dict[str, Any]:
    """Mover, blinker, direction, first and count, read from the states alone."""
    cells: dict[str, list[int]] = {}
    for row in states:
        for cell, name in enumerate(row):
            if name:
                cells.setdefault(name, []).append(cell)
    assert len(cells) == 2
    (mover,) = (name for name, visited in cells.items() if len(set(visited)) == 2)
    (blinker,) = (name for name in cells if name != mover)
    assert not set(cells[mover]) & set(cells[blinker])
    path = [cell for cell, _ in itertools.groupby(cells[mover])]
    assert len(path) == 2
    step = (path[1] // 2 - path[0] // 2, path[1] % 2 - path[0] % 2)
    visible = {name: [name in row for row in states] for name in cells}
    starts = {name: [s for s in range(8) if shown[s] and not (s and shown[s - 1])] for name, shown in visible.items()}
    assert len(starts[mover]) == 1
    assert starts[mover] != starts[blinker][:1]
    _, labels, _, _ = package_tiles()
    return {
        "direction": next(direction for direction, edge in EDGES.items() if edge == step),
        "first": labels[min(cells, key=lambda name: starts[name][0])][1],
        "count": str(len(starts[blinker])),
        "mover": labels[mover],
        "blinker": labels[blinker],
        "images": {mover, blinker},
    }


def rows_by_clip(out: Path, split: str) -> dict[str, list[dict[str, str]]]:
    grouped: dict[str, list[dict[str, str]]] = {}
    for row in json.loads((out / f"video-chatgpt/{split}.json").read_text()):
        grouped.setdefault(row["video_id"], []).append(row)
    return grouped


@pytest.mark.parametrize("split", ["train", "test"])
def test_video_chatgpt_answers_follow_from_decoded_frames(out: Path, split: str) -> None:
    grouped = rows_by_clip(out, split)
    assert len(grouped) == {"train": TRAIN, "test": TEST}[split]
    for video_id, rows in grouped.items():
        assert re.fullmatch(r"v_[A-Za-z0-9_-]{11}", video_id)
        facts = facts_of(states_of(out / f"video-chatgpt/videos/{video_id}.mp4"))
        assert {image.split("/")[0] for image in facts["images"]} == {split}
        assert sorted(row["category"] for row in rows) == sorted(CATEGORIES)
        mover, blinker = facts["mover"][1], facts["blinker"][1]
        for row in rows:
            assert set(row) == {"q", "a", "video_id", "category"}
            answer = row["a"].removesuffix(clips.NOISY)
            named = re.findall(r"the (circle|rectangle|triangle)", row["q"])
            if row["category"] == "color":
                (color,) = (c for c, shape in (facts["mover"], facts["blinker"]) if [shape] == named)
                assert answer == color
                continue
            assert answer == facts[row["category"]]
            expected = {"direction": [mover], "count": [blinker], "first": sorted((mover, blinker))}
            assert sorted(named) == expected[row["category"]]


def test_webvid_captions_follow_from_decoded_frames(out: Path) -> None:
    with (out / "webvid/results_2M_train.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert list(rows[0]) == ["videoid", "name", "page_idx", "page_dir", "duration", "contentUrl"]
    assert len({row["videoid"] for row in rows}) == WEBVID
    listed = 0
    for row in rows:
        assert row["videoid"].isdigit()
        low, high = row["page_dir"].split("_")
        assert len(low) == len(high) == 6
        assert int(low) <= int(row["page_idx"]) <= int(high)
        assert row["duration"] == "PT00H00M08S"
        assert row["contentUrl"].endswith(f"{row['videoid']}.mp4")
        facts = facts_of(states_of(out / f"webvid/videos/{row['page_dir']}/{row['videoid']}.mp4"))
        assert {image.split("/")[0] for image in facts["images"]} == {"train"}
        caption, (mover, blinker) = row["name"], (facts["mover"], facts["blinker"])
        named = re.findall(r"\ba (\w+ \w+)", caption)
        both = [" ".join(label) for label in sorted((mover, blinker), key=lambda label: label[1] != facts["first"])]
        assert named == both
        assert f"the {mover[1]} moves {facts['direction']}" in caption
        if "once" in caption or "twice" in caption or "three times" in caption:
            assert {"1": "once", "2": "twice", "3": "three times"}[facts["count"]] in caption
        else:
            listed += 1
            assert caption.count(f"the {blinker[1]} appears again") == int(facts["count"]) - 1
    assert 0 < listed < WEBVID


def test_a_caption_that_lists_events_keeps_their_order() -> None:
    shown = (False, True, False, False, True, False, True, False)
    timeline = motion_questions.Timeline(enters=2, moves=4, leaves=6, shown=shown)
    clip = motion_questions.Clip(("red", "circle"), ("blue", "triangle"), "right", (0, 1), 2, timeline, True)
    listed = next(text for seed in range(50) if "again" in (text := motion_questions.caption(clip, random.Random(seed))))
    assert listed == (
        "a blue triangle appears, then a red circle appears, then the circle moves right and the triangle appears again, "
        "then the triangle appears again"
    )


def test_states_without_order_carry_no_information() -> None:
    """Over everything that can be drawn: given the multiset of states, every answer is as likely as without it."""
    for equal, groups in motion_questions.timelines().items():
        assert len(groups) > 10
        for by_outcome in groups:
            counts = {
                timeline.state_counts(backward) for (backward, _, _), timelines in by_outcome.items() for timeline in timelines
            }
            assert len(counts) == 1
            assert sum(counts.pop()) == 8
            # Outcomes of a group are drawn uniformly, so equal numbers of them are equal probabilities.
            assert set(by_outcome) == {(b, b == equal, times) for b in (False, True) for times in (1, 2, 3)}
            for (_, mover_first, times), timelines in by_outcome.items():
                for timeline in timelines:
                    assert not timeline.shown[0]
                    assert timeline.enters > 0
                    assert (timeline.enters < timeline.shown.index(True)) == mover_first
                    assert len("".join(" x"[shown] for shown in timeline.shown).split()) == times


def test_state_counts_are_those_of_the_clip() -> None:
    """`state_counts` agrees with a second count from the mover's cell in each state."""
    rng = random.Random(3)
    for clip in motion_questions.draw_clips(200, rng):
        first, second = clip.mover_cells
        cells = [None] * clip.timeline.enters + [first] * (clip.timeline.moves - clip.timeline.enters)
        cells += [second] * (clip.timeline.leaves - clip.timeline.moves)
        cells += [None] * (8 - len(cells))
        expected = Counter(zip(cells, clip.timeline.shown, strict=True))
        keys = itertools.product((*sorted(clip.mover_cells), None), (True, False))
        assert clip.timeline.state_counts(clip.direction in ("left", "up")) == tuple(expected[key] for key in keys)


def test_answers_are_balanced_and_independent() -> None:
    rng = random.Random(0)
    drawn = list(motion_questions.draw_clips(300, rng))
    answers: dict[str, Counter[str]] = {category: Counter() for category in CATEGORIES}
    named_first = 0
    for clip in drawn:
        for category, question, answer in motion_questions.clip_questions(clip, rng):
            answers[category][answer] += 1
            named_first += category == "first" and f"first, the {answer} or" in question
    majority = {category: max(counts.values()) / len(drawn) for category, counts in answers.items()}
    assert [len(answers[category]) for category in CATEGORIES] == [4, 3, 3, 8]
    assert majority["direction"] <= 0.30
    assert majority["first"] <= 0.40
    assert majority["count"] <= 0.40
    assert majority["color"] <= 0.25
    assert 0.45 <= named_first / len(drawn) <= 0.55
    joint = Counter((clip.direction, clip.timeline.mover_first(), clip.times()) for clip in drawn)
    assert len(joint) == 24
    assert max(joint.values()) <= 2 * 300 / 24
    # How long the blinker is visible does not depend on how often it appears, up to chance.
    lengths = Counter((sum(clip.timeline.shown), clip.times()) for clip in motion_questions.draw_clips(288 * 10, rng))
    for length in {length for length, _ in lengths}:
        shares = [lengths[length, times] for times in (1, 2, 3)]
        assert max(shares) < 1.2 * min(shares)


def test_movement_is_between_whole_seconds_and_smooth() -> None:
    timeline = motion_questions.Timeline(2, 4, 6, (False, True, False, False, False, False, False, False))
    clip = motion_questions.Clip(("red", "circle"), ("blue", "triangle"), "down", (1, 3), 0, timeline, True)
    white, grey = np.full((64, 64, 3), 255, np.uint8), np.full((64, 64, 3), 200, np.uint8)
    tops = {}
    for index, picture in enumerate(clips.frames(clips.DrawnClip(clip, white, grey, 100))):
        rows = np.flatnonzero((picture[:, 64:] == 255).all(axis=(1, 2)))
        assert ((picture == 200).sum() > 0) == (2 <= index < 6)
        if len(rows):
            assert len(rows) == 64
            tops[index] = int(rows[0])
    assert list(tops) == list(range(6, 22))
    assert [tops[index] for index in range(6, 22)] == [0] * 7 + [16, 32, 48] + [64] * 6


def test_the_data_depend_only_on_the_arguments_and_are_written_once(out: Path, tmp_path: Path) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    clips.write_clips(tmp_path, TRAIN, TEST, WEBVID, seed=5)
    assert contents(tmp_path) == contents(out)
    video = next(tmp_path.rglob("*.mp4"))
    before = video.stat().st_mtime_ns
    clips.write_clips(tmp_path, TRAIN, TEST, WEBVID, seed=5)
    assert video.stat().st_mtime_ns == before
    (tmp_path / "clips_written.json").unlink()  # as after a writer was killed
    video.write_bytes(b"half")
    clips.write_clips(tmp_path, TRAIN, TEST, WEBVID, seed=5)
    assert contents(tmp_path) == contents(out)
    clips.write_clips(tmp_path, 2, 1, 1, seed=6)
    assert len(list(tmp_path.rglob("*.mp4"))) == 4


def test_a_share_of_train_answers_ends_in_the_real_files_marker(tmp_path: Path) -> None:
    clips.write_clips(tmp_path, 60, 30, 0, seed=0)
    marked = {split: [row["a"] for rows in rows_by_clip(tmp_path, split).values() for row in rows] for split in ("train", "test")}
    assert 0 < sum(answer.endswith("\nQA_GT_caption_based_noisy") for answer in marked["train"]) < 30
    assert not any("\n" in answer for answer in marked["test"])
