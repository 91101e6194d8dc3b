"""Answers to evaluation rows by the cached path: each image compressed once, every question asked alone, in batches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from voco import rows, work
from voco.anyres import Size
from voco.blocks import Evaluate
from voco.errors import Refused
from voco.evaluate.scores import exact_match
from voco.features import FeatureStore
from voco.model import weights
from voco.model.cache import VocoCache
from voco.model.flops import cache_bytes, read_flops
from voco.model.voco_llama import prompt_ids
from voco.tokens import Layout
from voco.train.data import COLUMNS, images_of, sizes_of
from voco.video.frame_store import FrameStore
from voco.work import part

VIEWS_AT_ONCE = 64  # compressed in one forward pass, or read from a frame cache
HELD_BYTES = 2 << 30  # of keys and values in memory at a time; a sample that is larger is alone
FIGURES = ("compress_seconds", "answer_seconds", "cache_bytes", "full_cache_bytes", "prefill_flops")  # summed over the samples
VARIANTS = {"shuffled": "shuffled_frames", "one": "one_frame"}  # what answers to less than the video are called


def write_list(output: str, samples: list[str], unit_samples: int) -> int:
    """The work list of an evaluate job: every row of the `samples/` tables. Returns the number of units."""
    return work.write_list(output, work.cut(work.sample_rows(samples), unit_samples, work.SAMPLE_LIST), work.SAMPLE_LIST)


def layout_for(checkpoint: str, read_as: str) -> Layout:
    """The checkpoint's own layout, or the voco mask and positions on a `none` checkpoint: the paper's lower bound."""
    layout = Layout(**weights.read_config(checkpoint)["layout"])
    if read_as == "own":
        return layout
    if layout.method != "none":
        raise ValueError(f"read_as voco: expected a checkpoint of method none, got {layout.method}")
    return layout.model_copy(update={"method": "voco"})


class AnswerWorker:
    """Answers the questions of one unit's samples."""

    def __init__(
        self, output: str, checkpoint: str, features: str | None, frame_cache: str | None, block: dict[str, Any]
    ) -> None:
        self.output, self.checkpoint = output, checkpoint
        self.block = Evaluate.model_validate(block)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = weights.load(checkpoint, layout_for(checkpoint, self.block.read_as), device=device)
        self.features = FeatureStore(features) if features is not None else None
        self.frames = FrameStore(frame_cache) if frame_cache is not None else None
        number_bytes = next(self.model.parameters()).element_size()
        self.token_bytes = cache_bytes(self.model.language_model.config, 1, number_bytes)
        self.sizes: dict[str, Size] = {}  # of the unit's images, by sha256

    def __call__(self, unit: int, listed: pa.Table) -> dict[str, Any]:
        samples = [sample for sample in read_rows(listed.to_pylist()) if not self._rejected(sample)]
        self.sizes = {name: size for one in samples for name, size in zip(images_of(one), sizes_of(one), strict=True)}
        answered: list[dict[str, Any]] = []
        figures = dict.fromkeys(FIGURES, 0.0)
        images = 0
        for group in self._groups(samples):
            started = time.monotonic()
            caches = self._compress(group)
            compressed = time.monotonic()
            questions = list(self._questions(group))
            largest = max((cache.bytes for cache in caches.values()), default=1)
            size = max(1, min(self.block.batch, HELD_BYTES // largest))
            for start in range(0, len(questions), size):
                answered += self._answer(questions[start : start + size], caches)
            figures["compress_seconds"] += compressed - started
            figures["answer_seconds"] += time.monotonic() - compressed
            figures["cache_bytes"] += sum(cache.bytes / len(self._sizes(media)) for media, cache in caches.items())
            figures["full_cache_bytes"] += sum(map(self._full_bytes, caches))
            figures["prefill_flops"] += sum(self._flops(question, caches) for question in questions)
            images += len(caches)
        table = pa.Table.from_pylist(answered, schema=rows.ANSWERS)
        entry = rows.write_table(part(self.output, "answers", unit), [table], rows.ANSWERS)
        counts = {"read": listed.num_rows, "written": len(answered), "images": images}
        return {"tables": {"answers": [entry]}, "counts": counts, "figures": figures}

    def _rejected(self, sample: dict[str, Any]) -> bool:
        return self.frames is not None and sample["sample_id"] in self.frames.rejected

    def _flops(self, question: dict[str, Any], caches: dict[tuple[str, ...], VocoCache]) -> float:
        kept = sum(caches[question["media"]].tokens) if question["media"] else 0
        return read_flops(self.model.language_model.config, kept, len(question["prompt"]))

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

    def _compress(self, samples: list[dict[str, Any]]) -> dict[tuple[str, ...], VocoCache]:
        """One cache for each distinct list of images, or of frames; frames are compressed already."""
        wanted = list(dict.fromkeys(self._media(sample) for sample in samples if sample["media"]))
        if self.frames is not None:
            n = self.model.layout.tokens
            return {media: self.frames.read(media[0], [int(at) for at in media[1:]], n) for media in wanted}
        assert self.features is not None
        features = [[self.features(sha256) for sha256 in media] for media in wanted]
        made = self.model.compress_features(features, sizes=[self._sizes(media) for media in wanted]) if wanted else []
        return dict(zip(wanted, made, strict=True))

    def _sizes(self, media: tuple[str, ...]) -> list[Size | None]:
        """Height and width of each image, None of each frame, that a cache is of."""
        return [self.sizes[one] for one in media] if self.frames is None else [None] * (len(media) - 1)

    def _full_bytes(self, media: tuple[str, ...]) -> float:
        """Keys and values of the whole prefix of one of its images or frames, uncompressed, on average."""
        layout, sizes = self.model.layout, self._sizes(media)
        method = "none" if layout.anyres is not None else layout.method
        whole = layout.model_copy(update={"method": method}).prefix_tokens(sizes) / len(sizes)
        return self.token_bytes * (whole + (layout.vision_slots - layout.slots if layout.anyres is None else 0))

    def _media(self, sample: dict[str, Any]) -> tuple[str, ...]:
        """What a sample's cache is of: its images' hashes, or its id and the places of its frames in reading order."""
        if self.frames is None or not sample["media"]:
            return tuple(one["sha256"] for one in sample["media"] or [])
        sample_id = sample["sample_id"]
        places = ordered(self.frames.taken(sample_id, self.block.max_frames), self.block.frames, sample_id)
        return (sample_id, *(str(place) for place in places))

    def _questions(self, samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        asked: set[tuple[str, ...]] = set()
        for sample in samples:
            media = self._media(sample)
            for index, conversation in enumerate(sample["conversations"]):
                turns = conversation["turns"]
                if turns[-1]["role"] != "user" or not conversation["answers"]:
                    raise Refused(f"{sample['sample_id']}: not an evaluation row: it must end on a user turn and carry answers")
                yield {
                    "sample_id": sample["sample_id"],
                    "index": index,
                    "conversation": conversation,
                    "media": media,
                    "text": turns[-1]["text"],
                    "prompt": prompt_ids(turns, self.model.tokenizer, self.model.layout, bool(media)),
                    "cache_hit": bool(media) and media in asked,
                }
                asked.add(media)

    def _answer(self, questions: list[dict[str, Any]], made: dict[tuple[str, ...], VocoCache]) -> list[dict[str, Any]]:
        caches = [made[q["media"]] if q["media"] else None for q in questions]
        new = self.model.answer(caches, [q["prompt"] for q in questions], self.block.max_new_tokens)
        texts = self.model.tokenizer.batch_decode(new, skip_special_tokens=True)
        layout = self.model.layout
        method = "lower_bound" if self.block.read_as == "voco" else VARIANTS.get(self.block.frames, layout.method)
        return [
            {
                "sample_id": question["sample_id"],
                "conversation_index": question["index"],
                "source_id": question["conversation"]["source_id"],
                "benchmark": self.block.benchmark,
                "category": question["conversation"]["category"] or "none",
                "method": method,
                "n": layout.tokens,
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


def ordered(places: list[int], how: str, sample_id: str) -> list[int]:
    """A video's frames as they are read: all in order, all in an order drawn from the sample's id, or the middle one only."""
    if how == "one":
        return [places[len(places) // 2]]
    if how == "shuffled":
        draw = np.random.default_rng(int(sample_id[:8], 16))
        return [int(place) for place in draw.permutation(places)]
    return places


def read_rows(wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `samples/` without their bytes, in the order of the list; each row group is read once."""
    held: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in wanted:
        where = (one["part"], one["group"])
        if where not in held:
            with rows.open_parquet(one["part"]) as file:
                held[where] = file.read_row_group(one["group"], columns=COLUMNS).to_pylist()
    return [held[(one["part"], one["group"])][one["row"]] for one in wanted]
