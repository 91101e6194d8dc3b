"""The table of `voco plan`: bytes, operations, memory, hours and price of every stage, and which vision path is cheaper."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

from voco.commands import estimate
from voco.commands.estimate import Estimate, Volume
from voco.commands.rates import Rates
from voco.commands.saving import saving_lines
from voco.commands.shapes import ModelShape, TowerShape, checkpoint_model, new_model, tower_shape, unreachable
from voco.commands.validation_cost import validation_lines, with_validation
from voco.job.config import Features, FrameCache, Ingest, Training, VideoSft, lora_of
from voco.job.evaluation import Evaluate
from voco.job.resources import Resources
from voco.job.spec import OWN_CHECKPOINT, Job, Sweep
from voco.job.tables import FORMATS
from voco.job.trials import sweep_trials
from voco.report.table import bytes_text, flops_text
from voco.run.manifest import Manifest, read_manifest
from voco.store import storage

SMALL_SHARE = 0.02  # of the total hours: consecutive stages of a kind below it share a line
SIZES, EARLIER = "`expect: {rows, bytes}`", "an estimate of earlier stages"  # what a stage may need for an estimate


@dataclass
class _Outputs:
    """What earlier stages of the flow would write, by `@name`."""

    volumes: dict[str, Volume] = field(default_factory=dict)
    models: dict[str, ModelShape | None] = field(default_factory=dict)
    caches: dict[str, FrameCache] = field(default_factory=dict)


@dataclass(frozen=True)
class _Line:
    """A line of the table."""

    name: str
    kind: str
    resources: Resources
    estimate: Estimate
    unknown: str = ""  # what it needs for an estimate
    fewest: Estimate | None = None  # of elastic training, with the fewest of its workers
    other_vision: Estimate | None = None  # the same stage with the other way to see images, where it has both
    stored: bool = False  # it reads stored features
    images: dict[str, Volume] = field(default_factory=dict)  # that it sees, by the table that they are from
    tower: TowerShape | None = None


@storage.s3_patience(0)
def cost_lines(job: Job, rates: Rates) -> list[str]:
    """The table of a job's stages and its assumptions, a line each; a reason where a stage cannot be estimated."""
    lines = list(_stage_lines(job, rates))
    total = sum(line.estimate.duration for line in lines)
    if not any(line.estimate.duration for line in lines):
        return _missing(lines)
    rows = [_cells(line, rates) for line in _folded(lines, total)]
    rows += [_total_cells(lines, rates)] if len(lines) > 1 else []
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]  # 0: nothing to show
    widths = [max(width, len(title)) if width else 0 for width, title in zip(widths, _HEADER, strict=True)]
    table = ["  ".join(_aligned(row, widths)).rstrip() for row in (_HEADER, *rows)]
    estimates = {line.name: line.estimate for line in lines}
    notes = [*_range_lines(lines, rates), *validation_lines(job.stages, estimates, rates)]
    notes += saving_lines(job.stages, estimates, rates)
    return [*table, *notes, *_vision_lines(lines, rates), _assumptions(job, lines, rates)]


def _missing(lines: list[_Line]) -> list[str]:
    """What a job must say for its costs to be estimated."""
    needs = list(dict.fromkeys(line.unknown for line in lines if line.unknown))
    causes = [need for need in needs if need != EARLIER] or needs
    names = [", ".join(line.name for line in lines if line.unknown == need) for need in causes]
    missing = "; ".join(f"{name} {'need' if ',' in name else 'needs'} {need}" for name, need in zip(names, causes, strict=True))
    return [f"costs: not estimated: {missing}"] if missing else []


def stage_estimates(job: Job, rates: Rates) -> dict[str, Estimate]:
    """The estimate of every stage that has one, by name."""
    return {line.name: line.estimate for line in _stage_lines(job, rates) if not line.unknown}


_HEADER = ("stage", "read", "written", "steps", "tokens", "work", "GPU", "host", "time", "bound by", "price")


