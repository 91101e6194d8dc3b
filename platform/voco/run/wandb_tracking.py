"""Weights & Biases: one run id per job, offline unless WANDB_MODE says otherwise, and no training step logged twice.

W&B's files are under `<output>/wandb/`, one directory per attempt. wandb cannot resume a run offline, so a new attempt reads
back what the earlier attempts recorded and logs only what is missing. After SIGKILL only these files are reliable: wandb-core
writes them in another process, which dies with the worker and loses what it had not written.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import psutil

from voco.errors import Stopped
from voco.image.encoded import read_rgb
from voco.image.fault import ImageFault
from voco.job.spec import Job
from voco.run import manifest
from voco.run.logs import get_logger
from voco.run.manifest import Manifest
from voco.run.wandb_records import is_finished, recorded_steps
from voco.store import storage

if TYPE_CHECKING:  # takes half a second to import, so a job without tracking never imports it
    import wandb

log = get_logger(__name__)

# columns of schemas.METRICS
CURVES = (
    "step", "epoch", "loss", "kl", "lr", "grad_norm", "tokens", "seconds", "wait", "samples_per_s", "tokens_read", "tokens_per_s",
    "mfu", "memory_bytes", "voco_norm", "attempt", "val_loss", "val_score",
)  # fmt: skip
PREDICTIONS = ("image", "question", "references", "prediction", "correct", "category")
IMAGE_EDGE = 256  # pixels: pictures in a table are only looked at
GROUP = "WANDB_RUN_GROUP"
FLUSH_S = 1.0  # seconds between wandb-core's writes to its file: a kill may lose that much of the record
CALL_S = 60.0  # seconds after which wandb-core counts as hung


@dataclass(frozen=True)
class TrackedJob:
    """What W&B records of a job. Built in the driver, which has the user's environment; picklable, for workers."""

    run_id: str
    group: str | None  # run id of the flow or sweep that the job is part of
    kind: str
    name: str
    project: str
    output: str  # resolved URI
    mode: str  # offline or online
    config: dict[str, Any]


@contextmanager
def wandb_group(run_id: str | None) -> Iterator[None]:
    """Runs that are tracked in this block belong to this flow or sweep, by W&B's own variable. None changes nothing."""
    before = os.environ.get(GROUP)
    if run_id is not None:
        os.environ[GROUP] = run_id
    try:
        yield
    finally:
        if run_id is not None:
            os.environ.pop(GROUP)
            if before is not None:
                os.environ[GROUP] = before


def tracked_job(job: Job, run_id: str) -> TrackedJob | None:
    """The job as W&B sees it; None when `tracking.wandb` is false or WANDB_MODE is disabled.

    Its config is the job file and `parents`, [{uri, manifest_sha256}]: the lineage of inputs, since `use_artifact`
    works online only.
    """
    mode = os.environ.get("WANDB_MODE", "offline")
    if not job.tracking.wandb or mode == "disabled":
        return None
    parents = []
    for uri in dict.fromkeys(uri for stage in job.stages for uri in stage.uris().values() if not uri.startswith("@")):
        resolved = storage.resolve(uri)
        state = manifest.manifest_sha256(resolved)
        if state is not None:  # source files have none
            parents.append({"uri": resolved, "manifest_sha256": state})
    config = {**job.model_dump(mode="json", exclude_none=True, exclude={"tracking"}), "parents": parents}
    mode = "online" if mode in ("online", "run") else "offline"
    output = job.output_uri
    return TrackedJob(run_id, os.environ.get(GROUP), job.kind, job.name, job.tracking.project, output, mode, config)


def start_tracking(job: TrackedJob | None) -> TrackedRun:
    """One attempt of a run: call it on rank 0 only, after the output is claimed. None gives a run that records nothing.

    Nothing here ends a job: a failure in W&B is reported once on stderr, and the job continues unrecorded.
    """
    return TrackedRun(job)


