"""Rows of `samples/` to batches of text that reads its frames from a frame cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from voco.job.config import VideoSft
from voco.model.batch import CachedBatch, collate_cached
from voco.model.voco_llama import VocoLlama
from voco.precompute.frame_store import FrameStore
from voco.precompute.stored_frames import StoredFrames
from voco.sequence.sequence import TokenSample, filler_sample
from voco.store.samples import SampleTables
from voco.train.batches import SampleRows, Split, StepData, Tokens, TrainingSamples, first_trained, row_ids
from voco.train.packing import split_by_tokens, split_evenly
from voco.train.sampler import LIVE_GROUPS, Rows

READERS = 8  # caches that are read at a time
Shown = tuple[str, tuple[str, ...]]  # a sample and its frames


class VideoBatches:
    """Batches of samples whose frames are read as caches."""

    def __init__(
        self, tables: SampleTables, frames: FrameStore, model: VocoLlama, block: VideoSft, live_groups: int = 2 * LIVE_GROUPS
    ) -> None:
        def views(row: dict[str, Any]) -> list[str] | None:
            if row["sample_id"] in frames.rejected:
                return None
            return [str(index) for index in frames.select_frames(row["sample_id"], block.max_frames)] if row["media"] else []

        rows = SampleRows(tables, block.share_vision, live_groups)
        self.samples = TrainingSamples(tables, model.tokenizer, model.layout, block, views, cached=True, rows=rows)
        self.frames, self.layout = frames, model.layout

    def micro_batches(self, rows: Rows, count: int, sizes: Tokens = None) -> StepData:
        """The samples at (n, 2) rows as `count` batches of nearly equal length, cached tokens counted. `sizes`: N of each row."""
        return self._batches(rows, sizes, lambda lengths: split_evenly(lengths, count))

    def token_batches(self, rows: Rows, tokens: int, sizes: Tokens = None) -> StepData:
        """As few batches of at most `tokens` each, cached tokens counted, a longer sample alone; with a filler."""
        data = self._batches(rows, sizes, lambda lengths: split_by_tokens(lengths, tokens) or [[]])
        return replace(data, filler=self._collate([], [], []))

    def _batches(self, rows: Rows, sizes: Tokens, split_lengths: Split) -> StepData:
        samples = self.samples.take(rows, sizes)
        counts = [self.layout.tokens] * len(samples)
        if sizes is not None:
            counts = [n for group, n in zip(rows[:, 0].tolist(), sizes, strict=True) if group >= 0]
        lengths = [len(sample) + len(sample.media) * n for sample, n in zip(samples, counts, strict=True)]
        shown = {(sample.sample_id, sample.media): sample for sample in samples if sample.media}
        with ThreadPoolExecutor(READERS) as readers:  # several questions about one video read its cache once
            caches = dict(zip(shown, readers.map(self._cache, shown.values()), strict=True))
        read = [_first_tokens(caches.get((sample.sample_id, sample.media)), n) for sample, n in zip(samples, counts, strict=True)]
        batches = [self._collate(samples, read, indices) for indices in split_lengths(lengths)]
        cut, example = sum(sample.cut for sample in samples), first_trained(samples)
        return StepData(batches, cut, row_ids(rows, samples), example=example)

    def _collate(self, samples: list[TokenSample], caches: list[StoredFrames | None], indices: list[int]) -> CachedBatch:
        if not indices:
            return collate_cached([filler_sample(self.layout)], [None])
        return collate_cached([samples[index] for index in indices], [caches[index] for index in indices])

    def _cache(self, sample: TokenSample) -> StoredFrames:
        return self.frames.read(sample.sample_id, [int(index) for index in sample.media], self.layout.tokens)


def _first_tokens(cache: StoredFrames | None, n: int) -> StoredFrames | None:
    """The first `n` tokens of each frame; None without frames."""
    return None if cache is None else cache.take(n)