def _aligned(row: tuple[str, ...], widths: list[int]) -> Iterator[str]:
    for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
        if width:
            yield cell.ljust(width) if column in (0, 9) else cell.rjust(width)


def _stage_lines(job: Job, rates: Rates) -> Iterator[_Line]:
    outputs = _Outputs()
    for stage in job.stages:
        if not stage.stage.in_driver:
            yield _elastic_line(stage, outputs, rates)


def _elastic_line(job: Job, outputs: _Outputs, rates: Rates) -> _Line:
    """A stage at the most of its workers; elastic training with the memory at the fewest, whose shards are the largest."""
    line, resources = _stage_line(job, outputs, rates), job.resources
    line = replace(line, estimate=with_validation(job, line.estimate, rates))
    if not job.stage.trains or not resources.is_elastic or line.unknown:
        return line
    smaller = job.model_copy(update={"resources": resources.with_workers(resources.fewest_workers)})
    fewest = with_validation(smaller, _stage_line(smaller, outputs, rates).estimate, rates)
    return replace(line, estimate=replace(line.estimate, gpu=fewest.gpu, host=fewest.host), fewest=fewest)


def _stage_line(job: Job, outputs: _Outputs, rates: Rates) -> _Line:
    """The estimate of one stage; records what later stages read."""
    block, name = job.block, f"@{job.name}"
    line = _Line(job.name, job.kind, job.resources, Estimate())
    if isinstance(block, Ingest):
        volume = _ingest_volume(job)
        if volume is None:
            return replace(line, unknown=SIZES)
        outputs.volumes[name] = volume
        size = float(job.expect.bytes) if job.expect is not None else volume.media_bytes
        return replace(line, estimate=estimate.ingest(volume, size, block.check == "full", job.resources, rates))
    if isinstance(block, Sweep):
        return _sweep_line(job, outputs, rates, line)
    volumes = _volumes(job, outputs)
    if volumes is None:
        return replace(line, unknown=EARLIER if any(item.uri.startswith("@") for item in job.inputs.samples) else SIZES)
    total = sum((volume for volume, _ in volumes), Volume())
    if isinstance(block, Features):
        return replace(line, estimate=estimate.features(total, tower_shape(block.tower), job.resources, rates))
    model = _model(job, outputs)
    is_training = isinstance(block, Training) and "language_model." in job.stage.trains
    if model is not None and is_training and lora_of(block) is None:  # with an adapter the stored type stays
        bytes_per_number = 2 if block.precision == "bf16" else 4
        outputs.models[name] = replace(model, bytes_per_number=bytes_per_number)
    else:
        outputs.models[name] = model
    if model is None:
        existing = EARLIER if (job.inputs.checkpoint or "").startswith("@") else "a checkpoint that can be read here"
        return replace(line, unknown=existing if job.model is None else "`model.expect`, the shape of its language model")
    if isinstance(block, FrameCache):
        outputs.caches[name] = block
        stored = job.inputs.features is not None
        return replace(line, estimate=estimate.frame_cache(total, model, block, job.resources, rates, stored))
    cache = outputs.caches.get(job.inputs.frame_cache or "", _finished_cache(job))
    if isinstance(block, VideoSft):
        if cache is None:
            existing = EARLIER if (job.inputs.frame_cache or "").startswith("@") else "a frame cache that can be read here"
            return replace(line, unknown=existing)
        return replace(line, estimate=estimate.video_training(volumes, model, block, cache, job.resources, rates))
    stored = job.inputs.features is not None

    def seen(stored_features: bool) -> Estimate:
        if isinstance(block, Evaluate):
            return estimate.evaluation(total, model, block, job.resources, rates, cache, stored_features)
        training: Training = block
        aligns = "language_model." not in job.stage.trains
        taught = job.inputs.teacher is not None
        cost = estimate.training(volumes, model, training, job.resources, rates, aligns, stored_features, taught)
        first = 0.0 if job.model is None else estimate.model_bytes(model)  # a new model is written before it is trained
        return replace(cost, written=cost.written + first)

    if cache is not None:
        return replace(line, estimate=seen(stored))
    images = {item.uri: volume for item, (volume, _) in zip(job.inputs.samples, volumes, strict=True)}
    return replace(line, estimate=seen(stored), other_vision=seen(not stored), stored=stored, images=images, tower=model.tower)


