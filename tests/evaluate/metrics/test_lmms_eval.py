"""Our rules and lmms-eval's on the same random answers: equal, or different for a reason of `MEANT`.

Runs where lmms-eval is importable, in a separate environment (0.7.3 was compared):

    python -m venv /tmp/lmms && /tmp/lmms/bin/pip install lmms-eval==0.7.3 pytest
    /tmp/lmms/bin/python -m pytest --noconftest -s tests/evaluate/metrics/test_lmms_eval.py
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from voco.evaluate.metrics import get_metric, official_figures
from voco.evaluate.metrics.box_iou import box_overlap
from voco.evaluate.metrics.mmbench import match_option
from voco.evaluate.metrics.mme import COGNITION, PERCEPTION
from voco.evaluate.metrics.vqa import CONTRACTIONS
from voco.image.boxes import square_box

pytest.importorskip("lmms_eval")

COUNT = 2000  # random answers to each set
WORDS = [
    "yes", "no", "two", "none", "dog", "cat", "red", "blue", "the", "a", "an", "t-shirt", "coca-cola", "1,000", "3.5", "p.m.",
    "dont", "whats", "it's", "mcdonald's", "left/right", "5:30", "$5", "couldn'tve", "oclock", "red,blue", "(left)",
    "stop!", "10", "twelve",
]  # fmt: skip
CHOICES = ["cat", "dog", "red car", "bird"]


def short_answer(draw: random.Random) -> str:
    """One to three words, now and then capital, with a mark at the end, with blanks around them, or nothing."""
    text = " ".join(draw.choice(WORDS) for _ in range(draw.choice([1, 1, 1, 2, 3])))
    text = draw.choice([text, text, text.capitalize(), text.upper()])
    return draw.choice(["{}", "{}", "{}", "{}.", "{}?", "{},", " {}\n", "{}!", ""]).format(text)


def annotators(draw: random.Random) -> list[str]:
    """Ten answers: all the same, or several different ones, near the prediction's words."""
    pool = [short_answer(draw).strip() or "yes" for _ in range(draw.choice([1, 2, 3]))]
    return [draw.choice(pool) for _ in range(10)]


def yes_no_answer(draw: random.Random) -> str:
    answers = (
        "yes",
        "Yes",
        "YES",
        "no",
        "No",
        "NO",
        "y",
        "N",
        "not",
        "know",
        "Nope",
        "maybe",
        "",
        "there is no dog",
        "...yes",
        "I see",
    )
    return draw.choice(["{}", "{}", "{}.", "{}, there is.", " {}\n", "({})"]).format(draw.choice(answers))


def letter_answer(draw: random.Random) -> str:
    forms = (
        "{}",
        "{}.",
        "{})",
        "({})",
        "{}. cat",
        "{}\ndog",
        "The answer is {}.",
        "The answer is {}",
        "Answer: {}",
        "{} or B",
        "",
    )
    texts = ("cat", "a dog", "the red car is here", "A bird", "A dog and a cat", "horse", "catfish")
    letter = draw.choice(["A", "B", "C", "D", "E", "b", "d"])
    return draw.choice([*forms, *forms, *texts]).format(letter)


