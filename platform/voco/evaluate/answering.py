"""Answers to evaluation rows by the cached path: each image compressed once, every question asked alone, in batches.

One compression answers for every N' <= N. Under FastV nothing is made beforehand: each question runs its images anew.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from voco.errors import Refused
from voco.evaluate.metrics.gqa import exact_match
from voco.job.config import Evaluate
from voco.methods import fastv
from voco.model import weights
from voco.model.cache import VocoCache
from voco.model.flops import cache_bytes, compress_flops, fastv_bytes, fastv_flops, read_flops
from voco.model.generation import prompt_ids
from voco.model.rope import max_positions
from voco.precompute.feature_store import FeatureStore
from voco.precompute.frame_store import FrameStore
from voco.run import units
from voco.run.units import part_uri
from voco.sequence.anyres import Size
from voco.sequence.sequence import Layout
from voco.store import parquet, schemas
from voco.store.samples import COLUMNS, ROW_ADDRESS, SampleTables, images_of, list_rows, sizes_of

VIEWS_AT_ONCE = 64  # compressed in one forward pass, or read from a frame cache
HELD_BYTES = 2 << 30  # of keys and values in memory at a time; a sample that is larger is alone
# summed over the samples, for each N
FIGURES = ("compress_seconds", "answer_seconds", "cache_bytes", "full_cache_bytes", "prefill_flops", "uncached_flops")
VARIANTS = {"shuffled": "shuffled_frames", "one": "one_frame"}  # what answers to less than the video are called


def list_evaluation_rows(output: str, samples: list[str], unit_samples: int) -> int:
    """The work list of an evaluate job: every row of the `samples/` tables. Returns the number of units."""
    return units.write_work_list(output, units.cut_units(list_rows(samples), unit_samples, ROW_ADDRESS), ROW_ADDRESS)


def reading_layout(config: dict[str, Any], block: Evaluate) -> Layout:
    """How the checkpoint of this configuration is read: its own layout, or under `read_as: voco` the voco mask and positions
    on a `none` checkpoint, the paper's lower bound. Raises ValueError for what this checkpoint cannot be asked.
    """
    layout, layers = Layout(**config["layout"]), config["language_model"]["num_hidden_layers"]
    if layout.template == "plain":
        raise ValueError("benchmark: this checkpoint was trained on captions (text.template: plain) and reads no question")
    if block.read_as != "own" and layout.method != "none":
        raise ValueError(f"read_as: {block.read_as} reads a checkpoint of method none, got {layout.method}")
    if block.read_as == "voco" and layout.tokens < 1:
        raise ValueError("read_as: voco reads through <voco> tokens, and this checkpoint was made with none (compression.tokens)")
    if block.tokens is not None and layout.method != "voco":
        raise ValueError(f"tokens: only <voco> can be read in part: expected a checkpoint of method voco, got {layout.method}")
    if max(block.tokens or [0]) > layout.tokens:
        raise ValueError(f"tokens: expected at most the checkpoint's {layout.tokens}, got {max(block.tokens or [0])}")
    if block.fastv is not None and layout.anyres is not None:
        raise ValueError("fastv: not for a checkpoint that cuts images into tiles (LLaVA-1.6)")
    if block.fastv is not None and block.fastv.layer >= layers:
        raise ValueError(f"fastv.layer: expected fewer than the model's {layers} layers, got {block.fastv.layer}")
    if block.fastv is not None and fastv.kept_tokens(layout.vision_slots, block.fastv.keep) < 1:
        raise ValueError(f"fastv.keep: expected a share that leaves one of {layout.vision_slots} vision tokens")
    return layout.model_copy(update={"method": "voco"}) if block.read_as == "voco" else layout


def check_length(config: dict[str, Any], block: Evaluate, store: FrameStore) -> None:
    """Refuse videos whose frames leave no position for a question: it would only be seen when a worker comes to one."""
    layout, positions = Layout(**config["layout"]), max_positions(config["language_model"])
    taken = max((min(store.frames(sample_id), block.max_frames) for sample_id in store.groups), default=0)
    most = (positions - layout.cached_from - block.max_new_tokens - 1) // max(answer_token_counts(layout, block))
    if taken > most:
        raise Refused(
            f"evaluate.max_frames: a video has {taken} frames, and {positions} positions hold {max(0, most)} with "
            f"{block.max_new_tokens} new tokens and no question; set it lower, and frames are dropped evenly"
        )


def check_rows(samples: list[str]) -> None:
    """Refuse a table whose first row is not one of evaluation."""
    for uri in samples:
        for row in itertools.islice(SampleTables([uri], [1.0]).rows(["sample_id", "conversations"]), 1):
            for conversation in row["conversations"]:
                _check_row(row["sample_id"], conversation)


def _check_row(sample_id: str, conversation: dict[str, Any]) -> None:
    if conversation["turns"][-1]["role"] != "user" or not conversation["answers"]:
        raise Refused(
            f"{sample_id}: not an evaluation row: it must end on a user turn and carry answers (ingest it as split test)"
        )


def answer_token_counts(layout: Layout, block: Evaluate) -> list[int]:
    """The `n` of the answers: under FastV the vision tokens of a view that stay, else each N asked for, or the layout's."""
    if block.fastv is not None:
        return [fastv.kept_tokens(layout.vision_slots, block.fastv.keep)]
    return block.tokens or [layout.tokens]


