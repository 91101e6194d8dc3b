"""Checks in the driver that features or frame caches fit a job's samples and checkpoint; raises Refused where they do not."""

from __future__ import annotations

from typing import Any

from voco.errors import Refused
from voco.job.spec import Job
from voco.precompute.feature_store import FeatureStore, check_tower
from voco.precompute.frame_store import FrameStore, check_compressor
from voco.store.samples import MEDIA_SHA256, SampleTables, images_of


def check_features(job: Job, config: dict[str, Any], tables: SampleTables) -> None:
    """Refuse features of another tower than the checkpoint's (`config`), or that lack an image of `tables`, the job's samples."""
    features = FeatureStore(job.resolved_inputs.features or "")
    check_tower(features, config["preprocessing"])
    images = {sha256 for row in tables.rows([MEDIA_SHA256]) for sha256 in images_of(row)}
    missing = images - features.index.keys()
    if missing:
        raise Refused(
            f"inputs.features: {job.inputs.features} lacks {len(missing)} of {len(images)} images; make it from these samples"
        )


def check_frames(job: Job, config: dict[str, Any], n: int, tables: SampleTables) -> FrameStore:
    """Refuse frame caches that the checkpoint cannot read at N = `n`, or that lack a sample of `tables`. Returns the store."""
    store = FrameStore(job.resolved_inputs.frame_cache or "")
    check_compressor(store, config, n)
    sample_ids = media_sample_ids(tables)
    missing = [sample_id for sample_id in sample_ids if sample_id not in store.groups and sample_id not in store.rejected]
    if missing:
        raise Refused(
            f"inputs.frame_cache: {job.inputs.frame_cache} lacks {len(missing)} of {len(sample_ids)} samples, the first is "
            f"{missing[0]}; make it from these samples"
        )
    return store


def media_sample_ids(tables: SampleTables) -> list[str]:
    """Ids of the samples that have media, in order."""
    return [row["sample_id"] for row in tables.rows(["sample_id", "modality"]) if row["modality"] != "text"]
