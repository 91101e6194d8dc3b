"""A job file: what may stand in it, and how a mistake in it is told.

One YAML file is one job. Every key is a field below; unknown keys, wrong types and impossible combinations are refused
before anything starts, with one line: `file: key.path: expected ..., got ...; did you mean ...`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from voco.errors import Refused
from voco.job import validation_errors
from voco.job.config import (
    Compression,
    Evaluate,
    Expect,
    Features,
    FrameCache,
    ImageSft,
    Ingest,
    Inputs,
    Model,
    Report,
    Resources,
    Strict,
    Tracking,
    Training,
    VideoSft,
)
from voco.store import storage

Kind = Literal[
    "ingest", "align", "features", "image_sft", "frame_cache", "video_sft", "evaluate", "sweep", "report", "flow"
]  # fmt: skip
TRAINING = ("align", "image_sft", "video_sft")  # kinds that run DeepSpeed workers and write a checkpoint


class Sweep(Strict):
    """Trials on Ray Tune: each trains, then evaluates. `@train` in `evaluate` is the trial's own checkpoint."""

    axes: dict[str, list[Any]] = Field(min_length=1)  # dotted key of the training job -> its values; trials are the product
    train: Job
    evaluate: Job
    concurrent: int = Field(default=1, ge=1)  # trials at a time, each with its own workers


class Flow(Strict):
    """Jobs in order. An input `@name` is the output of the earlier stage of that name, `@name/path` what lies in it."""

    stages: list[Job] = Field(min_length=1)


class Job(Strict):
    """One job file."""

    name: str = Field(pattern=r"^[a-z0-9-]{1,40}$")
    kind: Kind
    output: str = ""  # a stage of a flow: <flow output>/<stage name> when it is left out
    seed: int = 0
    inputs: Inputs = Inputs()
    resources: Resources = Resources()
    compression: Compression | None = None
    model: Model | None = None
    expect: Expect | None = None
    tracking: Tracking = Tracking()
    ingest: Ingest | None = None
    align: Training | None = None
    features: Features | None = None
    image_sft: ImageSft | None = None
    frame_cache: FrameCache | None = None
    video_sft: VideoSft | None = None
    evaluate: Evaluate | None = None
    sweep: Sweep | None = None
    report: Report | None = None
    flow: Flow | None = None

    @property
    def block(self) -> Any:
        """The block named as the kind."""
        return getattr(self, self.kind)

    @property
    def parts(self) -> dict[str, Job]:
        """The jobs inside a sweep, by key path; none for other kinds."""
        return {} if self.sweep is None else {"sweep.train": self.sweep.train, "sweep.evaluate": self.sweep.evaluate}

    def uris(self) -> dict[str, str]:
        """Every input of the job and of its parts, by key path."""
        found = self.inputs.uris()
        for where, part in self.parts.items():
            found |= {f"{where}.{key}": uri for key, uri in part.inputs.uris().items() if uri != OWN}
        return found

    @model_validator(mode="after")
    def _combination(self) -> Self:
        if self.kind == "report" and self.report is None:
            raise ValueError("report: expected a block, got nothing; write `report: {}`")
        if self.block is None:
            raise ValueError(f"{self.kind}: expected a block, got nothing")
        for kind in get_args(Kind):
            if kind != self.kind and getattr(self, kind) is not None:
                raise ValueError(f"{kind}: not for a job of kind {self.kind}")
        _check_inputs(self)
        _check_model(self)
        if self.kind == "sweep":
            _check_sweep(self)
        return self


OWN = "@train"  # in a sweep's `evaluate`: the checkpoint of the trial
MODEL_BLOCKS = {"align": ("model",), "image_sft": ("compression", "model"), "video_sft": ("compression",)}

# What each kind needs, and what it may have besides.
TAKES: dict[str, tuple[set[str], set[str]]] = {
    "ingest": ({"annotations"}, {"answers", "media"}),
    "features": ({"samples"}, set()),
    "align": ({"samples", "features"}, {"checkpoint", "vocabulary"}),
    "image_sft": ({"samples", "features"}, {"checkpoint", "teacher", "vocabulary"}),
    "frame_cache": ({"samples", "checkpoint"}, set()),
    "video_sft": ({"samples", "frame_cache", "checkpoint"}, set()),
    "evaluate": ({"samples", "checkpoint"}, {"features", "frame_cache", "upper", "lower"}),
    "sweep": (set(), set()),
    "report": ({"outputs"}, set()),
    "flow": (set(), set()),
}


