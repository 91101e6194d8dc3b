"""An LRU cache of Parquet row groups with a limit in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

File = TypeVar("File", bound=Hashable)
LIMIT_BYTES = 1 << 30


class RowGroupCache(Generic[File]):
    """Row groups by (file, number), as `read` returns them: Arrow arrays or tables. Above `limit` bytes the
    least recently used one is dropped; the one just read stays, however large it is.
    """

    def __init__(self, read: Callable[[File, int], Any], limit: int = LIMIT_BYTES) -> None:
        self.read, self.limit, self.bytes = read, limit, 0
        self.groups: OrderedDict[tuple[File, int], Any] = OrderedDict()

    def get(self, file: File, number: int) -> Any:
        """A row group, read from its file unless it is in memory."""
        key = (file, number)
        if key not in self.groups:
            group = self.groups[key] = self.read(file, number)
            self.bytes += group.nbytes
            while self.bytes > self.limit and len(self.groups) > 1:
                self.bytes -= self.groups.popitem(last=False)[1].nbytes
        self.groups.move_to_end(key)
        return self.groups[key]
