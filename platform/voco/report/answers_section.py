"""Answers side by side: the same questions with every evaluation's answer. The choice of questions ignores all results."""

from __future__ import annotations

import hashlib
from typing import Any

import pyarrow.compute as pc

from voco.report.comparison import Comparison
from voco.report.differences import answers_at
from voco.report.outputs import Output, OutputGraph
from voco.report.pictures import Picture, picture, rows_by_id

QUESTIONS_SHOWN = 12  # per benchmark


def side_by_side(graph: OutputGraph, comparison: Comparison) -> tuple[list[dict[str, Any]], str]:
    """Questions with every evaluation's answer; without any, the reason as the second value."""
    answers: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    sources: list[Output] = []
    for row in comparison.rows:
        output = graph.at(row["output"])
        table = answers_at(output, row["n"]) if output is not None else None
        if output is not None and table is not None:
            lines = table.filter(pc.equal(table["benchmark"], comparison.benchmark)).to_pylist()
            answers[row["label"]] = {(line["sample_id"], line["conversation_index"]): line for line in lines}
            parents = [graph.at(uri) for uri in output.samples_inputs() or [parent.uri for parent in output.parents]]
            sources += [parent for parent in parents if parent is not None and parent.kind == "ingest" and parent not in sources]
    if not answers:
        return [], "The answers are missing."
    common = set.intersection(*(set(by_key) for by_key in answers.values()))
    if not common:
        return [], "The evaluations have no question in common."
    first = next(iter(answers.values()))
    keys = choose_questions({key: str(first[key]["category"]) for key in common}, QUESTIONS_SHOWN)
    media = rows_by_id(sources, {sample_id for sample_id, _ in keys})
    return [
        {
            "picture": picture(media[key[0]])
            if key[0] in media
            else Picture(problem="picture missing: its samples table is gone"),
            "question": _question(media.get(key[0]), key[1]) or first[key]["prompt"],
            "category": first[key]["category"],
            "references": first[key]["references"] or [],
            "answers": [(label, by_key[key]) for label, by_key in answers.items()],
        }
        for key in keys
    ], ""


def _question(row: dict[str, Any] | None, index: int) -> str | None:
    """The last user turn of a conversation as ingested: the question without the chat template of the prompt."""
    conversations = (row or {}).get("conversations") or []
    if index >= len(conversations) or not conversations[index]["turns"]:
        return None
    return str(conversations[index]["turns"][-1]["text"])


def choose_questions(category_of: dict[tuple[str, int], str], count: int) -> list[tuple[str, int]]:
    """`count` keys, one category after another, lowest hash of the key first, at most one key per sample.

    The hash makes the choice independent of every result.
    """
    queues: dict[str, list[tuple[str, int]]] = {}
    for key in sorted(category_of, key=lambda key: hashlib.sha256(f"{key[0]}:{key[1]}".encode()).digest()):
        queues.setdefault(category_of[key], []).append(key)
    chosen: list[tuple[str, int]] = []
    used: set[str] = set()
    while len(chosen) < count and any(queues.values()):
        for category in sorted(queues):
            queue = queues[category]
            while queue and queue[0][0] in used:
                queue.pop(0)
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
                used.add(chosen[-1][0])
    return chosen
