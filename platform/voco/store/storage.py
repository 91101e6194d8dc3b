"""Every byte that outlives a process goes through here: local paths and `s3://`, by fsspec and s3fs.

s3fs reads credentials and `AWS_ENDPOINT_URL` from the environment; nothing here takes a secret as an argument.
Every call waits up to `PATIENCE_S` seconds for an S3 server that does not answer.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from voco.errors import Refused

if TYPE_CHECKING:  # a third of a second that `voco plan` does not need
    import pyarrow.fs as pafs

HASHED_BESIDE = 1 << 20  # bytes of a write from which it is hashed on another thread meanwhile: the two take equally long
HASHED_BEHIND = 32 << 20  # bytes that are written and not hashed yet
PATIENCE_S = 180.0  # longer than a restart of a server, shorter than a night
SHARDS = (".tar", ".parquet")  # of sources that are a folder of files
PLACEHOLDER = "YOUR-"  # s3://YOUR-BUCKET/...: to be filled in by the user

_patience_s = [PATIENCE_S]


def is_placeholder(uri: str) -> bool:
    """True for a URI that the user must fill in; `plan` skips it, `run` and `submit` refuse it."""
    return PLACEHOLDER in uri


def resolve(uri: str, root: str | None = None) -> str:
    """Make a local path absolute against `root` (default: the working directory); leave `s3://` unchanged.

    Ray Train workers change directory, so every path is resolved once, in the driver.
    """
    if "://" in uri:
        if not uri.startswith("s3://"):
            raise Refused(f"{uri}: expected a local path or s3://, got {uri.split('://')[0]}://")
        return uri.rstrip("/")
    return os.path.abspath(os.path.join(root or os.getcwd(), os.path.expanduser(uri)))


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec file system of a resolved URI and the path inside it."""
    if uri.startswith("s3://"):
        from voco.store.s3 import PatientS3  # an import of half a second, which local files do not need

        return PatientS3(_patience_s[0]), uri.removeprefix("s3://")
    return LocalFileSystem(), uri


def read_range(fs: fsspec.AbstractFileSystem, path: str, start: int, size: int) -> bytes:
    """`size` bytes from `start` of a file of `filesystem`; fewer at its end."""
    if not isinstance(fs, LocalFileSystem):
        return bytes(fs.cat_file(path, start=start, end=start + size)) if size else b""  # S3 has no empty range
    with open(path, "rb") as handle:
        handle.seek(start)
        return handle.read(size)


@contextmanager
def s3_patience(seconds: float) -> Iterator[None]:
    """Change how long calls inside it wait for an S3 server that does not answer; 0 fails at once, for read-only checks."""
    before, _patience_s[0] = _patience_s[0], seconds
    try:
        yield
    finally:
        _patience_s[0] = before


def arrow_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The same for pyarrow and Ray Train. S3 goes through s3fs: pyarrow's own client fails with some servers."""
    import pyarrow.fs as pafs

    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return pafs.LocalFileSystem(), path
    from voco.store.arrow_files import ArrowFiles

    return pafs.PyFileSystem(ArrowFiles(fs)), path


