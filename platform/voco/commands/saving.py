"""What the checkpoints of a training cost it, for `voco plan`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from voco.commands.estimate import Estimate
from voco.commands.rates import Rates
from voco.commands.training_memory import COPY_TO_SAVE
from voco.job.spec import Job
from voco.report.table import bytes_text


def saving_lines(stages: Sequence[Job], estimates: Mapping[str, Estimate], rates: Rates) -> Iterator[str]:
    """A line about the training whose saves take the largest share of its time; none where no training is estimated.

    A save blocks the steps for a copy to host memory, and for the rest of the save before it where that is not written yet.
    """
    shares = [
        (share, f"saves: {stage.name}: {text}")
        for stage in stages
        if stage.stage.trains and stage.name in estimates
        for share, text in _share(stage, estimates[stage.name], rates)
    ]
    if shares:
        yield max(shares)[1]


def _share(stage: Job, cost: Estimate, rates: Rates) -> Iterator[tuple[float, str]]:
    size, seconds = cost.host.get(COPY_TO_SAVE, 0.0), 3600 * cost.duration
    if not size or not cost.steps or not seconds:
        return
    saves = math.ceil(cost.steps / stage.block.save_every)
    copied, written = size / (rates.host_copy_gb_s * 1e9), size / (rates.storage_mb_s * 1e6)
    waited = max(0.0, copied + written - seconds * stage.block.save_every / cost.steps)
    share = saves * (copied + waited) / seconds
    wait = f" and a wait of {waited:,.1f} s for the one before" if waited else ""
    yield (
        share,
        (
            f"{saves:,} of {bytes_text(size * stage.resources.fewest_workers)}; each blocks the steps for {copied:,.2f} s{wait}, "
            f"{share:.2%} of the time in all, and is written in {written:,.0f} s meanwhile"
        ),
    )
