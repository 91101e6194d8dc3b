"""Checks in the driver of what would otherwise fail only in the workers."""

from __future__ import annotations

import importlib.util
from typing import Any

from voco.errors import Refused
from voco.job.chat_templates import CHAT_TEMPLATES
from voco.job.config import ImageSft, Training, VideoSft, lora_of
from voco.job.spec import Job
from voco.job.tables import ATTENTION, AUTO, METRICS
from voco.precompute.feature_store import FeatureStore, check_tower
from voco.precompute.preflight import check_frames, check_images, media_sample_ids
from voco.sequence.sequence import Layout
from voco.store.samples import SampleTables
from voco.train.sampler import TableMix

SPECIAL_IDS = ("bos_id", "eos_id", "pad_id", "image_id", "voco_id", "separator_ids")


def run_preflight(job: Job, layout: Layout, model: str) -> Layout | None:
    """Every check of a training job, on tables opened once. Returns the teacher's layout, or None without a teacher."""
    tables = SampleTables(job.resolved_inputs.sample_uris)
    check_training(job, layout, model, tables)
    check_validation(job, layout, model)
    return check_teacher(job, layout, model, tables)


def check_training(job: Job, layout: Layout, model: str, tables: SampleTables) -> None:
    """Refuse features or caches of another model or other samples, and sizes that do not fit. `tables` are the job's samples."""
    from voco.methods import get_method
    from voco.model import weights
    from voco.model.attention.plan import get_backend
    from voco.model.rope import max_positions

    block: Training = job.block
    check_adapter(job)
    config = weights.read_config(model)
    positions = max_positions(config["language_model"])
    # a video's text comes after one prefix and every frame's <voco>; max_tokens counts the <voco> and the text
    limit = positions - layout.prefix_length if isinstance(block, VideoSft) else positions
    if block.max_tokens > limit:
        got = f"for the model's {positions} positions, got {block.max_tokens}"
        raise Refused(f"{job.kind}.max_tokens: expected at most {limit}, {got}")
    if not TableMix(tables.sizes, tables.owners, tuple(item.weight for item in job.inputs.samples)).epoch_samples():
        raise Refused("inputs.samples: an epoch of these tables with these weights has no sample")
    if block.attention != AUTO:
        narrowest, head = ATTENTION[block.attention].narrowest_head, config["language_model"].get("head_dim")
        if head is not None and head < narrowest:
            raise Refused(f"{job.kind}.attention: {block.attention} has no kernel for heads of width {head}: expected segments")
        get_backend(block.attention)  # a package's may be broken
    if isinstance(block, VideoSft):
        _check_frames(job, block, layout, config, tables)
        return
    check_images(job, config, tables)
    try:
        get_method(layout.method).check(layout)
    except ValueError as error:
        raise Refused(f"compression.{error}") from None
    images = tables.media_sizes() if layout.anyres is not None else []
    prefix = max((layout.prefix_tokens(sizes) for sizes in images), default=layout.prefix_tokens([None]))
    if prefix >= block.max_tokens:
        raise Refused(f"{job.kind}.max_tokens: expected more than the prefix's {prefix} tokens, got {block.max_tokens}")


def check_adapter(job: Job) -> None:
    """Refuse an adapter where its package, an extra of ours, is missing."""
    if lora_of(job.block) is not None and importlib.util.find_spec("peft") is None:
        raise Refused(f"{job.kind}.lora: needs the package peft: pip install 'voco[lora]'")


