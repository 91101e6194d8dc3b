"""Files that are hashed while they are written."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest

from voco.store import storage


@pytest.mark.parametrize("sizes", [[0], [5, 7], [3 << 20, 5, 0, 2 << 20, 9], [70 << 20, 1], [100, 40 << 20, 40 << 20, 100]])
def test_writes_are_hashed_in_their_order_and_memory_that_may_change_before_they_return(sizes: list[int], tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    pieces = [draw.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    expected = b"".join(piece.tobytes() for piece in pieces)
    threads = set(threading.enumerate())
    with storage.open_write(str(tmp_path / "file")) as file:
        for number, piece in enumerate(pieces):
            if number % 2:
                file.write(memoryview(piece).toreadonly())
            else:
                file.write(memoryview(piece))
                piece[:] = 0  # the caller uses it again
    assert (file.size, file.sha256()) == (len(expected), hashlib.sha256(expected).hexdigest())
    assert (tmp_path / "file").read_bytes() == expected
    assert set(threading.enumerate()) <= threads


def test_an_error_after_large_writes_leaves_no_file_and_no_thread(tmp_path: Path) -> None:
    threads = set(threading.enumerate())

    def write() -> None:
        with storage.open_write(str(tmp_path / "file")) as file:
            file.write(bytes(8 << 20))
            raise KeyError("later")

    with pytest.raises(KeyError, match="later"):
        write()
    assert not list(tmp_path.iterdir())
    assert set(threading.enumerate()) <= threads
