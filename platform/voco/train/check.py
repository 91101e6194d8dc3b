"""What a training job would only fail on once its workers run, refused in the driver."""

from __future__ import annotations

from typing import Any

from voco import storage
from voco.blocks import Training, VideoSft
from voco.errors import Refused
from voco.spec import Job
from voco.tokens import Layout
from voco.train.data import SampleTables


def check(job: Job, layout: Layout, model: str) -> None:
    """Refuse what would only fail on the workers: features or caches of another maker or other samples, and sizes."""
    from voco.model import weights

    block: Training = job.block
    config = weights.read_config(model)
    longest = config["language_model"]["max_position_embeddings"]
    if block.max_tokens > longest:
        raise Refused(f"{job.kind}.max_tokens: expected at most the model's {longest} positions, got {block.max_tokens}")
    if isinstance(block, VideoSft):
        _check_frames(job, block, layout, config)
        return
    _check_features(job, config)
    if layout.method == "avg_pool" and layout.vision_slots % layout.tokens:
        raise Refused(
            f"compression.tokens: expected a divisor of the tower's {layout.vision_slots} positions, got {layout.tokens}"
        )
    prefix = layout.prefix_length + layout.voco_tokens()
    if prefix >= block.max_tokens:
        raise Refused(f"{job.kind}.max_tokens: expected more than the prefix's {prefix} tokens, got {block.max_tokens}")


def _check_features(job: Job, config: dict[str, Any]) -> None:
    from voco.features import FeatureStore, check_tower

    features = FeatureStore(storage.resolve(job.inputs.features or ""))
    check_tower(features, config["preprocessing"])
    images = {one["sha256"] for row in _tables(job).rows(["media.list.element.sha256"]) for one in row["media"] or []}
    missing = images - features.index.keys()
    if missing:
        raise Refused(
            f"inputs.features: {job.inputs.features} lacks {len(missing)} of {len(images)} images; make it from these samples"
        )


def _check_frames(job: Job, block: VideoSft, layout: Layout, config: dict[str, Any]) -> None:
    from voco.video.frame_store import FrameStore, check_maker

    if layout.template == "plain":
        raise Refused("video_sft.text.template: plain starts with the answer, which no cache can predict; use another template")
    store = FrameStore(storage.resolve(job.inputs.frame_cache or ""))
    check_maker(store, config, layout.tokens)
    held = [row["sample_id"] for row in _tables(job).rows(["sample_id", "modality"]) if row["modality"] != "text"]
    missing = [sample_id for sample_id in held if sample_id not in store.groups]
    if missing:
        raise Refused(
            f"inputs.frame_cache: {job.inputs.frame_cache} lacks {len(missing)} of {len(held)} samples, {missing[0]} for one; "
            "make it from these samples"
        )
    frames = max((len(store.taken(sample_id, block.max_frames)) for sample_id in held), default=0)
    if frames * layout.tokens >= block.max_tokens:
        most = (block.max_tokens - 1) // layout.tokens
        raise Refused(
            f"video_sft.max_frames: a sample has {frames} frames of {layout.tokens} tokens, which leaves no room for text in "
            f"max_tokens {block.max_tokens}; set max_frames below {most}, and frames are dropped evenly"
        )


def _tables(job: Job) -> SampleTables:
    return SampleTables([storage.resolve(item.uri) for item in job.inputs.samples], [1.0] * len(job.inputs.samples))
