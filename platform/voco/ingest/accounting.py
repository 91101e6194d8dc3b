"""Every source row is written or rejected: the sum over the listing and all units, and the two limits on what is lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from voco.errors import JobFailed
from voco.ingest.listing import SourceListing
from voco.ingest.statistics import total_figures
from voco.job.config import Ingest
from voco.run import units
from voco.store import storage

MISSING = ("missing_media", "download_failed")  # what `max_missing_share` is about

# Its default: what public sets link to vanishes from the web, so there every one may be missing.
MISSING_SHARE = {"webvid_csv": 1.0, "video_chatgpt": 1.0, "video_qa": 1.0, "webdataset": 1.0, "cc3m_tsv": 1.0}
OTHER_MISSING_SHARE = 0.02


@dataclass(frozen=True)
class Totals:
    """The whole job in source rows, and its files."""

    read: int
    written: int
    samples: int
    rejected: dict[str, int]
    tables: dict[str, list[dict[str, Any]]]
    statistics: dict[str, Any]

    @property
    def counts(self) -> dict[str, Any]:
        return {"read": self.read, "written": self.written, "samples": self.samples, "rejected": self.rejected}

    def __str__(self) -> str:
        lost = ", ".join(f"{reason} {count:,}" for reason, count in self.rejected.items())
        total = sum(self.rejected.values())
        reasons = f" ({lost})" if lost else ""
        return f"read {self.read:,} = written {self.written:,} + rejected {total:,}{reasons}; {self.samples:,} samples"


def add_up(listing: SourceListing, records: list[dict[str, Any]]) -> Totals:
    """Add everything up. Raises AssertionError, our own mistake, when a row is lost or doubled."""
    rejected = Counter(listing.rejected)
    kinds: Counter[str] = Counter()
    tables: dict[str, list[dict[str, Any]]] = {"samples": [], "rejects": list(listing.tables)}
    for record in records:
        rejected.update(record["rejected"])
        kinds.update(record["kinds"])
        for name, entries in record["tables"].items():
            if entries:
                tables.setdefault(name, []).extend(entries)
    written = sum(record["written"] for record in records)
    assert listing.read == written + rejected.total(), f"{listing.read} read, {written} written, {rejected.total()} rejected"
    statistics = {
        "figures": total_figures(record["spread"] for record in records),
        "kinds": dict(sorted(kinds.items())),
    }
    samples = sum(entry["rows"] for entry in tables["samples"])
    return Totals(listing.read, written, samples, dict(sorted(rejected.items())), tables, statistics)


def missing_share(block: Ingest) -> float:
    """The limit on missing media that holds for a job: its own, or the default of its format."""
    if block.max_missing_share is not None:
        return block.max_missing_share
    return MISSING_SHARE.get(block.format, OTHER_MISSING_SHARE)


def check_limits(block: Ingest, account: Totals, output: str) -> None:
    """Fail a job that lost too much; its rejects are written already.

    Units with a rejected medium are then to be done again: once the media are put in place, the same job goes on.
    """
    missing = sum(account.rejected.get(reason, 0) for reason in MISSING)
    other = sum(account.rejected.values()) - missing
    limits = (
        ("max_missing_share", missing_share(block), missing, "lack their media"),
        ("max_reject_share", block.max_reject_share, other, "are bad"),
    )
    for key, limit, lost, what in limits:
        if account.read and lost / account.read > limit:
            forget_rejecting_units(output)
            whose = f", the default of {block.format}" if getattr(block, key) is None else ""
            raise JobFailed(
                f"ingest.{key}: {lost:,} of {account.read:,} rows ({lost / account.read:.2%}) {what}, "
                f"more than {limit:.2%}{whose}; "
                f"{output}/rejects says which and why: mend the source and send again, or raise the limit"
            )


def forget_rejecting_units(output: str) -> None:
    for record in units.unit_records(output):
        if record["rejected"]:
            storage.delete(units.unit_record_uri(output, record["unit"]))
