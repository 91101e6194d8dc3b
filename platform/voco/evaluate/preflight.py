"""Checks in the driver, before any work, that an evaluate job can use its checkpoint, rows, caches and bounds; else Refused."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from voco.errors import Refused
from voco.evaluate.adaptive import AdaptiveReading, choose_threshold, held_out_margins, mean_cost
from voco.evaluate.metrics import get_metric
from voco.evaluate.scores import join_correct, read_answers
from voco.job.benchmarks import default_metric
from voco.job.chat_templates import CHAT_TEMPLATES
from voco.job.evaluation import Evaluate
from voco.job.spec import Job
from voco.methods import fastv
from voco.model import weights
from voco.model.checkpoint_layout import own_compressor
from voco.model.rope import max_positions
from voco.precompute.frame_store import FrameStore
from voco.precompute.preflight import check_frames, check_images
from voco.run.logs import get_logger
from voco.sequence.sequence import Layout
from voco.store.samples import SampleTables

log = get_logger(__name__)


def check_evaluation(job: Job) -> list[int]:
    """Refuse a checkpoint that cannot be read as the job says, and unsuitable inputs. Returns the `n` of the answers."""
    block: Evaluate = job.block
    get_metric(block.metric or default_metric(block.benchmark))  # a package's may be broken
    checkpoint = job.resolved_inputs.checkpoint or ""
    config = weights.read_config(checkpoint)
    try:
        counts = answer_token_counts(reading_layout(config, block), block)
    except ValueError as error:
        raise Refused(f"evaluate.{error}") from error
    tables = SampleTables(job.resolved_inputs.sample_uris)
    if job.inputs.frame_cache is None:
        if own_compressor(checkpoint):
            key = "inputs.frame_cache" if job.inputs.features is None else "inputs.features"
            raise Refused(
                f"{key}: this checkpoint reads the caches of a frozen compressor: make a frame_cache of the samples "
                "with it (an image is one frame) and give that as inputs.frame_cache"
            )
        check_images(job, config, tables)
    else:
        store = check_frames(job, config, config["layout"]["tokens"], tables)
        check_length(config, block, store)
        if store.rejected:
            log.warning("%s: %d samples have no frame cache and are left out", job.name, len(store.rejected))
    check_rows(tables)
    return counts


def reading_layout(config: dict[str, Any], block: Evaluate) -> Layout:
    """The layout that reads the checkpoint of this configuration: its own; under `read_as: voco` the voco mask and positions on a
    `none` checkpoint, the paper's lower bound; under `read_as: none` the plain mask on a `voco` checkpoint. Raises ValueError for
    what this checkpoint cannot do.
    """
    layout, layers = Layout(**config["layout"]), config["language_model"]["num_hidden_layers"]
    if CHAT_TEMPLATES[layout.template].drops_questions:
        captions = f"this checkpoint was trained on captions (text.template: {layout.template})"
        raise ValueError(f"benchmark: {captions} and reads no question")
    if block.read_as == "none" and not layout.rule.views_apart:
        raise ValueError(f"read_as: none reads a checkpoint of method voco without compression, got {layout.method}")
    if block.read_as in ("voco", "fastv") and not layout.rule.uncompressed:
        raise ValueError(f"read_as: {block.read_as} reads a checkpoint of method none, got {layout.method}")
    if block.read_as == "voco" and layout.tokens < 1:
        raise ValueError("read_as: voco reads through <voco> tokens, and this checkpoint was made with none (compression.tokens)")
    if block.tokens is not None and not layout.rule.views_apart:
        raise ValueError(f"tokens: only <voco> can be read in part: expected a checkpoint of method voco, got {layout.method}")
    if (most := max(block.fixed_tokens, default=0)) > layout.tokens:
        raise ValueError(f"tokens: expected at most the checkpoint's {layout.tokens}, got {most}")
    if block.fastv is not None and layout.anyres is not None:
        raise ValueError("fastv: not for a checkpoint that cuts images into tiles (LLaVA-1.6)")
    if block.fastv is not None and block.fastv.layer >= layers:
        raise ValueError(f"fastv.layer: expected fewer than the model's {layers} layers, got {block.fastv.layer}")
    if block.fastv is not None and fastv.kept_tokens(layout.vision_slots, block.fastv.keep) < 1:
        raise ValueError(f"fastv.keep: expected a share that leaves one of {layout.vision_slots} vision tokens")
    return layout.model_copy(update={"method": block.read_as}) if block.read_as in ("voco", "none") else layout


def answer_token_counts(layout: Layout, block: Evaluate) -> list[int]:
    """The `n` of the answers: under FastV the vision tokens of a view that stay, else each N of the block, or the layout's.

    Of adaptive answers it is the layout's, that of the compression.
    """
    if block.fastv is not None:
        return [fastv.kept_tokens(layout.vision_slots, block.fastv.keep)]
    return block.fixed_tokens or [layout.tokens]


def check_length(config: dict[str, Any], block: Evaluate, store: FrameStore) -> None:
    """Refuse videos whose frames leave no position for a question, which workers would notice only in mid-job."""
    layout, positions = Layout(**config["layout"]), max_positions(config["language_model"])
    frames = min(store.most_frames, block.max_frames)
    limit = (positions - layout.cached_from - block.max_new_tokens - 1) // max(answer_token_counts(layout, block))
    if frames > limit:
        raise Refused(
            f"evaluate.max_frames: a video has {frames} frames, and {positions} positions have room for {max(0, limit)} with "
            f"{block.max_new_tokens} new tokens and no question; set it lower, and frames are dropped evenly"
        )


def check_rows(tables: SampleTables) -> None:
    """Refuse a table whose first row is not an evaluation row."""
    for sample_id, asks in tables.first_rows():
        _check_question(sample_id, asks)


def check_conversation(sample_id: str, conversation: dict[str, Any]) -> None:
    """Refuse a conversation that asks nothing. References may be missing: some sets do not publish them."""
    _check_question(sample_id, conversation["turns"][-1]["role"] == "user")


def _check_question(sample_id: str, asks: bool) -> None:
    if not asks:
        raise Refused(f"{sample_id}: not an evaluation row: it must end on a user turn (ingest it as split test)")


def read_bounds(job: Job) -> tuple[pa.Table | None, pa.Table | None]:
    """The answers of the upper and the lower bound, or None twice. Refuse bounds at several N, or on different questions."""
    if job.inputs.upper is None or job.inputs.lower is None:
        return None, None
    bounds = {"upper": read_answers(job.inputs.upper), "lower": read_answers(job.inputs.lower)}
    for name, table in bounds.items():
        counts = sorted(pc.unique(table["n"]).to_pylist())
        if len(counts) != 1:
            raise Refused(f"inputs.{name}: expected answers at one N, got {len(counts)}: {', '.join(map(str, counts))}")
    join_correct(bounds)
    return bounds["upper"], bounds["lower"]


def read_calibration(job: Job) -> AdaptiveReading | None:
    """How far questions are read under `tokens: auto`; else None.

    Refuses held-out answers of another checkpoint, those to questions that are scored too, and a budget below the smallest N.
    """
    block: Evaluate = job.block
    if not block.is_adaptive or job.inputs.calibration is None:
        return None
    answers = read_answers(job.inputs.calibration)
    checkpoints = answers["checkpoint"].unique().to_pylist()
    if checkpoints != [job.resolved_inputs.checkpoint]:
        other = ", ".join(map(str, checkpoints))
        raise Refused(f"inputs.calibration: expected answers of {job.resolved_inputs.checkpoint}, got those of {other}")
    scored = {row["sample_id"] for row in SampleTables(job.resolved_inputs.sample_uris).rows(["sample_id"])}
    if shared := scored & set(answers["sample_id"].to_pylist()):
        raise Refused(f"inputs.calibration: {len(shared)} of its samples are scored by this job too; expected held-out ones")
    sizes, margins = held_out_margins(answers)
    try:
        threshold = choose_threshold(margins, sizes, block.budget or 0.0)
    except ValueError as error:
        raise Refused(f"evaluate.budget: {error}") from error
    cost = mean_cost(margins, sizes, threshold)
    listed = ", ".join(map(str, sizes))
    log.info("%s: N = %s, threshold %.3f: held out, %.2f tokens on average", job.name, listed, threshold, cost)
    return AdaptiveReading(sizes, threshold)
