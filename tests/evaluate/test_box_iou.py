"""Accuracy at IoU 0.5 of RefCOCO: golden cases worked out by hand, and equality with lmms-eval's rule where it has one."""

from __future__ import annotations

import importlib.util
import random

import numpy as np
import pytest
from PIL import Image

from voco.evaluate.metrics import get_metric, official_figures
from voco.evaluate.metrics.box_iou import box_overlap
from voco.image.boxes import box_text, parse_box, square_box
from voco.job.benchmarks import default_metric
from voco.model.vision.pixels import llava_pixels

TRUE = "[0.2, 0.2, 0.6, 0.6]"  # 0.4 x 0.4 = 0.16
# prediction, references, IoU, mark
CASES: list[tuple[str, list[str], float, float]] = [
    # the same box, however it is written
    ("[0.2, 0.2, 0.6, 0.6]", [TRUE], 1.0, 1.0),
    ("[0.20, 0.20, 0.60, 0.60]", [TRUE], 1.0, 1.0),
    ("[.2,.2,.6,.6]", [TRUE], 1.0, 1.0),
    ("[ 0.2 ,0.2,\n0.6,\t0.6 ]", [TRUE], 1.0, 1.0),
    ("[2e-1, 0.2, 6E-1, 0.6]", [TRUE], 1.0, 1.0),
    ("[+0.2, 0.2, 0.6, 0.6]", [TRUE], 1.0, 1.0),
    ("[0.2, 0.2, 0.6, 0.6].", [TRUE], 1.0, 1.0),
    ("The region is at [0.2, 0.2, 0.6, 0.6] in the image.", [TRUE], 1.0, 1.0),
    ("the man[0.2, 0.2, 0.6, 0.6]", [TRUE], 1.0, 1.0),
    ("[[0.2, 0.2, 0.6, 0.6]]", [TRUE], 1.0, 1.0),
    ('{"bbox_2d": [0.2, 0.2, 0.6, 0.6]}', [TRUE], 1.0, 1.0),
    # the first box counts
    ("[0.2, 0.2, 0.6, 0.6] or [0.0, 0.0, 0.1, 0.1]", [TRUE], 1.0, 1.0),
    ("[0.0, 0.0, 0.1, 0.1] or [0.2, 0.2, 0.6, 0.6]", [TRUE], 0.0, 0.0),
    ("[1] The box is [0.2, 0.2, 0.6, 0.6]", [TRUE], 1.0, 1.0),
    ("[0.2, 0.2] to [0.6, 0.6]", [TRUE], 0.0, 0.0),
    # shifted: shared 0.3 x 0.4 = 0.12 of 0.20; 0.2 x 0.4 = 0.08 of 0.24; 0.3 x 0.3 = 0.09 of 0.23
    ("[0.3, 0.2, 0.7, 0.6]", [TRUE], 0.6, 1.0),
    ("[0.4, 0.2, 0.8, 0.6]", [TRUE], 1 / 3, 0.0),
    ("[0.3, 0.3, 0.7, 0.7]", [TRUE], 9 / 23, 0.0),
    ("[0.2, 0.1, 0.6, 0.5]", [TRUE], 0.6, 1.0),
    ("[0.1, 0.2, 0.5, 0.6]", [TRUE], 0.6, 1.0),
    # smaller and larger
    ("[0.2, 0.2, 0.4, 0.6]", [TRUE], 0.5, 1.0),  # a tie counts
    ("[0.2, 0.2, 0.39, 0.6]", [TRUE], 0.475, 0.0),
    ("[0.2, 0.2, 0.41, 0.6]", [TRUE], 0.525, 1.0),
    ("[0.2, 0.2, 0.4, 0.4]", [TRUE], 0.25, 0.0),
    ("[0.0, 0.0, 1.0, 1.0]", [TRUE], 0.16, 0.0),
    ("[0.2, 0.2, 0.6, 1.0]", [TRUE], 0.5, 1.0),
    ("[0.2, 0.2, 1.0, 1.0]", [TRUE], 0.25, 0.0),
    ("[0.15, 0.15, 0.65, 0.65]", [TRUE], 0.64, 1.0),
    # apart, and touching
    ("[0.7, 0.7, 0.9, 0.9]", [TRUE], 0.0, 0.0),
    ("[0.6, 0.2, 0.8, 0.6]", [TRUE], 0.0, 0.0),
    ("[0.6, 0.6, 0.8, 0.8]", [TRUE], 0.0, 0.0),
    # beyond the image: compared as it is
    ("[-0.2, 0.2, 0.6, 0.6]", [TRUE], 0.5, 1.0),
    ("[0.2, 0.2, 0.6, 1.4]", [TRUE], 1 / 3, 0.0),
    # no box
    ("", [TRUE], 0.0, 0.0),
    ("on the left", [TRUE], 0.0, 0.0),
    ("0.2, 0.2, 0.6, 0.6", [TRUE], 0.0, 0.0),
    ("(0.2, 0.2, 0.6, 0.6)", [TRUE], 0.0, 0.0),
    ("[0.2, 0.2, 0.6]", [TRUE], 0.0, 0.0),
    ("[0.2, 0.2, 0.6, 0.6, 0.9]", [TRUE], 0.0, 0.0),
    ("[0.2 0.2 0.6 0.6]", [TRUE], 0.0, 0.0),
    ("[0.2, 0.2, 0.6, 0.6", [TRUE], 0.0, 0.0),
    ("[a, b, c, d]", [TRUE], 0.0, 0.0),
    ("[nan, 0.2, 0.6, 0.6]", [TRUE], 0.0, 0.0),
    ("[0.2, 0.2, 1e999, 0.6]", [TRUE], 0.0, 0.0),
    # pixels, per thousand, corners in the wrong order, no area
    ("[128, 128, 384, 384]", [TRUE], 0.0, 0.0),
    ("[200, 200, 600, 600]", [TRUE], 0.0, 0.0),
    ("[0.6, 0.6, 0.2, 0.2]", [TRUE], 0.0, 0.0),
    ("[0.2, 0.6, 0.6, 0.2]", [TRUE], 0.0, 0.0),
    ("[0.3, 0.3, 0.3, 0.3]", [TRUE], 0.0, 0.0),
    ("[0.2, 0.2, 0.2, 0.6]", [TRUE], 0.0, 0.0),
    # several references: the best one; none
    ("[0.2, 0.2, 0.6, 0.6]", ["[0.7, 0.7, 0.9, 0.9]", TRUE], 1.0, 1.0),
    ("[0.3, 0.2, 0.7, 0.6]", [TRUE, "[0.4, 0.2, 0.8, 0.6]"], 0.6, 1.0),
    ("[0.2, 0.2, 0.6, 0.6]", ["left", TRUE], 1.0, 1.0),
    ("[0.2, 0.2, 0.6, 0.6]", ["left"], 0.0, 0.0),
    ("[0.2, 0.2, 0.6, 0.6]", [], 0.0, 0.0),
    ("[0.2, 0.2, 0.6, 0.6]", ["[0.2, 0.2, 0.2, 0.6]"], 0.0, 0.0),
    # small objects: hundredths move the IoU, so references have four decimals
    ("[0.5, 0.5, 0.52, 0.52]", ["[0.5049, 0.5, 0.5249, 0.52]"], 151 / 249, 1.0),
    ("[0.5, 0.5, 0.52, 0.52]", ["[0.51, 0.5, 0.53, 0.52]"], 1 / 3, 0.0),
    # as VoCo's base model answers
    ("[0.28, 0.34, 0.4, 0.71]", ["[0.2781, 0.3422, 0.4047, 0.7109]"], 0.044136 / 0.04694142, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("prediction", "references", "overlap", "mark"), CASES)
def test_golden_cases(prediction: str, references: list[str], overlap: float, mark: float) -> None:
    assert box_overlap(prediction, references) == pytest.approx(overlap, abs=1e-9)
    assert get_metric("box_iou").mark(prediction, references) == mark


def test_enough_cases_of_both_kinds() -> None:
    assert len(CASES) > 50
    assert sum(mark for *_, mark in CASES) > 20


def test_figures_are_by_split_with_the_mean_overlap() -> None:
    metric = get_metric("box_iou")
    answers = [
        {"prediction": prediction, "references": [TRUE], "category": category, "mark": metric.mark(prediction, [TRUE])}
        for prediction, category in [(TRUE, "testA"), ("[0.4, 0.2, 0.8, 0.6]", "testA"), ("left", "testB"), (TRUE, "testB")]
    ]
    assert official_figures(metric, answers) == {
        "accuracy": 0.5, "testA/accuracy": 0.5, "testB/accuracy": 0.5, "mean_iou": pytest.approx(7 / 12),
        "no_box": 0.25,
    }  # fmt: skip
    assert metric.headline == "accuracy"


@pytest.mark.parametrize("name", ["refcoco", "RefCOCO+", "refcocog", "refcoco-testA", "refcoco+-testB", "refcocog-val"])
def test_it_is_the_default_of_its_benchmarks(name: str) -> None:
    assert default_metric(name) == "box_iou"


@pytest.mark.parametrize(
    ("corners", "size", "expected"),
    [
        ((0, 0, 640, 640), (640, 640), [0.0, 0.0, 1.0, 1.0]),
        ((0, 0, 640, 480), (640, 480), [0.0, 0.12, 1.0, 0.88]),  # 80 pixels of padding above and below: 0.125 to 0.875
        ((0, 0, 480, 640), (480, 640), [0.12, 0.0, 0.88, 1.0]),
        ((320, 240, 640, 480), (640, 480), [0.5, 0.5, 1.0, 0.88]),
        ((0, 0, 3, 4), (3, 4), [0.0, 0.0, 0.75, 1.0]),  # (4 - 3) // 2 = 0 pixels on the left, as expand2square does
        ((10, 20, 30, 40), (100, 50), [0.1, 0.45, 0.3, 0.65]),
    ],
)
def test_boxes_are_shares_of_the_padded_square(corners, size: tuple[int, int], expected: list[float]) -> None:
    text = box_text(square_box(corners, *size))
    assert text == str(expected)
    assert parse_box(text) == tuple(expected)


def test_the_square_is_the_one_that_the_tower_pads_to() -> None:
    """The white rectangle of an image, in the padded image, is where its box says it is."""
    image = Image.new("RGB", (61, 40))
    image.paste((255, 255, 255), (11, 7, 31, 29))
    rows, columns, _ = np.nonzero(llava_pixels(image, 61, (0, 0, 0)).numpy())
    edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert square_box((11, 7, 31, 29), 61, 40) == pytest.approx([edge / 61 for edge in edges])


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_it_marks_as_lmms_eval_does() -> None:
    """On boxes that both can read; it has no rule for corners in the wrong order, and divides by zero for an empty box."""
    from lmms_eval.tasks.refcoco import utils_rec

    source = random.Random(0)
    for _ in range(5000):
        first, second = ([source.randrange(100) / 100 for _ in range(4)] for _ in range(2))
        if first[0] < first[2] and first[1] < first[3] and second[0] < second[2] and second[1] < second[3]:
            iou = utils_rec.compute_iou(second, utils_rec.parse_float_sequence_within(f"It is {first}."))
            assert box_overlap(f"It is {first}.", [str(second)]) == pytest.approx(iou, abs=1e-12)
