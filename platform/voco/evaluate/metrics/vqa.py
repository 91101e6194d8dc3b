"""VQAv2's soft accuracy, by the rule of its evaluation server; VizWiz has the same.

Source: the evaluation page of visualqa.org, and Antol et al. 2015, section 3 (arXiv 1505.00468). A prediction is compared with
the answers of ten annotators. Where they differ, their answers and the prediction are normalised first. Where all agree, the
prediction counts only as it is written: `Yes` is not `yes`. LLaVA's scripts normalise before they submit; `vqa_llava` does too,
and is the figure of LLaVA's papers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from voco.evaluate.metrics import Figures, MarkedAnswer, Metric, accuracy_figures

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")  # not the point of 3.5; the rule spares it before a digit only, so `v.2` keeps its own
NUMBERS = {
    word: str(value)
    for value, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
} | {"none": "0"}
ARTICLES = {"a", "an", "the"}


def _contractions() -> dict[str, str]:
    """Contractions without an apostrophe, as typed -> as written, in the server's selection: `ill`, `wed` and `shell` are words.

    The server also has I'm, I've and I'd've, which no text in lower case reaches, and takes the apostrophe out of somebody'd.
    """
    pairs = {"somebody'd": "somebodyd", "maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all"}
    negated = (
        "ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn needn oughtn shan shouldn wasn weren won wouldn"
    )
    pairs |= {f"{stem}t": f"{stem}'t" for stem in negated.split()}
    endings = {
        "ve": "could might must not should they we what where who would you",
        "d": "he how it someone something there they where who you",
        "ll": "how it somebody someone something they what who why you",
        "s": "he how somebody someone that there what when where who why",
        "re": "there they what why you",
    }
    for ending, stems in endings.items():
        pairs |= {f"{stem}{ending}": f"{stem}'{ending}" for stem in stems.split()}
    twice = {"n't've": "could had might should would", "'d've": "he it she somebody someone something there they we who you"}
    for ending, stems in twice.items():
        first, last = ending[:-3].replace("'", ""), ending[:-3]
        for stem in stems.split():
            pairs |= {f"{stem}{first}'ve": f"{stem}{ending}", f"{stem}{last}ve": f"{stem}{ending}"}
    pairs |= dict.fromkeys(("yall'll", "y'allll"), "y'all'll")
    pairs |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    return pairs | dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")


CONTRACTIONS = _contractions()


@lru_cache(maxsize=1 << 16)
def normalise_answer(text: str) -> str:
    """An answer by the server's rule: without punctuation and articles, in lower case, numbers up to ten as digits.

    A punctuation mark that touches a blank anywhere in the text is deleted, and otherwise becomes a blank; where the text has a
    comma between digits, every mark is deleted. Full stops are deleted unless a digit follows.
    """
    cleaned, number = text, COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        deleted = number or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if deleted else " ")
    words = [NUMBERS.get(word, word) for word in FULL_STOP.sub("", cleaned).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1 << 16)
def evalai_answer(text: str) -> str:
    """An answer as the processor of TextVQA's challenge gives it: the server's rule, after commas and question marks are deleted
    and `'s` is a word. LLaVA gives every answer this form before it submits.
    """
    lowered = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_answer(in_one_line(lowered))


def in_one_line(text: str) -> str:
    """Text with blanks for line ends and tabs, and none around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """How many annotators agree: min(1, matches / 3), averaged over the sets that leave one annotator out.

    Of ten annotators: 0, 0.3, 0.6, 0.9 and 1.0 for 0, 1, 2, 3 and more matches. A single reference counts 1.0, as there
    is none to leave out.
    """
    matches, others = sum(reference == answer for reference in references), len(references)
    if others <= 1:
        return float(matches)
    return (matches * min(3, matches - 1) + (others - matches) * min(3, matches)) / (3 * others)


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """The server's rule: normalised only where the annotators differ. 0.0 for an empty prediction."""
    answer, truths = in_one_line(prediction), [in_one_line(reference) for reference in references]
    if not answer:
        return 0.0
    if len(set(truths)) > 1:
        answer, truths = normalise_answer(answer), [normalise_answer(truth) for truth in truths]
    return soft_accuracy(answer, truths)


def submitted_accuracy(prediction: str, references: Sequence[str]) -> float:
    """The server's rule, on the answer as LLaVA's scripts submit it."""
    return vqa_accuracy(evalai_answer(prediction), references)


def _figures(answers: Sequence[MarkedAnswer]) -> Figures:
    """Accuracy of all and of each category (VQAv2's are the answer types), and the accuracy after LLaVA's normalisation."""
    figures = accuracy_figures(answers)
    submitted = [submitted_accuracy(answer["prediction"], answer["references"]) for answer in answers]
    return {"accuracy": figures["accuracy"], "accuracy_llava": sum(submitted) / len(submitted), **figures}


METRIC = Metric(
    name="vqa",
    mark=vqa_accuracy,
    aggregate=_figures,
    headline_is_mean=True,
    note="where all annotators agree the server compares answers as they are written; accuracy_llava is normalised before, as "
    "LLaVA's published figures are",
)
