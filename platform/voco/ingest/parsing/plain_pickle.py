"""A pickle of plain data, read without running anything that it names.

A pickle is a program: it may call any function of any module. Here every name is refused, so only what needs none can be read:
lists, tuples, dictionaries, strings, bytes, numbers, true, false and nothing. Python's own unpickler in Python reads it, because
the one in C allocates a table as long as the file says.
"""

from __future__ import annotations

import pickle
import struct
from typing import IO, Any

from voco.errors import Refused, message_line
from voco.store import storage

STARTS = (b"\x80", b"(", b"]")  # of pickles of a list: protocol 2 and later, 0, and 0 or 1 of an empty list; no JSON starts so
# what the unpickler raises for bytes that are no pickle, or for a pickle that is cut or misuses its stack
FAULTS = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError,
    MemoryError, RecursionError, NotImplementedError, struct.error,
)  # fmt: skip


class _PlainUnpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise _NamesCode(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _NamesCode(f"the persistent id {str(pid)[:40]}")


class _NamesCode(Exception):
    """A pickle that is more than plain data."""


def is_pickle(uri: str) -> bool:
    with storage.open_read(uri) as handle:
        return handle.read(1) in STARTS


def read_plain_pickle(uri: str, key: str) -> Any:
    """The value of a pickle of plain data. Strings of Python 2 are read as UTF-8.

    Raises Refused at `key` for a pickle that names a class or function, and for a file that is no complete pickle.
    """
    with storage.open_read(uri) as handle:
        return _load(uri, key, handle)


def _load(uri: str, key: str, handle: IO[bytes]) -> Any:
    try:
        return _PlainUnpickler(handle, fix_imports=False, encoding="utf-8", errors="replace").load()
    except _NamesCode as error:
        names = message_line(error, 80)
        raise Refused(f"{key}: {uri}: expected a pickle of plain data, got one that names {names}; it was not run") from None
    except FAULTS as error:
        raise Refused(f"{key}: {uri}: expected a complete pickle: {message_line(error, 120)}") from error
