"""Accounts for every source row (read = written + rejected, over the listing and all units) and checks the two reject limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from voco.errors import JobFailed
from voco.ingest.formats import get_format
from voco.ingest.listing import SourceListing
from voco.ingest.statistics import Figures, add_means, merge_figures
from voco.job.config import Ingest
from voco.run.unit_records import UnitRecords, forget_units

MISSING = ("missing_media", "download_failed")  # the reasons that `max_missing_share` limits


@dataclass(frozen=True)
class Totals:
    """Counts of the job in source rows, and its files."""

    read: int
    written: int
    samples: int
    rejected: dict[str, int]
    tables: dict[str, list[dict[str, Any]]]
    statistics: dict[str, Any]

    @property
    def counts(self) -> dict[str, Any]:
        return {"read": self.read, "written": self.written, "samples": self.samples, "rejected": self.rejected}

    @property
    def fields(self) -> dict[str, Any]:
        """Counts, tables and statistics of the job's manifest."""
        return {"counts": self.counts, "tables": self.tables, "statistics": self.statistics}

    def __str__(self) -> str:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in self.rejected.items())
        total = sum(self.rejected.values())
        reasons = f" ({counts})" if counts else ""
        return f"read {self.read:,} = written {self.written:,} + rejected {total:,}{reasons}; {self.samples:,} samples"


def add_up(listing: SourceListing, records: Iterable[dict[str, Any]]) -> Totals:
    """Sum the listing and the unit records. Raises AssertionError when a row is lost or counted twice, which is a bug."""
    rejected = Counter(listing.rejected)
    kinds: Counter[str] = Counter()
    tables: dict[str, list[dict[str, Any]]] = {"samples": [], "rejects": list(listing.tables)}
    figures: Figures = {}
    written = 0
    for record in records:
        written += record["written"]
        merge_figures(figures, record["spread"])
        rejected.update(record["rejected"])
        kinds.update(record["kinds"])
        for name, entries in record["tables"].items():
            if entries:
                tables.setdefault(name, []).extend(entries)
    assert listing.read == written + rejected.total(), f"{listing.read} read, {written} written, {rejected.total()} rejected"
    statistics = {"figures": add_means(figures), "kinds": dict(sorted(kinds.items()))}
    samples = sum(entry["rows"] for entry in tables["samples"])
    return Totals(listing.read, written, samples, dict(sorted(rejected.items())), tables, statistics)


def missing_share(block: Ingest) -> float:
    """The limit on missing media: the job's, or else the default of its format."""
    return get_format(block.format).missing_share if block.max_missing_share is None else block.max_missing_share


def check_limits(block: Ingest, account: Totals, output: str) -> None:
    """Raise JobFailed when a job rejected too many rows, or wrote none. `rejects/` is already written.

    The records of units with rejects are deleted, so that the same job reads them again after the media were added.
    """
    missing = sum(account.rejected.get(reason, 0) for reason in MISSING)
    other = sum(account.rejected.values()) - missing
    limits = (
        ("max_missing_share", missing_share(block), missing, "lack their media"),
        ("max_reject_share", block.max_reject_share, other, "are bad"),
    )
    for key, limit, count, problem in limits:
        if account.read and count / account.read > limit:
            forget_rejecting_units(output)
            origin = f", the default of {block.format}" if getattr(block, key) is None else ""
            raise JobFailed(
                f"ingest.{key}: {count:,} of {account.read:,} rows ({count / account.read:.2%}) {problem}, "
                f"more than {limit:.2%}{origin}; "
                f"{output}/rejects lists them: repair the source and submit again, or raise the limit"
            )
    if not account.written and not block.allow_empty:
        forget_rejecting_units(output)
        why = f"{output}/rejects lists the reasons" if account.read else "the source has no row"
        raise JobFailed(f"nothing was written ({account}): {why}; `ingest.allow_empty: true` accepts an output without rows")


def forget_rejecting_units(output: str) -> None:
    """Delete the record of every unit with rejects, so that the unit runs again."""
    forget_units(output, {record["unit"] for record in UnitRecords(output) if record["rejected"]})