def _check_inputs(job: Job) -> None:
    needs, may = TAKES[job.kind]
    given = {path.split(".")[1].split("[")[0] for path in job.inputs.uris()}
    for key in sorted(needs - given):
        raise ValueError(f"inputs.{key}: expected a value for a job of kind {job.kind}, got nothing")
    for key in sorted(given - needs - may):
        raise ValueError(f"inputs.{key}: not for a job of kind {job.kind}, which takes {', '.join(sorted(needs | may))}")
    if (job.inputs.upper is None) != (job.inputs.lower is None):
        raise ValueError("inputs: expected `upper` and `lower` together, for retention")
    if job.kind == "evaluate" and (job.inputs.features is None) == (job.inputs.frame_cache is None):
        raise ValueError("inputs: expected either `features`, for images, or `frame_cache`, and not both")
    if job.evaluate is not None and job.evaluate.fastv is not None and job.inputs.frame_cache is not None:
        raise ValueError("evaluate.fastv: reads images whole: expected `inputs.features`, got `frame_cache`")


def _check_model(job: Job) -> None:
    for key in ("compression", "model"):
        if getattr(job, key) is not None and key not in MODEL_BLOCKS.get(job.kind, ()):
            raise ValueError(f"{key}: not for a job of kind {job.kind}")
    if job.kind not in TRAINING:
        return
    block: Training = job.block
    if job.compression is None and job.kind != "align":
        raise ValueError("compression: expected a block, got nothing")
    if job.kind == "video_sft" and block.checkpoint_activations:
        raise ValueError("video_sft.checkpoint_activations: transformers drops the caches that are read under it; leave it off")
    if job.kind == "video_sft" and job.compression is not None and job.compression.method != "voco":
        raise ValueError(f"compression.method: frame caches hold <voco> tokens: expected voco, got {job.compression.method}")
    if isinstance(block, ImageSft):
        _check_distill(job, block)
    if job.model is not None and job.model.llama is not None and block.text is not None and block.text.template == "chatml":
        raise ValueError(
            f"{job.kind}.text.template: chatml needs a tokenizer that has its markers; a model from nothing has none"
        )
    if block.attention in ("varlen", "flex") and not job.resources.gpus_per_worker:
        raise ValueError(f"{job.kind}.attention: {block.attention} trains on GPUs only: expected segments, or gpus_per_worker")
    if block.attention == "varlen" and block.precision == "fp32":
        raise ValueError(f"{job.kind}.attention: varlen has no fp32 kernel: expected segments, or precision bf16")
    if (job.model is None) == (job.inputs.checkpoint is None):
        raise ValueError("model: expected either a `model` block or `inputs.checkpoint`, and not both")
    if block.global_batch % (job.resources.workers * block.micro_batch):
        step = job.resources.workers * block.micro_batch
        got = f"got {block.global_batch}"
        raise ValueError(f"{job.kind}.global_batch: expected a multiple of workers x micro_batch = {step}, {got}")


def _check_distill(job: Job, block: ImageSft) -> None:
    if block.distill is None and job.inputs.teacher is not None:
        raise ValueError("inputs.teacher: expected a block image_sft.distill, which says how much it counts")
    if block.distill is not None and job.inputs.teacher is None and job.compression and job.compression.method != "voco":
        got = f"got {job.compression.method}; give a checkpoint as inputs.teacher"
        raise ValueError(f"image_sft.distill: a network teaches itself under method voco only: {got}")


def _check_sweep(job: Job) -> None:
    assert job.sweep is not None
    if job.sweep.train.kind not in ("image_sft", "video_sft"):
        raise ValueError(f"sweep.train.kind: expected image_sft or video_sft, got {job.sweep.train.kind}")
    if job.sweep.evaluate.kind != "evaluate":
        raise ValueError(f"sweep.evaluate.kind: expected evaluate, got {job.sweep.evaluate.kind}")
    if job.sweep.evaluate.inputs.checkpoint != OWN:
        raise ValueError(f'sweep.evaluate.inputs.checkpoint: expected "{OWN}", the checkpoint of the trial itself')


