"""The demo's scenes: right answers, the rule that no question follows from the others, balance, and a deterministic writer."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from voco.demo import easy_vqa_shapes, scene_questions, scenes
from voco.demo.easy_vqa_shapes import COLORS, SHAPES
from voco.demo.scene_questions import CELL_NAMES

TRAIN, TEST = 400, 120


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("scenes") / "data"
    scenes.write_scenes(target, train_scenes=TRAIN, test_scenes=TEST, seed=5)
    return target


def rows_of(out: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / f"{name}.json").read_text())
    return rows


@cache
def package_labels(split: str) -> dict[bytes, tuple[str, str]]:
    """Every package image's pixels and its label."""
    folder = easy_vqa_shapes.folder(split) / "images"
    labels = easy_vqa_shapes.labels(easy_vqa_shapes.shape_questions(split))
    return {Image.open(folder / f"{key}.png").convert("RGB").tobytes(): label for key, label in labels.items()}


def cell_labels(out: Path, split: str, image: str) -> list[tuple[str, str]]:
    """The scene's labels, by looking up the pixels of each quarter among the package's images of the split."""
    with Image.open(out / "images" / image) as picture:
        assert picture.size == (128, 128)
        assert picture.mode == "RGB"
        corners = [(0, 0), (64, 0), (0, 64), (64, 64)]
        return [package_labels(split)[picture.crop((x, y, x + 64, y + 64)).tobytes()] for x, y in corners]


def answer_of(question: str, scene: list[tuple[str, str]]) -> str | None:
    """The answer by a second reading of the question's text; None when its presupposition is false in the scene."""
    if match := re.fullmatch(r"what (color|shape) is at the (.+)\?", question):
        return scene[CELL_NAMES.index(match[2])][match[1] == "shape"]
    if match := re.fullmatch(r"what (color|shape) is (to the right of|to the left of|above|below) the (\w+) (\w+)\?", question):
        cells = [cell for cell, label in enumerate(scene) if label == (match[3], match[4])]
        if len(cells) != 1:
            return None
        row, column = divmod(cells[0], 2)
        step = {"to the right of": (0, 1), "to the left of": (0, -1), "above": (-1, 0), "below": (1, 0)}[match[2]]
        row, column = row + step[0], column + step[1]
        return scene[2 * row + column][match[1] == "shape"] if row in (0, 1) and column in (0, 1) else None
    if match := re.fullmatch(r"how many (\w+)s are there\?", question):
        return str(sum(shape == match[1] for _, shape in scene))
    if match := re.fullmatch(r"how many (\w+) shapes are there\?", question):
        return str(sum(color == match[1] for color, _ in scene))
    match = re.fullmatch(r"is there a (\w+) (\w+)\?", question)
    assert match, question
    return "yes" if (match[1], match[2]) in scene else "no"


def by_scene(rows: list[dict[str, Any]]) -> dict[str, list[tuple[str, str, str]]]:
    grouped: dict[str, list[tuple[str, str, str]]] = {}
    for row in rows:
        if "image" in row:
            human, gpt = row["conversations"]
            grouped.setdefault(row["image"], []).append((row["category"], human["value"].removeprefix("<image>\n"), gpt["value"]))
    return grouped


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_match_the_pixels(out: Path, split: str) -> None:
    grouped = by_scene(rows_of(out, f"scenes_{split}"))
    assert len(grouped) == {"train": TRAIN, "test": TEST}[split]
    for image, questions in grouped.items():
        scene = cell_labels(out, split, image)
        assert Counter(category for category, _, _ in questions) == scene_questions.MIX
        assert len({question for _, question, _ in questions}) == 8
        for _, question, answer in questions:
            assert answer_of(question, scene) == answer, (image, question)


def test_labels_agree_with_every_question_of_the_package() -> None:
    questions = easy_vqa_shapes.shape_questions("test")
    labels = easy_vqa_shapes.labels(questions)
    assert len(labels) > 800
    checked = 0
    for question in questions:
        color, shape = labels.get(question.image, ("", ""))
        if not color:
            continue
        if question.answer in ("yes", "no"):
            negated = " no " in question.text or " not " in question.text
            named = next(word for word in easy_vqa_shapes.WORD.findall(question.text) if word in COLORS + SHAPES)
            assert (question.answer == "yes") == ((named in (color, shape)) != negated)
        else:
            assert question.answer in (color, shape)
        checked += 1
    assert checked > 7000


def test_tables_agree_with_the_texts() -> None:
    """In random scenes, the answer tables agree with a second reading of the questions' texts."""
    rng = np.random.default_rng(0)
    kinds = list(itertools.product(COLORS, SHAPES))
    rows = [int(row) for row in rng.integers(0, 24**4, 60)]
    everything = [kinds[0], kinds[7], kinds[7], kinds[23]]
    queries = {query for candidates in scene_questions._candidates(everything).values() for query in candidates}
    for row in rows:
        scene = [kinds[int(kind)] for kind in np.unravel_index(row, (24,) * 4)]
        assert scene_questions.scene_index(scene) == row
        scene_queries = {query for candidates in scene_questions._candidates(scene).values() for query in candidates}
        for query in queries | scene_queries:
            index = int(scene_questions.answer_table(query)[row])
            expected = None if index == scene_questions.UNASKABLE else query.answers()[index]
            assert answer_of(query.text(), scene) == expected, (query.text(), scene)


