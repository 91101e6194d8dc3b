"""What a stage reads, writes, computes and keeps in memory: arithmetic on the shapes of its model and the volume of its data.

Everything here is a count, but for hours, which come from the assumed rates of `rates.py`. tests/commands/test_costs.py
compares the bytes with what real stages wrote.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from voco.commands.rates import Rates
from voco.commands.shapes import ModelShape, TowerShape, adapter_parameters
from voco.commands.training_memory import CHECKPOINT_BYTES, loading_memory, pass_samples, teacher_memory, worker_memory
from voco.job.config import FrameCache, ImageSft, Training, VideoSft, lora_of
from voco.job.evaluation import Evaluate
from voco.job.resources import Resources
from voco.job.tables import METHODS
from voco.model.flops import cache_bytes, compress_flops, layer_flops, read_flops
from voco.store.number_types import FRAME_GROUP_BYTES

TEXT_BYTES_PER_TOKEN = 4  # of English under a large vocabulary
TEXT_TOKENS = 171  # of a conversation, where nothing says how long they are
CLIP_SECONDS = 18.0  # of a video, where nothing says how long it is
TRAINED_TEXT = 0.5  # share of the text that is answers, whose logits the loss reads

# What the tables of Parquet take beside media and tensors, in bytes
SAMPLE_BYTES, TEXT_SHARE = 64, 0.3  # of a sample: ids and hashes; and of its text, compressed
FEATURE_BYTES = 150  # of an image's row, with its share of the file's footer and the index
# Of frame caches: a row; a row group, its columns (of scales, where there are any) and its row of the index; a file; the index
FRAME_BYTES, FRAME_GROUP, SCALE_COLUMNS, FRAME_FILE, FRAME_INDEX = 57, 455, 175, 2200, 3000


@dataclass(frozen=True)
class Volume:
    """The data of one or more `samples/` tables."""

    conversations: float = 0
    media: float = 0  # images or videos
    media_bytes: float = 0
    text_tokens: float = 0  # of all conversations together
    seconds: float = 0  # of all videos together; images have none
    videos: float = 0
    samples: float = 0  # rows: each of some media, or a conversation without any; 0: as many as media

    def __add__(self, other: Volume) -> Volume:
        return Volume(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def times(self, weight: float) -> Volume:
        return Volume(*(weight * getattr(self, name) for name in self.__dataclass_fields__))

    def frames(self, block: FrameCache) -> float:
        """Frames that a frame_cache job makes of these media; an image is one."""
        if not self.videos:
            return self.media
        each = block.frames if block.frames is not None else (block.fps or 1.0) * self.seconds / self.videos
        return self.media - self.videos + self.videos * max(1.0, min(each, block.max_frames))

    def batch_items(self, block: Training) -> float:
        """What a training job's batches count: rows, or conversations where vision is not shared."""
        return (self.samples or self.media) if block.share_vision else self.conversations

    @property
    def tokens_each(self) -> float:
        """Text tokens of one conversation."""
        return self.text_tokens / max(1.0, self.conversations)


@dataclass(frozen=True)
class Estimate:
    """One stage. Memory is of one worker, in bytes by part; hours are of all workers together, by what takes them."""

    read: float = 0.0
    written: float = 0.0
    steps: int = 0
    tokens: float = 0.0  # of one step
    flops: float = 0.0  # of one step, or of the complete stage where there are no steps
    gpu: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    hours: dict[str, float] = field(default_factory=dict)

    @property
    def duration(self) -> float:
        """Hours: reading, decoding and computing overlap, so the slowest of them."""
        return max(self.hours.values(), default=0.0)

    @property
    def bottleneck(self) -> str:
        return max(self.hours, key=lambda name: self.hours[name]) if self.duration else "-"


def ingest(volume: Volume, source_bytes: float, full: bool, resources: Resources, rates: Rates) -> Estimate:
    """Source files to samples/."""
    written = samples_bytes(volume)
    speed = rates.images_s if full else rates.headers_s
    return Estimate(
        read=source_bytes,
        written=written,
        host={"row group and read-ahead": 64 << 20},
        hours=_hours(resources, rates, source_bytes + written, decode_s=volume.media / speed),
    )


