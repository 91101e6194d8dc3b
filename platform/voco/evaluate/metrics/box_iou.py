"""RefCOCO, RefCOCO+, RefCOCOg: is the box of the answer the one that the expression means? Accuracy at IoU 0.5.

Source: Yu et al. 2016 (arXiv 1608.00272), section 5: a box counts when its intersection over union with the true one is at least
0.5. The first box of the prediction counts, `[x0, y0, x1, y1]` as LLaVA writes it: shares of the image's padded square. It is
compared as it is, not clipped to the image. Without a box, or with corners in the wrong order, the mark is 0. Published figures
are one for each split: the categories val, testA, testB or test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from voco.evaluate.metrics import Figures, MarkedAnswer, Metric, accuracy_figures
from voco.image.boxes import intersection_over_union, parse_box

THRESHOLD = 0.5
# IoU of equal decimal fractions, such as 0.2 / 0.4, may come out one rounding below: a tie counts
ROUNDING = 1e-9


def box_overlap(prediction: str, references: Sequence[str]) -> float:
    """The largest IoU, 0.0 to 1.0, of the prediction's first box with the box of a reference."""
    box = parse_box(prediction)
    if box is None or not all(map(math.isfinite, box)):
        return 0.0
    targets = [target for reference in references if (target := parse_box(reference)) is not None]
    return max((intersection_over_union(box, target) for target in targets), default=0.0)


def box_is_right(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the IoU is at least 0.5."""
    return float(box_overlap(prediction, references) >= THRESHOLD - ROUNDING)


def _figures(answers: Sequence[MarkedAnswer]) -> Figures:
    """Accuracy, of all and of each category, the mean IoU, and the share of answers without a box."""
    overlaps = [box_overlap(answer["prediction"], answer["references"]) for answer in answers]
    without = sum(parse_box(answer["prediction"]) is None for answer in answers)
    return {**accuracy_figures(answers), "mean_iou": sum(overlaps) / len(answers), "no_box": without / len(answers)}


METRIC = Metric(name="box_iou", mark=box_is_right, aggregate=_figures, headline_is_mean=True)