def join(uri: str, *parts: str) -> str:
    """The URI of a file or directory below `uri`."""
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """True for a file or a directory."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return bool(fs.exists(path))
    try:
        fs.info(path)  # s3fs's own `exists` is False for a bucket that did not answer
    except FileNotFoundError:
        return False
    return True


def is_directory(uri: str) -> bool:
    fs, path = filesystem(uri)
    return bool(fs.isdir(path))


def list_names(uri: str) -> list[str]:
    """Names directly under a directory, sorted; none if it does not exist. Hidden files, left by killed writes, are skipped."""
    fs, path = filesystem(uri)
    if not fs.isdir(path):
        return []
    entries = (entry.rstrip("/") for entry in fs.ls(path, detail=False))
    names = (entry.rsplit("/", 1)[-1] for entry in entries if entry != path)  # S3 consoles make an object for the folder itself
    return sorted(name for name in names if not name.startswith("."))


def read_bytes(uri: str, is_small: bool = False) -> bytes:
    """The content of a file; on S3, of a small one by one request: s3fs asks for the size first. Raises FileNotFoundError."""
    fs, path = filesystem(uri)
    if is_small and not isinstance(fs, LocalFileSystem):
        return bytes(fs.cat_file(path, max_concurrency=1))
    return bytes(fs.cat_file(path))


def open_read(uri: str) -> IO[bytes]:
    """A seekable file. Raises FileNotFoundError."""
    fs, path = filesystem(uri)
    handle: IO[bytes] = fs.open(path, "rb")
    return handle


def write_bytes(uri: str, data: bytes) -> None:
    """Write atomically: a temporary name and a rename on disk, a single put on S3."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(target)
        partial.write_bytes(data)
        os.replace(partial, target)
    else:
        fs.pipe_file(path, data)


def _partial(target: Path) -> Path:
    """A hidden name beside a file, to write it under until it is complete; `delete_partials` knows its form."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")


class Hashing(io.RawIOBase):
    """A file that is written from start to end, and counts its bytes (`size`) and hashes them (`sha256()`) meanwhile.

    Large writes are hashed on another thread. Memory that is read-only, such as `bytes`, may still be hashed after `write`: it
    must not change before `finish`.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw = raw
        self.digest = hashlib.sha256()
        self.size = 0
        self._hasher: ThreadPoolExecutor | None = None
        self._unhashed: deque[tuple[Future[None], int]] = deque()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._hash(view)
        done = 0
        try:
            while done < len(view):  # the system writes at most 2 GiB at a time
                done += self.raw.write(view[done:]) or 0
        finally:
            self._wait(HASHED_BEHIND if view.readonly else 0)
        self.size += done
        return done

    def _hash(self, view: memoryview) -> None:
        self._wait(HASHED_BEHIND)
        if not self._unhashed and len(view) < HASHED_BESIDE:
            self.digest.update(view)
            return
        if self._hasher is None:
            self._hasher = ThreadPoolExecutor(1)
        self._unhashed.append((self._hasher.submit(self.digest.update, view), len(view)))

    def _wait(self, limit: int) -> None:
        """Wait until at most `limit` bytes are not hashed, and forget those that are."""
        left = sum(size for _, size in self._unhashed)
        while self._unhashed and (left > limit or self._unhashed[0][0].done()):
            hashed, size = self._unhashed.popleft()
            hashed.result()
            left -= size

    def finish(self) -> None:
        """Wait until every byte is hashed, and end the thread."""
        self._wait(0)
        if self._hasher is not None:
            self._hasher.shutdown()
            self._hasher = None

    def tell(self) -> int:
        return self.size

    def sha256(self) -> str:
        self._wait(0)
        return self.digest.hexdigest()


@contextmanager
def _finished(file: Hashing) -> Iterator[Hashing]:
    try:
        yield file
    finally:
        file.finish()


@contextmanager
def open_write(uri: str) -> Iterator[Hashing]:
    """A file that is at `uri`, complete, when the block ends; after an exception there is none."""
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        with tempfile.TemporaryFile(buffering=0) as raw:  # it has no name, so a kill leaves nothing
            with _finished(Hashing(raw)) as file:
                yield file
            raw.seek(0)
            fs.put_file(f"/dev/fd/{raw.fileno()}", path)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target)
    try:
        with partial.open("wb", buffering=0) as raw, _finished(Hashing(raw)) as file:
            yield file
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def put_directory(local: Path, uri: str) -> None:
    """Copy every file under `local` to `uri`, `config.json` last, so a directory with that file is complete."""
    for file in sorted(
        (path for path in local.rglob("*") if path.is_file()), key=lambda path: (path.name == "config.json", path)
    ):
        _copy_file(file, join(uri, file.relative_to(local).as_posix()))


