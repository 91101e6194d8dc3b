"""The demo's captions: `python -m voco.demo.captions OUT` writes them in the form of LLaVA's CC3M-595K pretraining set.

    OUT/cc3m/chat.json      a list of {"id": "GCC_train_001234567", "image": id + ".jpg", "conversations": [human, gpt]}
    OUT/cc3m/images.zip     the images under flat names, JPEG, stored without compression
    OUT/cc3m/written.json   the parameters, written last: a second call with the same parameters does nothing

The human turn is a short request with `<image>` before or after it, the gpt turn a lower-case caption. Half of the images
are train images of the easy-vqa package, one shape each; half are 2x2 grids of them. A caption names the labels and nothing
else; a grid's caption names its cells in the order of `scene_questions.CELL_NAMES`.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import zipfile
from pathlib import Path

from PIL import Image

from voco.demo import easy_vqa_shapes, scenes

CC3M_ROWS = 3_318_333  # of the real set; the nine digits of an id are a row number, with gaps for dead links
REQUESTS = (
    "Describe the image briefly.",
    "What does this picture show?",
    "Give a short description of the image.",
    "Say in a few words what is in the photo.",
    "Write a brief caption for this picture.",
    "Sum up what the image contains.",
)
SINGLE_CAPTIONS = ("a {0}", "one {0}", "a picture of a {0}", "there is a {0}", "a single {0}")
GRID_CAPTIONS = (
    "a {0} and a {1} above a {2} and a {3}",
    "a {0} beside a {1}, and below them a {2} beside a {3}",
    "a {0} at the top left, a {1} at the top right, a {2} at the bottom left and a {3} at the bottom right",
    "top row: a {0} and a {1}, bottom row: a {2} and a {3}",
    "a {0} to the left of a {1}, a {2} to the left of a {3} below",
)
JPEG_QUALITY = 90
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # of every member, so that the archive depends on the arguments only
VERSION = 1  # of the data; raise it when the same parameters would write other bytes


def write_captions(out: Path, count: int = 3000, seed: int = 0) -> None:
    """Write `count` captioned images, or nothing when a call with the same parameters has finished.

    The bytes depend only on the arguments and Pillow's JPEG encoder. A call with other parameters replaces the data. Raises
    ValueError when `count` is more than twice the number of the package's images.
    """
    folder = out / "cc3m"
    parameters = {"version": VERSION, "count": count, "seed": seed}
    marker = folder / "written.json"
    if marker.exists() and json.loads(marker.read_text()) == parameters:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = random.Random(f"{seed} captions")
    pictures = _pictures(count, rng)
    rows = []
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        for index, (caption, picture) in zip(sorted(rng.sample(range(CC3M_ROWS), count)), pictures, strict=True):
            name = f"GCC_train_{index:09d}"
            encoded = io.BytesIO()
            picture.save(encoded, "JPEG", quality=JPEG_QUALITY)
            archive.writestr(zipfile.ZipInfo(f"{name}.jpg", ZIP_TIME), encoded.getvalue())
            request = "\n".join(rng.sample((rng.choice(REQUESTS), "<image>"), 2))
            turns = [{"from": "human", "value": request}, {"from": "gpt", "value": caption}]
            rows.append({"id": name, "image": f"{name}.jpg", "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(rows))
    marker.write_text(json.dumps(parameters) + "\n")


def _pictures(count: int, rng: random.Random) -> list[tuple[str, Image.Image]]:
    """(caption, image) in random order: half of them different train images, the others grids."""
    tiles = scenes.tiles("train", easy_vqa_shapes.labels(easy_vqa_shapes.shape_questions("train")))
    single = [(label, tile) for label, label_tiles in tiles.items() for tile in label_tiles]
    if count > 2 * len(single):
        raise ValueError(f"expected at most {2 * len(single)} captions, got {count}")
    pictures = [(rng.choice(SINGLE_CAPTIONS).format(" ".join(label)), tile) for label, tile in rng.sample(single, count // 2)]
    while len(pictures) < count:
        scene = scenes.draw_scene(rng)
        caption = rng.choice(GRID_CAPTIONS).format(*(" ".join(label) for label in scene))
        pictures.append((caption, scenes.compose([rng.choice(tiles[label]) for label in scene])))
    rng.shuffle(pictures)
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's captions in the form of LLaVA's CC3M set.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_captions(options.out, options.count, options.seed)


if __name__ == "__main__":
    main()
