"""What is recorded of a training step beside its loss: its rates, MFU and memory, and what in it is worth a warning.

Everything is counted on the host, or travels in the two all-reduces that a step has anyway: watching costs no synchronisation.
MFU is PaLM's (arXiv 2204.02311, appendix B): the operations that the model needs, whatever is recomputed, over those that the
workers' devices could do in the same time. The frozen vision tower does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from voco.job.config import Training
from voco.model.attention.voco_mask import TokenIds
from voco.model.batch import Batch, CachedBatch
from voco.model.flops import device_peak_tflops, training_flops
from voco.model.generation import cached_tokens
from voco.model.voco_llama import VocoLlama
from voco.sequence.sequence import PAD, TEXT, VOCO
from voco.train.zero import gather_parameter

Row = dict[str, Any]  # of schemas.METRICS

RECENT = 20  # steps whose mean the log line has
SPIKE_STEPS, SPIKE_LEAST = 50, 20  # earlier losses that a loss is compared with, and how many there must be
SPIKE_DEVIATIONS, SPIKE_FLOOR = 6.0, 1e-3  # median absolute deviations above the median; a deviation is at least this share of it
DEAD_NORM, DEAD_STEPS = 1e-8, 3  # a gradient below it counts as none; after so many such steps in a row there is a warning
NORM_EVERY = 50  # steps between two norms of <voco> under ZeRO-3, where the embedding table is gathered for it
IDS_SHOWN = 8


@dataclass(frozen=True)
class StepFacts:
    """What a step takes: of one rank, or of all together."""

    samples: int = 0  # the fill of an epoch's last step is none
    tokens_read: int = 0  # positions of the language model's pass
    flops: int = 0  # of the model: forward and backward, without what is recomputed
    memory_bytes: int = 0  # of the rank that has most

    def packed(self, rank: int, world: int) -> list[int]:
        """Integers whose sum over all ranks `unpacked` reads: the sums, then the memory of each rank at its own position."""
        memory = [0] * world
        memory[rank] = self.memory_bytes
        return [self.samples, self.tokens_read, self.flops, *memory]

    @classmethod
    def unpacked(cls, sums: Sequence[int]) -> StepFacts:
        """The facts of all ranks together, from the sum of their `packed`."""
        samples, tokens_read, flops, *memory = sums
        return cls(samples, tokens_read, flops, max(memory))


NO_FACTS = StepFacts()


class StepCounter:
    """Counts what batches of a model take. Used on the thread that prefetches."""

    def __init__(self, model: VocoLlama) -> None:
        self.model, self.passes = model, 2.0 + trained_share(model)

    def count(self, batches: Sequence[Batch | CachedBatch], samples: int) -> StepFacts:
        """The facts of one rank's micro-batches, in which `samples` samples are; without its memory."""
        flops = sum(self.passes * forward_flops(self.model, batch) + self._teacher_flops(batch) for batch in batches)
        tokens = sum(_text_of(batch).ids.numel() for batch in batches)
        return StepFacts(samples, tokens, round(flops))

    def _teacher_flops(self, batch: Batch | CachedBatch) -> float:
        teacher, distillation = _text_of(batch).teacher, self.model.distillation
        if teacher is None or distillation is None:
            return 0.0
        return forward_flops(distillation.teacher or self.model, teacher, views_apart=False)


def _text_of(batch: Batch | CachedBatch) -> Batch:
    return batch.text if isinstance(batch, CachedBatch) else batch


def trained_share(model: VocoLlama) -> float:
    """Share of the language model's weights that are trained: a backward pass is one pass for the activations, which gradients
    of the projector need too, and one for the weights that learn.
    """
    weights = model.language_model.parameters()
    sizes: list[tuple[int, bool]] = [(getattr(weight, "ds_numel", weight.numel()), weight.requires_grad) for weight in weights]
    return sum(size for size, trained in sizes if trained) / max(1, sum(size for size, _ in sizes))