def _sweep_line(job: Job, outputs: _Outputs, rates: Rates, line: _Line) -> _Line:
    sweep: Sweep = job.block
    parts: list[Estimate] = []
    others: list[Estimate] = []
    images: dict[str, Volume] = {}
    for trial in sweep_trials(job):
        trained = _stage_line(trial.train, outputs, rates)
        if trained.unknown:
            return replace(line, unknown=trained.unknown)
        model = outputs.models[f"@{trial.train.name}"]
        outputs.models |= dict.fromkeys((OWN_CHECKPOINT, trial.train.output, f"@{job.name}/runs/{trial.name}/train"), model)
        members = [trained, *(_stage_line(answers, outputs, rates) for answers in trial.evaluations)]
        if unknown := next((member.unknown for member in members if member.unknown), ""):
            return replace(line, unknown=unknown)
        parts += [member.estimate for member in members]
        images |= {uri: volume for member in members for uri, volume in member.images.items()}
        others += [member.other_vision or member.estimate for member in members]
    total, other = (estimate.together(estimates, sweep.concurrent) for estimates in (parts, others))
    resources = sweep.train.resources
    resources = resources.with_workers(resources.most_workers * sweep.concurrent)
    vision = replace(line, other_vision=other, stored=trained.stored, images=images, tower=trained.tower)
    return replace(vision, resources=resources, estimate=total)


def _volumes(job: Job, outputs: _Outputs) -> list[tuple[Volume, float]] | None:
    """The tables of a job with their weights; None when the size of one is unknown."""
    volumes: list[tuple[Volume, float]] = []
    for item in job.inputs.samples:
        volume = outputs.volumes.get(item.uri) or _finished_volume(item.uri)
        if volume is None and job.expect is not None:
            volume = _expected_volume(job, job.expect.seconds is not None or isinstance(job.block, VideoSft))
        if volume is None:
            return None
        volumes.append((volume, item.weight))
    return volumes


def _model(job: Job, outputs: _Outputs) -> ModelShape | None:
    """The shape of the model that a stage works with, under its compression."""
    uri = job.inputs.checkpoint or ""
    if job.model is not None:
        model = new_model(job.model)
    elif uri in outputs.models:
        model = outputs.models[uri]
    else:
        model = checkpoint_model(uri)
    return None if model is None else model.compressed(job.compression)


def _ingest_volume(job: Job) -> Volume | None:
    finished = None if storage.is_placeholder(job.output) else _finished_volume(job.output)
    if finished is not None:
        return finished
    return None if job.expect is None else _expected_volume(job, FORMATS[job.block.format].videos)


def _expected_volume(job: Job, video: bool) -> Volume:
    expect = job.expect
    assert expect is not None
    media = float(expect.rows if expect.media is None else expect.media)
    return Volume(
        conversations=expect.rows,
        media=media,
        media_bytes=expect.bytes,
        text_tokens=expect.rows * (expect.text_tokens or estimate.TEXT_TOKENS),
        seconds=media * (expect.seconds or estimate.CLIP_SECONDS) if video else 0.0,
        videos=media if video else 0.0,
        samples=media,
    )


