"""Refuses, in the driver, features and frame caches that do not fit a job's samples or checkpoint."""

from __future__ import annotations

from typing import Any

from voco.errors import Refused
from voco.job.spec import Job
from voco.precompute.feature_store import FeatureStore, check_tower
from voco.precompute.frame_store import FrameStore, check_compressor
from voco.store.samples import SampleTables, images_of


def check_features(job: Job, config: dict[str, Any], tables: SampleTables) -> None:
    """Refuse features of another tower than a checkpoint's, or that lack an image of the job's samples, which are open."""
    features = FeatureStore(job.resolved_inputs.features or "")
    check_tower(features, config["preprocessing"])
    images = {sha256 for row in tables.rows(["media.list.element.sha256"]) for sha256 in images_of(row)}
    missing = images - features.index.keys()
    if missing:
        raise Refused(
            f"inputs.features: {job.inputs.features} lacks {len(missing)} of {len(images)} images; make it from these samples"
        )


def check_frames(job: Job, config: dict[str, Any], n: int, tables: SampleTables) -> FrameStore:
    """Refuse frame caches that the checkpoint cannot read, or that lack one of the job's samples. Returns the open store."""
    store = FrameStore(job.resolved_inputs.frame_cache or "")
    check_compressor(store, config, n)
    sample_ids = media_sample_ids(tables)
    missing = [sample_id for sample_id in sample_ids if sample_id not in store.groups and sample_id not in store.rejected]
    if missing:
        raise Refused(
            f"inputs.frame_cache: {job.inputs.frame_cache} lacks {len(missing)} of {len(sample_ids)} samples, {missing[0]} for "
            "one; make it from these samples"
        )
    return store


def media_sample_ids(tables: SampleTables) -> list[str]:
    """Ids of the samples that have media, in order."""
    return [row["sample_id"] for row in tables.rows(["sample_id", "modality"]) if row["modality"] != "text"]
