"""Checks in the driver that features or frame caches fit a job's samples and checkpoint; raises Refused where they do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from voco.errors import Refused
from voco.job.spec import Job
from voco.precompute.feature_store import FeatureStore, check_tower
from voco.precompute.frame_store import FrameStore, check_compressor
from voco.run import manifest
from voco.store.index import DigestSet, raw_digests
from voco.store.samples import MEDIA_SHA256, SampleTables, images_of


def check_images(job: Job, config: dict[str, Any], tables: SampleTables) -> None:
    """Refuse what the checkpoint (`config`) cannot see of `tables`, the job's samples: features of another tower or without some
    of the images; without `inputs.features`, videos, and a checkpoint that has no tower to run.
    """
    if job.inputs.features is not None:
        _check_features(job, config, tables)
        return
    if config["tower"] is None:
        raise Refused("inputs.features: expected a value: this checkpoint has no vision tower that could see the images itself")
    if tables.has_videos:
        way = "give it as inputs.frame_cache" if job.kind == "evaluate" else "train on them with video_sft"
        raise Refused(f"inputs.samples: expected images and text, got videos; make a frame_cache of them and {way}")


def _check_features(job: Job, config: dict[str, Any], tables: SampleTables) -> None:
    output = job.resolved_inputs.features or ""
    features = FeatureStore(output)
    check_tower(features, config["preprocessing"])
    groups = tables.groups_with_media() if tables.has_videos else _other_groups(output, tables)
    images, missing = DigestSet(), DigestSet()
    for _, table in tables.tables([MEDIA_SHA256], groups):
        digests = raw_digests(sha256 for row in table.to_pylist() for sha256 in images_of(row))
        images.add(digests)
        missing.add(digests[~features.keys.has(digests)])
    if len(missing):
        raise Refused(
            f"inputs.features: {job.inputs.features} lacks {len(missing)} of {len(images)} images; make it from these samples"
        )


def check_frames(job: Job, config: dict[str, Any], n: int, tables: SampleTables) -> FrameStore:
    """Refuse frame caches that the checkpoint cannot read at N = `n`, or that lack a sample of `tables`. Returns the store."""
    output = job.resolved_inputs.frame_cache or ""
    store = FrameStore(output)
    check_compressor(store, config, n)
    read, missing = 0, []
    for sample_id in media_sample_ids(tables, _other_groups(output, tables)):
        read += 1
        if sample_id not in store and sample_id not in store.rejected:
            missing.append(sample_id)
    if missing:
        raise Refused(
            f"inputs.frame_cache: {job.inputs.frame_cache} lacks {len(missing)} of {read} samples, the first is "
            f"{missing[0]}; make it from these samples"
        )
    return store


def media_sample_ids(tables: SampleTables, groups: list[int] | None = None) -> Iterator[str]:
    """Ids of the samples that have media, in order; of all row groups that have any, or of `groups`."""
    for _, table in tables.tables(["sample_id", "modality"], tables.groups_with_media() if groups is None else groups):
        yield from (row["sample_id"] for row in table.to_pylist() if row["modality"] != "text")


def _other_groups(output: str, tables: SampleTables) -> list[int]:
    """The row groups with media of samples that `output` (features or frame caches) was not made from, as its manifest says.

    Of the others it has every image or sample: its job lists them all, and fails or counts a reject where it has none.
    """
    finished = manifest.read_manifest(output)
    parents = {(parent["uri"], parent["manifest_sha256"]) for parent in (finished.parents if finished is not None else [])}
    is_parent = [(uri, manifest.manifest_sha256(uri)) in parents for uri in tables.uris]
    return [group for group in tables.groups_with_media() if not is_parent[tables.owners[group]]]
