"""What the first rows of a source are, read as `run` reads them: for `voco plan`, which must not promise what run refuses."""

from __future__ import annotations

import itertools
from collections import Counter

from voco.errors import Refused
from voco.ingest.formats import get_format
from voco.ingest.source_row import Reject
from voco.job.config import Ingest

ROWS = 20


def preview(block: Ingest, annotations: str) -> str:
    """`first 20 rows: 18 image, 2 text`, with the rejected ones and the first reason. Reads no medium.

    Raises Refused when the file is not of the job's format: at its start, or because none of these rows can be read.
    """
    kinds: Counter[str] = Counter()
    rejects: list[Reject] = []
    for row in itertools.islice(get_format(block.format).read(annotations, block, None), ROWS):
        if isinstance(row, Reject):
            rejects.append(row)
        else:
            several = f" of {len(row.paths)}" if len(row.paths) > 1 else ""
            kinds[f"{row.modality}{several}"] += 1
    total = kinds.total() + len(rejects)
    if not total:
        raise Refused(f"inputs.annotations: {annotations}: no rows")
    reason = f"{rejects[0].reason}: {rejects[0].source}: {rejects[0].detail}" if rejects else ""
    if not kinds and block.max_reject_share < 1:
        raise Refused(
            f"inputs.annotations: {annotations}: none of the first {total} rows can be read as {block.format} ({reason})"
        )
    counts = [f"{count} {kind}" for kind, count in sorted(kinds.items())]
    if rejects:
        counts.append(f"{len(rejects)} rejected ({reason})")
    return f"{block.format}, first {total} rows: {', '.join(counts)}"
