"""S3 by s3fs, with patience: a request without an answer is repeated until the server is back, for at most `patience_s` seconds.

s3fs passes every request through one method, so all retries are here: botocore's own and s3fs's are off. An answer that is an
error (no such object, access denied) is raised at once.
"""

from __future__ import annotations

import asyncio
import logging
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

log = logging.getLogger(__name__)

# Some servers answer a ranged read with the checksum of the complete object (rclone does), which botocore would reject.
CHECKSUMS = os.environ.get("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")

# No answer, or a truncated one: rejected and reset connections, names that do not resolve, timeouts, half a body.
NO_ANSWER = (
    boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError, ResponseParserError, ClientPayloadError, TimeoutError,
    ConnectionError,
)  # fmt: skip

# Error codes for "not now", or for a body damaged in transit. Statuses from 500 on are retried too, except 501.
TRANSIENT_CODES = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestTimeout", "InternalError",
    "ServiceUnavailable", "OperationAborted", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch",
}  # fmt: skip

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 3.0  # between two attempts; after a server's restart at most the longest is lost
QUIET_S = 1.0  # a shorter wait is not logged
UPLOAD_STARTS = 3  # of a multipart upload: a server that restarts may have forgotten it

CONNECTIONS = 64  # of a client; more requests than these wait
PART_BYTES = 16 << 20  # of a multipart upload or a download
PARALLEL_PARTS = 4  # at a time, all in memory
MAX_PARTS = 10_000  # S3's own limit

_last_warning = [-math.inf]  # when this process last logged that it waits


class StorageLost(JobFailed, ConnectionError):
    """The storage did not answer within `patience_s`."""


