"""Rows of `samples/` to token samples, row group by row group; nothing is read twice within a window."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq

from voco import rows, storage
from voco.tokens import Layout, TokenSample, build
from voco.train.order import WINDOW, Rows

COLUMNS = ["sample_id", "media.list.element.sha256", "conversations"]


class SampleTables:
    """Row groups of one or more `samples/` tables, numbered through. `share_vision` off makes each conversation a sample."""

    def __init__(self, uris: Sequence[str], weights: Sequence[float]) -> None:
        self.files: list[pq.ParquetFile] = []
        self.groups: list[tuple[int, int]] = []  # file, row group in it
        self.group_rows: list[int] = []
        self.group_weight: list[float] = []
        for uri, weight in zip(uris, weights, strict=True):
            folder = storage.join(uri, "samples")
            for name in storage.names(folder):
                file = rows.open_parquet(storage.join(folder, name))
                for group in range(file.num_row_groups):
                    self.groups.append((len(self.files), group))
                    self.group_rows.append(file.metadata.row_group(group).num_rows)
                    self.group_weight.append(weight)
                self.files.append(file)

    def read(self, group: int, columns: Sequence[str] = COLUMNS) -> list[dict[str, Any]]:
        """The rows of one row group as Python values, without media bytes unless they are asked for."""
        file, number = self.groups[group]
        found: list[dict[str, Any]] = self.files[file].read_row_group(number, columns=list(columns)).to_pylist()
        return found


class TrainingSamples:
    """Token samples by (row group, row), with the last window of row groups kept."""

    def __init__(self, tables: SampleTables, tokenizer: Any, layout: Layout, max_tokens: int, share_vision: bool) -> None:
        self.tables, self.tokenizer, self.layout = tables, tokenizer, layout
        self.max_tokens, self.share_vision = max_tokens, share_vision
        self.held: OrderedDict[int, list[list[TokenSample]]] = OrderedDict()
        self.cut = 0  # text tokens left out so far

    def take(self, wanted: Rows) -> list[TokenSample]:
        """The samples of (n, 2) rows; rows of the epoch's tail are left out."""
        return [sample for group, row in wanted.tolist() if group >= 0 for sample in self._group(group)[row]]

    def _group(self, group: int) -> list[list[TokenSample]]:
        if group not in self.held:
            self.held[group] = [self._build(row) for row in self.tables.read(group)]
            if len(self.held) > 2 * WINDOW:
                self.held.popitem(last=False)
        self.held.move_to_end(group)
        return self.held[group]

    def _build(self, row: dict[str, Any]) -> list[TokenSample]:
        media = [one["sha256"] for one in row["media"] or []]
        conversations = [one["turns"] for one in row["conversations"]]
        parts = [conversations] if self.share_vision else [[one] for one in conversations]
        built = [build(row["sample_id"], part, media, self.tokenizer, self.layout, max_tokens=self.max_tokens) for part in parts]
        self.cut += sum(sample.cut for sample in built)
        return built
