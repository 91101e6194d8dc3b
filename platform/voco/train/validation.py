"""Validation during training: the loss of held-out rows and, if the job asks for it, answers about them with their mean mark.

The first rows of `inputs.val` are dealt to the ranks. A row that ends with a question (an evaluation row) counts for the loss
with its most frequent reference as the answer. Which step is best, and when to end early, follows from the metrics alone, so that
a run that continues decides as the unbroken one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from voco.job.config import Training, Validate
from voco.job.tables import METRICS
from voco.model.generation import prompt_ids
from voco.model.rope import max_positions
from voco.model.voco_llama import VocoLlama
from voco.sequence.chat_template import Turn
from voco.store.samples import images_of, sizes_of
from voco.train.batches import ImageBatches
from voco.train.live_images import LiveImages
from voco.train.sampler import Rows
from voco.train.step import DataLost, UnusableData, joined_problems, problem_of
from voco.train.video_batches import VideoBatches

Row = dict[str, Any]
QUESTIONS = 64  # of one forward pass of answering


@dataclass(frozen=True)
class ValidationResult:
    """Of all ranks together."""

    loss: float | None  # mean over tokens of answers; None where no row has any
    score: float | None  # mean mark; None without answers
    answers: int  # that were marked


@dataclass(frozen=True)
class _Question:
    prompt: list[int]
    cache: Any  # of its views; None without any
    references: list[str]
    choices: list[str]


class Validation:
    """The first rows of the held-out tables on one of `world` ranks. `data` reads them; its `share_vision` is on."""

    def __init__(self, data: ImageBatches | VideoBatches, model: VocoLlama, block: Training, rank: int, world: int) -> None:
        assert block.validation is not None
        self.data, self.model, self.block, self.settings = data, model, block, block.validation
        data.samples.rows.turns_of = answered_turns
        sizes = data.samples.tables.sizes
        self.rows = first_addresses(sizes, self.settings.rows)[rank::world]
        most_rows = math.ceil(min(self.settings.rows, sum(sizes)) / world)  # of a rank
        self.passes = math.ceil(most_rows / pass_rows(block))  # the same on every rank
        # rooms of one level do not import each other: the metric comes from the table of its names
        self.metric: Any = METRICS.implementation(self.settings.metric, "voco.evaluate.metrics", "METRIC", object)

    @torch.no_grad()
    def run(self, engine: Any) -> ValidationResult:
        """Both figures, computed by all ranks. Raises UnusableData or DataLost, on every rank, where one cannot read its rows."""
        with evaluating(self.model):
            loss = self._loss(engine)
            score, answers = self._score(engine.device) if self.settings.answers else (None, 0)
        return ValidationResult(loss, score, answers)

    def _loss(self, engine: Any) -> float | None:
        sums = torch.zeros(3, dtype=torch.float64, device=engine.device)  # of losses, of tokens, and ranks with a problem
        size, problem = pass_rows(self.block), None
        for start in range(0, self.passes * size, size):
            rows = self.rows[start : start + size] if problem is None else self.rows[:0]
            try:
                (batch,) = self.data.micro_batches(rows, 1).batches
            except Exception as error:  # noqa: BLE001 - the other ranks wait in the next forward pass; all raise it below
                problem = problem_of(error)
                (batch,) = self.data.micro_batches(self.rows[:0], 1).batches
            summed = engine(batch.to(engine.device, torch.float32))
            sums[0] += summed[0] if isinstance(summed, tuple) else summed
            sums[1] += len(batch.predict_id)
        sums[2] += problem is not None
        _raise_problem(sums, problem)
        total, tokens, _ = sums.tolist()
        return total / tokens if tokens else None

    def _score(self, device: torch.device) -> tuple[float | None, int]:
        """The mean mark of the answers to questions with references, and their number."""
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # of marks, of answers, and ranks with a problem
        problem = None
        try:
            questions = self._questions()
            while group := list(islice(questions, QUESTIONS)):
                marks = self._marks(group)
                sums[0] += sum(marks)
                sums[1] += len(marks)
        except Exception as error:  # noqa: BLE001 - as above
            problem = problem_of(error)
        sums[2] += problem is not None
        _raise_problem(sums, problem)
        total, answers, _ = sums.tolist()
        return (total / answers if answers else None), int(answers)

    def _marks(self, group: Sequence[_Question]) -> list[float]:
        caches, prompts = [question.cache for question in group], [question.prompt for question in group]
        ids = self.model.answer_ids(caches, prompts, self.settings.max_new_tokens)
        texts = self.model.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [self._mark(text, question) for text, question in zip(texts, group, strict=True)]

    def _mark(self, answer: str, question: _Question) -> float:
        choices = [question.choices] if self.metric.reads_choices else []
        return float(self.metric.mark(answer, question.references, *choices))

    def _questions(self) -> Iterator[_Question]:
        """The questions of this rank's rows that have references and fit into the model's positions."""
        limit = max_positions(self.model.language_model.config.to_dict()) - self.settings.max_new_tokens
        size = pass_rows(self.block)
        for start in range(0, len(self.rows), size):
            rows = self.rows[start : start + size]
            self.data.samples.rows.load(group for group, _ in rows.tolist())
            listed = [self.data.samples.rows.part(group, index)[0] for group, index in rows.tolist()]
            for row, cache in zip(listed, self._caches(rows, listed), strict=True):
                rejected = bool(row["media"]) and cache is None  # a video without frames
                for conversation in row["conversations"] if not rejected else []:
                    turns, references = conversation["turns"], conversation["answers"] or []
                    if turns[-1]["role"] == "user" and references:
                        prompt = prompt_ids(turns, self.model.tokenizer, self.model.layout, cache is not None)
                        if int(self.model.text_starts([cache])) + len(prompt) <= limit:
                            yield _Question(prompt, cache, references, conversation["choices"] or [])

    def _caches(self, rows: Rows, listed: Sequence[Row]) -> list[Any]:
        """The cache of each row's media; None of a row of text, and of a video that has no frames."""
        if isinstance(self.data, VideoBatches):
            frames, tokens = self.data.frames, self.model.layout.tokens
            shown = [(sample.sample_id, [int(index) for index in sample.media]) for sample in self.data.samples.take(rows)]
            return [frames.read(sample_id, indices, tokens) if indices else None for sample_id, indices in shown]
        features, with_media = self.data.features, [row for row in listed if row["media"]]
        if isinstance(features, LiveImages):
            features.load(with_media)
        else:
            features.load(name for row in with_media for name in images_of(row))
        images = [[self._features(name) for name in images_of(row)] for row in with_media]
        sizes = [sizes_of(row) for row in with_media]
        caches = iter(self.model.compress_features(images, sizes=sizes) if images else [])
        return [next(caches) if row["media"] else None for row in listed]

    def _features(self, name: str) -> Tensor:
        """(V, C) or (T, V, C): stored, or by the tower that was detached from the model."""
        assert isinstance(self.data, ImageBatches)
        image = self.data.features(name)
        return self.model.encode_pixels(image.to(self.model.device)) if image.dtype == torch.uint8 else image


