"""What a worker trains: the model of a job with the right weights free, its teacher, and its data."""

from __future__ import annotations

from typing import Any

import torch

from voco.job.config import ImageSft, Training, VideoSft
from voco.job.spec import STAGES
from voco.model import weights
from voco.model.voco_llama import Distillation, VocoLlama
from voco.precompute.feature_store import FeatureStore
from voco.precompute.frame_store import FrameStore
from voco.sequence.sequence import Layout
from voco.store.row_group_cache import LIMIT_BYTES
from voco.store.samples import SampleTables
from voco.train.batches import ImageBatches
from voco.train.live_images import LiveImages
from voco.train.sampler import live_groups
from voco.train.video_batches import VideoBatches

FEATURE_BYTES = 8 << 30  # of all workers together: features that are kept for further conversations about the same images


def load_model(config: dict[str, Any], block: Training) -> VocoLlama:
    """The model to start from, with gradients for the weights that this kind of job trains, and without its tower, which is
    detached from it where images are not read as features.
    """
    layout = Layout(**config["layout"])
    model = weights.load_checkpoint(config["model"], layout, torch.float32, block.attention, method_seed=config["seed"])
    if is_live(config):
        model.detach_tower()
    model.tower = None  # DeepSpeed takes all that is left, and features or frames' caches are precomputed
    prefixes = tuple(f"{layout.method}." if prefix == "method." else prefix for prefix in STAGES[config["kind"]].trains)
    if "projector." in prefixes and layout.rule.uncompressed:
        prefixes += ("image_newline",)  # LLaVA-1.6's, which only an uncompressed image has
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith(prefixes))
    if block.checkpoint_activations:
        model.language_model.train()  # transformers recomputes in training mode only; there is no dropout to switch on
        model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    return model


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


def open_data(config: dict[str, Any], block: Training, model: VocoLlama, engine: Any, world: int) -> ImageBatches | VideoBatches:
    """The job's samples as batches of one of `world` workers; with distillation the model also gets its teacher."""
    tables = SampleTables([item["uri"] for item in config["samples"]], block.share_vision)
    groups = live_groups(block.global_batch, world)
    if isinstance(block, VideoSft):
        return VideoBatches(tables, FrameStore(config["frame_cache"]), model, block, groups)
    teacher = Layout(**config["teacher"]["layout"]) if config["teacher"] is not None else None
    features: FeatureStore | LiveImages
    if is_live(config):
        features = live_images(config, block, model, engine.device)
    else:
        limit = LIMIT_BYTES if block.share_vision else max(LIMIT_BYTES, FEATURE_BYTES // world)
        features = FeatureStore(config["features"], limit)
    data = ImageBatches(tables, features, model, block, teacher, groups)
    if isinstance(block, ImageSft) and block.distill is not None:
        distill = block.distill
        model.distillation = Distillation(distill.weight, distill.temperature, _load_teacher(config, block, engine))
    return data


def _load_teacher(config: dict[str, Any], block: Training, engine: Any) -> VocoLlama | None:
    """The frozen teacher, unsharded on every rank and in training's number type; None: the trained network itself."""
    if not config["teacher"]["uri"]:
        return None
    dtype = torch.bfloat16 if block.precision == "bf16" else torch.float32
    teacher = weights.load_checkpoint(config["teacher"]["uri"], Layout(**config["teacher"]["layout"]), dtype, block.attention)
    teacher.tower = None
    return teacher.requires_grad_(False).to(engine.device)
