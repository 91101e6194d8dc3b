"""The memory of a training worker in `voco plan`: ZeRO's shares, activations and buffers, and what loading takes for a while."""

from __future__ import annotations

import math

from voco.commands.shapes import ModelShape
from voco.job.config import Training
from voco.job.resources import Resources
from voco.train.zero_sizes import SUB_GROUP, bucket_elements, live_parameters, sums_in_fp32

ACTIVATION_BYTES = 34  # of a token, as a multiple of the layer's width in bf16: Korthikanti et al., arXiv 2205.05198, eq. 2
CHECKPOINT_BYTES = 12.0  # of a trained weight in a training's checkpoint: its fp32 value and Adam's two moments
COPY_TO_SAVE = "copy that is saved"  # in host memory


def zero_parts(block: Training, workers: int, gpu: bool) -> list[tuple[int, int]]:
    """Bytes of a parameter, and over how many ranks ZeRO spreads them: as weight, as gradient and in Adam's state.

    bf16: 2 + 2 bytes and 12 of fp32 master weights and moments, and 4 for gradients that GPUs add up in fp32; fp32: 4 + 4 and 8
    of moments.
    """
    samples = block.global_batch / workers
    sums = 4 if gpu and sums_in_fp32(block, math.ceil(samples / (block.micro_batch or samples))) else 2
    sizes = (2, sums, 12) if block.precision == "bf16" else (4, 4, 8)
    return [(size, workers if block.zero_stage >= least else 1) for size, least in zip(sizes, (3, 2, 1), strict=True)]


def pass_samples(block: Training, tokens_each: float, workers: int) -> float:
    """Samples of one forward pass: `micro_batch`, or as many as fit into `micro_tokens`, at most those of a worker in a step."""
    if block.micro_tokens is None:
        return float(block.micro_batch or 0)
    return min(block.micro_tokens / max(1.0, tokens_each), block.global_batch / workers)


def worker_memory(
    model: ModelShape, block: Training, resources: Resources, trained: int, tokens: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes of one worker by part, of its GPU and of host memory: ZeRO's shares, the activations of `tokens`, those of one
    micro-batch, and on GPUs ZeRO's buffers. With `offload` parts are in host memory, and gradients too where ZeRO splits them.
    """
    workers = resources.most_workers
    parts = zero_parts(block, workers, resources.gpus_per_worker > 0)
    (weights, weight_ranks), (gradients, gradient_ranks), (adam, adam_ranks) = parts
    config = model.config
    layer = tokens * config.hidden_size * ACTIVATION_BYTES * (weights / 2)
    kept = tokens * config.hidden_size * weights * config.num_hidden_layers + layer
    activations = kept if block.checkpoint_activations else layer * config.num_hidden_layers
    gpu = {
        "weights": (model.parameters + model.projector_parameters) * weights / weight_ranks,
        "gradients": trained * gradients / gradient_ranks,
        "Adam": trained * adam / adam_ranks,
        "activations": activations,
    }
    if resources.gpus_per_worker:
        gpu["ZeRO's buffers"] = _buffer_bytes(model, block, workers, trained, activations)
    saved = {COPY_TO_SAVE: CHECKPOINT_BYTES * trained / workers}
    if block.offload == "none":
        return gpu, saved
    away = ["Adam", *(["gradients"] if block.zero_stage >= 2 else []), *(["weights"] if block.offload == "parameters" else [])]
    host = saved | {f"{name}, from the GPU": gpu.pop(name) for name in away}
    host["gradients of the update, fp32"] = 4.0 * trained / adam_ranks
    return gpu, host


def _buffer_bytes(model: ModelShape, block: Training, workers: int, trained: int, activations: float) -> float:
    """Buckets of gradients, gathered weights, and what the update's fp32 gradients need beyond the activations' place, which is
    free by then: those of a rank under ZeRO-1 and 2, of a sub-group under ZeRO-3, and none on the GPU with `offload`.
    """
    number = 2 if block.precision == "bf16" else 4
    split = block.zero_stage == 3
    buckets = number * bucket_elements(model.config.hidden_size) * (1 if split or workers == 1 else 2)
    gathered = number * min(live_parameters(block), model.parameters) if split else 0
    updated = 4 * min(SUB_GROUP if split else trained, trained / workers) if block.offload == "none" else 0
    return buckets + gathered + max(0.0, updated - activations)


def loading_memory(model: ModelShape, block: Training, resources: Resources, trained: int) -> float:
    """Bytes of host memory that one worker needs for a while, beside what it keeps, until its engine is ready.

    Weights are read one by one (the largest is the embedding), under ZeRO-3 a rank's slice of each; then DeepSpeed copies the
    shard into one buffer by way of host memory, or, on CPUs under ZeRO-1 and 2, all trained weights.
    """
    (number, ranks), *_ = zero_parts(block, resources.most_workers, resources.gpus_per_worker > 0)
    largest = float(number * model.config.vocab_size * model.config.hidden_size) / ranks
    copied = number * trained / ranks if block.zero_stage == 3 or not resources.gpus_per_worker else 0.0
    return largest + copied


def teacher_memory(model: ModelShape, block: Training, resources: Resources) -> float:
    """Bytes of another checkpoint's weights as the teacher, of the model's own size: complete on every worker, or under ZeRO-3 a
    shard of it and its complete output head.
    """
    number = 2.0 if block.precision == "bf16" else 4.0
    if block.zero_stage < 3:
        return number * model.parameters
    head = float(model.config.vocab_size * model.config.hidden_size)
    return number * (model.parameters / resources.most_workers + head * (1 - 1 / resources.most_workers))
