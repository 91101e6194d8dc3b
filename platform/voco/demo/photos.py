"""Photos with questions from their own labels: `python -m voco.demo.photos DATA OUT`.

DATA is a folder of GroceryStoreDataset (github.com/marcusklasson/GroceryStoreDataset): classes.csv, {train,val,test}.txt and the
photos that they list. Its own splits are kept: a test row shows test photos only.

    OUT/photos/{train,val,test}.json   one photo, LLaVA's form: its product, its coarse class, and its kind
    OUT/photos/scenes_{...}.json       2x2 grids of photos: what is where, beside what, how many, and is there one
    OUT/photos/chat.json               captions of train photos, the form of LLaVA's CC3M set; the first names the product, the
                                       second is the first sentence of its written description
    OUT/photos/images/                 the root of the rows' "image" paths, JPEG
    OUT/photos/written.json            the parameters, written last: a second call with the same parameters does nothing

Photos are cropped to their middle square and reduced to SIDE pixels, half of it in a grid. Names are those of the data set in
lower case. Half of the grids show four different coarse classes, the others one of them twice.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from voco.demo.captions import REQUESTS
from voco.demo.scene_questions import CELL_NAMES, RELATIONS
from voco.demo.scenes import llava_row, write_rows
from voco.errors import Refused

SIDE = 256  # pixels of a written picture
SPLITS = ("train", "val", "test")
KINDS = {"Fruit": "fruit", "Vegetables": "vegetable", "Packages": "package"}  # folders of the data set
JPEG_QUALITY = 90
VERSION = 1  # of the data; raise it when the same parameters would write other bytes
Question = tuple[str, str, str]  # category, question, answer


@dataclass(frozen=True)
class Product:
    """A class of the data set."""

    name: str
    coarse: str
    description: str  # the first sentence


@dataclass(frozen=True)
class Photo:
    """One photo, by its path in the data set."""

    path: str
    product: Product

    @property
    def kind(self) -> str:
        return KINDS[self.path.split("/")[1]]

    @property
    def name(self) -> str:
        """Of the written file, without an ending."""
        return self.path.split("/", 1)[1].rsplit(".", 1)[0].replace("/", "_").lower()


def read_products(data: Path) -> list[Product]:
    """The classes in the order of their ids. Raises Refused for a folder without the data set."""
    try:
        with (data / "classes.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise Refused(f"{data}: expected the folder of GroceryStoreDataset with its classes.csv and photos") from error
    products = []
    for row in rows:
        description = data / row["Product Description Path (str)"].lstrip("/")
        sentence = " ".join(description.read_text(encoding="utf-8").split()).split(". ")[0].rstrip(".")
        products.append(Product(_plain(row["Class Name (str)"]), _plain(row["Coarse Class Name (str)"]), sentence.lower()))
    return products


def read_photos(data: Path, split: str, products: Sequence[Product]) -> list[Photo]:
    """The photos of a split, in the order of its list: path, fine id, coarse id."""
    lines = [line.split(",") for line in (data / f"{split}.txt").read_text().splitlines() if line.strip()]
    return [Photo(path.strip(), products[int(number)]) for path, number, _ in lines]


def _plain(name: str) -> str:
    return name.replace("-", " ").lower()


def write_photos(data: Path, out: Path, train_scenes: int = 4000, test_scenes: int = 1000, seed: int = 0) -> None:
    """Write all files, or nothing when a call with the same parameters has finished. The bytes depend only on the arguments, the
    data set and Pillow's JPEG coder. A call with other parameters replaces the data.
    """
    parameters = {"version": VERSION, "train_scenes": train_scenes, "test_scenes": test_scenes, "seed": seed}
    folder = out / "photos"
    marker = folder / "written.json"
    if marker.exists() and json.loads(marker.read_text()) == parameters:
        return
    products = read_products(data)
    shutil.rmtree(folder, ignore_errors=True)
    for split in SPLITS:
        photos = read_photos(data, split, products)
        pictures = _write_pictures(data, folder / "images", split, photos)
        rng = random.Random(f"{seed} photos {split}")
        rows = [
            llava_row(f"photo-{split}-{number:05d}-{index}", pictures[photo], question, answer, category)
            for number, photo in enumerate(photos)
            for index, (category, question, answer) in enumerate(photo_questions(photo))
        ]
        write_rows(folder / f"{split}.json", rows)
        count = train_scenes if split == "train" else test_scenes
        write_rows(folder / f"scenes_{split}.json", list(_scene_rows(folder / "images", split, photos, pictures, count, rng)))
        if split == "train":
            write_rows(folder / "chat.json", list(_caption_rows(photos, pictures, rng)))
    marker.write_text(json.dumps(parameters) + "\n")


def photo_questions(photo: Photo) -> list[Question]:
    """What one photo shows, at three levels."""
    return [
        ("product", "which product is it?", photo.product.name),
        ("class", "what is it?", photo.product.coarse),
        ("kind", "is it a fruit, a vegetable or a package?", photo.kind),
    ]


class GridQuestions:
    """Draws the questions of one grid after another and balances the answers of each category over all of them."""

    def __init__(self, rng: random.Random, names: Sequence[str]) -> None:
        self._rng, self._names, self._counts = rng, names, Counter[tuple[str, str]]()

    def draw(self, scene: Sequence[Photo]) -> list[Question]:
        """Three questions of place, two of neighbours, one of count and one of presence, in random order."""
        coarse = [photo.product.coarse for photo in scene]
        candidates: dict[str, tuple[int, list[Question]]] = {
            "place": (3, [("place", f"what is at the {cell}?", name) for cell, name in zip(CELL_NAMES, coarse, strict=True)]),
            "neighbour": (2, list(_neighbour_questions(coarse))),
            "count": (1, _count_questions(scene)),
            "presence": (1, self._presence_questions(coarse)),
        }
        drawn: list[Question] = []
        for count, questions in candidates.values():
            self._rng.shuffle(questions)
            questions.sort(key=lambda question: self._counts[question[0], question[2]])  # the rarest answers first
            drawn += questions[:count]
        self._counts.update((category, answer) for category, _, answer in drawn)
        self._rng.shuffle(drawn)
        return drawn

    def _presence_questions(self, coarse: Sequence[str]) -> list[Question]:
        absent = self._rng.choice([name for name in self._names if name not in coarse])
        named = {"yes": self._rng.choice(coarse), "no": absent}
        return [("presence", f"is there {_with_article(name)}?", answer) for answer, name in named.items()]


def _neighbour_questions(coarse: Sequence[str]) -> Iterator[Question]:
    for relation, pairs in RELATIONS.items():
        for named, answered in pairs:
            if coarse.count(coarse[named]) == 1:
                yield "neighbour", f"what is {relation} the {coarse[named]}?", coarse[answered]


def _count_questions(scene: Sequence[Photo]) -> list[Question]:
    """How many of each kind, and how many of the class that is there most often."""
    kinds = Counter(photo.kind for photo in scene)
    (name, count), *_ = Counter(photo.product.coarse for photo in scene).most_common(1)
    questions = [("count", f"how many {kind}s are there?", str(kinds[kind])) for kind in KINDS.values()]
    return [*questions, ("count", f"how many photos of {_with_article(name)} are there?", str(count))]


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _write_pictures(data: Path, images: Path, split: str, photos: Sequence[Photo]) -> dict[Photo, str]:
    """Write each photo as a square, and return its path below `images`."""
    target = images / split
    target.mkdir(parents=True)
    paths = {}
    for photo in photos:
        with Image.open(data / photo.path) as opened:
            opened.draft("RGB", (2 * SIDE, 2 * SIDE))  # the decoder reduces it first
            picture = ImageOps.fit(ImageOps.exif_transpose(opened).convert("RGB"), (SIDE, SIDE), Image.Resampling.LANCZOS)
        paths[photo] = f"{split}/{photo.name}.jpg"
        picture.save(images / paths[photo], quality=JPEG_QUALITY)
    return paths


def _scene_rows(
    images: Path, split: str, photos: Sequence[Photo], pictures: Mapping[Photo, str], count: int, rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Compose and save `count` grids, and give their rows in order."""
    (images / "scenes" / split).mkdir(parents=True)
    by_class: dict[str, list[Photo]] = {}
    for photo in photos:
        by_class.setdefault(photo.product.coarse, []).append(photo)
    sampler = GridQuestions(rng, sorted(by_class))
    for number in range(count):
        scene = draw_photos(rng, by_class)
        name = f"scenes/{split}/{number:06d}.jpg"
        _grid([images / pictures[photo] for photo in scene]).save(images / name, quality=JPEG_QUALITY)
        for index, (category, question, answer) in enumerate(sampler.draw(scene)):
            yield llava_row(f"photo-scene-{split}-{number:06d}-{index}", name, question, answer, category)


