"""The row of the method `every_other`: plain data, because a row is loaded whenever a job file is checked."""

from __future__ import annotations

from voco.job.tables import MethodRow

ROW = MethodRow("every other patch", pooled=True, module="fruit.every_other")
