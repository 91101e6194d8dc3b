"""The demo's source data: `python -m voco.demo.scenes OUT` writes LLaVA-style JSON and an image folder.

    OUT/shapes_{train,test}.json    the easy-vqa package unchanged, one row per question
    OUT/scenes_{train,test}.json    2x2 grids of its images with eight questions each; train also has text-only rows
    OUT/scenes_val.json             with --val-scenes: further grids of train images, held out of training
    OUT/images/                     the root of the rows' "image" paths: {shapes,scenes}/{train,test}/*.png
    OUT/written.json                the parameters, written last: a second call with the same parameters does nothing

Test scenes use only the package's test images. The questions and their answers come from `scene_questions`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from voco.demo import easy_vqa_shapes, scene_questions
from voco.demo.easy_vqa_shapes import COLORS, SHAPES, Label

CELL = 64  # side of a package image in pixels, and half the side of a scene
TEXT_ONLY_SHARE = 0.01  # of the rows of scenes_train.json
PALETTE = (2, 4)  # minimum and maximum number of colors of a scene; few, so that counts by color exceed 1
DESCRIBE = "describe the image"
VERSION = 1  # of the data; raise it when the same parameters would write other bytes

LlavaRow = dict[str, Any]


def write_scenes(
    out: Path, train_scenes: int = 6000, test_scenes: int = 1500, seed: int = 0, describe: bool = False, val_scenes: int = 0
) -> None:
    """Write all files, or nothing when a call with the same parameters has finished. The bytes depend only on the arguments.

    With `describe` each train scene also has a row that asks for all four shapes.
    A call with other parameters replaces the data. Raises ValueError when there are too few text-only rows for the scenes.
    """
    parameters = {"version": VERSION, "train_scenes": train_scenes, "test_scenes": test_scenes, "seed": seed}
    parameters |= ({"describe": True} if describe else {}) | ({"val_scenes": val_scenes} if val_scenes else {})
    marker = out / "written.json"
    if marker.exists() and json.loads(marker.read_text()) == parameters:
        return
    marker.unlink(missing_ok=True)
    shutil.rmtree(out / "images", ignore_errors=True)
    for split, scenes in (("train", train_scenes), ("test", test_scenes)):
        questions = easy_vqa_shapes.shape_questions(split)
        write_rows(out / f"shapes_{split}.json", _shape_rows(out / "images", split, questions))
        rng = random.Random(f"{seed} {split}")
        described = describe and split == "train"
        rows = _scene_rows(out / "images", split, easy_vqa_shapes.labels(questions), scenes, rng, described)
        if split == "train":
            rows = _with_text_only(rows, rng)
        write_rows(out / f"scenes_{split}.json", rows)
    if val_scenes:
        labels, rng = easy_vqa_shapes.labels(easy_vqa_shapes.shape_questions("train")), random.Random(f"{seed} val")
        write_rows(out / "scenes_val.json", _scene_rows(out / "images", "val", labels, val_scenes, rng, False, "train"))
    marker.write_text(json.dumps(parameters) + "\n")


def llava_row(row_id: str, image: str | None, question: str, answer: str, category: str) -> LlavaRow:
    """A question in LLaVA's format; `category` is an extra key that evaluation groups by."""
    human = question if image is None else f"<image>\n{question}"
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
    return {"id": row_id, **({} if image is None else {"image": image}), "category": category, "conversations": turns}


def write_rows(path: Path, rows: list[LlavaRow]) -> None:
    """A JSON list with a line for each row."""
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def _shape_rows(images: Path, split: str, questions: list[easy_vqa_shapes.ShapeQuestion]) -> list[LlavaRow]:
    """Copy the package's images and convert its questions to rows."""
    shutil.copytree(easy_vqa_shapes.folder(split) / "images", images / "shapes" / split)
    rows = []
    for index, question in enumerate(questions):
        category = "presence" if question.answer in ("yes", "no") else "color" if question.answer in COLORS else "shape"
        image = f"shapes/{split}/{question.image}.png"
        rows.append(llava_row(f"shapes-{split}-{index:06d}", image, question.text, question.answer, category))
    return rows


def tiles(split: str, labels: dict[int, Label]) -> dict[Label, list[Image.Image]]:
    """The package's images of a split by label: RGB, CELL x CELL pixels, in the order of their numbers."""
    by_label: dict[Label, list[Image.Image]] = {}
    for image, label in labels.items():
        with Image.open(easy_vqa_shapes.folder(split) / "images" / f"{image}.png") as opened:
            by_label.setdefault(label, []).append(opened.convert("RGB"))
    return by_label


