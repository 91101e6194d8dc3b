"""S3 by s3fs, with patience: a call that gets no answer is made again until the server is back, at most `patience_s` seconds.

s3fs passes every request through one method, so here is the only place where anything is tried again: botocore's own
retries and s3fs's are off. What the server did answer (no such object, access denied) is an error at once.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import ClientPayloadError
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from voco.errors import JobFailed, one_line

# Some servers answer a ranged read with the checksum of the whole object (rclone does), which botocore would refuse.
CHECKSUMS = os.environ.get("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")

# No answer, or one that was cut: refused and reset connections, names that do not resolve, timeouts, half a body.
NO_ANSWER = (
    boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError, ResponseParserError, ClientPayloadError, TimeoutError,
    ConnectionError,
)  # fmt: skip

# Answers that say "not now", or that the body was damaged on its way; besides every status from 500 on but 501.
NOT_NOW = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestTimeout", "InternalError",
    "ServiceUnavailable", "OperationAborted", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch",
}  # fmt: skip

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 3.0  # between two attempts; the longest is what a restart of the server costs at most
QUIET_S = 1.0  # a shorter wait is not worth a word
STARTS = 3  # a multipart upload is begun anew so often: a server that restarts may have forgotten it

PART_BYTES = 16 << 20  # of an upload in parts or a download, and so many at once: what they hold in memory
PARTS_AT_ONCE = 4
MOST_PARTS = 10_000

_told = [-math.inf]  # when this process last said that it waits


class StorageLost(JobFailed, ConnectionError):
    """The storage did not answer for as long as it is waited for."""


class PatientS3(S3FileSystem):  # type: ignore[misc]
    """s3fs that waits for a server that stops and comes back; `patience_s` 0 fails at once. Lists are never cached."""

    retries = 1
    default_block_size = 8 << 20  # an open file reads so far ahead, and not the 50 MiB of s3fs: a row group is about as large

    def __init__(self, patience_s: float) -> None:
        config = {"response_checksum_validation": CHECKSUMS, "retries": {"max_attempts": 0}}
        super().__init__(config_kwargs=config, use_listings_cache=False)
        self.patience_s = patience_s

    async def _call_s3(self, method: str, *arguments: Any, **named: Any) -> Any:
        """One request, and the whole body of what is read. Raises StorageLost, or what s3fs raises for an answer."""
        started = math.inf  # of waiting
        wait = FIRST_WAIT_S
        while True:
            try:
                answer = await super()._call_s3(method, *arguments, **named)
                if method == "get_object":  # a body that breaks off is no answer either
                    answer["Body"] = await _whole(answer["Body"])
                return answer
            except (*NO_ANSWER, OSError) as error:
                if not _passes(error):
                    raise
                started = min(started, time.monotonic())
                waited = time.monotonic() - started
                if waited >= self.patience_s:
                    long = f" for {waited:.0f} s" if self.patience_s else ""
                    raise StorageLost(f"storage {self._where()} did not answer{long}: {one_line(error)}") from error
                if waited >= QUIET_S:
                    self._tell(error)
            await asyncio.sleep(wait * random.uniform(0.5, 1))
            wait = min(2 * wait, LONGEST_WAIT_S)

    call_s3 = sync_wrapper(_call_s3)  # what open files call

    def _where(self) -> str:
        return str(self._s3.meta.endpoint_url) if self._s3 is not None else "S3"

    def _tell(self, error: BaseException) -> None:
        """Say that it waits: one line a process for one outage, however many calls are waiting."""
        if time.monotonic() - _told[0] > self.patience_s:
            _told[0] = time.monotonic()
            print(
                f"storage {self._where()} does not answer, waiting up to {self.patience_s:.0f} s: {one_line(error)}", flush=True
            )

    async def _put_file(self, lpath: str, rpath: str, *arguments: Any, **named: Any) -> None:
        part = max(PART_BYTES, -(-os.path.getsize(lpath) // MOST_PARTS))
        named = {"chunksize": part, "max_concurrency": PARTS_AT_ONCE} | named
        await _anew(lambda: super(PatientS3, self)._put_file(lpath, rpath, *arguments, **named))

    async def _pipe_file(self, path: str, data: bytes, *arguments: Any, **named: Any) -> Any:
        return await _anew(lambda: super(PatientS3, self)._pipe_file(path, data, *arguments, **named))

    async def _get_file(self, rpath: str, lpath: str, *arguments: Any, **named: Any) -> None:
        """A download in ranges, because a body is held whole."""
        size = int((await self._info(rpath))["size"])
        starts = range(0, size, PART_BYTES)
        with open(lpath, "wb") as file:
            for first in range(0, len(starts), PARTS_AT_ONCE):
                some = starts[first : first + PARTS_AT_ONCE]
                parts = [self._cat_file(rpath, start=start, end=min(start + PART_BYTES, size)) for start in some]
                for data in await asyncio.gather(*parts):
                    file.write(data)


class _Body:
    """The body of an answer, here already; what s3fs asks of one."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read(self, amount: int = -1) -> bytes:
        amount = len(self._data) if amount < 0 else amount
        data, self._data = self._data[:amount], self._data[amount:]
        return data

    def close(self) -> None:
        pass


async def _whole(body: Any) -> _Body:
    try:
        return _Body(await body.read())
    finally:
        body.close()


async def _anew(upload: Callable[[], Awaitable[Any]]) -> Any:
    """An upload from its start again when the server does not know its parts any more."""
    for start in range(STARTS):
        try:
            return await upload()
        except FileNotFoundError as error:
            if _code(error) != "NoSuchUpload" or start == STARTS - 1:
                raise
    raise AssertionError("unreachable")


def _passes(error: BaseException) -> bool:
    """True for an error that may be gone when the same request is made again."""
    if isinstance(error, boto.SSLError):  # a certificate or protocol that does not fit
        return False
    if isinstance(error, NO_ANSWER):
        return True
    answer = getattr(error.__cause__, "response", None) or {}
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return _code(error) in NOT_NOW or status == 429 or (status >= 500 and status != 501)


def _code(error: BaseException) -> str:
    """The S3 error code behind what s3fs made of it."""
    answer = getattr(error.__cause__, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", ""))