def _finished_volume(uri: str) -> Volume | None:
    finished = _finished(uri)
    figures = (finished.statistics if finished is not None else {}).get("figures", {})
    if finished is None or not figures or "samples" not in finished.tables:
        return None

    def total(name: str) -> float:
        return float(figures.get(name, {}).get("sum", 0.0))

    media = float(figures.get("media_bytes", {}).get("count", 0))
    return Volume(
        conversations=total("conversations"),
        media=media,
        media_bytes=total("media_bytes"),
        text_tokens=total("text_bytes") / estimate.TEXT_BYTES_PER_TOKEN,
        seconds=total("duration_s"),
        videos=float(figures.get("duration_s", {}).get("count", 0)),
        samples=float(sum(entry["rows"] for entry in finished.tables["samples"])),
    )


def _finished_cache(job: Job) -> FrameCache | None:
    """The block of the job that made a finished frame cache."""
    uri = job.inputs.frame_cache
    if uri is None or uri.startswith("@") or storage.is_placeholder(uri):
        return None
    record = storage.join(storage.resolve(uri), "run.json")
    try:
        block = storage.read_json(record)["job"].get("frame_cache") if storage.exists(record) else None
    except unreachable(record):
        return None
    return None if block is None else FrameCache.model_validate(block)


def _finished(uri: str) -> Manifest | None:
    if uri.startswith("@") or storage.is_placeholder(uri):
        return None
    try:
        return read_manifest(storage.resolve(uri))
    except unreachable(storage.resolve(uri)):
        return None


def _folded(lines: list[_Line], total: float) -> Iterator[_Line]:
    """Consecutive small stages of a kind as one line, so that a long flow fits a screen."""

    def key(line: _Line) -> tuple[str, bool, Resources]:
        return line.kind, line.estimate.duration < SMALL_SHARE * total and not line.unknown, line.resources

    for (kind, small, _), group in groupby(lines, key):
        members = list(group)
        if not small or len(members) == 1:
            yield from members
            continue
        merged = estimate.together([line.estimate for line in members])
        yield replace(members[0], name=f"{len(members)} x {kind}", estimate=replace(merged, steps=0))


def _cells(line: _Line, rates: Rates) -> tuple[str, ...]:
    if line.unknown:
        return (line.name, *[""] * 7, "?", f"needs {line.unknown}", "")
    cost, price = line.estimate, rates.price(line.resources, line.estimate.duration)
    gpu = bytes_text(sum(cost.gpu.values())) if cost.gpu and line.resources.gpus_per_worker else ""
    host = sum(cost.host.values()) + (0.0 if line.resources.gpus_per_worker else sum(cost.gpu.values()))
    work = flops_text(cost.flops) + ("/step" if cost.steps else "")
    return (
        line.name, bytes_text(cost.read), bytes_text(cost.written), f"{cost.steps:,}" if cost.steps else "",
        f"{cost.tokens:,.0f}" if cost.tokens else "", work if cost.flops else "",
        gpu, bytes_text(host) if host else "", _time_text(cost.duration), cost.bottleneck,
        "" if price is None else f"{price:,.0f} {rates.currency}",
    )  # fmt: skip


def _total_cells(lines: list[_Line], rates: Rates) -> tuple[str, ...]:
    prices = [rates.price(line.resources, line.estimate.duration) for line in lines]
    price = sum(value for value in prices if value is not None)
    partly = "" if None not in prices else " (partly)"
    read, written, hours = (sum(getattr(line.estimate, name) for line in lines) for name in ("read", "written", "duration"))
    slowest = max(lines, key=lambda line: line.estimate.duration)
    bound = f"{slowest.estimate.bottleneck} of {slowest.name}"
    shown = f"{price:,.0f} {rates.currency}{partly}" if price else ""
    return ("all", bytes_text(read), bytes_text(written), "", "", "", "", "", _time_text(hours), bound, shown)


def _range_lines(lines: list[_Line], rates: Rates) -> Iterator[str]:
    """Time and price of elastic training at both ends of its range; the table shows the most workers."""
    for line in lines:
        if line.fewest is None:
            continue
        few = line.resources.with_workers(line.resources.fewest_workers)
        ends = [(few, line.fewest), (line.resources, line.estimate)]
        prices = [rates.price(resources, cost.duration) for resources, cost in ends]
        shown = ["" if price is None else f" and {price:,.0f} {rates.currency}" for price in prices]
        times = [f"{_time_text(cost.duration)}{price}" for (_, cost), price in zip(ends, shown, strict=True)]
        numbers = f"{times[0]} with {few.most_workers} workers, {times[1]} with {line.resources.most_workers}"
        yield f"{line.name}: {numbers}; memory is that of {few.most_workers}"


