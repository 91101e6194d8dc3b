"""Rows of `samples/` to batches of text that reads its frames from a frame cache."""

from __future__ import annotations

from typing import Any

from voco.blocks import VideoSft
from voco.model.batch import CachedBatch, collate_cached
from voco.model.cache import VocoCache
from voco.model.voco_llama import VocoLlama
from voco.tokens import TokenSample, filler
from voco.train.data import TrainingSamples
from voco.train.order import Rows
from voco.train.packing import deal
from voco.train.sample_tables import SampleTables
from voco.video.frame_store import FrameStore


class VideoBatches:
    """Batches of samples whose frames are read as caches."""

    def __init__(self, tables: SampleTables, frames: FrameStore, model: VocoLlama, block: VideoSft) -> None:
        def places(row: dict[str, Any]) -> list[str] | None:
            if row["sample_id"] in frames.rejected:
                return None
            return [str(place) for place in frames.taken(row["sample_id"], block.max_frames)] if row["media"] else []

        self.samples = TrainingSamples(tables, model.tokenizer, model.layout, block, places, cached=True)
        self.frames, self.layout = frames, model.layout

    def passes(self, wanted: Rows, count: int) -> list[CachedBatch]:
        """The samples of (n, 2) places as `count` batches of nearly equal length, cached tokens counted."""
        samples = self.samples.take(wanted)
        dealt = deal([len(sample) + len(sample.media) * self.layout.tokens for sample in samples], count)
        return [self.collate([samples[index] for index in row] or [filler(self.layout)]) for row in dealt]

    def collate(self, samples: list[TokenSample]) -> CachedBatch:
        caches = [self._cache(sample) if sample.media else None for sample in samples]
        return collate_cached(samples, caches)

    def _cache(self, sample: TokenSample) -> VocoCache:
        return self.frames.read(sample.sample_id, [int(place) for place in sample.media], self.layout.tokens)
