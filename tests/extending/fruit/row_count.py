"""A stage kind's config block and row: a job that counts the rows of samples/ tables."""

from __future__ import annotations

from pydantic import Field

from voco.job.config import Strict
from voco.job.spec import Stage


class RowCount(Strict):
    """`row_count: {at_least: 10}`"""

    at_least: int = Field(default=1, ge=1)  # rows, or the job fails


ROW = Stage(RowCount, "Row count", needs=frozenset({"samples"}), in_driver=True, module="fruit.count_rows")