def samples_bytes(volume: Volume) -> float:
    """Bytes of samples/."""
    return volume.media_bytes + SAMPLE_BYTES * volume.media + TEXT_SHARE * TEXT_BYTES_PER_TOKEN * volume.text_tokens


def features(volume: Volume, tower: TowerShape, resources: Resources, rates: Rates) -> Estimate:
    """Images to features/."""
    written = features_bytes(volume, tower)
    flops = volume.media * tower.flops
    return Estimate(
        read=volume.media_bytes,
        written=written,
        flops=flops,
        gpu={"tower": 4.0 * tower.parameters},
        hours=_hours(resources, rates, volume.media_bytes + written, volume.media / rates.images_s, flops),
    )


def features_bytes(volume: Volume, tower: TowerShape) -> float:
    """Bytes of features/: (V, C) fp16 of each image."""
    return volume.media * (2.0 * tower.slots * tower.width + FEATURE_BYTES)


def training(
    volumes: Sequence[tuple[Volume, float]],
    model: ModelShape,
    block: Training,
    resources: Resources,
    rates: Rates,
    aligns: bool,
    stored_features: bool,
    has_teacher: bool = False,
) -> Estimate:
    """align and image_sft over tables with their weights; images as stored features or through the live tower.

    `has_teacher`: distillation from another checkpoint, of the model's own size.
    """
    volume = _weighted(volumes)
    samples = volume.batch_items(block)
    steps = math.ceil(samples / block.global_batch) * block.epochs if samples else 0
    share = block.global_batch / samples if samples else 0.0  # of the volume that one step reads
    views, conversations, text = (share * number for number in (volume.media, volume.conversations, volume.text_tokens))
    if not block.share_vision and volume.media:
        views = max(views, conversations)  # each conversation is read with its image
    tokens = views * model.view_tokens + text
    forward = views * _view_flops(model) + conversations * _text_flops(model, text / max(1.0, conversations))
    if isinstance(block, ImageSft) and block.distill is not None:
        forward *= 4 / 3  # the teacher's forward pass, of a step's three
    # frozen weights have no gradient, which is a third of a step; an adapter's operations are few
    passes = (2 if aligns or lora_of(block) else 3) + block.checkpoint_activations
    tower = 0.0 if stored_features else views * model.tower.flops
    flops = passes * forward + tower
    trained = model.projector_parameters + (0 if aligns else trained_parameters(model, block))
    vision = features_bytes(volume, model.tower) if stored_features else volume.media_bytes
    text_bytes = TEXT_SHARE * TEXT_BYTES_PER_TOKEN * volume.text_tokens + SAMPLE_BYTES * volume.media
    read = block.epochs * (vision + text_bytes)
    written = _saved_bytes(model, block, trained, steps)
    decode = 0.0 if stored_features else steps * views / rates.images_s
    tokens_each = tokens / block.global_batch
    pass_tokens = pass_samples(block, tokens_each, resources.most_workers) * tokens_each
    gpu, host = worker_memory(model, block, resources, trained, pass_tokens)
    if not stored_features:
        gpu["tower"] = (2.0 if block.precision == "bf16" else 4.0) * model.tower.parameters
    if has_teacher:
        gpu["teacher"] = teacher_memory(model, block, resources)
    return Estimate(
        read=read,
        written=written,
        steps=steps,
        tokens=tokens,
        flops=flops,
        gpu=gpu,
        host={
            **host,
            "weights while they load": loading_memory(model, block, resources, trained),
            "two batches ahead": 3.0 * share * vision / resources.most_workers,
        },
        hours=_hours(resources, rates, read + written, decode, flops * steps, block.precision == "bf16"),
    )


