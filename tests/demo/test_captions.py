"""The demo's captions in CC3M form: LLaVA's fields, captions that match the pixels, and a deterministic writer."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from voco.demo import captions, easy_vqa_shapes
from voco.demo.easy_vqa_shapes import COLORS, SHAPES

COUNT = 60
TOLERANCE = 8  # largest mean difference (0 to 255) of a cell's pixels after JPEG
NAMED = re.compile(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("captions") / "data"
    captions.write_captions(target, COUNT, seed=5)
    return target


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "cc3m/chat.json").read_text())
    return rows


def train_tiles() -> tuple[list[tuple[str, str]], np.ndarray]:
    """Label and pixels (N, 64, 64, 3) of every labelled train image."""
    labels = easy_vqa_shapes.labels(easy_vqa_shapes.shape_questions("train"))
    folder = easy_vqa_shapes.folder("train") / "images"
    pixels = [np.asarray(Image.open(folder / f"{image}.png").convert("RGB")) for image in labels]
    return list(labels.values()), np.stack(pixels).astype(np.int16)


def test_form_is_that_of_llava_cc3m(out: Path) -> None:
    rows = rows_of(out)
    assert len(rows) == COUNT == len({row["id"] for row in rows})
    ends: Counter[tuple[bool, bool]] = Counter()
    for row in rows:
        assert list(row) == ["id", "image", "conversations"]
        assert re.fullmatch(r"GCC_train_\d{9}", row["id"])
        assert row["image"] == f"{row['id']}.jpg"
        human, gpt = row["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].count("<image>") == 1
        ends[human["value"].startswith("<image>\n"), human["value"].endswith("\n<image>")] += 1
        assert gpt["value"] == gpt["value"].lower().strip() != ""
    assert set(ends) == {(True, False), (False, True)}
    with zipfile.ZipFile(out / "cc3m/images.zip") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert sorted(archive.namelist()) == sorted(row["image"] for row in rows)


def test_captions_match_the_pixels(out: Path) -> None:
    labels, tiles = train_tiles()
    means = tiles.mean(axis=(1, 2))
    sides: Counter[int] = Counter()
    forms = set()
    with zipfile.ZipFile(out / "cc3m/images.zip") as archive:
        for row in rows_of(out):
            picture = Image.open(io.BytesIO(archive.read(row["image"])))
            assert (picture.format, picture.mode) == ("JPEG", "RGB")
            pixels = np.asarray(picture).astype(np.int16)
            sides[len(pixels)] += 1
            assert pixels.shape in {(64, 64, 3), (128, 128, 3)}
            cell_labels = []
            for y in range(0, len(pixels), 64):
                for x in range(0, len(pixels), 64):
                    cell = pixels[y : y + 64, x : x + 64]
                    near = np.flatnonzero((np.abs(means - cell.mean(axis=(0, 1))) < TOLERANCE).all(axis=1))  # first by mean color
                    distance = np.abs(tiles[near] - cell).mean(axis=(1, 2, 3))
                    assert distance.min() < TOLERANCE
                    cell_labels.append(labels[near[distance.argmin()]])
            caption = row["conversations"][1]["value"]
            assert NAMED.findall(caption) == cell_labels
            forms.add(NAMED.sub("X", caption))
    assert sides == {64: COUNT // 2, 128: COUNT - COUNT // 2}
    assert len(forms) >= 6


def test_the_data_depend_only_on_the_arguments_and_are_written_once(out: Path, tmp_path: Path) -> None:
    captions.write_captions(tmp_path, COUNT, seed=5)
    for name in ("chat.json", "images.zip"):
        assert (tmp_path / "cc3m" / name).read_bytes() == (out / "cc3m" / name).read_bytes()
    archive = tmp_path / "cc3m/images.zip"
    before = archive.stat().st_mtime_ns
    captions.write_captions(tmp_path, COUNT, seed=5)
    assert archive.stat().st_mtime_ns == before
    (tmp_path / "cc3m/written.json").unlink()  # as after a writer was killed
    archive.write_bytes(b"half")
    captions.write_captions(tmp_path, COUNT, seed=5)
    assert archive.read_bytes() == (out / "cc3m/images.zip").read_bytes()
    captions.write_captions(tmp_path, COUNT, seed=6)
    assert archive.read_bytes() != (out / "cc3m/images.zip").read_bytes()


def test_more_captions_than_images_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most"):
        captions.write_captions(tmp_path, 100_000)