def test_no_question_follows_from_the_other_seven(out: Path) -> None:
    """Over all 331,776 scenes that agree with seven questions and answers, the eighth has two answers or more."""
    labels = list(itertools.product(COLORS, SHAPES))
    # Each label alone in each cell, so that every possible question occurs.
    all_scenes = [[labels[k - 1]] * cell + [labels[k]] + [labels[k - 1]] * (3 - cell) for k in range(24) for cell in range(4)]
    candidates = [scene_questions._candidates(scene).values() for scene in all_scenes]
    by_text = {query.text(): query for scene in candidates for query in itertools.chain(*scene)}
    for questions in list(by_scene(rows_of(out, "scenes_test")).values())[:60]:
        queries = [by_text[question] for _, question, _ in questions]
        tables = np.stack([scene_questions.answer_table(query) for query in queries])
        answers = np.array([[query.answers().index(answer)] for query, (_, _, answer) in zip(queries, questions, strict=True)])
        agrees = tables == answers
        for index in range(len(questions)):
            possible = set(tables[index, np.delete(agrees, index, axis=0).all(axis=0)].tolist()) - {scene_questions.UNASKABLE}
            assert len(possible) >= 2, questions[index]


def test_a_question_that_follows_from_others_is_not_added() -> None:
    scene = [("red", "circle"), ("blue", "triangle"), ("red", "rectangle"), ("red", "circle")]
    row = scene_questions.scene_index(scene)

    def added(*queries: scene_questions.Query) -> list[bool]:
        questions = scene_questions.IndependentQuestions()
        return [questions.try_add(query, int(scene_questions.answer_table(query)[row])) for query in queries]

    query = scene_questions.Query
    presence = query("presence", "yes/no", color="blue", shape="triangle")
    below = query("neighbour", "shape", where="below", color="blue", shape="triangle")
    assert added(presence, below) == [True, False]  # "the blue triangle" presupposes that there is one
    assert added(below, presence) == [True, False]
    shapes = [query("place", "shape", where=cell) for cell in CELL_NAMES]
    circles = query("count", "shape", shape="circle")
    assert added(*shapes, circles) == [True, True, True, True, False]
    assert added(*shapes[:3], circles) == [True, True, True, False]  # the count and the other two cells give the first cell


def test_guessing_the_most_common_answer_is_weak(out: Path) -> None:
    answers: dict[str, Counter[str]] = {}
    for category, question, answer in itertools.chain(*by_scene(rows_of(out, "scenes_train")).values()):
        kind = re.sub("|".join(COLORS), "C", question) if category in ("count", "presence") else question
        kind = " ".join(
            [category, kind.split()[1] if category in ("place", "neighbour") else re.sub("|".join(SHAPES), "S", kind)]
        )
        answers.setdefault(kind, Counter())[answer] += 1
    limits = {"place shape": 0.40, "place color": 0.17, "neighbour shape": 0.40, "neighbour color": 0.17}
    for kind, counts in answers.items():
        limit = limits.get(kind, 0.55 if kind.startswith("presence") else 0.45)
        assert counts.most_common(1)[0][1] / counts.total() <= limit, (kind, counts)


def test_rows_are_llava_rows(out: Path) -> None:
    ids: list[str] = []
    for name in ("shapes_train", "shapes_test", "scenes_train", "scenes_test"):
        rows = rows_of(out, name)
        ids += [row["id"] for row in rows]
        for row in rows:
            human, gpt = row["conversations"]
            assert (human["from"], gpt["from"]) == ("human", "gpt")
            assert human["value"].startswith("<image>\n") == ("image" in row)
            if "image" in row:
                assert row["image"].startswith(f"{name.split('_')[0]}/{name.split('_')[1]}/")
    assert len(set(ids)) == len(ids)
    missing = [row["image"] for row in rows_of(out, "shapes_test") if not (out / "images" / row["image"]).exists()]
    assert missing == []


def test_text_only_rows_are_distinct_and_only_in_train(out: Path) -> None:
    texts = [row["conversations"][0]["value"] for row in rows_of(out, "scenes_train") if "image" not in row]
    assert len(texts) == len(set(texts)) >= 30
    assert all("image" in row for row in rows_of(out, "scenes_test"))
    assert len(set(scenes.text_only())) > 10_000


def test_no_two_scenes_have_equal_bytes(out: Path) -> None:
    files = sorted((out / "images" / "scenes").rglob("*.png"))
    assert len(files) == TRAIN + TEST
    assert len({hashlib.sha256(file.read_bytes()).digest() for file in files}) == len(files)


def test_a_second_call_skips_or_replaces_the_data(out: Path, tmp_path: Path) -> None:
    def state(folder: Path) -> dict[str, bytes]:
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    first, second = tmp_path / "a", tmp_path / "b"
    scenes.write_scenes(first, train_scenes=12, test_scenes=5, seed=1)
    scenes.write_scenes(second, train_scenes=30, test_scenes=5, seed=2)
    (second / "images" / "scenes" / "train" / "000003.png").write_bytes(b"changed")
    scenes.write_scenes(second, train_scenes=30, test_scenes=5, seed=2)
    assert (second / "images" / "scenes" / "train" / "000003.png").read_bytes() == b"changed"  # finished: nothing is written
    scenes.write_scenes(second, train_scenes=12, test_scenes=5, seed=1)
    assert state(first) == state(second)