def _copy_file(local: Path, uri: str) -> None:
    """Copy atomically, in pieces: a model may be larger than memory."""
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        fs.put_file(str(local), path)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target)
    shutil.copyfile(local, partial)
    os.replace(partial, target)


def get_directory(uri: str, local: Path) -> Path:
    """A local directory with the files of `uri`: the directory itself when it is local, else a copy in `local`."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return Path(path)
    local.mkdir(parents=True, exist_ok=True)
    for entry in fs.find(path):
        target = local / entry.removeprefix(path).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(entry, str(target))
    return local


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri, is_small=True))


def write_json(uri: str, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values are equal bytes."""
    write_bytes(uri, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def delete(uri: str) -> None:
    """Remove a file, or a directory with its content. Does nothing if there is none."""
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def delete_files(uris: Sequence[str]) -> None:
    """Remove files, all of one file system, that may be missing: on S3 a thousand a request, without looking first."""
    if not uris:
        return
    fs, _ = filesystem(uris[0])
    paths = [filesystem(uri)[1] for uri in uris]
    if isinstance(fs, LocalFileSystem):
        for path in paths:
            Path(path).unlink(missing_ok=True)
    else:
        fs.rm(paths)


def delete_partials(uri: str) -> None:
    """Remove the hidden files that killed writes left under a directory on disk. Call it when nothing writes there any more."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        for partial in Path(path).rglob(".*.partial"):
            partial.unlink(missing_ok=True)


def file_sha256(uri: str) -> str:
    digest = hashlib.sha256()
    with open_read(uri) as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(uri: str) -> dict[str, Any]:
    """What identifies a source file: uri, size in bytes, and the content's sha256 (local) or the ETag (S3).

    A folder of shards is identified by its listing: its `etag` is a hash over `shards`.
    """
    fs, path = filesystem(uri)
    if fs.isdir(path):
        shards = list_shards(uri)
        digest = hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()
        return {"uri": uri, "size": sum(shard["size"] for shard in shards), "shards": len(shards), "etag": digest}
    info = fs.info(path)
    if isinstance(fs, LocalFileSystem):
        return {"uri": uri, "size": int(info["size"]), "sha256": file_sha256(uri)}
    return {"uri": uri, "size": int(info["size"]), "etag": str(info.get("ETag", "")).strip('"')}


def list_shards(uri: str, extensions: tuple[str, ...] = SHARDS) -> list[dict[str, Any]]:
    """The .tar and .parquet files directly in a folder, by name: name, size in bytes, and mtime in ns (local) or ETag (S3).

    Terabytes are not hashed, so a local shard that is copied or touched counts as changed.
    """
    fs, path = filesystem(uri)
    shards = []
    for entry in sorted(fs.ls(path, detail=True), key=lambda entry: str(entry["name"])):
        name = str(entry["name"]).rsplit("/", 1)[-1]
        if entry["type"] == "directory" or not name.endswith(extensions) or name.startswith("."):
            continue
        mark = os.stat(entry["name"]).st_mtime_ns if isinstance(fs, LocalFileSystem) else str(entry.get("ETag", "")).strip('"')
        shards.append({"name": name, "size": int(entry["size"]), "mark": mark})
    return shards


def free_bytes(uri: str) -> int | None:
    """Free bytes where `uri` will be written; None on S3, where there is no such limit."""
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        return None
    directory = Path(path)
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def check_writable(uri: str) -> None:
    """Refuse an output that cannot be written, before any work is done."""
    probe = join(uri, f".write-probe-{uuid.uuid4().hex[:8]}")
    try:
        write_bytes(probe, b"")
        delete(probe)
    except (OSError, PermissionError) as error:
        raise Refused(f"output: {uri}: cannot be written: {error}") from error


def file_size(uri: str) -> int:
    """Bytes of a file, or of all shards of a folder."""
    fs, path = filesystem(uri)
    if fs.isdir(path):
        return sum(int(shard["size"]) for shard in list_shards(uri))
    return int(fs.info(path)["size"])