def forward_flops(model: VocoLlama, batch: Batch | CachedBatch, views_apart: bool | None = None) -> float:
    """Operations of one forward pass over a batch, by default under the method's own mask."""
    text = _text_of(batch)
    cached = [cached_tokens(cache) for cache in batch.caches] if isinstance(batch, CachedBatch) else None
    apart = model.layout.rule.views_apart if views_apart is None else views_apart
    pairs = attended_pairs(text.token_ids, apart, cached)
    tokens, projected = text.ids.numel(), len(text.vision_at)
    return training_flops(model.language_model.config, tokens, pairs, len(text.predict_id), projected, model.feature_width)


def attended_pairs(ids: TokenIds, views_apart: bool, cached: Sequence[int] | None = None) -> int:
    """Pairs (token, token that it attends to) of one flat row under the mask of `voco_mask`.

    A conversation's text attends to the <voco> of its sample, or without `views_apart` to all of its prefix, and causally to
    itself; `cached` instead says how many cached tokens each sample's text attends to.
    """
    kind, sample, view, conversation = (column[0].numpy() for column in (ids.kind, ids.sample, ids.view, ids.conversation))
    text, samples = kind == TEXT, int(sample.max()) + 1
    prefix = ~text & (kind != PAD)
    seen = np.bincount(sample[kind == VOCO if views_apart else prefix], minlength=samples)
    if cached is not None:
        seen = np.asarray(cached)
    owner, lengths = _stretches(sample[text], conversation[text])
    pairs = int((lengths * seen[owner] + lengths * (lengths + 1) // 2).sum())
    inside = view[prefix] if views_apart else np.zeros(int(prefix.sum()), dtype=np.int64)
    _, lengths = _stretches(sample[prefix], inside)
    return pairs + int((lengths * (lengths + 1) // 2).sum())


def _stretches(sample: np.ndarray[Any, Any], part: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Of each part of each sample: the sample, and how many tokens it has. Parts count from 0 in each sample."""
    width = int(part.max(initial=0)) + 1
    keys, lengths = np.unique(sample * width + part, return_counts=True)
    return keys // width, lengths


def used_memory(device: torch.device) -> int:
    """Bytes of this worker: the most that was allocated on its GPU so far, or what is resident now where it has none."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def peak_flops(block: Training, device: torch.device, given_tflops: float | None) -> float | None:
    """Operations a second that one worker could do at most: as `resources.peak_tflops` says, else by its GPU's name; None where
    neither is known. In fp32 half of the bf16 peak, that of TF32.
    """
    if given_tflops is not None:
        return given_tflops * 1e12
    known = device_peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if known is None else known * 1e12 * (1.0 if block.precision == "bf16" else 0.5)


def rates(facts: StepFacts, seconds: float, peak: float | None, world: int) -> Row:
    """The columns of a step's row that say how fast it was, on `world` workers of `peak` operations a second each."""
    return {
        "samples_per_s": facts.samples / seconds,
        "tokens_read": facts.tokens_read,
        "tokens_per_s": facts.tokens_read / seconds,
        "mfu": None if peak is None else facts.flops / (seconds * peak * world),
        "memory_bytes": facts.memory_bytes,
    }


def voco_norm(model: VocoLlama, zero_stage: int, step: int, cached: bool) -> Tensor | None:
    """L2 norm of the embedding of <voco>, a scalar on its device, which nobody waits for; None where it is not trained or not
    looked at: under `cached` frames no step reads it, and under ZeRO-3 every `NORM_EVERY` steps do.
    """
    table: nn.Parameter = model.language_model.model.embed_tokens.weight
    row = table if model.voco_embedding is None else model.voco_embedding  # beside an adapter it is a parameter by itself
    if cached or not model.layout.voco_tokens() or not row.requires_grad or (zero_stage == 3 and step % NORM_EVERY):
        return None
    with gather_parameter(row, zero_stage):
        embedding = row.detach() if row is not table else row.detach()[model.layout.voco_id]
        norm: Tensor = torch.linalg.vector_norm(embedding.float())
    return norm


def is_spike(loss: float, earlier: Sequence[float]) -> bool:
    """Whether a loss stands out of the last `SPIKE_STEPS` losses: it is above their median by `SPIKE_DEVIATIONS` median absolute
    deviations. False before `SPIKE_LEAST` steps.
    """
    limit = spike_limit(earlier)
    return limit is not None and loss > limit


def spike_limit(earlier: Sequence[float]) -> float | None:
    """The highest loss that is no spike after these losses; None where they are too few."""
    recent = earlier[-SPIKE_STEPS:]
    if len(recent) < SPIKE_LEAST:
        return None
    middle = median(recent)
    deviation = median(abs(loss - middle) for loss in recent)
    return middle + SPIKE_DEVIATIONS * max(deviation, SPIKE_FLOOR * abs(middle))


def is_dead(rows: Sequence[Row]) -> bool:
    """Whether the last `DEAD_STEPS` steps had tokens to learn from and no gradient."""
    last = rows[-DEAD_STEPS:]
    return len(last) == DEAD_STEPS and all(row["tokens"] and row["grad_norm"] < DEAD_NORM for row in last)


def warning_of(rows: Sequence[Row]) -> str:
    """What is wrong with the last of these steps, where it begins: a loss that stands out, or gradients that are gone; else "".

    The same on every rank, whose rows are the same.
    """
    losses = [row["loss"] for row in rows[-SPIKE_STEPS - 2 :] if row["tokens"]]
    if rows and rows[-1]["tokens"] and is_spike(losses[-1], losses[:-1]) and not is_spike(losses[-2], losses[:-2]):
        limit, count = spike_limit(losses[:-1]), len(losses[:-1][-SPIKE_STEPS:])
        return f"loss {losses[-1]:.4f} stands out of the last {count} steps, whose limit is {limit:.4f}"
    if is_dead(rows) and not is_dead(rows[:-1]):
        return f"no gradient for {DEAD_STEPS} steps, grad_norm {rows[-1]['grad_norm']:.1e}: nothing is learned"
    return ""


def ids_text(sample_ids: Sequence[str]) -> str:
    """The first ids, and how many more there are."""
    rest = len(sample_ids) - IDS_SHOWN
    return ", ".join(sample_ids[:IDS_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def progress_text(rows: Sequence[Row], steps_left: int) -> str:
    """The log line's figures: the loss of the last step, and rates over the last `RECENT`. Unknown ones are left out."""
    recent = rows[-RECENT:]
    seconds = sum(row["seconds"] for row in recent)

    def mean(name: str, form: str) -> str | None:
        known = [(row[name], row["seconds"]) for row in recent if row.get(name) is not None]
        return form.format(sum(value * time for value, time in known) / sum(time for _, time in known)) if known else None

    waiting = 100 * sum(row.get("wait") or 0.0 for row in recent) / seconds
    last = rows[-1]
    norm, memory = last.get("grad_norm"), last.get("memory_bytes")
    parts = [
        f"loss {last['loss']:.4f}",
        mean("samples_per_s", "{:,.1f} samples/s"),
        mean("tokens_per_s", "{:,.0f} tokens/s"),
        mean("mfu", "MFU {:.1%}"),
        f"{waiting:.0f} % waiting for data",
        None if norm is None else f"gradient norm {norm:.3g}",
        None if memory is None else f"{memory / 1e9:.1f} GB",
        f"{duration_text(seconds / len(recent) * steps_left)} left",
    ]
    return ", ".join(part for part in parts if part is not None)


def duration_text(seconds: float) -> str:
    """Seconds, from two minutes on as minutes, and from two hours on as hours."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
