"""Records of finished units (docs/data.md): a small JSON file for each, merged by the driver as units end.

Unit k writes `units/k.json` last, so a unit with this file is done. When all RECORD_UNITS units of a block are done, the
driver writes their records, as they are in those files, into `units/FIRST-LAST.jsonl.zst` (one JSON object a line, in order)
and deletes the small files. So 200,000 units end in 782 files, which a listing and a few seconds of reading cover, and no
process needs all records in memory. A block file may lack units that were forgotten: they run again, and then the block is
written again. Every step is one atomic write or a deletion of what is written already: a kill between them loses nothing.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa

from voco.store import storage
from voco.store.part_files import read_in_order

RECORD_UNITS = 256  # of a block file
SUFFIX = ".jsonl.zst"
HEAD = '{"unit": '  # of a line: lines are distinguished without parsing them

Record = dict[str, Any]


def unit_record_uri(output: str, unit: int) -> str:
    return storage.join(output, "units", f"{unit:05d}.json")


def block_uri(output: str, block: int) -> str:
    """The records of units [block * RECORD_UNITS, (block + 1) * RECORD_UNITS)."""
    first = block * RECORD_UNITS
    return storage.join(output, "units", f"{first:05d}-{first + RECORD_UNITS - 1:05d}{SUFFIX}")


class UnitRecords:
    """The records of all finished units of an output, in order. Each iteration reads them again, a few files ahead."""

    def __init__(self, output: str) -> None:
        self.output = output

    def __iter__(self) -> Iterator[Record]:
        single, blocks = _listed(self.output)
        files = sorted([(block, -1) for block in blocks] + [(unit // RECORD_UNITS, unit) for unit in single])
        lines = zip(files, read_in_order(self._read, files), strict=True)
        for _, of_block in itertools.groupby(lines, key=lambda item: item[0][0]):
            merged: dict[int, str] = {}
            for _, more in of_block:
                merged = more | merged  # the block file comes first, and wins
            for _, line in sorted(merged.items()):
                yield json.loads(line)

    def _read(self, file: tuple[int, int]) -> dict[int, str]:
        """The lines of a block's file, or of a unit's."""
        block, unit = file
        return _read_block(self.output, block) if unit < 0 else {unit: _read_line(self.output, unit)}


class FinishedUnits:
    """What is done of an output's `total` units, kept by its driver: adds each record, and merges complete blocks."""

    def __init__(self, output: str, total: int) -> None:
        self.output, self.total = output, total
        single, blocks = _listed(output)
        merged: set[int] = set()
        in_blocks = read_in_order(lambda block: _read_block(output, block).keys(), sorted(blocks))
        for units in in_blocks:
            merged |= units
        storage.delete_files([unit_record_uri(output, unit) for unit in sorted(single & merged)])  # a kill left them
        single -= merged
        self.pending = [unit for unit in range(total) if unit not in merged and unit not in single]
        self._missing = Counter(unit // RECORD_UNITS for unit in self.pending)  # units of each block
        self._new: dict[int, dict[int, str]] = defaultdict(dict)  # records of this run by block, until the block is merged
        for block in sorted({unit // RECORD_UNITS for unit in single}):
            if not self._missing[block]:  # a kill came before the merge
                self._merge(block)

    def add(self, unit: int, line: str) -> None:
        """Take the record that a pending unit has written, as `write_record` returned it."""
        block = unit // RECORD_UNITS
        self._new[block][unit] = line
        self._missing[block] -= 1
        if not self._missing[block]:
            self._merge(block)

    def _merge(self, block: int) -> None:
        """Write a block file and delete what it replaces. The last units stay single files where they fill no block."""
        units = range(block * RECORD_UNITS, (block + 1) * RECORD_UNITS)
        new = self._new.pop(block, {})
        if units.stop > self.total:
            return
        lines = _read_block(self.output, block) | new
        earlier = [unit for unit in units if unit not in lines]
        lines |= zip(earlier, read_in_order(lambda unit: _read_line(self.output, unit), earlier), strict=True)
        _write_block(self.output, block, lines)
        storage.delete_files([unit_record_uri(self.output, unit) for unit in units])


def write_record(output: str, unit: int, record: Record) -> str:
    """Write the file that says that a unit is done. Returns its line, which begins with the unit, for `FinishedUnits.add`."""
    line = f"{HEAD}{unit}, {json.dumps(record, sort_keys=True, ensure_ascii=False)[1:]}"
    storage.write_bytes(unit_record_uri(output, unit), f"{line}\n".encode())
    return line


def forget_units(output: str, units: Collection[int]) -> None:
    """Delete the records of these units, so that they run again."""
    storage.delete_files([unit_record_uri(output, unit) for unit in units])
    for block in sorted({unit // RECORD_UNITS for unit in units}):
        lines = _read_block(output, block)
        if not lines.keys().isdisjoint(units):
            _write_block(output, block, {unit: line for unit, line in lines.items() if unit not in units})


def _listed(output: str) -> tuple[set[int], set[int]]:
    """The units that have files and the blocks that have files."""
    single: set[int] = set()
    blocks: set[int] = set()
    for name in storage.list_names(storage.join(output, "units")):
        if name.endswith(SUFFIX):
            blocks.add(int(name.split("-")[0]) // RECORD_UNITS)
        elif name.endswith(".json"):
            single.add(int(name.removesuffix(".json")))
    return single, blocks


def _write_block(output: str, block: int, lines: dict[int, str]) -> None:
    data = "".join(f"{line}\n" for _, line in sorted(lines.items())).encode()
    storage.write_bytes(block_uri(output, block), pa.compress(data, codec="zstd", asbytes=True))


def _read_block(output: str, block: int) -> dict[int, str]:
    """Lines by unit; none where the block has no file."""
    try:
        data = storage.read_bytes(block_uri(output, block), is_small=True)
    except FileNotFoundError:
        return {}
    with pa.input_stream(pa.BufferReader(data), compression="zstd") as stream:
        lines = stream.read().decode().split("\n")[:-1]  # not `splitlines`: a text may have other line ends
    return {int(line[len(HEAD) : line.index(",")]): line for line in lines}


def _read_line(output: str, unit: int) -> str:
    return storage.read_bytes(unit_record_uri(output, unit), is_small=True).decode().rstrip("\n")
