"""Bytes in memory to a local file and to a real S3 server, without a copy on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from s3_process import Server

from voco.store import storage
from voco.store.memory_files import write_view
from voco.store.s3 import PatientS3


@pytest.mark.parametrize("size", [0, 1000, 40 << 20])  # the last one takes three parts on S3
@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_view_is_written_and_hashed(where: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    expected = hashlib.sha256(data.tobytes()).hexdigest()
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    uri, server = str(tmp_path / "folder" / "file"), None
    if where == "s3":
        server, uri = Server(tmp_path / "s3", tmp_path / "log"), "s3://bucket/folder/file"
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        PatientS3.clear_instance_cache()  # another test's server may be cached
    try:
        assert write_view(uri, memoryview(data)) == expected
        assert hashlib.sha256(storage.read_bytes(uri)).hexdigest() == expected
        assert storage.file_size(uri) == size
        assert storage.list_names(uri.rsplit("/", 1)[0]) == ["file"]
    finally:
        if server is not None:
            server.stop()