def check_validation(job: Job, layout: Layout, model: str) -> None:
    """Refuse held-out rows that the job cannot read, or cannot answer."""
    settings = job.block.validation
    if settings is None:
        return
    from voco.model import weights

    config, uri = weights.read_config(model), job.inputs.val
    try:
        tables = SampleTables([job.resolved_inputs.val or ""])
        if isinstance(job.block, VideoSft):
            check_frames(job, config, layout.tokens, tables)
        else:
            check_images(job, config, tables)
    except Refused as error:
        raise Refused(f"inputs.val: {error}") from None
    if not sum(tables.sizes):
        raise Refused(f"inputs.val: {uri} has no rows")
    if not settings.answers:
        return
    METRICS.implementation(settings.metric, "voco.evaluate.metrics", "METRIC", object)  # a package's may be broken
    if layout.drops_questions:
        raise Refused(f"{job.kind}.validate.answers: text.template {layout.template} trains on captions and reads no question")
    for sample_id, asks in tables.first_rows():
        if not asks:
            way = "ingest it as split test, or set no `validate.answers`"
            raise Refused(f"inputs.val: {sample_id} of {uri}: expected a row that ends with a question; {way}")


def check_teacher(job: Job, layout: Layout, model: str, tables: SampleTables) -> Layout | None:
    """The layout under which a distillation's teacher reads the samples; None without a teacher.

    Raises Refused for a teacher that would not predict the same tokens.
    """
    if not isinstance(job.block, ImageSft) or job.block.distill is None:
        return None
    if layout.anyres is not None:
        raise Refused(f"{job.kind}.distill: not for a checkpoint that cuts images into tiles (LLaVA-1.6)")
    if job.inputs.teacher is None:
        return layout.model_copy(update={"method": "none"})
    from voco.model import weights
    from voco.model.rope import max_positions

    uri = job.inputs.teacher
    config, student_config = weights.read_config(uri), weights.read_config(model)
    teacher = Layout(**config["layout"])
    if not teacher.rule.uncompressed:
        raise Refused(f"inputs.teacher: expected an uncompressed checkpoint, of method none, got {uri} of {teacher.method}")
    same = all(getattr(teacher, key) == getattr(layout, key) for key in SPECIAL_IDS)
    same = same and config["language_model"]["vocab_size"] == student_config["language_model"]["vocab_size"]
    if not same or weights.read_tokenizer(uri).get_vocab() != weights.read_tokenizer(model).get_vocab():
        raise Refused(
            f"inputs.teacher: {uri} has another vocabulary than the model; use a teacher that starts from the same base"
        )
    _check_teacher_tower(job, config["preprocessing"], student_config["preprocessing"])
    teacher = teacher.model_copy(update={key: getattr(layout, key) for key in ("template", "newlines", "system")})
    tokens = job.block.max_tokens + tables.most_views * (teacher.view_length - layout.view_length)
    positions = max_positions(config["language_model"])
    if tokens > positions:
        raise Refused(f"{job.kind}.max_tokens: the teacher reads up to {tokens} tokens and has {positions} positions; lower it")
    return teacher


def _check_teacher_tower(job: Job, teacher: str, student: str) -> None:
    """Refuse a teacher that does not see the images as they are read: its preprocessing against that of features or student."""
    if job.inputs.features is not None:
        check_tower(FeatureStore(job.resolved_inputs.features or ""), teacher)
    elif teacher != student:
        raise Refused(f"inputs.teacher: expected the model's tower {student[:12]}, which both see through, got {teacher[:12]}")


def _check_frames(job: Job, block: VideoSft, layout: Layout, config: dict[str, Any], tables: SampleTables) -> None:
    if CHAT_TEMPLATES[layout.template].drops_questions:
        raise Refused(
            f"video_sft.text.template: {layout.template} starts with the answer, which no cache can predict; use another template"
        )
    store = check_frames(job, config, layout.tokens, tables)
    frames = min(store.most_frames, block.max_frames)
    if frames * layout.tokens >= block.max_tokens:  # the cache may have longer videos than the samples
        cached = (sample_id for sample_id in media_sample_ids(tables) if sample_id in store)
        frames = max((min(store.frames(sample_id), block.max_frames) for sample_id in cached), default=0)
    if frames * layout.tokens >= block.max_tokens:
        limit = (block.max_tokens - 1) // layout.tokens
        raise Refused(
            f"video_sft.max_frames: a sample has {frames} frames of {layout.tokens} tokens, which leaves no room for text in "
            f"max_tokens {block.max_tokens}; set max_frames below {limit}, and frames are dropped evenly"
        )
