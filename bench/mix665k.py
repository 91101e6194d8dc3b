"""An annotation file with LLaVA-665k's size, sources and faults, and the exact counts that ingest must report: 665,298 rows.

The sources and their row counts are those of LLaVA-1.5's mix; texts are random words. The images are a few distinct files: hard
links in folders, and members of zip files for the sets that users leave packed.
"""

from __future__ import annotations

import io
import json
import os
import random
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

DISTINCT = 64  # files
BATCH = 10_000  # rows of one write


@dataclass(frozen=True)
class Source:
    rows: int
    folder: str  # of the images
    images: int  # number of images in the folder
    turns: tuple[int, int]  # question and answer pairs of a row
    words: tuple[int, int]  # of an answer


COCO = ("coco/train2017", 118_287)
MIX = {
    "llava": Source(157_712, *COCO, (1, 8), (10, 120)),
    "sharegpt": Source(40_688, "", 0, (1, 8), (40, 250)),
    "vqav2": Source(82_783, *COCO, (3, 8), (1, 2)),
    "gqa": Source(72_140, "gqa/images", 72_140, (5, 14), (1, 2)),
    "okvqa": Source(8_998, *COCO, (1, 1), (1, 2)),
    "ocrvqa": Source(80_000, "ocr_vqa/images", 80_000, (3, 6), (2, 8)),
    "aokvqa": Source(66_160, *COCO, (1, 1), (1, 1)),
    "textcaps": Source(21_953, "textvqa/train_images", 21_953, (1, 1), (8, 16)),
    "refcoco": Source(48_447, *COCO, (2, 8), (4, 8)),
    "vg": Source(86_417, "vg/VG_100K", 86_417, (4, 16), (4, 8)),
}
PACKED = {"coco/train2017": "coco/train2017.zip", "textvqa/train_images": "textvqa/train_val_images.zip"}

# Each fault occurs once in this many rows or images. The numbers have no common factor, so that every fault meets every source.
ROW_FAULTS = {7_919: "bad_conversation", 8_887: "empty_text", 9_973: "bad_record", 11_003: "unsafe_path", 1_511: "duplicate"}
IMAGE_FAULTS = {1_009: "missing_media", 2_003: "corrupt_media"}
OTHER_NAME, OTHER_FORMAT = 797, 89  # no faults: OCR-VQA's images that are stored as .png, and gifs that are named .jpg


def row_fault(index: int) -> str | None:
    return next((reason for every, reason in ROW_FAULTS.items() if index % every == every - 1), None)


def image_fault(number: int) -> str | None:
    return next((reason for every, reason in IMAGE_FAULTS.items() if number % every == every - 1), None)


def rows(share: float = 1.0) -> Iterator[tuple[Any, str | None]]:
    """Every row in the file's order with its expected reject reason, if any; `share` of each source."""
    draw = random.Random(665)
    words = [f"w{number:x}" * draw.randint(1, 2) for number in range(4000)]
    phrases = {size: [" ".join(draw.choices(words, k=size)) for _ in range(64)] for size in range(1, 260)}
    plan = [name for name, source in MIX.items() for _ in range(int(source.rows * share))]
    draw.shuffle(plan)
    used: Counter[str] = Counter()
    previous: Any = None
    for index, name in enumerate(plan):
        source = MIX[name]
        number = (used[name] * (7 if source.folder == COCO[0] else 1)) % max(1, int(source.images * share))
        used[name] += 1
        fault = row_fault(index)
        if fault == "duplicate" and previous is not None:
            yield previous, fault
            previous = None
            continue
        row = _row(draw, phrases, index, source, number)
        if fault == "bad_conversation":
            row["conversations"][-1]["from"] = "human"
        elif fault == "empty_text":
            row["conversations"][-1]["value"] = " "
        elif fault == "bad_record":
            row["conversations"] = "none"
        elif fault == "unsafe_path":
            row["image"] = f"../{index}.jpg"
            if not source.folder:
                row["conversations"][0]["value"] = f"<image>\n{row['conversations'][0]['value']}"
        else:
            previous = row
            lost = image_fault(number) if source.folder else None
            yield row, lost
            continue
        previous = None
        yield row, fault


def _row(draw: random.Random, phrases: dict[int, list[str]], index: int, source: Source, number: int) -> dict[str, Any]:
    row: dict[str, Any] = {"id": index if index % 13 == 0 else f"{number:012d}"}  # ids repeat, and some are numbers
    if source.folder:
        row["image"] = f"{source.folder}/{number:012d}.jpg"
    else:
        row["model"] = ""
    talk = []
    for turn in range(draw.randint(*source.turns)):
        question = f"{draw.choice(phrases[draw.randint(6, 14)])}?"
        if turn == 0:
            question = f"<image>\n{question} {index}" if source.folder else f"{question} {index}"
        talk.append({"from": "human", "value": question})
        talk.append({"from": "gpt", "value": draw.choice(phrases[draw.randint(*source.words)])})
    row["conversations"] = talk
    return row


def write(folder: Path, share: float = 1.0) -> dict[str, int]:
    """Write `mix.json` and `images/` in a new folder. Returns the expected counts: read, written and rejects by reason."""
    folder.mkdir(parents=True)
    counts: Counter[str] = Counter()
    with (folder / "mix.json").open("w") as file:
        file.write("[")
        for index, (row, fault) in enumerate(rows(share)):
            file.write((", " if index else "") + json.dumps(row))
            counts["read"] += 1
            counts[fault or "written"] += 1
        file.write("]")
    for name, total in sorted({source.folder: source.images for source in MIX.values() if source.folder}.items()):
        _write_images(folder / "images", name, int(total * share))
    return dict(counts)


def _write_images(root: Path, folder: str, count: int) -> None:
    files = [_image(seed, "JPEG") for seed in range(DISTINCT)]
    gif, png, cut = _image(1, "GIF"), _image(2, "PNG"), files[0][: len(files[0]) // 2]
    packed = PACKED.get(folder)
    target = root / (packed or folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    if packed is None:
        target.mkdir()
        pool = root.parent / "files"
        pool.mkdir(exist_ok=True)
        for name, data in [*((f"{seed}.jpg", data) for seed, data in enumerate(files)), ("gif", gif), ("png", png), ("cut", cut)]:
            (pool / name).write_bytes(data)
    inner = folder.rsplit("/", 1)[-1]
    with zipfile.ZipFile(target, "w") if packed else open(os.devnull) as archive:
        for number in range(count):
            fault = image_fault(number)
            if fault == "missing_media":
                continue
            name, file, data = f"{number:012d}.jpg", f"{number % DISTINCT}.jpg", files[number % DISTINCT]
            if fault == "corrupt_media":
                file, data = "cut", cut
            elif folder.startswith("ocr_vqa") and number % OTHER_NAME == 0:
                name, file, data = f"{number:012d}.png", "png", png
            elif folder.startswith("ocr_vqa") and number % OTHER_FORMAT == 0:
                file, data = "gif", gif
            if isinstance(archive, zipfile.ZipFile):
                archive.writestr(f"{inner}/{name}", data)
            else:
                (target / name).hardlink_to(pool / file)


def _image(seed: int, kind: str) -> bytes:
    draw = random.Random(seed)
    picture = Image.new("RGB", (12, 9))
    picture.putdata([(draw.randrange(256), draw.randrange(256), draw.randrange(256)) for _ in range(108)])
    buffer = io.BytesIO()
    picture.resize((96, 72)).save(buffer, kind)
    return buffer.getvalue()
