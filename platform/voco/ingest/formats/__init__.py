"""Source formats, one file each, which ends in `FORMAT = Format(...)`. `job/tables.py` has a row for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from voco.ingest.media.source import LocatedMedia
from voco.ingest.source_row import Reject, SourceRow
from voco.job.config import Ingest
from voco.job.tables import FORMATS


@dataclass(frozen=True)
class Format:
    """What ingest needs to know of a source format.

    `read(uri, block, answers)` yields one SourceRow or one Reject for each source row, in the order of the file. `uri` is
    `inputs.annotations`, `answers` is `inputs.answers` and None unless `takes_answers`. It raises Refused for a file that is
    not of this format.
    """

    read: Callable[[str, Ingest, str | None], Iterable[SourceRow | Reject]]
    takes_answers: bool = False  # the job may name a second file with the answers, `inputs.answers`
    missing_share: float = 0.02  # default of `ingest.max_missing_share`; 1.0 for sets whose links vanish from the web
    # opens the media of a format whose rows have a `location`: `open_media(block, annotations)`; None: `inputs.media` has them
    open_media: Callable[[Ingest, str], LocatedMedia] | None = None


def get_format(name: str) -> Format:
    """The format of a row of `FORMATS`. Imports its module only, not those of the other formats."""
    return FORMATS.implementation(name, __name__, "FORMAT", Format)