def box_answer(draw: random.Random) -> tuple[str, str]:
    """A box in one of the ways in which models write it, and the true one: any, the same, moved by a little, or half of it."""
    left, top = draw.randrange(60), draw.randrange(60)
    true = [left, top, left + 2 * draw.randrange(5, 20), top + 2 * draw.randrange(5, 20)]
    half = [*true[:2], (true[0] + true[2]) // 2, true[3]]
    box = draw.choice(
        [true, half, [corner + draw.randrange(-9, 10) for corner in true], [draw.randrange(-10, 110) for _ in range(4)]]
    )
    forms = (
        "[{}, {}, {}, {}]",
        "[{},{},{},{}]",
        "[ {}, {},\n{}, {} ].",
        "It is [{}, {}, {}, {}] or [0, 0, 1, 1].",
        "[{}, {}, {}]",
    )
    forms += (
        "[[{}, {}, {}, {}]]",
        "({}, {}, {}, {})",
        "{} {} {} {}",
        "[{} , {}, {}, {}]",
        "[+{}, {}, {}, {}]",
        "[{}, {}, {}, {}e0]",
        "",
    )
    spelled = [draw.choice([f"{corner / 100}", f"{corner / 100:.4f}", f"{corner / 100}".replace("0.", ".")]) for corner in box]
    return draw.choice([*forms[:3], *forms]).format(*spelled), str([corner / 100 for corner in true])


def vqav2(prediction: str, references: list[str]) -> float:
    from lmms_eval.tasks.vqav2 import utils

    answers = [{"answer": reference, "answer_id": number} for number, reference in enumerate(references)]
    return float(utils.vqav2_process_results_val({"question_id": 1, "answers": answers}, [prediction])["exact_match"])


def textvqa(prediction: str, references: list[str]) -> float:
    from lmms_eval.tasks.textvqa import utils

    return float(utils.textvqa_process_results({"question_id": 1, "answers": [*references]}, [prediction])["exact_match"])


def pope(prediction: str, references: list[str]) -> float:
    from lmms_eval.tasks.pope import utils

    return float(utils.pope_process_results({"question_id": 1, "answer": references[0]}, [prediction])["pope_accuracy"]["score"])


def mme(prediction: str, references: list[str]) -> float:
    from lmms_eval.tasks.mme import utils

    document = {"question_id": 1, "answer": references[0], "category": "count"}
    return float(utils.mme_process_results(document, [prediction])["mme_perception_score"]["score"])


def seed(prediction: str, references: list[str]) -> float:
    from lmms_eval.tasks.seedbench import utils

    document = {"answer": references[0], "data_type": "image", "question_id": 1}
    return float(utils.seed_aggregation_result([utils.seed_process_result(document, [prediction])["seed_all"]]))


def scienceqa(prediction: str, references: list[str]) -> float:
    from lmms_eval.tasks.scienceqa import utils

    return float(
        utils.sqa_process_results({"choices": [*"ABCDE"], "answer": "ABCDE".index(references[0])}, [prediction])["exact_match"]
    )


def gqa(prediction: str, references: list[str]) -> float:
    from lmms_eval.api.metrics import exact_match_hf_evaluate

    options = {"ignore_case": True, "ignore_punctuation": True}
    return float(exact_match_hf_evaluate([prediction.strip()], [references[0]], **options)["exact_match"])


def mmbench(prediction: str, references: list[str]) -> float:
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    matched = MMBench_Evaluator().can_infer(prediction, dict(zip("ABCD", CHOICES, strict=True)))
    return float(matched == references[0])


def refcoco(prediction: str, references: list[str], figure: str = "acc05") -> float:
    """Accuracy at IoU 0.5, or another figure, of one expression."""
    from lmms_eval.tasks.refcoco import utils_rec

    document = {"answer": "the left one", "question_id": 1, "bbox": utils_rec.parse_float_sequence_within(references[0])}
    result = utils_rec.refcoco_bbox_rec_process_result(document, [prediction])["refcoco_ACC@0.5"]
    return float(getattr(utils_rec, f"refcoco_bbox_rec_{figure}")([result]))


def agree(references: list[str]) -> bool:
    return len({reference.strip() for reference in references}) == 1


UNREAD_NUMBER = re.compile(r"[\[\s,-]\.\d|\+|\de\d|\d\s+,")


def is_tie(reply: str, references: list[str]) -> bool:
    return box_overlap(reply, references) == pytest.approx(0.5, abs=1e-9)


Reason = tuple[str, Callable[[str, list[str]], bool]]
EMPTY: Reason = ("an empty answer is wrong, also where a reference normalises to nothing", lambda reply, _: not reply.strip())
# metric -> (reason, the answers to which it applies)
MEANT: dict[str, list[Reason]] = {
    "vqa": [
        EMPTY,
        ("VQAv2's server normalises nothing where the annotators agree; lmms-eval always does", lambda _, truths: agree(truths)),
    ],
    "textvqa": [EMPTY],
    "pope": [
        (
            "LLaVA looks for No, no and not in the first sentence; lmms-eval wants exactly yes or no in lower case",
            lambda reply, _: reply.strip().lower() not in ("yes", "no") or reply.strip() == "NO",
        )
    ],
    "mme": [
        ("the authors' tool reads no single letter", lambda reply, _: len(reply.strip().strip(".")) == 1),
        ("it keeps full stops, which count among the first four characters", lambda reply, _: "." in reply.strip()[:6]),
    ],
    "letter_lenient": [],
    "letter_strict": [("LLaVA takes the bare letter only", lambda reply, _: reply.strip() not in [*"ABCDE"])],
    "scienceqa": [
        ("LLaVA reads `The answer is B`", lambda reply, _: "The answer is" in reply),
        ("and a line end after the letter", lambda reply, _: "\n" in reply.strip()),
        ("it reads no small letter", lambda reply, _: reply.strip()[:1].islower()),
        ("it wants a blank after `B.`", lambda reply, _: reply.strip()[1:] == "."),
    ],
    "mmbench": [],
    "gqa": [
        (
            "GQA forgives full stops at the end only",
            lambda reply, truths: any(not c.isalnum() and c != " " for c in reply + truths[0]),
        ),
    ],
    "box_iou": [
        (
            "a box that is half of the true one: its IoU of decimal fractions is a rounding below 0.5",
            lambda reply, truths: is_tie(reply, truths),
        ),
        (
            "it reads no `.5`, `+0.5`, `5e-1`, nor a blank before a comma",
            lambda reply, _: UNREAD_NUMBER.search(reply) is not None,
        ),
    ],
}
PEERS: dict[str, Callable[[str, list[str]], float]] = {
    "vqa": vqav2, "textvqa": textvqa, "pope": pope, "mme": mme, "letter_lenient": seed, "letter_strict": seed,
    "scienceqa": scienceqa, "mmbench": mmbench, "gqa": gqa, "box_iou": refcoco,
}  # fmt: skip


def question(name: str, draw: random.Random) -> tuple[str, list[str]]:
    """A random answer to a question of a set, and its references."""
    if name in ("pope", "mme"):
        return yes_no_answer(draw), [draw.choice(["yes", "no"])]
    if name in ("letter_lenient", "letter_strict", "scienceqa", "mmbench"):
        return letter_answer(draw), [draw.choice([*"ABCD"])]
    if name == "box_iou":
        reply, true = box_answer(draw)
        return reply, [true]
    references = annotators(draw)
    reply = draw.choice([short_answer(draw), draw.choice(references), draw.choice(references).upper()])
    return reply, references[:1] if name == "gqa" else references


@pytest.mark.parametrize("name", PEERS)
def test_marks_differ_only_where_they_should(name: str) -> None:
    draw, metric, reasons = random.Random(0), get_metric(name), Counter[str]()
    for _ in range(COUNT):
        reply, references = question(name, draw)
        choices = [CHOICES] if metric.reads_choices else []
        own, peer = metric.mark(reply, references, *choices), PEERS[name](reply, references)
        if own != pytest.approx(peer):
            reason = next((text for text, applies in MEANT[name] if applies(reply, references)), None)
            assert reason is not None, (reply, references, own, peer)
            reasons[reason] += 1
    print(f"\n{name}: {COUNT} answers, {sum(reasons.values())} marks differ: {dict(reasons)}")
    assert set(reasons) == {text for text, _ in MEANT[name]}, "a reason without an example"


def test_letters_of_mmbench_are_the_same() -> None:
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    draw, peer = random.Random(1), MMBench_Evaluator()
    for _ in range(COUNT):
        reply = letter_answer(draw)
        assert (match_option(reply, CHOICES) or False) == peer.can_infer(reply, dict(zip("ABCD", CHOICES, strict=True))), reply


def test_circular_accuracy_is_the_same() -> None:
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    draw, rows = random.Random(2), []
    for index in range(60):
        for rotation in range(4):
            answer = "ABCD"[rotation]
            reply = answer if draw.random() < 0.8 else draw.choice([*"ABCD"])
            options = dict(zip("ABCD", CHOICES, strict=True))
            rows.append(
                {"index": index + rotation * 1_000_000, "answer": answer, "prediction": reply, "category": "c", **options}
            )
    own = [
        {
            "question_id": row["index"], "prediction": row["prediction"], "references": [row["answer"]], "choices": CHOICES,
            "mark": float(row["prediction"] == row["answer"]),
        }
        for row in rows
    ]  # fmt: skip
    figures = official_figures(get_metric("mmbench"), own)
    assert figures["circular_accuracy"] == pytest.approx(MMBench_Evaluator().eval_result(rows, "static")[0])
    assert 0 < figures["circular_accuracy"] < figures["accuracy"]


def test_sums_of_mme_are_the_same() -> None:
    from lmms_eval.tasks.mme import utils

    draw = random.Random(3)
    rows: list[dict[str, Any]] = [
        {"category": name, "question_id": f"{name}/{image}", "score": (mark := float(draw.random() < 0.7)), "mark": mark}
        for name in (*PERCEPTION, *COGNITION)
        for image in range(20)
        for _ in range(2)
    ]
    figures = official_figures(get_metric("mme"), rows)
    for part, names in {"perception": PERCEPTION, "cognition": COGNITION}.items():
        peer = utils.mme_aggregate_results([row for row in rows if row["category"] in names])
        assert figures[part] == pytest.approx(peer)


def test_figures_of_pope_are_the_same_but_for_the_yes_ratio() -> None:
    """lmms-eval's yes ratio counts the labels; POPE's counts the answers."""
    from lmms_eval.tasks.pope import utils

    draw = random.Random(4)
    answers = [(draw.choice(["yes", "yes", "no"]), draw.choice(["yes", "no"])) for _ in range(500)]
    figures = official_figures(
        get_metric("pope"),
        [{"prediction": reply, "references": [label], "mark": float(reply == label)} for reply, label in answers],
    )
    peer = [{"prediction": reply, "ground_truth": label, "score": float(reply == label)} for reply, label in answers]
    assert figures["accuracy"] == pytest.approx(utils.pope_aggregate_accuracy(peer))
    assert figures["precision"] == pytest.approx(utils.pope_aggregate_precision(peer))
    assert figures["recall"] == pytest.approx(utils.pope_aggregate_recall(peer))
    assert figures["f1"] == pytest.approx(utils.pope_aggregate_f1_score(peer))
    assert utils.pope_aggregate_yes_ratio(peer) == sum(label == "yes" for _, label in answers) / 500
    assert figures["yes_ratio"] == sum(reply == "yes" for reply, _ in answers) / 500


def test_overlaps_of_boxes_are_the_same() -> None:
    """Of every reply that both can read, and of those without a box."""
    draw, compared = random.Random(5), Counter[bool]()
    for _ in range(COUNT):
        reply, true = box_answer(draw)
        if UNREAD_NUMBER.search(reply) is None:
            overlap = box_overlap(reply, [true])
            assert overlap == pytest.approx(refcoco(reply, [true], "iou"), abs=1e-12), (reply, true)
            compared[overlap > 0] += 1
    assert min(compared.values()) > 100


def test_boxes_of_the_padded_square_are_theirs_where_the_image_is_square() -> None:
    """lmms-eval asks for shares of width and height; LLaVA has learned those of the padded square, which ours are."""
    from datasets import Dataset
    from lmms_eval.tasks.refcoco import utils_rec
    from PIL import Image

    for size, same in (((200, 200), True), ((200, 100), False)):
        rows = Dataset.from_list([{"image": Image.new("RGB", size), "bbox": [20.0, 30.0, 60.0, 40.0], "answer": ["left"]}])
        (row,) = utils_rec.refcoco_bbox_rec_preprocess_dataset(rows)
        assert (square_box((20, 30, 80, 70), *size) == pytest.approx(row["bbox"])) == same


def test_contractions_are_the_same() -> None:
    """The server's table has words in capitals too, which no text in lower case reaches, and two that it leaves as they are."""
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    table: dict[str, str] = EvalAIAnswerProcessor.CONTRACTIONS
    reached = {typed: written for typed, written in table.items() if typed == typed.lower() and typed != written}
    assert reached == CONTRACTIONS
