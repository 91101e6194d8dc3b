"""The demo's source data: `python -m voco.demo.scenes OUT` writes LLaVA-style JSON and an image folder.

    OUT/shapes_{train,test}.json    the easy-vqa package as it is, one row a question
    OUT/scenes_{train,test}.json    2x2 grids of its images with eight questions each, and text-only rows in train
    OUT/images/                     what the rows' "image" is relative to: {shapes,scenes}/{train,test}/*.png
    OUT/written.json                the parameters, written last: the same call again does nothing

Test scenes are made of the package's test images only. The questions and their answers come from `scene_questions`.
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
from voco.demo.easy_vqa_shapes import COLORS, SHAPES

CELL = 64  # pixels; the side of a package image, and half a scene's
TEXT_ONLY_SHARE = 0.01  # of the rows of scenes_train.json
PALETTE = (2, 4)  # fewest and most colors a scene draws from, so that counts by color go beyond 1
VERSION = 1  # of what is written; raise it when the same parameters would write something else

Row = dict[str, Any]


def write_scenes(out: Path, train_scenes: int = 6000, test_scenes: int = 1500, seed: int = 0) -> None:
    """Write everything, or nothing when a call with the same parameters has finished. Depends on the arguments only.

    Other parameters replace what is there. Raises ValueError when more text-only rows are asked for than exist.
    """
    parameters = {"version": VERSION, "train_scenes": train_scenes, "test_scenes": test_scenes, "seed": seed}
    marker = out / "written.json"
    if marker.exists() and json.loads(marker.read_text()) == parameters:
        return
    marker.unlink(missing_ok=True)
    shutil.rmtree(out / "images", ignore_errors=True)
    for split, scenes in (("train", train_scenes), ("test", test_scenes)):
        asked = easy_vqa_shapes.shape_questions(split)
        _write_rows(out / f"shapes_{split}.json", _shape_rows(out / "images", split, asked))
        rng = random.Random(f"{seed} {split}")
        rows = _scene_rows(out / "images", split, easy_vqa_shapes.labels(asked), scenes, rng)
        if split == "train":
            rows = _with_text_only(rows, rng)
        _write_rows(out / f"scenes_{split}.json", rows)
    marker.write_text(json.dumps(parameters) + "\n")


def _row(row_id: str, image: str | None, question: str, answer: str, category: str) -> Row:
    """One question as LLaVA has it; `category` is an extra key that evaluation groups by."""
    human = question if image is None else f"<image>\n{question}"
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
    return {"id": row_id, **({} if image is None else {"image": image}), "category": category, "conversations": turns}


def _write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def _shape_rows(images: Path, split: str, asked: list[easy_vqa_shapes.ShapeQuestion]) -> list[Row]:
    """Copy the package's images and make its questions rows."""
    shutil.copytree(easy_vqa_shapes.folder(split) / "images", images / "shapes" / split)
    rows = []
    for index, question in enumerate(asked):
        category = "presence" if question.answer in ("yes", "no") else "color" if question.answer in COLORS else "shape"
        image = f"shapes/{split}/{question.image}.png"
        rows.append(_row(f"shapes-{split}-{index:06d}", image, question.text, question.answer, category))
    return rows


def tiles(split: str, labels: dict[int, tuple[str, str]]) -> dict[tuple[str, str], list[Image.Image]]:
    """The package's images of one split by (color, shape): RGB, CELL x CELL pixels, in the order of their numbers."""
    found: dict[tuple[str, str], list[Image.Image]] = {}
    for image, label in labels.items():
        with Image.open(easy_vqa_shapes.folder(split) / "images" / f"{image}.png") as opened:
            found.setdefault(label, []).append(opened.convert("RGB"))
    return found


def draw_scene(rng: random.Random) -> scene_questions.Scene:
    """Four (color, shape) at random, of a few colors."""
    palette = rng.sample(COLORS, rng.randint(*PALETTE))
    return [(rng.choice(palette), rng.choice(SHAPES)) for _ in range(4)]


def compose(four: list[Image.Image]) -> Image.Image:
    """A 2x2 grid of four tiles in the order of `scene_questions.PLACES`: RGB, 2 CELL x 2 CELL pixels."""
    picture = Image.new("RGB", (2 * CELL, 2 * CELL))
    for place, tile in enumerate(four):
        picture.paste(tile, (place % 2 * CELL, place // 2 * CELL))
    return picture


def _scene_rows(images: Path, split: str, labels: dict[int, tuple[str, str]], scenes: int, rng: random.Random) -> list[Row]:
    """Compose and save `scenes` different grids; rows in scene order, eight a scene."""
    target = images / "scenes" / split
    target.mkdir(parents=True)
    cells = tiles(split, labels)
    asker = scene_questions.Asker(rng)
    seen: set[tuple[int, ...]] = set()
    rows: list[Row] = []
    while len(seen) < scenes:
        scene = draw_scene(rng)
        picks = tuple(rng.randrange(len(cells[label])) for label in scene)
        grid = tuple(id(cells[label][pick]) for label, pick in zip(scene, picks, strict=True))
        asked = asker.ask(scene) if grid not in seen else None
        if asked is None:
            continue
        name = f"{len(seen):06d}"
        seen.add(grid)
        picture = compose([cells[label][pick] for label, pick in zip(scene, picks, strict=True)])
        picture.save(target / f"{name}.png", compress_level=1)
        for index, (category, question, answer) in enumerate(asked):
            rows.append(_row(f"scenes-{split}-{name}-{index}", f"scenes/{split}/{name}.png", question, answer, category))
    return rows


def _with_text_only(rows: list[Row], rng: random.Random) -> list[Row]:
    """The rows with text-only ones, all different, put between the scenes."""
    wanted = max(30, round(len(rows) * TEXT_ONLY_SHARE / (1 - TEXT_ONLY_SHARE)))
    texts = sorted(set(text_only()))
    if wanted > len(texts):
        raise ValueError(f"expected at most {len(texts)} text-only rows, got {wanted}: write fewer scenes")
    groups = [rows[start : start + scene_questions.PER_SCENE] for start in range(0, len(rows), scene_questions.PER_SCENE)]
    for index, (question, answer) in enumerate(rng.sample(texts, wanted)):
        groups.append([_row(f"text-train-{index:06d}", None, question, answer, "text")])
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
            told = f"there is {names[0]}, {names[1]} and {names[2]}."
            for color, shape in zip(colors, shapes, strict=True):
                yield f"{told} what color is the {shape}?", color
                yield f"{told} what shape is {color}?", shape


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's source data.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--train-scenes", type=int, default=6000)
    parser.add_argument("--test-scenes", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_scenes(given.out, given.train_scenes, given.test_scenes, given.seed)


if __name__ == "__main__":
    main()
