"""Frame caches section: the number of frames, and the bytes of a frame checked against the formula of its shape."""

from __future__ import annotations

import json
from typing import Any

from voco.report.outputs import Output
from voco.store import parquet, schemas, storage
from voco.store.number_types import NUMBER_BYTES, SCALED_LIMITS, frame_tensor_bytes


def frames_section(output: Output) -> dict[str, Any]:
    """The template's values for one frame_cache output; None where the file with a figure is gone."""
    index_uri = storage.join(output.uri, schemas.INDEX_FILE)
    index = parquet.read_table(index_uri) if storage.exists(index_uri) else None
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
    stored_per_frame = output.manifest.statistics.get("stored_bytes_per_frame")
    return {
        "output": output, "frames": frames, "media": len(by_medium) or None, "files": len(files), "stored": stored,
        "groups": index.num_rows if index is not None else None,
        "least": min(by_medium.values(), default=None), "most": max(by_medium.values(), default=None),
        "facts": facts, "fields": fields, "measured": measured, "formula": formula, "stored_per_frame": stored_per_frame,
        "overhead": stored_per_frame / measured - 1 if stored_per_frame and measured else None,
        "equal": None if formula is None or measured is None else formula == measured == fields,
        "item": NUMBER_BYTES.get(facts.get("dtype", "")), "scales": facts.get("dtype") in SCALED_LIMITS,
        "block": output.job.get("frame_cache", {}),
    }  # fmt: skip


def _first_file(output: Output) -> tuple[dict[str, Any], int | None]:
    """The file metadata FRAME_CACHE_METADATA, and the bytes of keys and values, scales included, per row."""
    for uri in output.files("frame_cache"):
        if storage.exists(uri):
            with parquet.open_parquet(uri) as opened:
                schema = opened.schema_arrow
                facts = dict(json.loads((schema.metadata or {}).get(schemas.FRAME_CACHE_METADATA.encode(), b"{}")))
                return facts, sum(field.type.byte_width for field in schema if field.name in schemas.UNCOMPRESSED)
    return {}, None


def _formula(facts: dict[str, Any]) -> int | None:
    """2 x layers x kv_heads x (head_dim x N x bytes per number, and 4 bytes of a scale) (docs/data.md)."""
    if facts.get("dtype") not in NUMBER_BYTES or "shape" not in facts:
        return None
    return 2 * sum(frame_tensor_bytes(facts["shape"], facts["dtype"]))