def _raise_problem(sums: Tensor, problem: UnusableData | DataLost | None) -> None:
    """Sum over ranks, in place; raises the problems of all ranks where the last sum says that there is one."""
    dist.all_reduce(sums)
    if sums[-1]:
        raise joined_problems(problem)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode: recomputing activations, which training mode switches on, ignores caches."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def pass_rows(block: Training) -> int:
    """Rows of one forward pass: at most what a micro-batch of training has."""
    return block.micro_batch or max(1, (block.micro_tokens or 0) // block.max_tokens)


def first_addresses(sizes: Sequence[int], count: int) -> Rows:
    """(n, 2) int64: row group and row in it of the first `count` rows of row groups of these sizes."""
    rows = [(group, row) for group, size in enumerate(sizes) for row in range(min(size, count))]
    return np.array(rows[:count], dtype=np.int64).reshape(-1, 2)


def answered_turns(conversation: dict[str, Any]) -> list[Turn]:
    """The turns of a conversation, after a last question its most frequent reference as the answer."""
    turns: list[Turn] = conversation["turns"]
    references = conversation["answers"] or []
    if turns[-1]["role"] != "user" or not references:
        return turns
    ((reference, _),) = Counter(references).most_common(1)
    return [*turns, {"role": "assistant", "text": reference}]


def value_of(row: Row, settings: Validate) -> float | None:
    """What a validation is compared by, more is better: the score where there are answers, else minus the loss; None for a step
    without one.
    """
    value = row.get("val_score") if settings.answers else row.get("val_loss")
    if value is None or math.isnan(value):
        return None
    return float(value) if settings.answers else -float(value)


def best_step(metrics: Sequence[Row], settings: Validate) -> int | None:
    """How many steps were done at the best validation so far, the earliest of equal ones; None before the first."""
    validated = [(value, -row["step"]) for row in metrics if (value := value_of(row, settings)) is not None]
    return 1 - max(validated)[1] if validated else None


def is_exhausted(metrics: Sequence[Row], settings: Validate) -> bool:
    """Whether the last `stop_after` validations brought nothing better than one before them."""
    validated = [row["step"] + 1 for row in metrics if value_of(row, settings) is not None]
    best = best_step(metrics, settings)
    return settings.stop_after is not None and best is not None and sum(step > best for step in validated) >= settings.stop_after