def draw_scene(rng: random.Random) -> scene_questions.Scene:
    """Four random labels of a few colors."""
    palette = rng.sample(COLORS, rng.randint(*PALETTE))
    return [(rng.choice(palette), rng.choice(SHAPES)) for _ in range(4)]


def compose(four: list[Image.Image]) -> Image.Image:
    """A 2x2 grid of four tiles in the order of `scene_questions.CELL_NAMES`: RGB, 2 CELL x 2 CELL pixels."""
    picture = Image.new("RGB", (2 * CELL, 2 * CELL))
    for cell, tile in enumerate(four):
        picture.paste(tile, (cell % 2 * CELL, cell // 2 * CELL))
    return picture


def _scene_rows(
    images: Path, split: str, labels: dict[int, Label], scenes: int, rng: random.Random, describe: bool, of_split: str = ""
) -> list[LlavaRow]:
    """Compose and save `scenes` different grids; eight rows per scene, in scene order, and its description as a ninth.

    Tiles are those of the package's `of_split` (default: `split`), whose labels are given.
    """
    target = images / "scenes" / split
    target.mkdir(parents=True)
    split_tiles = tiles(of_split or split, labels)
    sampler = scene_questions.QuestionSampler(rng)
    grids: set[tuple[int, ...]] = set()
    rows: list[LlavaRow] = []
    while len(grids) < scenes:
        scene = draw_scene(rng)
        picks = tuple(rng.randrange(len(split_tiles[label])) for label in scene)
        grid = tuple(id(split_tiles[label][pick]) for label, pick in zip(scene, picks, strict=True))
        questions = sampler.draw(scene) if grid not in grids else None
        if questions is None:
            continue
        name = f"{len(grids):06d}"
        grids.add(grid)
        picture = compose([split_tiles[label][pick] for label, pick in zip(scene, picks, strict=True)])
        picture.save(target / f"{name}.png", compress_level=1)
        if describe:
            questions.append(("description", DESCRIBE, scene_questions.description(scene)))
        for index, (category, question, answer) in enumerate(questions):
            rows.append(llava_row(f"scenes-{split}-{name}-{index}", f"scenes/{split}/{name}.png", question, answer, category))
    return rows


def _with_text_only(rows: list[LlavaRow], rng: random.Random) -> list[LlavaRow]:
    """The scenes in random order with distinct text-only rows between them."""
    count = max(30, round(len(rows) * TEXT_ONLY_SHARE / (1 - TEXT_ONLY_SHARE)))
    texts = sorted(set(text_only()))
    if count > len(texts):
        raise ValueError(f"expected at most {len(texts)} text-only rows, got {count}: write fewer scenes")
    groups = [list(of_scene) for _, of_scene in itertools.groupby(rows, key=lambda row: row["image"])]
    for index, (question, answer) in enumerate(rng.sample(texts, count)):
        groups.append([llava_row(f"text-train-{index:06d}", None, question, answer, "text")])
    rng.shuffle(groups)
    return [row for group in groups for row in group]


def text_only() -> Iterator[tuple[str, str]]:
    """Questions and answers that need no image."""
    sides = {"circle": 0, "rectangle": 4, "triangle": 3}
    for shape, count in sides.items():
        yield f"how many sides does a {shape} have?", str(count)
        yield f"how many corners does a {shape} have?", str(count)
    for first, second in itertools.permutations(SHAPES, 2):
        yield f"does a {first} have more sides than a {second}?", "yes" if sides[first] > sides[second] else "no"
    mixed = {("blue", "yellow"): "green", ("black", "white"): "gray", ("red", "green"): "brown", ("blue", "green"): "teal"}
    for (first, second), color in mixed.items():
        yield f"what color do you get from {first} and {second}?", color
        yield f"what color do you get from {second} and {first}?", color
    for first, second in itertools.permutations(COLORS, 2):
        yield f"what color comes first in the alphabet, {first} or {second}?", min(first, second)
    for colors in itertools.permutations(COLORS, 3):
        for shapes in itertools.permutations(SHAPES):
            names = [f"a {color} {shape}" for color, shape in zip(colors, shapes, strict=True)]
            premise = f"there is {names[0]}, {names[1]} and {names[2]}."
            for color, shape in zip(colors, shapes, strict=True):
                yield f"{premise} what color is the {shape}?", color
                yield f"{premise} what shape is {color}?", shape


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's source data.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--train-scenes", type=int, default=6000)
    parser.add_argument("--test-scenes", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--val-scenes", type=int, default=0)
    parser.add_argument("--describe", action="store_true")
    options = parser.parse_args()
    sizes = (options.train_scenes, options.test_scenes)
    write_scenes(options.out, *sizes, options.seed, options.describe, options.val_scenes)


if __name__ == "__main__":
    main()
