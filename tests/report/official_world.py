"""A flow of evaluations whose published figure is not the mean mark: POPE, MME and MMBench, and a video set with two judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from report import report_world

from voco.commands import judge as judge_command
from voco.evaluate.judge import Verdict
from voco.evaluate.metrics import get_metric, mark_answer
from voco.evaluate.metrics.mme import COGNITION, PERCEPTION
from voco.evaluate.official import QuestionFacts
from voco.evaluate.scores import score_rows
from voco.job.benchmarks import default_metric
from voco.run import units
from voco.store import parquet, schemas

IMAGES = 60
SKILLS = {"upper": 0.85, "voco": 0.75, "avg-pool": 0.6, "lower": 0.45}
METHOD = {"upper": "none", "voco": "voco", "avg-pool": "avg_pool", "lower": "lower_bound"}
SETS = {"pope": "pope", "mme": "mme", "mmbench": "mmbench-dev", "msvd": "msvd-qa"}


def questions(name: str) -> list[dict[str, Any]]:
    """sample_id, conversation_index, source_id, category, references, another answer, and choices of each question."""
    rows = []
    for image in range(IMAGES):
        for number in range(1 if name == "msvd" else 2):
            label = ("yes", "no")[(number + (image % 2 if name == "pope" else 0)) % 2]
            row = {"category": "none", "references": [label], "wrong": "no" if label == "yes" else "yes", "choices": []}
            source = f"{image}-{number}"
            if name == "pope":
                row["category"] = ("adversarial", "popular", "random")[image % 3]
            elif name == "mme":
                row["category"], source = (*PERCEPTION, *COGNITION)[image % 14], f"{image}"
            elif name == "mmbench":
                row |= {"category": ("logic", "colour")[image % 2], "references": ["AB"[number]], "wrong": "BA"[number]}
                row["choices"], source = ["red", "blue"], str(image + 1_000_000 * number)
            else:
                row |= {"references": ["a man"], "wrong": "a dog"}
            rows.append({"sample_id": f"{image:032x}", "conversation_index": number, "source_id": source, **row})
    return rows


def answers(name: str, role: str) -> tuple[pa.Table, QuestionFacts]:
    """The answers of a model that is right in a share of SKILLS, and what the metric reads of the samples."""
    draw, metric, items = np.random.default_rng(len(role)), get_metric(default_metric(SETS[name])), questions(name)
    facts: QuestionFacts = {}
    rows = []
    for question in items:
        prediction = question["references"][0] if draw.random() < SKILLS[role] else question["wrong"]
        sample = question["sample_id"]
        facts.setdefault(sample, (f"{int(sample, 16)}.jpg", []))[1].append(question["choices"])
        rows.append(
            {
                **{key: question[key] for key in ("sample_id", "conversation_index", "source_id", "category", "references")},
                "benchmark": SETS[name], "method": METHOD[role], "n": 2 if name == "msvd" else 1, "checkpoint": role,
                "prompt": "USER: ...", "prediction": prediction, "new_tokens": 1, "cache_hit": False,
                "correct": mark_answer(metric, prediction, question["references"], question["choices"]),
            }
        )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schemas.ANSWERS), facts


def evaluation(root: Path, name: str, role: str, bounds: dict[str, pa.Table]) -> list[dict[str, Any]]:
    """A finished evaluate job; returns its rows of scores."""
    table, facts = answers(name, role)
    metric = get_metric(default_metric(SETS[name]))
    measures = {"cache_bytes": 4096, "full_cache_bytes": 266240, "latency_s": 0.002, "seconds": 9.5}
    rows = score_rows(metric, table, bounds.get("upper"), bounds.get("lower"), 200, 0, facts, **measures)
    inputs = {
        "samples": [{"uri": str(root / "ingest-test")}], "features": str(root / "features-test"),
        "checkpoint": str(root / "base"),
        **{key: str(root / f"{name}-{key}") for key in bounds},
    }  # fmt: skip
    block = {"benchmark": SETS[name], "read_as": "voco" if role == "lower" else "own"}
    job = report_world.job(root, f"{name}-{role}", "evaluate", inputs=inputs, evaluate=block)
    entries = {
        kind: [parquet.write_table(units.part_uri(job.output_uri, kind, 0), [data], data.schema)]
        for kind, data in (("answers", table), ("scores", pa.Table.from_pylist(rows, schema=schemas.SCORES)))
    }
    report_world.finish(job, 12.5, tables=entries)
    return rows


def judged(root: Path, output: str, judge: str, wrong: int, finished: bool = True) -> None:
    """The files of `voco judge` by its own code, without a server: a verdict for each answer, `wrong` of them without one."""
    options = judge_command.JudgeOptions("http://127.0.0.1:9/v1", judge)
    folder = Path(judge_command.default_folder(str(root / output), judge))
    items = judge_command.read_judged_answers(str(root / output))
    with judge_command.open_verdicts(folder, options) as log:
        for number, (key, answer) in enumerate(zip(judge_command.judge.answer_keys(items), items, strict=True)):
            right = answer.prediction in answer.references
            verdict = None if number < wrong else Verdict(right, 5 if right else 1)
            text = "?" if verdict is None else f"{{'pred': '{'yes' if right else 'no'}', 'score': {verdict.score}}}"
            log.append({"key": key, **judge_command.verdict_row(text, f"{judge}-0613")})
        if finished:
            judge_command.write_summary(folder, items, log.verdicts, options)


def flow(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Every evaluation under `root`; returns the rows of scores by the evaluation's name."""
    report_world.ingest(root)
    report_world.features(root)
    report_world.training(root, "base", "none", 0.4)
    scores = {}
    for name in SETS:
        bounds = {} if name == "msvd" else {role: answers(name, role)[0] for role in ("upper", "lower")}
        for role in ("voco",) if name == "msvd" else ("upper", "lower", "voco", "avg-pool"):
            own = {} if role in ("upper", "lower") else bounds
            scores[f"{name}-{role}"] = evaluation(root, name, role, own)
    judged(root, "msvd-voco", "gpt-3.5-turbo", 3)
    judged(root, "msvd-voco", "other/judge", 0, finished=False)
    return scores