class ObjectTooLarge(Exception):
    """An object has more bytes than its reader takes. `size` is the length that the answer states; its body was not read."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


class PatientS3(S3FileSystem):  # type: ignore[misc]
    """s3fs that waits for a server that stops and comes back; `patience_s` 0 fails at once. Listings are never cached."""

    retries = 1
    default_block_size = 8 << 20  # read-ahead of an open file, about a row group; s3fs's own default is 50 MiB

    def __init__(self, patience_s: float) -> None:
        config = {"response_checksum_validation": CHECKSUMS, "retries": {"max_attempts": 0}, "max_pool_connections": CONNECTIONS}
        config["user_agent"] = "voco"  # botocore otherwise builds one for each request, an eighth of its work
        super().__init__(config_kwargs=config, use_listings_cache=False)
        self.patience_s = patience_s

    async def _call_s3(self, method: str, *arguments: Any, most_bytes: float = math.inf, **named: Any) -> Any:
        """One request; of a read, with its complete body. Raises StorageLost, or what s3fs raises for an answer.

        Raises ObjectTooLarge for a read of more than `most_bytes`, before the body arrives.
        """
        started = math.inf  # when the waiting began
        wait = FIRST_WAIT_S
        while True:
            try:
                answer = await super()._call_s3(method, *arguments, **named)
                if method == "get_object":  # a truncated body is no answer either
                    if answer.get("ContentLength", 0) > most_bytes:
                        answer["Body"].close()
                        raise ObjectTooLarge(int(answer["ContentLength"]))
                    answer["Body"] = await _read_body(answer["Body"])
                return answer
            except (*NO_ANSWER, OSError) as error:
                if not _is_transient(error):
                    raise
                started = min(started, time.monotonic())
                waited = time.monotonic() - started
                if waited >= self.patience_s:
                    duration = f" for {waited:.0f} s" if self.patience_s else ""
                    raise StorageLost(f"storage {self._endpoint()} did not answer{duration}: {one_line(error)}") from error
                if waited >= QUIET_S:
                    self._warn(error)
            await asyncio.sleep(wait * random.uniform(0.5, 1))
            wait = min(2 * wait, LONGEST_WAIT_S)

    call_s3 = sync_wrapper(_call_s3)  # for open files

    async def _read_object(self, path: str, most_bytes: int) -> bytes:
        """A complete object by one request. Raises ObjectTooLarge, and what `_call_s3` raises."""
        bucket, key, _ = self.split_path(path)
        answer = await self._call_s3("get_object", Bucket=bucket, Key=key, most_bytes=most_bytes)
        return bytes(await answer["Body"].read())

    read_object = sync_wrapper(_read_object)

    def _endpoint(self) -> str:
        return str(self._s3.meta.endpoint_url) if self._s3 is not None else "S3"

    def _warn(self, error: BaseException) -> None:
        """Log the wait: one line a process for one outage, however many calls are waiting."""
        if time.monotonic() - _last_warning[0] > self.patience_s:
            _last_warning[0] = time.monotonic()
            message = "storage %s does not answer, waiting up to %.0f s: %s"
            log.warning(message, self._endpoint(), self.patience_s, one_line(error))

    async def _put_file(self, lpath: str, rpath: str, *arguments: Any, **named: Any) -> None:
        named = {"chunksize": part_bytes(os.path.getsize(lpath)), "max_concurrency": PARALLEL_PARTS} | named
        await _restart_lost(lambda: super(PatientS3, self)._put_file(lpath, rpath, *arguments, **named))

    async def _pipe_file(self, path: str, data: Any, *arguments: Any, **named: Any) -> Any:
        """`data` is bytes, or has their length and slices."""
        if len(data) < 2 * named.get("chunksize", PART_BYTES):
            data = data[:]  # one request
        else:
            named = {"max_concurrency": PARALLEL_PARTS} | named
        return await _restart_lost(lambda: super(PatientS3, self)._pipe_file(path, data, *arguments, **named))

    async def _get_file(self, rpath: str, lpath: str, *arguments: Any, **named: Any) -> None:
        """A download in ranges, because a response body is read into memory."""
        size = int((await self._info(rpath))["size"])
        starts = range(0, size, PART_BYTES)
        with open(lpath, "wb") as file:
            for first in range(0, len(starts), PARALLEL_PARTS):
                batch = starts[first : first + PARALLEL_PARTS]
                parts = [self._cat_file(rpath, start=start, end=min(start + PART_BYTES, size)) for start in batch]
                for data in await asyncio.gather(*parts):
                    file.write(data)


def part_bytes(size: int) -> int:
    """Bytes of each part of a multipart upload of `size` bytes."""
    return max(PART_BYTES, -(-size // MAX_PARTS))


class _Body:
    """A response body that is in memory, with the methods that s3fs calls."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read(self, amount: int = -1) -> bytes:
        amount = len(self._data) if amount < 0 else amount
        data, self._data = self._data[:amount], self._data[amount:]
        return data

    def close(self) -> None:
        pass


async def _read_body(body: Any) -> _Body:
    try:
        return _Body(await body.read())
    finally:
        body.close()


async def _restart_lost(upload: Callable[[], Awaitable[Any]]) -> Any:
    """An upload, restarted when the server no longer knows its parts."""
    for start in range(UPLOAD_STARTS):
        try:
            return await upload()
        except FileNotFoundError as error:
            if _code(error) != "NoSuchUpload" or start == UPLOAD_STARTS - 1:
                raise
    raise AssertionError("unreachable")


def _is_transient(error: BaseException) -> bool:
    """True for an error that may be gone when the same request is repeated."""
    if isinstance(error, boto.SSLError):  # a wrong certificate or protocol
        return False
    if isinstance(error, NO_ANSWER):
        return True
    answer = getattr(error.__cause__, "response", None) or {}
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return _code(error) in TRANSIENT_CODES or status == 429 or (status >= 500 and status != 501)


def _code(error: BaseException) -> str:
    """The S3 error code that s3fs translated into this exception."""
    answer = getattr(error.__cause__, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", ""))