def draw_photos(rng: random.Random, by_class: Mapping[str, Sequence[Photo]]) -> list[Photo]:
    """Four photos, one after the other of a random class; half of the grids show a class twice."""
    names = rng.sample(sorted(by_class), 4)
    if rng.random() < 0.5:
        names[3] = names[0]
    rng.shuffle(names)
    return [rng.choice(by_class[name]) for name in names]


def _grid(paths: Sequence[Path]) -> Image.Image:
    """A 2x2 grid of pictures in the order of CELL_NAMES: RGB, SIDE x SIDE pixels."""
    picture, cell = Image.new("RGB", (SIDE, SIDE)), SIDE // 2
    for number, path in enumerate(paths):
        with Image.open(path) as opened:
            tile = opened.resize((cell, cell), Image.Resampling.LANCZOS)
        picture.paste(tile, (number % 2 * cell, number // 2 * cell))
    return picture


def _caption_rows(photos: Sequence[Photo], pictures: Mapping[Photo, str], rng: random.Random) -> Iterator[dict[str, Any]]:
    forms: tuple[Callable[[Photo], str], ...] = (
        lambda photo: f"{_with_article(photo.product.name)}, {_with_article(photo.kind)}",
        lambda photo: photo.product.description,
    )
    for number, photo in enumerate(photos):
        request = "\n".join(rng.sample((rng.choice(REQUESTS), "<image>"), 2))
        turns = [{"from": "human", "value": request}, {"from": "gpt", "value": rng.choice(forms)(photo)}]
        yield {"id": f"photo-caption-{number:05d}", "image": pictures[photo], "conversations": turns}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write photos and questions about them from GroceryStoreDataset.")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train-scenes", type=int, default=4000)
    parser.add_argument("--test-scenes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_photos(options.data, options.out, options.train_scenes, options.test_scenes, options.seed)


if __name__ == "__main__":
    main()