def load_job(path: str, text: str | None = None) -> Job:
    """Read a job file. Local paths in it stay as written, relative to the working directory of whoever runs it.

    Raises Refused with one line for the first mistake.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text() if text is None else text)
    except FileNotFoundError as error:
        raise Refused(f"{path}: no such file") from error
    except yaml.YAMLError as error:
        raise Refused(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise Refused(f"{path}: expected a mapping of keys, got {type(raw).__name__}")
    return build_job(path, raw)


def build_job(path: str, raw: dict[str, Any]) -> Job:
    """A checked job from parsed YAML; `path` is only named in errors."""
    try:
        job = Job.model_validate(raw)
    except ValidationError as error:
        raise Refused(f"{path}: {validation_errors.first_error(error, Job)}") from None
    if not job.output:
        raise Refused(f"{path}: output: expected a path or s3:// URI, got nothing")
    if job.kind == "flow":
        return _fill_stages(path, job)
    return _fill_parts(f"{path}: ", job)


def _fill_stages(path: str, job: Job) -> Job:
    """Default outputs, seeds, resources and tracking of a flow's stages; `@name` must be an earlier stage."""
    assert job.flow is not None
    stages: list[Job] = []
    for index, stage in enumerate(job.flow.stages):
        where = f"{path}: flow.stages[{index}]"
        if stage.kind == "flow":
            raise Refused(f"{where}.kind: a flow cannot hold a flow")
        earlier = [done.name for done in stages]
        if stage.name in earlier:
            raise Refused(f"{where}.name: {stage.name} is used twice")
        for key, uri in stage.uris().items():
            name = uri[1:].split("/")[0]
            if uri.startswith("@") and name not in earlier:
                raise Refused(
                    f"{where}.{key}: expected an earlier stage, got {uri}{validation_errors.did_you_mean(name, earlier, '@')}"
                )
        output = stage.output or storage.join(job.output, stage.name)
        stages.append(_fill_parts(f"{where}.", _inherit(f"{where}.", stage, job).model_copy(update={"output": output})))
    return job.model_copy(update={"flow": job.flow.model_copy(update={"stages": stages})})


def _inherit(where: str, part: Job, whole: Job) -> Job:
    """The part with the seed, resources and tracking of what it is in, unless it has its own."""
    keys = [key for key in ("seed", "resources", "tracking") if key not in part.model_fields_set]
    filled = part.model_copy(update={key: getattr(whole, key) for key in keys})
    try:
        _check_model(filled)
    except ValueError as error:
        raise Refused(f"{where}{error}") from None
    return filled


def _fill_parts(where: str, job: Job) -> Job:
    """A sweep's inner jobs made whole; every trial of it must be a job that could be sent alone."""
    if job.sweep is None:
        return job
    held = {name.split(".")[1]: _inherit(f"{where}{name}.", part, job) for name, part in job.parts.items()}
    filled = job.model_copy(update={"sweep": job.sweep.model_copy(update=held)})
    from voco.job.trials import sweep_trials  # made of this module's jobs

    try:
        sweep_trials(filled)
    except ValidationError as error:
        raise Refused(f"{where}sweep.axes: {validation_errors.first_error(error, Job)}") from None
    except (ValueError, KeyError) as error:
        raise Refused(f"{where}sweep.axes: {error.args[0]}") from None
    return filled


def resolve_stage(stage: Job, outputs: dict[str, str], kept: str = "") -> Job:
    """The stage with every `@name` replaced by that stage's output, `@name/path` by what lies in it; `kept` stays."""

    def real(uri: str) -> str:
        if not uri.startswith("@") or uri == kept:
            return uri
        name, _, rest = uri[1:].partition("/")
        return storage.join(outputs[name], rest) if rest else outputs[name]

    changes: dict[str, Any] = {"inputs": stage.inputs.replaced(real)}
    if stage.sweep is not None:
        held = {name.split(".")[1]: resolve_stage(part, outputs, kept=OWN) for name, part in stage.parts.items()}
        changes["sweep"] = stage.sweep.model_copy(update=held)
    return stage.model_copy(update=changes)


def hashed_content(job: Job) -> dict[str, Any]:
    """What is hashed into the run id, besides the state of each input: kind, inputs, blocks and seed. Not resources or output."""
    if job.flow is not None:
        stages = [{**hashed_content(stage), "name": stage.name} for stage in job.flow.stages]
        return {"kind": job.kind, "seed": job.seed, "stages": stages}
    if job.sweep is not None:
        parts = {where: hashed_content(part) for where, part in job.parts.items()}
        return {"kind": job.kind, "seed": job.seed, "axes": job.sweep.axes, **parts}
    blocks = {key: getattr(job, key) for key in ("compression", "model", job.kind)}
    # neither the limits that fail a job nor the place where it works change what it writes
    unhashed = {"max_missing_share", "max_reject_share", "in_process_rows", "download_threads"}
    held = {key: block.model_dump(exclude=unhashed) for key, block in blocks.items() if block is not None}
    roles = job.inputs.model_dump(exclude_none=True, exclude_defaults=True)  # which input is what, and with which weight
    return {"kind": job.kind, "seed": job.seed, "inputs": roles, **held}


def compute_run_id(job: Job, inputs: dict[str, str]) -> str:
    """`name` and 8 hex digits over the job's content and `inputs`: each input URI with what identifies its state."""
    text = json.dumps({**hashed_content(job), "input_states": inputs}, sort_keys=True)
    return f"{job.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


Sweep.model_rebuild()
Flow.model_rebuild()
Job.model_rebuild()
