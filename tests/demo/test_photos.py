"""The photos' rows: right answers by a second reading, the data set's own split, balance, and a deterministic writer.

The photos are GroceryStoreDataset's: two of each class and split, so that the test takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from real_data import shared_folder

from voco.demo import photos
from voco.demo.photos import GridQuestions, Photo, Product, draw_photos, photo_questions, write_photos
from voco.demo.scene_questions import CELL_NAMES
from voco.errors import Refused

SCENES, TEST_SCENES = 40, 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set with two photos of each class in each split."""
    source = shared_folder("grocery/dataset")
    target = tmp_path_factory.mktemp("grocery")
    for name in (*photos.SPLITS, "iconic-images-and-descriptions", "classes.csv"):
        (target / name).symlink_to(source / name)
    for split in photos.SPLITS:
        seen: Counter[str] = Counter()
        lines = []
        for line in (source / f"{split}.txt").read_text().splitlines():
            number = line.split(",")[1]
            seen[number] += 1
            lines += [line] if seen[number] <= 2 else []
        (target / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return target


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("photos")
    write_photos(data, target, SCENES, TEST_SCENES, seed=3)
    return target / "photos"


def rows_of(out: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / f"{name}.json").read_text())
    return rows


def test_single_photos_have_their_labels_and_stay_in_their_split(data: Path, out: Path) -> None:
    by_id = {line.split(",")[1]: line.split(",") for line in (data / "classes.csv").read_text().splitlines()[1:]}
    for split in photos.SPLITS:
        listed = [line.split(", ") for line in (data / f"{split}.txt").read_text().splitlines()]
        rows = rows_of(out, split)
        assert len(rows) == 3 * len(listed)
        for (path, number, _), row in zip([item for item in listed for _ in range(3)], rows, strict=True):
            name, _, coarse = by_id[number][:3]
            kind = {"Fruit": "fruit", "Vegetables": "vegetable", "Packages": "package"}[path.split("/")[1]]
            expected = {"product": name.replace("-", " ").lower(), "class": coarse.replace("-", " ").lower(), "kind": kind}
            assert row["conversations"][1]["value"] == expected[row["category"]]
            assert row["image"].startswith(f"{split}/")
            assert row["image"].endswith(Path(path).stem.lower() + ".jpg")
            assert (out / "images" / row["image"]).is_file()
        assert all(row["image"].startswith(f"scenes/{split}/") for row in rows_of(out, f"scenes_{split}"))
    assert len(rows_of(out, "scenes_train")) == 7 * SCENES
    assert len(rows_of(out, "scenes_test")) == 7 * TEST_SCENES


def test_captions_are_of_train_photos_and_partly_their_written_descriptions(data: Path, out: Path) -> None:
    captions = rows_of(out, "chat")
    assert all(row["image"].startswith("train/") for row in captions)
    descriptions = {product.description for product in photos.read_products(data)}
    written = sum(row["conversations"][1]["value"] in descriptions for row in captions)
    assert 0.3 < written / len(captions) < 0.7
    assert all("<image>" in row["conversations"][0]["value"] for row in captions)


def answer_of(question: str, scene: list[Photo]) -> str | None:
    """The answer by a second reading of the question's text."""
    coarse = [photo.product.coarse for photo in scene]
    if match := re.fullmatch(r"what is at the (.+)\?", question):
        return coarse[CELL_NAMES.index(match[1])]
    if match := re.fullmatch(r"what is (to the right of|to the left of|above|below) the (.+)\?", question):
        (cell,) = [index for index, name in enumerate(coarse) if name == match[2]]
        step = {"to the right of": 1, "to the left of": -1, "above": -2, "below": 2}[match[1]]
        return coarse[cell + step]
    if match := re.fullmatch(r"how many (fruit|vegetable|package)s are there\?", question):
        return str(sum(photo.kind == match[1] for photo in scene))
    if match := re.fullmatch(r"how many photos of an? (.+) are there\?", question):
        return str(coarse.count(match[1]))
    match = re.fullmatch(r"is there an? (.+)\?", question)
    return None if match is None else "yes" if match[1] in coarse else "no"


def test_every_answer_about_a_grid_is_right_and_yes_is_as_common_as_no(data: Path) -> None:
    products = photos.read_products(data)
    by_class: dict[str, list[Photo]] = {}
    for photo in photos.read_photos(data, "test", products):
        by_class.setdefault(photo.product.coarse, []).append(photo)
    rng = random.Random(0)
    sampler, counts = GridQuestions(rng, sorted(by_class)), Counter[tuple[str, str]]()
    for _ in range(300):
        scene = draw_photos(rng, by_class)
        questions = sampler.draw(scene)
        assert Counter(category for category, _, _ in questions) == {"place": 3, "neighbour": 2, "count": 1, "presence": 1}
        for category, question, answer in questions:
            assert answer == answer_of(question, scene), question
            counts[category, answer] += 1
    assert abs(counts["presence", "yes"] - counts["presence", "no"]) <= 1
    for category in ("place", "neighbour", "count"):
        shares = [count for (name, _), count in counts.items() if name == category]
        assert max(shares) / sum(shares) < (0.4 if category == "count" else 0.1), category


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_same_arguments_write_the_same_bytes_and_a_second_call_nothing(data: Path, out: Path, tmp_path: Path) -> None:
    write_photos(data, tmp_path, SCENES, TEST_SCENES, seed=3)
    assert digests(tmp_path / "photos") == digests(out)
    (tmp_path / "photos" / "test.json").write_text("changed")
    write_photos(data, tmp_path, SCENES, TEST_SCENES, seed=3)
    assert (tmp_path / "photos" / "test.json").read_text() == "changed"
    write_photos(data, tmp_path, SCENES, TEST_SCENES, seed=4)
    assert digests(tmp_path / "photos") != digests(out)
    with pytest.raises(Refused, match="expected the folder of GroceryStoreDataset"):
        write_photos(tmp_path, tmp_path / "other")


def test_questions_of_one_photo_go_from_the_product_to_its_kind() -> None:
    photo = Photo("test/Packages/Juice/Bravo/Bravo_001.jpg", Product("bravo apple juice", "juice", "a juice"))
    assert [answer for _, _, answer in photo_questions(photo)] == ["bravo apple juice", "juice", "package"]
    assert photo.name == "packages_juice_bravo_bravo_001"
