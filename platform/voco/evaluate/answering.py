"""Answers to evaluation rows by the cached path: each image compressed once, every question answered alone, in batches.

One compression answers for every N' <= N. FastV caches nothing: its choice of tokens depends on the question, so each question
runs its images again. Without `features/` the images are decoded here, and the checkpoint's own tower sees them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from voco.errors import Refused
from voco.evaluate.adaptive import AdaptiveReading
from voco.evaluate.metrics import get_metric, mark_answer
from voco.evaluate.preflight import answer_token_counts, check_conversation, reading_layout
from voco.evaluate.scores import FRAME_METHODS, LOWER_BOUND, READ_ADAPTIVE, READ_WHOLE
from voco.job.benchmarks import default_metric
from voco.job.evaluation import Evaluate
from voco.job.spec import Job
from voco.methods import fastv
from voco.model import weights
from voco.model.cache import VocoCache
from voco.model.flops import cache_bytes, compress_flops, fastv_bytes, fastv_flops, read_flops
from voco.model.generation import prompt_ids
from voco.model.sampling import NotedMargin
from voco.precompute.feature_store import FeatureStore
from voco.precompute.frame_store import FrameStore
from voco.precompute.live_features import LiveFeatures
from voco.run import units
from voco.run.units import part_uri
from voco.sequence.anyres import Size
from voco.store import parquet, schemas
from voco.store.samples import ROW_ADDRESS, images_of, read_at, row_addresses, sizes_of

BATCH_VIEWS = 64  # compressed in one forward pass, or read from a frame cache
BATCH_BYTES = 2 << 30  # of keys and values in memory at a time; a larger sample is a batch alone
# sums over the samples of a unit, for each N
FIGURES = ("compress_seconds", "answer_seconds", "cache_bytes", "full_cache_bytes", "prefill_flops", "uncached_flops")

MediaKey = tuple[str, ...]  # hashes of a sample's images, or its id and the offsets of its frames
Prepared = VocoCache | list[torch.Tensor]  # a sample's media before a question: their cache, or under FastV their features


def list_evaluation_rows(output: str, samples: list[str], block: Evaluate) -> int:
    """Write the work list of an evaluate job: the first `limit` rows of the `samples/` tables, by default all. Returns the
    number of units.

    Raises Refused when there is no row.
    """
    rows = units.cut_units(itertools.islice(row_addresses(samples), block.limit), block.unit_samples, ROW_ADDRESS)
    count = units.write_work_list(output, rows, ROW_ADDRESS)
    if count == 0:
        raise Refused("inputs.samples: no rows to answer")
    return count


def worker_arguments(job: Job, adaptive: AdaptiveReading | None = None) -> dict[str, Any]:
    """The arguments of a job's `AnswerWorker`s; `adaptive` under `tokens: auto`."""
    inputs = {key: getattr(job.resolved_inputs, key) for key in ("checkpoint", "features", "frame_cache")}
    threads = max(1, int(job.resources.cpus_per_worker))
    return {"output": job.output_uri, **inputs, "block": job.block.model_dump(), "threads": threads, "adaptive": adaptive}