def video_training(
    volumes: Sequence[tuple[Volume, float]],
    model: ModelShape,
    block: VideoSft,
    cache: FrameCache,
    resources: Resources,
    rates: Rates,
) -> Estimate:
    """video_sft: text against cached frames."""
    volume = _weighted(volumes)
    frames = min(volume.frames(cache), block.max_frames * max(1.0, volume.media))
    samples = volume.batch_items(block)
    steps = math.ceil(samples / block.global_batch) * block.epochs if samples else 0
    share = block.global_batch / samples if samples else 0.0
    conversations, text = share * volume.conversations, share * volume.text_tokens
    cached = frames / max(1.0, volume.media) * model.tokens
    passes = (2 if block.lora else 3) + block.checkpoint_activations
    flops = passes * conversations * _text_flops(model, volume.tokens_each, cached)
    read = block.epochs * frames * model.frame_bytes(cache.dtype)
    trained = trained_parameters(model, block)
    written = _saved_bytes(model, block, trained, steps)
    text_each = text / block.global_batch
    items = pass_samples(block, text_each + cached, resources.most_workers)
    memory, host = worker_memory(model, block, resources, trained, items * text_each)
    memory["cached frames"] = float(cache_bytes(model.config, round(cached * items), model.bytes_per_number))
    return Estimate(
        read=read,
        written=written,
        steps=steps,
        tokens=text,
        flops=flops,
        gpu=memory,
        host={**host, "weights while they load": loading_memory(model, block, resources, trained)},
        hours=_hours(resources, rates, read + written, 0.0, flops * steps, block.precision == "bf16"),
    )


def frame_cache(
    volume: Volume, model: ModelShape, block: FrameCache, resources: Resources, rates: Rates, stored_features: bool = False
) -> Estimate:
    """Every frame compressed alone."""
    frames = volume.frames(block)
    numbers = model.frame_bytes(block.dtype)
    groups = max(volume.media, frames * numbers / FRAME_GROUP_BYTES)
    group_bytes = FRAME_GROUP + (SCALE_COLUMNS if block.dtype in ("int8", "fp8") else 0)
    files = math.ceil(volume.media / block.unit_samples)
    written = frames * (numbers + FRAME_BYTES) + groups * group_bytes + files * FRAME_FILE + FRAME_INDEX
    images = volume.media - volume.videos
    read = volume.media_bytes
    flops = frames * (_view_flops(model) + model.tower.flops) - (images * model.tower.flops if stored_features else 0.0)
    decode = (frames - images) / rates.frames_s + (0.0 if stored_features else images / rates.images_s)
    return Estimate(
        read=read,
        written=written,
        flops=flops,
        gpu=_reading_memory(model, tower=True),
        hours=_hours(resources, rates, read + written, decode, flops, model.bytes_per_number == 2),
    )


def evaluation(
    volume: Volume,
    model: ModelShape,
    block: Evaluate,
    resources: Resources,
    rates: Rates,
    cache: FrameCache | None = None,
    stored_features: bool = False,
) -> Estimate:
    """Each medium compressed once or read from caches, every question answered at each N."""
    counts = 2 if block.is_adaptive else max(1, len(block.fixed_tokens))  # adaptive: about a second reading of each
    views = volume.media
    seen = model.seen_tokens
    if cache is not None:
        read, decode, compressing = volume.frames(cache) * model.frame_bytes(cache.dtype), 0.0, 0.0
        seen = round(volume.frames(cache) / max(1.0, volume.media) * model.tokens)
    else:
        read = features_bytes(volume, model.tower) if stored_features else volume.media_bytes
        decode = 0.0 if stored_features else views / rates.images_s
        compressing = views * (_view_flops(model) + (0.0 if stored_features else model.tower.flops))
    prefill = volume.conversations * read_flops(model.config, seen, round(volume.tokens_each)) * counts
    new_tokens = volume.conversations * block.max_new_tokens * counts
    flops = compressing + prefill
    hours = _hours(resources, rates, read, decode, flops, model.bytes_per_number == 2)
    hours["generation"] = new_tokens / rates.decode_tokens_s / resources.most_workers / 3600
    return Estimate(
        read=read,
        written=volume.conversations * counts * 100.0,
        flops=flops,
        gpu=_reading_memory(model, tower=cache is None and not stored_features),
        hours=hours,
    )


