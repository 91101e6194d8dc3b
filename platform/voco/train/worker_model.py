"""What a worker trains: the model of a job with the right weights free, its teacher, and its data."""

from __future__ import annotations

from typing import Any

import torch

from voco.job.config import ImageSft, Training, VideoSft, lora_of
from voco.job.spec import STAGES
from voco.model import adapter, weights
from voco.model.voco_llama import Distillation, VocoLlama
from voco.precompute.feature_store import FeatureStore
from voco.precompute.frame_store import FrameStore
from voco.sequence.sequence import Layout
from voco.store.row_group_cache import LIMIT_BYTES
from voco.store.samples import SampleTables
from voco.train.batches import ImageBatches
from voco.train.live_images import LiveImages
from voco.train.sampler import live_groups
from voco.train.teacher import load_teacher
from voco.train.validation import Validation
from voco.train.video_batches import VideoBatches
from voco.train.weight_placement import node_copy
from voco.train.zero import gather_sharded

FEATURE_BYTES = 8 << 30  # of all workers together: features that are kept for further conversations about the same images


def load_model(
    config: dict[str, Any],
    block: Training,
    device: torch.device | str = "cpu",
    make_parameter: weights.MakeParameter | None = None,
) -> VocoLlama:
    """The model to start from in training's number type, with gradients for the weights that this kind of job trains.

    Its tower, which is read only where images are not read as features, is detached from it. `make_parameter` says what this
    worker keeps of each weight; default: all of it.

    Weights are read in training's number type at once. Under bf16 that changes nothing: DeepSpeed 0.19.8 converts a module that
    it gets in fp32 to bf16 first, and makes the fp32 master weights from that (`_configure_distributed_model`, then
    `single_partition_of_fp32_groups` and stage 3's `_create_fp32_partitions`).
    """
    layout = Layout(**config["layout"])
    dtype = training_dtype(block)
    with node_copy(config["model"]) as folder:
        model = weights.load_checkpoint(
            config["model"], layout, dtype, block.attention, device, config["seed"],
            with_tower=is_live(config), folder=folder, make_parameter=make_parameter,
        )  # fmt: skip
    if is_live(config):
        model.detach_tower()
    model.tower = None  # DeepSpeed takes all that is left, and features or frames' caches are precomputed
    prefixes = tuple(f"{layout.method}." if prefix == "method." else prefix for prefix in STAGES[config["kind"]].trains)
    compression = config.get("compression") or {}
    if "projector." in prefixes and (layout.rule.uncompressed or compression.get("uncompressed_share")):
        prefixes += ("image_newline",)  # LLaVA-1.6's, which only an uncompressed image has
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith(prefixes))
    if (lora := lora_of(block)) is not None:
        learns_voco = "projector." in prefixes and layout.voco_tokens() > 0  # a video's <voco> are in its caches
        adapter.attach(model, lora, config["seed"], learns_voco, gather_sharded)
        for weight in model.parameters():  # what DeepSpeed does to all weights unless some are sharded already
            weight.data = weight.data.to(dtype)
    if block.checkpoint_activations:
        model.language_model.train()  # transformers recomputes in training mode only; there is no dropout to switch on
        model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def training_dtype(block: Training) -> torch.dtype:
    """The number type of the weights that the forward pass reads."""
    return torch.bfloat16 if block.precision == "bf16" else torch.float32


def is_live(config: dict[str, Any]) -> bool:
    """Whether the frozen tower runs in each step: the job reads neither features nor frame caches."""
    return not config["features"] and not config["frame_cache"]


def live_images(config: dict[str, Any], block: Training, model: VocoLlama, device: torch.device) -> LiveImages:
    """Pixels for the model's detached tower, which is moved to its device: in bf16 on a GPU that trains so, else in fp32."""
    assert model.detached_tower is not None
    tower = model.detached_tower.tower
    in_bf16 = device.type == "cuda" and block.precision == "bf16"
    tower.to(device, torch.bfloat16 if in_bf16 else torch.float32)
    return LiveImages(lambda image: tower.tiles(image)[0], config["threads"])


def open_images(
    config: dict[str, Any], block: Training, model: VocoLlama, device: torch.device, limit: int
) -> FeatureStore | LiveImages:
    """What reads images: their features, of which `limit` bytes are kept, or their pixels."""
    return live_images(config, block, model, device) if is_live(config) else FeatureStore(config["features"], limit)


def open_validation(
    config: dict[str, Any], block: Training, model: VocoLlama, engine: Any, rank: int, world: int
) -> Validation | None:
    """The job's held-out rows on one of `world` workers; None without `validate`. Their readers are not those of training, which
    a thread uses at the same time.
    """
    if block.validation is None:
        return None
    complete_rows = block.model_copy(update={"share_vision": True})
    tables = SampleTables([config["val"]])
    data: ImageBatches | VideoBatches
    if isinstance(complete_rows, VideoSft):
        data = VideoBatches(tables, FrameStore(config["frame_cache"]), model, complete_rows)
    else:
        data = ImageBatches(tables, open_images(config, block, model, engine.device, LIMIT_BYTES), model, complete_rows)
    return Validation(data, model, block, rank, world)


def open_data(config: dict[str, Any], block: Training, model: VocoLlama, engine: Any, world: int) -> ImageBatches | VideoBatches:
    """The job's samples as batches of one of `world` workers; with distillation the model also gets its teacher."""
    tables = SampleTables([item["uri"] for item in config["samples"]], block.share_vision)
    groups = live_groups(block.global_batch, world)
    if isinstance(block, VideoSft):
        return VideoBatches(tables, FrameStore(config["frame_cache"]), model, block, groups)
    teacher = Layout(**config["teacher"]["layout"]) if config["teacher"] is not None else None
    limit = LIMIT_BYTES if block.share_vision else max(LIMIT_BYTES, FEATURE_BYTES // world)
    features = open_images(config, block, model, engine.device, limit)
    data = ImageBatches(tables, features, model, block, teacher, groups)
    if isinstance(block, ImageSft) and block.distill is not None:
        taught: tuple[Any, ...] = ()  # by itself
        if teacher is not None and config["teacher"]["uri"]:
            dtype = training_dtype(block)
            taught = load_teacher(config["teacher"]["uri"], teacher, block, dtype, engine.device, engine.config)
        model.distillation = Distillation(block.distill.weight, block.distill.temperature, *taught)
    return data