class TrackedRun:
    """One attempt of a job. As a context manager it finishes with the exit code of the block's end."""

    def __init__(self, job: TrackedJob | None) -> None:
        self.recorded: set[int] = set()  # training steps that this attempt and earlier ones recorded
        self._job, self._run = job, None
        self._last = -1  # the last step that this attempt logged
        self._copied: dict[str, tuple[int, int]] = {}  # to S3: file -> size and mtime_ns
        if job is None:
            return
        with self.guard(2 * CALL_S):
            self._root = _local_root(job)
            self.recorded = recorded_steps(job.output, job.run_id)
            self._run = _start_run(job, self._root)
            self._folder = Path(self._run.dir).parent

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        stopped = kind is not None and issubclass(kind, (KeyboardInterrupt, Stopped))
        self.finish(130 if stopped else int(error is not None))

    def log_steps(self, rows: list[dict[str, Any]]) -> None:
        """Training curves: `CURVES` of rows of `schemas.METRICS`, in order. A step that any attempt recorded is skipped.

        After a resume, pass the checkpoint's entire history first: steps that a kill lost are logged from it.
        Raises ValueError for a new step below one that this attempt has logged: wandb would drop it.
        """
        if self._run is None:
            return
        new = [row for row in rows if row["step"] not in self.recorded]
        steps = [self._last, *(int(row["step"]) for row in new)]
        if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise ValueError(f"expected steps in order and above {self._last}, got {steps[1:4]}...")
        with self.guard() as run:
            for row in new:
                values = {key: row[key] for key in CURVES if row.get(key) is not None}
                run.log(values, step=int(row["step"]), commit=True)
            self._last = steps[-1]
            self.recorded.update(steps[1:])

    def log_predictions(self, rows: list[dict[str, Any]]) -> None:
        """A table `predictions`, one row each: image (encoded bytes or None), question, references (list of str), prediction,
        correct (float or None), category. The caller makes one picture of a video."""
        if self._run is None:
            return
        import wandb

        with self.guard() as run, self._staging():
            table = wandb.Table(columns=list(PREDICTIONS))
            for row in rows:
                correct = None if row["correct"] is None else float(row["correct"])
                answers = " | ".join(row["references"])
                table.add_data(_picture(row["image"]), row["question"], answers, row["prediction"], correct, row["category"])
            run.log({"predictions": table}, commit=False)  # in the next step's row: committed, it would use up that number

    def log_summary(self, values: dict[str, Any]) -> None:
        """The run's final figures, e.g. scores; None is left out, a nested dict is allowed."""
        if self._run is None:
            return
        with self.guard() as run:
            run.summary.update({key: value for key, value in values.items() if value is not None})

    def log_output(self, done: Manifest, uri: str) -> None:
        """The finished output as an artifact: named as the job, typed as its kind, with manifest.json and no other file.

        Metadata: uri, run_id, manifest_sha256, parents. `uri` is the output, whose manifest.json must be there.
        """
        if self._run is None:
            return
        import wandb

        with self.guard() as run, self._staging():
            content = storage.read_bytes(storage.join(uri, "manifest.json"))
            copy = self._folder / "manifest.json"
            copy.write_bytes(content)
            facts = {
                "uri": uri,
                "run_id": done.run_id,
                "manifest_sha256": hashlib.sha256(content).hexdigest(),
                "parents": done.parents,
            }
            artifact = wandb.Artifact(done.name, done.kind, metadata=facts)
            artifact.add_file(str(copy), name="manifest.json", policy="immutable", skip_cache=True)
            run.log_artifact(artifact)

    def flush(self) -> None:
        """Copy what is recorded so far to an output on S3; call it when a checkpoint is committed.

        A local output has it already, at most `FLUSH_S` late.
        """
        if self._run is not None:
            with self.guard():
                self._copy_to_s3()

    def finish(self, exit_code: int) -> None:
        """End the attempt, in `CALL_S` seconds at most: 0 done, 130 stopped, else failed. A second call does nothing."""
        if self._run is None or self._job is None:
            return
        with self.guard() as run:
            run.finish(exit_code)
            self._wait_until_closed()
            self._copy_to_s3()
            if self._job.output.startswith("s3://"):
                shutil.rmtree(self._root, ignore_errors=True)
        self._run = None

    def _wait_until_closed(self) -> None:
        """wandb-core answers before the last records are in the file, and a worker may be killed as soon as this returns."""
        assert self._job is not None
        file = self._folder / f"run-{self._job.run_id}.wandb"
        deadline = time.monotonic() + CALL_S / 4
        while not is_finished(file.read_bytes()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{file} was not closed")
            time.sleep(0.02)

    def _copy_to_s3(self) -> None:
        if self._job is None or not self._job.output.startswith("s3://"):
            return
        for file in sorted(path for path in self._folder.rglob("*") if path.is_file() and not path.is_symlink()):
            name = file.relative_to(self._root).as_posix()
            state = file.stat()
            if self._copied.get(name) != (state.st_size, state.st_mtime_ns):
                storage.write_bytes(storage.join(self._job.output, name), file.read_bytes())
                self._copied[name] = (state.st_size, state.st_mtime_ns)

    @contextmanager
    def guard(self, seconds: float | None = None) -> Iterator[Any]:
        """A failure in this block ends the tracking, not the job. A wandb-core that hangs is killed, so that the call returns."""
        watch = threading.Timer(seconds or CALL_S, _kill_core)
        watch.daemon = True
        watch.start()
        try:
            yield self._run
        except Exception as error:  # noqa: BLE001 - of wandb, its service or the storage: none may end a training run
            log.warning("tracking: W&B is off from here on: %s: %s", type(error).__name__, error)
            self._run = None
        finally:
            watch.cancel()

    @contextmanager
    def _staging(self) -> Iterator[None]:
        """Keep the files of artifacts and tables with the run; wandb would put them into the home directory."""
        before = os.environ.get("WANDB_DATA_DIR")
        os.environ["WANDB_DATA_DIR"] = str(self._folder)
        try:
            yield
        finally:
            del os.environ["WANDB_DATA_DIR"]
            if before is not None:
                os.environ["WANDB_DATA_DIR"] = before


def _local_root(job: TrackedJob) -> Path:
    """The local directory that gets `wandb/`: the output, or a temporary one of fixed name for an output on S3.

    The name is fixed because wandb writes absolute paths of pictures into its record: `wandb sync` works on any machine
    where `<output>/wandb` is copied to the same path.
    """
    if not job.output.startswith("s3://"):
        root = Path(job.output)
        root.mkdir(parents=True, exist_ok=True)
        return root
    own = Path(tempfile.gettempdir()) / f"voco-wandb-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    if own.stat().st_uid != os.getuid() or own.is_symlink():
        raise PermissionError(f"{own} belongs to another user")
    root = own / job.run_id
    shutil.rmtree(root, ignore_errors=True)  # of a killed attempt, whose records are on S3
    root.mkdir()
    return root


def _start_run(job: TrackedJob, root: Path) -> wandb.Run:
    """A started wandb run; offline, with a warning, where WANDB_MODE is online but wandb cannot log in."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's own crash reports, over the network
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    if job.mode == "online":
        try:
            if wandb.login(prompt=False):
                return _init_run(job, root, "online")
            reason = "there is no API key"
        except (wandb.Error, TimeoutError) as error:
            reason = str(error).splitlines()[0]
        log.warning("tracking: WANDB_MODE is online, but %s: recording offline", reason)
    return _init_run(job, root, "offline")


def _init_run(job: TrackedJob, root: Path, mode: Literal["online", "offline"]) -> wandb.Run:
    """A wandb run that asks nothing, prints nothing, and collects nothing about code, host or console."""
    import wandb

    settings = wandb.Settings(
        mode=mode,
        root_dir=str(root),
        use_dot_wandb=False,
        silent=True,
        console="off",
        host="",
        disable_code=True,
        disable_git=True,
        save_code=False,
        sagemaker_disable=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
        x_transaction_log_flush_interval=FLUSH_S,
        init_timeout=CALL_S,
        finish_timeout=CALL_S / 2,
        reinit="create_new",  # a driver may have a flow's run and its stage's
    )
    return wandb.init(
        project=job.project,
        id=job.run_id,
        name=job.name,
        group=job.group,
        job_type=job.kind,
        config=job.config,
        resume="allow" if mode == "online" else None,
        settings=settings,
    )


def _kill_core() -> None:
    """End this process's own wandb-core; calls that wait for it then fail."""
    for child in psutil.Process().children():
        if child.name() == "wandb-core":
            log.warning("tracking: wandb-core does not answer: killed")
            child.kill()


def _picture(content: bytes | None) -> Any:
    """Encoded bytes as a small JPEG of wandb's; None for no picture, or one that cannot be read."""
    import wandb

    if content is None:
        return None
    try:
        picture = read_rgb(content)
    except ImageFault:
        return None
    picture.thumbnail((IMAGE_EDGE, IMAGE_EDGE))
    return wandb.Image(picture, file_type="jpg")
