"""SEED-Bench: letters as LLaVA marks them, and the accuracy of questions about images, about videos and of each type.

Source: Li et al. 2023 (arXiv 2307.16125), Table 1: types 1 to 9 are about images, 10 to 12 about videos. LLaVA's papers print the
accuracy of all questions. The answer is marked by LLaVA's strict rule; the authors rank the options by their likelihood instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from voco.evaluate.metrics import Figures, MarkedAnswer, Metric, accuracy_figures, mean_mark
from voco.evaluate.metrics.letter_strict import strict_letter

IMAGE_TYPES = (
    "Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location", "Instances Counting",
    "Spatial Relation", "Instance Interaction", "Visual Reasoning", "Text Understanding",
)  # fmt: skip
VIDEO_TYPES = ("Action Recognition", "Action Prediction", "Procedure Understanding")


def _plain(name: str) -> str:
    """A name in small letters only: SEED-Bench's files spell the types in several ways, `Instance Attribute` among them."""
    return re.sub("[^a-z0-9]", "", name.lower()).replace("instances", "instance").replace("attributes", "attribute")


MEDIUM_OF_TYPE = {
    key: medium
    for medium, types in {"image": enumerate(IMAGE_TYPES, 1), "video": enumerate(VIDEO_TYPES, len(IMAGE_TYPES) + 1)}.items()
    for number, name in types
    for key in (_plain(name), str(number))
}


def _medium(answer: MarkedAnswer) -> str | None:
    """image or video: by the type's name or number, else by LLaVA's folder of the file; None where neither says."""
    medium = MEDIUM_OF_TYPE.get(_plain(answer.get("category") or ""))
    if medium is None and answer.get("image"):
        folder = answer["image"].rpartition("/")[0].lower()
        medium = "video" if "video" in folder else "image" if "image" in folder else None
    return medium


def _figures(answers: Sequence[MarkedAnswer]) -> Figures:
    """Accuracy of all questions, of those about images and about videos, and of each type."""
    figures = accuracy_figures(answers)
    parts: Figures = {}
    for medium in ("image", "video"):
        about = [answer for answer in answers if _medium(answer) == medium]
        parts |= {f"{medium}_accuracy": mean_mark(about)} if about else {}
    return {"accuracy": figures["accuracy"], **parts, **figures}


METRIC = Metric(name="seed", mark=strict_letter, aggregate=_figures, headline_is_mean=True)