Media = tuple[str, ...]  # hashes of a sample's images, or its id and the places of its frames
Made = VocoCache | list[torch.Tensor]  # what is made of them before a question is known: a cache, or under FastV features alone


class AnswerWorker:
    """Answers the questions of one unit's samples."""

    def __init__(
        self, output: str, checkpoint: str, features: str | None, frame_cache: str | None, block: dict[str, Any]
    ) -> None:
        self.output, self.checkpoint = output, checkpoint
        self.block = Evaluate.model_validate(block)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        layout = reading_layout(weights.read_config(checkpoint), self.block)
        self.counts = answer_token_counts(layout, self.block)
        self.model = weights.load_checkpoint(checkpoint, layout, device=device)
        self.features = FeatureStore(features) if features is not None else None
        self.frames = FrameStore(frame_cache) if frame_cache is not None else None
        held, number_bytes = self.model.language_model.config, next(self.model.parameters()).element_size()
        self.token_bytes = cache_bytes(held, 1, number_bytes)
        self.view_tokens = layout.prefix_length + layout.voco_tokens()  # of a view that text sees whole
        self.dropped, self.view_bytes = 0, 0  # of each view, under FastV
        if self.block.fastv is not None:
            self.dropped = layout.vision_slots - self.counts[0]
            self.view_bytes = fastv_bytes(held, self.view_tokens, self.dropped, self.block.fastv.layer, number_bytes)
        self.sizes: dict[str, Size] = {}  # of the unit's images, by sha256

    def __call__(self, unit: int, listed: pa.Table) -> dict[str, Any]:
        samples = [sample for sample in read_evaluation_rows(listed.to_pylist()) if not self._rejected(sample)]
        self.sizes = {name: size for one in samples for name, size in zip(images_of(one), sizes_of(one), strict=True)}
        answered: list[dict[str, Any]] = []
        figures = {str(n): dict.fromkeys(FIGURES, 0.0) for n in self.counts}
        images = 0
        for group in self._groups(samples):
            started = time.monotonic()
            made = self._compress(group)
            compressed = time.monotonic() - started
            questions = list(self._questions(group))
            images += len(made)
            for n in self.counts:
                started = time.monotonic()
                held = {media: self._taken(one, n) for media, one in made.items()}
                largest = max((self._bytes(one) for one in held.values()), default=1)
                size = max(1, min(self.block.batch, HELD_BYTES // largest))
                if self.block.fastv is not None:  # its questions carry their views with them
                    size = max(1, min(size, VIEWS_AT_ONCE // max((len(one) for one in made), default=1)))
                for start in range(0, len(questions), size):
                    answered += self._answer(questions[start : start + size], held, n)
                mine = figures[str(n)]
                mine["compress_seconds"] += compressed
                mine["answer_seconds"] += time.monotonic() - started
                mine["cache_bytes"] += sum(self._bytes(one) / len(self._sizes(media)) for media, one in held.items())
                mine["full_cache_bytes"] += sum(map(self._full_bytes, held))
                for question in questions:
                    ready, none = self._flops(question, held)
                    mine["prefill_flops"] += ready
                    mine["uncached_flops"] += none
                for question in questions:  # what the first N had made, the others find
                    question["cache_hit"] = bool(question["media"]) and self.block.fastv is None
        table = pa.Table.from_pylist(answered, schema=schemas.ANSWERS)
        entry = parquet.write_table(part_uri(self.output, "answers", unit), [table], schemas.ANSWERS)
        counts = {"read": listed.num_rows, "written": len(answered), "images": images}
        return {"tables": {"answers": [entry]}, "counts": counts, "figures": figures}

    def _rejected(self, sample: dict[str, Any]) -> bool:
        return self.frames is not None and sample["sample_id"] in self.frames.rejected

    def _flops(self, question: dict[str, Any], held: dict[Media, Made]) -> tuple[float, float]:
        """The language model's operations up to the first token: on what is ready, and where no cache of the views is."""
        config, layout, text = self.model.language_model.config, self.model.layout, len(question["prompt"])
        made = held[question["media"]] if question["media"] else []
        if self.block.fastv is not None:
            views = len(made) if isinstance(made, list) else 0
            whole = fastv_flops(config, views * self.view_tokens + text, views * self.dropped, self.block.fastv.layer)
            return whole, whole
        if not isinstance(made, VocoCache):
            return (alone := read_flops(config, 0, text)), alone
        kept = sum(made.tokens)
        ready = read_flops(config, kept, text)
        if layout.method == "voco":
            return ready, ready + sum(compress_flops(config, layout.prefix_length, n) for n in made.tokens)
        return ready, read_flops(config, 0, kept + text)

    def _bytes(self, made: Made) -> int:
        """Keys and values that a question holds of its views while it is answered."""
        return made.bytes if isinstance(made, VocoCache) else self.view_bytes * len(made)

    def _taken(self, made: Made, n: int) -> Made:
        """The first `n` <voco> of each view; under other methods all that was made."""
        voco = isinstance(made, VocoCache) and made.key.method == "voco"
        return made.take(n) if voco and n < made.tokens[0] else made  # type: ignore[union-attr]

    def _groups(self, samples: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """Consecutive samples whose caches are in memory together: `VIEWS_AT_ONCE` views, and `HELD_BYTES` of caches."""
        held: list[dict[str, Any]] = []
        views = size = 0
        layout = self.model.layout
        for sample in samples:
            sizes = self._sizes(self._media(sample)) if sample["media"] else []
            count = layout.tiles(sizes)
            kept = len(layout.views(sizes)) * layout.tokens if layout.method == "voco" else layout.prefix_tokens(sizes)
            if held and (views + count > VIEWS_AT_ONCE or size + kept * self.token_bytes > HELD_BYTES):
                yield held
                held, views, size = [], 0, 0
            held.append(sample)
            views, size = views + count, size + kept * self.token_bytes
        if held:
            yield held

    def _compress(self, samples: list[dict[str, Any]]) -> dict[Media, Made]:
        """One cache for each distinct list of images, or of frames; frames are compressed already. Under FastV features."""
        wanted = list(dict.fromkeys(self._media(sample) for sample in samples if sample["media"]))
        if self.frames is not None:
            most = max(self.counts)
            return {media: self.frames.read(media[0], [int(at) for at in media[1:]], most) for media in wanted}
        assert self.features is not None
        features = {media: [self.features(sha256) for sha256 in media] for media in wanted}
        if self.block.fastv is not None or not wanted:
            return dict(features)
        layout, sizes = self.model.layout, [self._sizes(media) for media in wanted]
        tokens = [max(self.counts)] * max(len(layout.views(some)) for some in sizes) if layout.method == "voco" else None
        made = self.model.compress_features(list(features.values()), tokens, sizes)
        return dict(zip(wanted, made, strict=True))

    def _sizes(self, media: Media) -> list[Size | None]:
        """Height and width of each image, None of each frame, that a cache is of."""
        return [self.sizes[one] for one in media] if self.frames is None else [None] * (len(media) - 1)

    def _full_bytes(self, media: Media) -> float:
        """Keys and values of the whole prefix of one of its images or frames, uncompressed, on average."""
        layout, sizes = self.model.layout, self._sizes(media)
        plain = layout.model_copy(update={"method": "none"})
        # no <voco> where the method has none: they are the only tokens by which the two prefixes may differ
        return self.token_bytes * (plain.prefix_tokens(sizes) / len(sizes) - plain.voco_tokens() + layout.voco_tokens())

    def _media(self, sample: dict[str, Any]) -> Media:
        """What a sample's cache is of: its images' hashes, or its id and the places of its frames in reading order."""
        if self.frames is None or not sample["media"]:
            return tuple(one["sha256"] for one in sample["media"] or [])
        sample_id = sample["sample_id"]
        places = reading_order(self.frames.taken(sample_id, self.block.max_frames), self.block.frames, sample_id)
        return (sample_id, *(str(place) for place in places))

    def _questions(self, samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        asked: set[Media] = set()
        for sample in samples:
            media = self._media(sample)
            for index, conversation in enumerate(sample["conversations"]):
                turns = conversation["turns"]
                _check_row(sample["sample_id"], conversation)
                yield {
                    "sample_id": sample["sample_id"],
                    "index": index,
                    "conversation": conversation,
                    "media": media,
                    "text": turns[-1]["text"],
                    "prompt": prompt_ids(turns, self.model.tokenizer, self.model.layout, bool(media)),
                    "cache_hit": bool(media) and media in asked and self.block.fastv is None,
                }
                asked.add(media)

    def _new_tokens(self, questions: list[dict[str, Any]], held: dict[Media, Made]) -> list[list[int]]:
        prompts, most = [question["prompt"] for question in questions], self.block.max_new_tokens
        made = [held[question["media"]] if question["media"] else None for question in questions]
        if self.block.fastv is not None:
            views = [one if isinstance(one, list) else [] for one in made]
            return fastv.fastv_answers(self.model, views, prompts, self.block.fastv.layer, self.counts[0], most)
        return self.model.answer([one if isinstance(one, VocoCache) else None for one in made], prompts, most)

    def _answer(self, questions: list[dict[str, Any]], held: dict[Media, Made], n: int) -> list[dict[str, Any]]:
        new = self._new_tokens(questions, held)
        texts = self.model.tokenizer.batch_decode(new, skip_special_tokens=True)
        read_as = {"voco": "lower_bound", "fastv": "fastv"}.get(self.block.read_as)
        method = read_as or VARIANTS.get(self.block.frames, self.model.layout.method)
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
                "correct": exact_match(text, question["conversation"]["answers"]),
                "new_tokens": len(ids),
                "cache_hit": question["cache_hit"],
            }
            for question, ids, text in zip(questions, new, texts, strict=True)
        ]


def reading_order(places: list[int], how: str, sample_id: str) -> list[int]:
    """A video's frames as they are read: all in order, all in an order drawn from the sample's id, or the middle one only."""
    if how == "one":
        return [places[len(places) // 2]]
    if how == "shuffled":
        draw = np.random.default_rng(int(sample_id[:8], 16))
        return [int(place) for place in draw.permutation(places)]
    return places


def read_evaluation_rows(wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `samples/` without their bytes, in the order of the list; each row group is read once."""
    held: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in wanted:
        where = (one["part"], one["group"])
        if where not in held:
            with parquet.open_parquet(one["part"]) as file:
                held[where] = file.read_row_group(one["group"], columns=COLUMNS).to_pylist()
    return [held[(one["part"], one["group"])][one["row"]] for one in wanted]