class AnswerWorker:
    """Answers the questions of one unit's samples. Without features and frame caches, `threads` threads decode images ahead."""

    def __init__(
        self,
        output: str,
        checkpoint: str,
        features: str | None,
        frame_cache: str | None,
        block: dict[str, Any],
        threads: int = 1,
        adaptive: AdaptiveReading | None = None,
    ) -> None:
        self.output, self.checkpoint, self.adaptive = output, checkpoint, adaptive
        self.block = Evaluate.model_validate(block)
        self.metric = get_metric(self.block.metric or default_metric(self.block.benchmark))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        layout = reading_layout(weights.read_config(checkpoint), self.block)
        self.counts = answer_token_counts(layout, self.block)
        self.model = weights.load_checkpoint(checkpoint, layout, device=device)
        self.features = FeatureStore(features) if features is not None else None
        self.frames = FrameStore(frame_cache) if frame_cache is not None else None
        self.threads = threads
        config, number_bytes = self.model.language_model.config, next(self.model.parameters()).element_size()
        self.token_bytes = cache_bytes(config, 1, number_bytes)
        self.view_tokens = layout.prefix_length + layout.voco_tokens()  # of an uncompressed view: text sees all of them
        self.dropped, self.view_bytes = 0, 0  # of each view, under FastV
        if self.block.fastv is not None:
            self.dropped = layout.vision_slots - self.counts[0]
            self.view_bytes = fastv_bytes(config, self.view_tokens, self.dropped, self.block.fastv.layer, number_bytes)
        self.sizes: dict[str, Size] = {}  # of the unit's images, by sha256

    def __call__(self, unit: int, listed: pa.Table) -> dict[str, Any]:
        """Write the answers to one unit, given as rows of ROW_ADDRESS. Returns the unit's record."""
        addresses = listed.to_pylist()
        rows = (row | address for row, address in zip(read_at(addresses), addresses, strict=True))
        samples = [sample for sample in rows if not self._rejected(sample)]
        self.sizes = {name: size for row in samples for name, size in zip(images_of(row), sizes_of(row), strict=True)}
        answers: list[dict[str, Any]] = []
        figures = {str(n): dict.fromkeys(FIGURES, 0.0) for n in self.counts}
        images = 0
        groups = list(self._groups(samples))
        with self._live_features(groups) as live:
            for group in groups:
                started = time.monotonic()
                prepared = self._prepare(group, live)
                compress_seconds = time.monotonic() - started
                questions = list(self._questions(group if live is None else _decoded(group, live)))
                images += len(prepared)
                for n in self.counts:
                    started = time.monotonic()
                    at_n = self._at(prepared, n)
                    if self.adaptive is None:
                        answers += self._read(questions, at_n, n, figures[str(n)])
                    else:
                        answers += self._read_adaptively(questions, prepared, self.adaptive, figures[str(n)])
                    figures[str(n)]["compress_seconds"] += compress_seconds
                    figures[str(n)]["answer_seconds"] += time.monotonic() - started
                    self._measure(figures[str(n)], at_n)
                    for question in questions:  # at the next N every cache is there already
                        question["cache_hit"] = bool(question["media"]) and self.block.fastv is None
        table = pa.Table.from_pylist(answers, schema=schemas.ANSWERS)
        entry = parquet.write_table(part_uri(self.output, "answers", unit), [table], schemas.ANSWERS)
        counts = {"read": listed.num_rows, "written": len(answers), "images": images}
        bad = [] if live is None else [f"{name}: {error}" for name, error in live.bad.items()]
        return {"tables": {"answers": [entry]}, "counts": counts, "figures": figures, "bad": bad}

    def _live_features(self, groups: list[list[dict[str, Any]]]) -> AbstractContextManager[LiveFeatures | None]:
        """What computes the features of the groups' images; None where features or caches of them are stored."""
        if self.features is not None or self.frames is not None:
            return nullcontext()
        assert self.model.tower is not None
        return closing(LiveFeatures(image_addresses(groups), self.model.tower, self.threads))

    def _rejected(self, sample: dict[str, Any]) -> bool:
        return self.frames is not None and sample["sample_id"] in self.frames.rejected

    def _batch_size(self, prepared: dict[MediaKey, Prepared]) -> int:
        """Questions of one forward pass, so that their views fit into memory."""
        largest = max((self._bytes(views) for views in prepared.values()), default=1)
        size = max(1, min(self.block.batch, BATCH_BYTES // largest))
        if self.block.fastv is None:
            return size
        return max(1, min(size, BATCH_VIEWS // max((len(media) for media in prepared), default=1)))  # its questions carry views

    def _read(
        self, questions: list[dict[str, Any]], at_n: dict[MediaKey, Prepared], n: int, figures: dict[str, float]
    ) -> list[dict[str, Any]]:
        """The answers to all questions at one N, in batches. Adds their operations to `figures`."""
        size, answers = self._batch_size(at_n), []
        for start in range(0, len(questions), size):
            answers += self._answer(questions[start : start + size], at_n, n)
        for question in questions:
            cached, uncached = self._flops(question, at_n)
            figures["prefill_flops"] += cached
            figures["uncached_flops"] += uncached
        return answers

    def _read_adaptively(
        self,
        questions: list[dict[str, Any]],
        prepared: dict[MediaKey, Prepared],
        adaptive: AdaptiveReading,
        figures: dict[str, float],
    ) -> list[dict[str, Any]]:
        """The answers to all questions in order, each of the reading at which the model was sure enough."""
        answers: dict[int, dict[str, Any]] = {}
        left, read = list(range(len(questions))), 0
        for n in adaptive.sizes:
            read += n
            if not left:
                break
            reading = self._read([questions[index] for index in left], self._at(prepared, n), n, figures)
            for index, answer in zip(left, reading, strict=True):
                tokens = {"method": READ_ADAPTIVE, "n": self.counts[0], "tokens_read": read if questions[index]["media"] else 0}
                answers[index] = {**answer, **tokens}
            left = [
                index for index in left if questions[index]["media"] and not adaptive.is_sure(answers[index]["margin"], n)
            ]  # more tokens tell nothing about a question without views
        return [answers[index] for index in range(len(questions))]

    def _measure(self, figures: dict[str, float], prepared: dict[MediaKey, Prepared]) -> None:
        """Add the bytes of these views to the figures of one N."""
        figures["cache_bytes"] += sum(self._bytes(views) / len(self._sizes(media)) for media, views in prepared.items())
        figures["full_cache_bytes"] += sum(map(self._full_bytes, prepared))

    def _flops(self, question: dict[str, Any], prepared: dict[MediaKey, Prepared]) -> tuple[float, float]:
        """The language model's operations up to the first token: with the views' cache, and without."""
        config, layout, text = self.model.language_model.config, self.model.layout, len(question["prompt"])
        views = prepared[question["media"]] if question["media"] else []
        if self.block.fastv is not None:
            count = len(views) if isinstance(views, list) else 0
            flops = fastv_flops(config, count * self.view_tokens + text, count * self.dropped, self.block.fastv.layer)
            return flops, flops
        if not isinstance(views, VocoCache):
            return (text_only := read_flops(config, 0, text)), text_only
        cached = sum(views.tokens)
        flops = read_flops(config, cached, text)
        if layout.rule.views_apart:
            return flops, flops + sum(compress_flops(config, layout.prefix_length, n) for n in views.tokens)
        return flops, read_flops(config, 0, cached + text)

    def _bytes(self, views: Prepared) -> int:
        """Keys and values of a question's views while it is answered."""
        return views.bytes if isinstance(views, VocoCache) else self.view_bytes * len(views)

    def _at(self, prepared: dict[MediaKey, Prepared], n: int) -> dict[MediaKey, Prepared]:
        """What questions read at N = `n`."""
        return {media: self._first_tokens(views, n) for media, views in prepared.items()}

    def _first_tokens(self, views: Prepared, n: int) -> Prepared:
        """The first `n` <voco> of each view; other methods use every token."""
        voco = isinstance(views, VocoCache) and views.key.views_apart
        return views.take(n) if voco and n < views.tokens[0] else views  # type: ignore[union-attr]

    def _groups(self, samples: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """Consecutive samples whose caches are in memory together: `BATCH_VIEWS` views, and `BATCH_BYTES` of caches."""
        group: list[dict[str, Any]] = []
        group_views = group_bytes = 0
        layout = self.model.layout
        for sample in samples:
            sizes = self._sizes(self._media_key(sample)) if sample["media"] else []
            views = layout.tiles(sizes)
            tokens = len(layout.views(sizes)) * layout.tokens if layout.rule.views_apart else layout.prefix_tokens(sizes)
            size = tokens * self.token_bytes
            if group and (group_views + views > BATCH_VIEWS or group_bytes + size > BATCH_BYTES):
                yield group
                group, group_views, group_bytes = [], 0, 0
            group.append(sample)
            group_views, group_bytes = group_views + views, group_bytes + size
        if group:
            yield group

    def _prepare(self, samples: list[dict[str, Any]], live: LiveFeatures | None) -> dict[MediaKey, Prepared]:
        """A cache for each distinct list of images, or of frames (already compressed); under FastV the images' features.

        A list with an image that `live` cannot decode is left out.
        """
        keys = list(dict.fromkeys(self._media_key(sample) for sample in samples if sample["media"]))
        if self.frames is not None:
            n = max(self.counts)
            return {key: self.frames.read(key[0], [int(offset) for offset in key[1:]], n).joined() for key in keys}
        if live is not None:
            of_image = live.take([image["sha256"] for image in image_addresses([samples])])
            keys = [key for key in keys if of_image.keys() >= set(key)]
            features = {key: [of_image[sha256] for sha256 in key] for key in keys}
        else:
            assert self.features is not None
            self.features.load(sha256 for key in keys for sha256 in key)
            features = {key: [self.features(sha256) for sha256 in key] for key in keys}
        if self.block.fastv is not None or not keys:
            return dict(features)
        layout, sizes = self.model.layout, [self._sizes(key) for key in keys]
        tokens = [max(self.counts)] * max(len(layout.views(images)) for images in sizes) if layout.rule.views_apart else None
        caches = self.model.compress_features(list(features.values()), tokens, sizes)
        return dict(zip(keys, caches, strict=True))

    def _sizes(self, media: MediaKey) -> list[Size | None]:
        """Height and width of each image of a cache, None of each frame."""
        return [self.sizes[sha256] for sha256 in media] if self.frames is None else [None] * (len(media) - 1)

    def _full_bytes(self, media: MediaKey) -> float:
        """Keys and values of the complete, uncompressed prefix of an image or frame, on average over `media`."""
        layout, sizes = self.model.layout, self._sizes(media)
        plain = layout.model_copy(update={"method": "none"})
        # no <voco> where the method has none: they are the only tokens by which the two prefixes may differ
        return self.token_bytes * (plain.prefix_tokens(sizes) / len(sizes) - plain.voco_tokens() + layout.voco_tokens())

    def _media_key(self, sample: dict[str, Any]) -> MediaKey:
        """What identifies a sample's cache: its images' hashes, or its id and the offsets of its frames in reading order."""
        if self.frames is None or not sample["media"]:
            return tuple(images_of(sample))
        sample_id = sample["sample_id"]
        offsets = reading_order(self.frames.select_frames(sample_id, self.block.max_frames), self.block.frames, sample_id)
        return (sample_id, *map(str, offsets))

    def _questions(self, samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        cached: set[MediaKey] = set()
        for sample in samples:
            media = self._media_key(sample)
            for index, conversation in enumerate(sample["conversations"]):
                turns = conversation["turns"]
                check_conversation(sample["sample_id"], conversation)
                yield {
                    "sample_id": sample["sample_id"],
                    "index": index,
                    "conversation": conversation,
                    "media": media,
                    "text": turns[-1]["text"],
                    "prompt": prompt_ids(turns, self.model.tokenizer, self.model.layout, bool(media)),
                    "cache_hit": bool(media) and media in cached and self.block.fastv is None,
                }
                cached.add(media)

    def _new_tokens(
        self, questions: list[dict[str, Any]], prepared: dict[MediaKey, Prepared]
    ) -> tuple[list[list[int]], Sequence[float | None]]:
        """New ids of each answer, and the margin of its first; FastV notes none."""
        prompts, limit = [question["prompt"] for question in questions], self.block.max_new_tokens
        views = [prepared[question["media"]] if question["media"] else None for question in questions]
        if self.block.fastv is not None:
            features = [images if isinstance(images, list) else [] for images in views]
            ids = fastv.fastv_answers(self.model, features, prompts, self.block.fastv.layer, self.counts[0], limit)
            return ids, [None] * len(ids)
        caches, noted = [cache if isinstance(cache, VocoCache) else None for cache in views], NotedMargin()
        (*_, answers) = self.model.stream_answers(caches, prompts, limit, noted)
        return [answer.ids for answer in answers], noted.margins

    def _answer(self, questions: list[dict[str, Any]], prepared: dict[MediaKey, Prepared], n: int) -> list[dict[str, Any]]:
        new_ids, margins = self._new_tokens(questions, prepared)
        is_voco = self.model.layout.rule.views_apart
        texts = self.model.tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        read_as = {"voco": LOWER_BOUND, "fastv": "fastv", "none": READ_WHOLE}.get(self.block.read_as)
        method = read_as or FRAME_METHODS.get(self.block.frames, self.model.layout.method)
        return [
            {
                "sample_id": question["sample_id"],
                "conversation_index": question["index"],
                "source_id": question["conversation"]["source_id"],
                "benchmark": self.block.benchmark,
                "category": question["conversation"]["category"] or "none",
                "method": method,
                "n": n,
                "checkpoint": self.checkpoint,
                "prompt": question["text"],
                "prediction": text.strip(),
                "references": question["conversation"]["answers"],
                "correct": self._mark(text, question["conversation"]),
                "new_tokens": len(ids),
                "cache_hit": question["cache_hit"],
                "margin": margin,
                "tokens_read": (n if question["media"] else 0) if is_voco else None,
            }
            for question, ids, text, margin in zip(questions, new_ids, texts, margins, strict=True)
        ]

    def _mark(self, prediction: str, conversation: dict[str, Any]) -> float | None:
        """None for a question without references: nobody knows."""
        return mark_answer(self.metric, prediction, conversation["answers"], conversation["choices"] or ())


def _decoded(samples: list[dict[str, Any]], live: LiveFeatures) -> list[dict[str, Any]]:
    """The samples of which no image could not be decoded."""
    return [sample for sample in samples if live.bad.keys().isdisjoint(images_of(sample))]


def image_addresses(groups: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of IMAGE_ADDRESS: the images of each group of samples, which have their ROW_ADDRESS, once a group."""
    listed: list[dict[str, Any]] = []
    for group in groups:
        first: dict[str, dict[str, Any]] = {}
        for sample in group:
            for medium, sha256 in enumerate(images_of(sample)):
                address = {key: sample[key] for key in ROW_ADDRESS.names}
                first.setdefault(sha256, {"sha256": sha256, **address, "medium": medium})
        listed += first.values()
    return listed


def reading_order(offsets: list[int], order: str, sample_id: str) -> list[int]:
    """A video's frames as they are read: `all` in order, `shuffled` by the sample's id, or the middle `one`."""
    if order == "one":
        return [offsets[len(offsets) // 2]]
    if order == "shuffled":
        draw = np.random.default_rng(int(sample_id[:8], 16))
        return [int(offset) for offset in draw.permutation(offsets)]
    return offsets
