"""The key `resources` of a job file: how many Ray workers, and what each of them needs."""

from __future__ import annotations

from typing import Annotated, Any, Self, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from voco.job.config import Strict


class WorkerRange(Strict):
    """Elastic training: it starts with what there is between both numbers, and takes more workers when nodes join."""

    min: int = Field(ge=1)  # below it, training waits
    max: int = Field(ge=1)
    resize_every_s: float = Field(default=60.0, gt=0)  # how often more room is looked for: to use it, training saves and restarts

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"expected min of at most max, got {self.min} and {self.max}")
        return self


def _workers_form(value: Any) -> str:
    return "(number)" if isinstance(value, int) or not isinstance(value, dict | WorkerRange) else "(range)"


# the tags are not in a job file: validation_errors.py leaves them out of a key's path
Workers: TypeAlias = Annotated[
    Annotated[int, Field(ge=1), Tag("(number)")] | Annotated[WorkerRange, Tag("(range)")], Discriminator(_workers_form)
]


class Resources(Strict):
    """Resources of the job's Ray workers. A range is for training; other kinds work with any number and take its `max`."""

    workers: Workers = 1
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    accelerator: str | None = None  # Ray accelerator type, e.g. A100
    peak_tflops: float | None = Field(default=None, gt=0)  # of a worker, in the job's number type, for MFU; default: by its GPU

    @property
    def fewest_workers(self) -> int:
        """Training starts with at least so many."""
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def most_workers(self) -> int:
        """Workers of a job that has all that it asks for."""
        return self.workers.max if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def is_elastic(self) -> bool:
        return self.fewest_workers < self.most_workers

    @property
    def workers_text(self) -> str:
        """`8`, or `2 to 8` of a range."""
        return f"{self.fewest_workers} to {self.most_workers}" if self.is_elastic else str(self.most_workers)

    def with_workers(self, number: int) -> Resources:
        """The same with a fixed number of workers."""
        return self.model_copy(update={"workers": number})