def trained_parameters(model: ModelShape, block: Training) -> int:
    """Weights of the language model that learn: all of them, or an adapter and, with pixels, the row of <voco>."""
    lora = lora_of(block)
    if lora is None:
        return model.parameters
    learns_voco = not isinstance(block, VideoSft) and model.tokens > 0 and not METHODS[model.method].pooled
    return adapter_parameters(model.config, lora) + learns_voco * int(model.config.hidden_size)


def together(parts: Sequence[Estimate], at_a_time: int = 1) -> Estimate:
    """A sweep's trials, `at_a_time` of them in parallel; sizes of one step and memory are those of the largest."""
    largest = max(parts, key=lambda part: sum(part.gpu.values()), default=Estimate())
    slowest = max(parts, key=lambda part: part.duration, default=Estimate())
    return replace(
        largest,
        read=sum(part.read for part in parts),
        written=sum(part.written for part in parts),
        steps=sum(part.steps for part in parts),
        hours={slowest.bottleneck: sum(part.duration for part in parts) / at_a_time},
    )


def _weighted(volumes: Sequence[tuple[Volume, float]]) -> Volume:
    return sum((volume.times(weight) for volume, weight in volumes), Volume())


def _view_flops(model: ModelShape) -> float:
    """One view's prefix in the language model, forward, with the projector."""
    width = int(model.config.hidden_size)
    projected = 2.0 * model.tower.slots * (model.tower.width * width + width * width)
    if METHODS[model.method].views_apart:
        return projected + compress_flops(model.config, model.view_tokens - model.tokens, model.tokens)
    tokens = model.view_tokens
    return projected + float(model.config.num_hidden_layers * layer_flops(model.config, tokens, tokens * (tokens + 1) / 2))


def _text_flops(model: ModelShape, text: float, seen: float | None = None) -> float:
    """One conversation's text, forward, with the output head for its answers."""
    pairs = text * (model.seen_tokens if seen is None else seen) + text * (text + 1) / 2
    layers = model.config.num_hidden_layers * layer_flops(model.config, round(text), pairs)
    return float(layers + 2 * TRAINED_TEXT * text * model.config.hidden_size * model.config.vocab_size)


def _reading_memory(model: ModelShape, tower: bool) -> dict[str, float]:
    """Bytes of one worker that compresses or answers: the model as it is stored, and the tower in fp32 where it runs."""
    weights = {"weights": float(model.bytes_per_number * (model.parameters + model.projector_parameters))}
    return weights | ({"tower": 4.0 * model.tower.parameters} if tower else {})


def model_bytes(model: ModelShape, trained: int = 0, number: float = 0.0) -> float:
    """Bytes of a complete model's files; `trained` of its weights have `number` bytes, the tower is in fp32."""
    parameters = model.parameters + model.projector_parameters
    return number * trained + model.bytes_per_number * (parameters - trained) + 4.0 * model.tower.parameters


def _saved_bytes(model: ModelShape, block: Training, trained: int, steps: int) -> float:
    """Checkpoints on the way (fp32 weights and Adam's moments of what is trained), and the complete model at the end."""
    number = 2.0 if block.precision == "bf16" else 4.0
    adapted = 0 if lora_of(block) is None else trained_parameters(model, block)  # also written beside the merged weights
    saves = math.ceil(steps / block.save_every) if steps else 0
    return saves * CHECKPOINT_BYTES * trained + model_bytes(model, trained - adapted, number) + number * adapted


def _hours(
    resources: Resources, rates: Rates, storage: float, decode_s: float = 0.0, flops: float = 0.0, bf16: bool = True
) -> dict[str, float]:
    """Hours by part: storage bytes and operations spread over the workers; media, `decode_s` of one core, over their cores."""
    workers = resources.most_workers
    hours = {
        "storage": storage / (rates.storage_mb_s * 1e6) / workers / 3600,
        "media": decode_s / (workers * resources.cpus_per_worker) / 3600,
    }
    speed = rates.flops(resources, bf16)
    if speed:
        hours["compute"] = flops / speed / workers / 3600
    return hours
