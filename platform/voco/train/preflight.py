"""What a training job would only fail on once its workers run, refused in the driver."""

from __future__ import annotations

from typing import Any

from voco.errors import Refused
from voco.job.config import ImageSft, Training, VideoSft
from voco.job.spec import Job
from voco.precompute.frame_store import FrameStore, check_compressor
from voco.sequence.sequence import Layout
from voco.store import storage
from voco.store.samples import IMAGES, SampleTables, sizes_of

FLEX_WIDTH = 16  # of a head, at least: torch's kernel on GPUs has none that is narrower


def check_training(job: Job, layout: Layout, model: str) -> None:
    """Refuse what would only fail on the workers: features or caches of another maker or other samples, and sizes."""
    from voco.model import weights
    from voco.model.rope import max_positions

    block: Training = job.block
    config = weights.read_config(model)
    positions = max_positions(config["language_model"])
    # text behind a video stands after one prefix and every frame's <voco>; max_tokens counts those and the text
    most = positions - layout.prefix_length if isinstance(block, VideoSft) else positions
    if block.max_tokens > most:
        got = f"for the model's {positions} positions, got {block.max_tokens}"
        raise Refused(f"{job.kind}.max_tokens: expected at most {most}, {got}")
    samples = job.inputs.samples
    if not SampleTables([storage.resolve(item.uri) for item in samples], [item.weight for item in samples]).mix.shown():
        raise Refused("inputs.samples: an epoch of these tables with these weights has no sample")
    head = config["language_model"].get("head_dim") or FLEX_WIDTH
    if block.attention == "flex" and head < FLEX_WIDTH:
        raise Refused(f"{job.kind}.attention: flex has no kernel for heads of width {head}: expected segments")
    if isinstance(block, VideoSft):
        _check_frames(job, block, layout, config)
        return
    check_features(job, config)
    if layout.method == "avg_pool" and layout.vision_slots % layout.tokens:
        raise Refused(
            f"compression.tokens: expected a divisor of the tower's {layout.vision_slots} positions, got {layout.tokens}"
        )
    images = (sizes_of(row) for row in _tables(job).rows(IMAGES)) if layout.anyres is not None else []
    prefix = max((layout.prefix_tokens(sizes) for sizes in images), default=layout.prefix_tokens([None]))
    if prefix >= block.max_tokens:
        raise Refused(f"{job.kind}.max_tokens: expected more than the prefix's {prefix} tokens, got {block.max_tokens}")


def check_teacher(job: Job, layout: Layout, model: str) -> Layout | None:
    """How the teacher of a distillation reads the samples; None without one. Refuse one that would not say the same tokens."""
    if not isinstance(job.block, ImageSft) or job.block.distill is None:
        return None
    if layout.anyres is not None:
        raise Refused(f"{job.kind}.distill: not for a checkpoint that cuts images into tiles (LLaVA-1.6)")
    if job.inputs.teacher is None:
        return layout.model_copy(update={"method": "none"})
    from voco.model import weights
    from voco.model.rope import max_positions

    uri = job.inputs.teacher
    config, ours = weights.read_config(uri), weights.read_config(model)
    teacher = Layout(**config["layout"])
    if teacher.method != "none":
        raise Refused(f"inputs.teacher: expected an uncompressed checkpoint, of method none, got {uri} of {teacher.method}")
    special = ("bos_id", "eos_id", "pad_id", "image_id", "voco_id", "separator_ids")
    same = all(getattr(teacher, key) == getattr(layout, key) for key in special)
    same = same and config["language_model"]["vocab_size"] == ours["language_model"]["vocab_size"]
    if not same or weights.read_tokenizer(uri).get_vocab() != weights.read_tokenizer(model).get_vocab():
        raise Refused(f"inputs.teacher: {uri} has another vocabulary than the model; use one that starts from the same base")
    check_features(job, config)
    teacher = teacher.model_copy(update={"template": layout.template, "newlines": layout.newlines})
    views = max(len(row["media"] or []) for row in _tables(job).rows(["media.list.element.sha256"]))
    most, positions = (
        job.block.max_tokens + views * (teacher.view_length - layout.view_length),
        max_positions(config["language_model"]),
    )
    if most > positions:
        raise Refused(f"{job.kind}.max_tokens: the teacher reads up to {most} tokens and has {positions} positions; lower it")
    return teacher


def check_features(job: Job, config: dict[str, Any]) -> None:
    """Refuse features of another tower than a checkpoint's, or that lack an image of the job's samples."""
    from voco.precompute.feature_store import FeatureStore, check_tower

    features = FeatureStore(storage.resolve(job.inputs.features or ""))
    check_tower(features, config["preprocessing"])
    images = {one["sha256"] for row in _tables(job).rows(["media.list.element.sha256"]) for one in row["media"] or []}
    missing = images - features.index.keys()
    if missing:
        raise Refused(
            f"inputs.features: {job.inputs.features} lacks {len(missing)} of {len(images)} images; make it from these samples"
        )


def check_frames(job: Job, config: dict[str, Any], n: int) -> FrameStore:
    """Refuse frame caches of another maker than a checkpoint's, or that lack one of the job's samples; else the open store."""
    store = FrameStore(storage.resolve(job.inputs.frame_cache or ""))
    check_compressor(store, config, n)
    held = _with_media(job)
    missing = [sample_id for sample_id in held if sample_id not in store.groups and sample_id not in store.rejected]
    if missing:
        raise Refused(
            f"inputs.frame_cache: {job.inputs.frame_cache} lacks {len(missing)} of {len(held)} samples, {missing[0]} for one; "
            "make it from these samples"
        )
    return store


def _check_frames(job: Job, block: VideoSft, layout: Layout, config: dict[str, Any]) -> None:
    if layout.template == "plain":
        raise Refused("video_sft.text.template: plain starts with the answer, which no cache can predict; use another template")
    store = check_frames(job, config, layout.tokens)
    held = [sample_id for sample_id in _with_media(job) if sample_id in store.groups]
    frames = max((len(store.taken(sample_id, block.max_frames)) for sample_id in held), default=0)
    if frames * layout.tokens >= block.max_tokens:
        most = (block.max_tokens - 1) // layout.tokens
        raise Refused(
            f"video_sft.max_frames: a sample has {frames} frames of {layout.tokens} tokens, which leaves no room for text in "
            f"max_tokens {block.max_tokens}; set max_frames below {most}, and frames are dropped evenly"
        )


def _with_media(job: Job) -> list[str]:
    return [row["sample_id"] for row in _tables(job).rows(["sample_id", "modality"]) if row["modality"] != "text"]


def _tables(job: Job) -> SampleTables:
    return SampleTables([storage.resolve(item.uri) for item in job.inputs.samples], [1.0] * len(job.inputs.samples))
