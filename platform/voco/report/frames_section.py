"""Frame caches: how many frames, and the bytes of one measured against the formula of its shape."""

from __future__ import annotations

import json
import math
from typing import Any

from voco.report.outputs import Output
from voco.store import parquet, storage

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def frames_section(output: Output) -> dict[str, Any]:
    """One frame_cache output in figures; None where a file that says it is gone."""
    place = storage.join(output.uri, "index.parquet")
    index = parquet.read_table(place) if storage.exists(place) else None
    files = output.manifest.tables.get("frame_cache", [])
    stored = sum(entry["bytes"] for entry in files)
    facts, fields = _first_file(output)
    by_medium: dict[tuple[str, int], int] = {}
    for line in index.to_pylist() if index is not None else []:
        medium = (line["sample_id"], line["media_index"])
        by_medium[medium] = by_medium.get(medium, 0) + line["frames"]
    frames = output.manifest.counts.get("written")
    measured = output.manifest.statistics.get("bytes_per_frame")
    formula = _formula(facts) if facts else None
    each = output.manifest.statistics.get("stored_bytes_per_frame")
    return {
        "output": output, "frames": frames, "media": len(by_medium) or None, "files": len(files), "stored": stored,
        "groups": index.num_rows if index is not None else None,
        "least": min(by_medium.values(), default=None), "most": max(by_medium.values(), default=None),
        "facts": facts, "fields": fields, "measured": measured, "formula": formula, "each": each,
        "overhead": each / measured - 1 if each and measured else None,
        "equal": None if formula is None or measured is None else formula == measured == fields,
        "item": ITEM_BYTES.get(facts.get("dtype", "")), "block": output.job.get("frame_cache", {}),
    }  # fmt: skip


def _first_file(output: Output) -> tuple[dict[str, Any], int | None]:
    """What the files say of themselves, and the bytes of keys and values in one of their rows."""
    for place in output.files("frame_cache"):
        if storage.exists(place):
            with parquet.open_parquet(place) as opened:
                schema = opened.schema_arrow
                facts = dict(json.loads((schema.metadata or {}).get(b"voco.frame_cache", b"{}")))
                return facts, sum(schema.field(name).type.byte_width for name in ("keys", "values"))
    return {}, None


def _formula(facts: dict[str, Any]) -> int | None:
    """2 x layers x kv_heads x head_dim x N x bytes of a number (design section 4)."""
    item = ITEM_BYTES.get(facts.get("dtype", ""))
    return None if item is None or "shape" not in facts else 2 * math.prod(facts["shape"]) * item
