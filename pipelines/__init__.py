"""The stages, one driver-side module each, and the one way to run a job of any kind.

Every module has `run(job, run_id) -> Manifest`: read the inputs, do the work, write the manifest last. It may have
`record(tracked_run, job)`, which adds the stage's own figures to W&B.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `voco` imports this package for its command line, and `voco --help` needs none of these
    from voco.job.spec import Job
    from voco.run.manifest import Manifest


def stage_module(kind: str) -> str:
    """The module that runs a kind of job: the file of its name here, or the one that its row names."""
    from voco.job.spec import STAGES

    return STAGES[kind].module or f"pipelines.{kind}"


def run(job: Job, replace: bool = False) -> Manifest:
    """Run one job in this driver, or report that it is done. `replace` overwrites an output of another run."""
    from voco.job.spec import STAGES
    from voco.run.stages import run_stage

    stage_run: Any = STAGES.implementation(job.kind, __name__, "run", object)
    record = getattr(sys.modules[stage_module(job.kind)], "record", None)
    return run_stage(job, stage_run, record, replace)
