"""Saves checkpoints while training continues: a step waits only for a copy of the state in host memory.

Each rank writes its file of a checkpoint (`checkpoint_files.py`) on a thread. That all ranks are done is agreed in collectives of
the main thread, because two threads must not run collectives at a time; then rank 0's thread writes the rest.
"""

from __future__ import annotations

import errno
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from voco.errors import message_line, one_line
from voco.run.logs import get_logger
from voco.store import schemas, storage
from voco.store.memory_files import write_view
from voco.train.checkpoint_files import KEPT, PROGRESS_FILE, delete_old, file_sizes, step_uri, write_metrics
from voco.train.state_shards import StateCopy

log = get_logger(__name__)

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # trying again does not help
WAITS_S = (2.0, 10.0, 30.0)  # before further attempts to write; storage on S3 has waited for minutes in each
LONG_S = 5.0  # a wait for the save before this one that is logged

Result = TypeVar("Result")


class CheckpointFailed(Exception):
    """A checkpoint that was waited for could not be written. The message says why, and which step a new start continues at."""


class AsyncSaver:
    """Checkpoints of a DeepSpeed optimizer under `folder`. Every rank makes the same calls in the same steps."""

    def __init__(self, folder: str, optimizer: Any, device: torch.device, name: str) -> None:
        self.folder, self.device, self.name = folder, device, name
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.state = StateCopy(optimizer)
        self.last_step: int | None = None  # of the last complete checkpoint, as far as this rank has heard
        self.blocked_s = 0.0  # seconds that `save` kept training waiting
        token = [uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(token)  # names of files of another attempt, which may still be writing, are other names
        self._token = token[0]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="voco-save")
        self._step: int | None = None  # that is being saved, or was last
        self._metrics: list[dict[str, Any]] = []
        self._keep: frozenset[int] = frozenset()
        self._written: Future[dict[str, Any]] | None = None  # this rank's file, until all ranks agreed on it
        self._completed: Future[None] | None = None  # on rank 0
        self._failure = ""  # why the last save failed; the same on every rank
        self._is_open = False  # whether `finish` has an outcome to agree on

    def save(self, step: int, metrics: Sequence[dict[str, Any]], keep: Iterable[int] = ()) -> None:
        """Begin a checkpoint of `step` steps; the save before this one is waited for, and its failure only logged.

        Of older checkpoints the newest `KEPT` stay, this one included, and those of the steps `keep`.
        """
        started = time.monotonic()
        if self._is_open:
            self.finish()
            if time.monotonic() - started > LONG_S and self.rank == 0:
                log.warning("%s: waited %.0f s for the checkpoint before this one", self.name, time.monotonic() - started)
        self.state.copy()
        self._step, self._metrics, self._keep = step, list(metrics), frozenset(keep)
        self._written, self._failure, self._is_open = self._thread.submit(self._write, step), "", True
        self.blocked_s += time.monotonic() - started

    def poll(self) -> None:
        """Go on with a save whose files are all written. Call it in each step; it waits for nothing but the other ranks."""
        if self._written is None:
            return
        done = torch.tensor(int(self._written.done()), device=self.device)
        dist.all_reduce(done)
        if int(done) == self.world:
            self._agree(self._written)

    def finish(self) -> str:
        """Wait until the save that was begun is complete in storage. Returns why it failed, or "". The same on every rank."""
        if self._written is not None:
            self._agree(self._written)
        if self._is_open:
            outcome = [self._failure]
            if self._completed is not None:
                error = self._completed.exception()
                self._completed = None
                outcome = [_text(error) if error is not None else ""]
            dist.broadcast_object_list(outcome)
            self._failure, self._is_open = outcome[0], False
            if not self._failure:
                self.last_step = self._step
        return self._failure

    def close(self) -> None:
        """End the thread. What it writes at the moment is given up."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _agree(self, written: Future[dict[str, Any]]) -> None:
        """Exchange what all ranks wrote; on rank 0, begin to complete the checkpoint, or to remove what there is of it."""
        error = written.exception()  # waits
        own: dict[str, Any] = {"failed": _text(error)} if error is not None else written.result()
        files: list[dict[str, Any]] = [{}] * self.world
        dist.all_gather_object(files, own)
        self._written = None
        failures = [f"rank {rank}: {file['failed']}" for rank, file in enumerate(files) if "failed" in file]
        self._failure = failures[0] if failures else ""
        if self.rank:
            return
        assert self._step is not None
        if failures:
            self._log_failure(self._failure)
            self._thread.submit(_ignore_errors, partial(storage.delete, step_uri(self.folder, self._step)))
        else:
            self._completed = self._thread.submit(self._complete, self._step, files, self._metrics, self._keep)

    def _write(self, step: int) -> dict[str, Any]:
        """This rank's file. Returns its name, bytes and sha256."""
        name = f"rank-{self.rank:05d}-{self._token}.safetensors"
        view = self.state.view()
        uri = storage.join(step_uri(self.folder, step), name)
        return {"name": name, "bytes": len(view), "sha256": self._persist(lambda: write_view(uri, view))}

    def _complete(self, step: int, files: list[dict[str, Any]], metrics: list[dict[str, Any]], keep: frozenset[int]) -> None:
        """Rank 0: the metrics, and then the file that makes it a checkpoint. Older ones are deleted."""
        uri = step_uri(self.folder, step)
        try:
            sizes = self._persist(lambda: file_sizes(uri))
            unseen = [file["name"] for file in files if sizes.get(file["name"]) != file["bytes"]]
            if unseen:
                raise OSError(f"{uri} lacks {unseen[0]}: workers on several machines need an output that all of them share")
            self._persist(lambda: write_metrics(storage.join(uri, schemas.METRICS_FILE), metrics))
            progress = {"step": step, "workers": self.world, "files": files}
            self._persist(lambda: storage.write_json(storage.join(uri, PROGRESS_FILE), progress))
        except BaseException as error:
            self._log_failure(_text(error))
            _ignore_errors(partial(storage.delete, uri))
            raise
        self.last_step = step
        _ignore_errors(lambda: delete_old(self.folder, KEPT, keep))

    def _persist(self, work: Callable[[], Result]) -> Result:
        """`work`, which writes, tried again after errors of storage that may pass."""
        for wait in WAITS_S:
            try:
                return work()
            except OSError as error:
                if error.errno in NO_SPACE:
                    raise
                log.warning("%s: saving a checkpoint: %s; tried again in %.0f s", self.name, one_line(error), wait)
                time.sleep(wait)
        return work()

    def _log_failure(self, failure: str) -> None:
        last = "there is none before" if self.last_step is None else f"the last one is that of step {self.last_step}"
        log.error("%s: the checkpoint of step %s is not saved: %s; %s; training continues", self.name, self._step, failure, last)


def _text(error: BaseException) -> str:
    """An error in one line, for the user."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return f"no space is left: {message_line(error)}"
    return one_line(error)


def _ignore_errors(work: Callable[[], None]) -> None:
    """What is left over after it is removed by the next save or start."""
    try:
        work()
    except OSError as error:
        log.warning("old checkpoints could not be removed: %s", one_line(error))