def _vision_lines(lines: list[_Line], rates: Rates) -> list[str]:
    """Both ways to see the images of a job, and which is cheaper: features stored once, or the tower in every step."""
    both = [line for line in lines if line.other_vision is not None]
    if not both:
        return []
    making = [line.estimate for line in lines if line.kind == "features"]
    if not making and not any(line.stored for line in both):  # else they exist
        images: dict[str, Volume] = {uri: volume for line in both for uri, volume in line.images.items()}
        tower = next(line.tower for line in both if line.tower is not None)
        making = [estimate.features(sum(images.values(), Volume()), tower, both[0].resources, rates)]

    def totals(stored: bool) -> tuple[float, float]:
        chosen = [line.estimate if line.stored == stored else line.other_vision for line in both]
        parts = [part for part in chosen if part is not None] + (making if stored else [])
        written = sum(part.written for part in making) if stored else 0.0
        return sum(part.duration for part in parts), sum(part.read for part in parts) + written

    ways = {"live tower": totals(stored=False), "stored features": totals(stored=True)}
    hours = [way[0] for way in ways.values()]
    saved = (max(hours) - min(hours)) / max(hours) if max(hours) else 0.0
    column, why = (0, f"{saved:.1%} less time") if saved >= SMALL_SHARE else (1, "fewer bytes in nearly the same time")
    cheaper = min(ways, key=lambda name: ways[name][column])
    used = {"stored features" if line.stored else "live tower" for line in both}
    shown = [
        f"{name}{' (this job)' if used == {name} else ''} {_time_text(way[0])} and {bytes_text(way[1])}"
        for name, way in ways.items()
    ]
    return [f"vision: {', '.join(shown)} read and written; cheaper: {cheaper}, {why}"]


def _time_text(hours: float) -> str:
    """Hours, or minutes or seconds where they are few."""
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.0f} min" if hours >= 1 / 60 else f"{math.ceil(3600 * hours)} s"


def _assumptions(job: Job, lines: list[_Line], rates: Rates) -> str:
    """The rates behind the times of these stages, and what is missing."""
    computed = [line.resources for line in lines if line.estimate.flops]
    peaks = sorted({resources.accelerator or "" for resources in computed if resources.gpus_per_worker})
    unknown = [name or "GPU" for name in peaks if not rates.flops(Resources(gpus_per_worker=1, accelerator=name or None))]
    stages = [stage for stage in job.stages if not stage.stage.in_driver]
    core = [f"{rates.images_s:,.0f} images/s"]
    core += [f"{rates.headers_s:,.0f} image headers/s"] if any(stage.kind == "ingest" for stage in stages) else []
    core += [f"{rates.frames_s:,.0f} video frames/s"] if any(stage.kind == "frame_cache" for stage in stages) else []
    core += [f"{rates.cpu_gflops:,.0f} GFLOP/s"] if any(not resources.gpus_per_worker for resources in computed) else []
    text = [f"MFU {rates.mfu:.0%} of the bf16 peak"] if peaks else []
    text += [f"{rates.storage_mb_s:,.0f} MB/s a worker", f"{', '.join(core)} a core"]
    if any(stage.expect is not None and stage.expect.text_tokens is None for stage in stages):
        text.append(f"{estimate.TEXT_TOKENS} text tokens a row")
    missing = f"; no peak is known for {', '.join(unknown)}, so its compute hours are missing" if unknown else ""
    return f"assumed: {'; '.join(text)}{missing}" + ("" if rates.nodes else "; prices: --prices FILE")
