"""A job file: what may stand in it, and how a mistake in it is told.

One YAML file is one job. Every key is a field below; unknown keys, wrong types and impossible combinations are refused
before anything starts, with one line: `file: key.path: expected ..., got ...; did you mean ...`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from voco import mistakes, storage
from voco.errors import Refused

Kind = Literal["ingest", "features", "image_sft", "evaluate", "report", "flow"]
Method = Literal["voco", "none", "avg_pool"]


class Strict(BaseModel):
    """Immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class WeightedSamples(Strict):
    """One `samples/` table in a training mix."""

    uri: str
    weight: float = Field(default=1.0, gt=0)  # rows seen in one epoch, as a multiple of the table's rows


class Inputs(Strict):
    """Where a job reads; each kind takes some of these (`TAKES`)."""

    annotations: str | None = None  # the source's annotation file
    media: str | None = None  # the folder that media paths are relative to
    samples: list[WeightedSamples] = []  # outputs of ingest
    features: str | None = None  # output of features: vision features by image hash
    checkpoint: str | None = None  # output of a training job
    upper: str | None = None  # evaluate: answers of the upper bound, for retention
    lower: str | None = None  # evaluate: answers of the lower bound
    outputs: list[str] = []  # report: outputs of any kind

    def uris(self) -> dict[str, str]:
        """Every input that is given, by its key path."""
        single = {key: getattr(self, key) for key in ("annotations", "media", "features", "checkpoint", "upper", "lower")}
        found = {f"inputs.{key}": uri for key, uri in single.items() if uri is not None}
        found |= {f"inputs.samples[{index}].uri": item.uri for index, item in enumerate(self.samples)}
        return found | {f"inputs.outputs[{index}]": uri for index, uri in enumerate(self.outputs)}


class Resources(Strict):
    """What the job's Ray workers take."""

    workers: int = Field(default=1, ge=1)
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    accelerator: str | None = None  # Ray accelerator type, e.g. A100


class Compression(Strict):
    """How an image's vision tokens reach the text."""

    method: Method
    tokens: int = Field(ge=1)  # N: <voco> tokens per view; avg_pool: pooled vectors per view


class Tower(Strict):
    """The frozen vision net and its preprocessing. Both are part of every cache key."""

    name: Literal["efficientnet_lite0", "clip"]
    image_size: int = Field(ge=32)  # pixels; the image is padded to a square with the mean colour and resized
    path: str | None = None  # clip: a local directory or hub name with transformers' weights
    layer: int = -2  # clip: the hidden state that is used, as LLaVA does

    @model_validator(mode="after")
    def _path(self) -> Self:
        if (self.name == "clip") != (self.path is not None):
            raise ValueError("expected `path` with clip and only with clip")
        return self


class Llama(Strict):
    """A Llama built from nothing, for small machines."""

    layers: int = Field(ge=1)
    width: int = Field(ge=8)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    mlp_width: int = Field(ge=8)
    vocabulary: int = Field(ge=300)  # entries of the byte-level BPE that is trained on the job's own samples

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.width % self.heads or self.heads % self.kv_heads or self.width // self.heads % 2:
            raise ValueError("expected width to be an even multiple of heads and heads a multiple of kv_heads")
        return self


class Model(Strict):
    """A new model; a job that starts from `inputs.checkpoint` has none of it."""

    llama: Llama
    tower: Tower


class Text(Strict):
    """How turns become a prompt; saved in the checkpoint."""

    template: Literal["vicuna_v1", "plain", "chatml", "question_answer"] = "vicuna_v1"
    newlines: Literal["keep", "strip"] = "keep"  # strip: as the released code does


class Ingest(Strict):
    """Source files to `samples/` and `rejects/`."""

    format: Literal["llava_json"]
    dataset: str
    split: str = "train"
    check: Literal["full", "header"] = "header"  # decode every pixel, or the header only
    duplicates: Literal["reject", "keep"] = "reject"
    max_missing_share: float = Field(default=0.02, ge=0, le=1)
    max_reject_share: float = Field(default=0.01, ge=0, le=1)
    max_text_bytes: int = Field(default=1 << 20, ge=1)
    max_media_bytes: int = Field(default=256 << 20, ge=1)
    max_pixels: int = Field(default=178_956_970, ge=1)  # Pillow's own limit against decompression bombs
    unit_rows: int = Field(default=2000, ge=1)  # samples of one work unit, which is one Parquet file
    in_process_rows: int = Field(default=2000, ge=0)  # up to so many samples the driver does the work itself


class Features(Strict):
    """Vision features of every unique image, once."""

    tower: Tower
    unit_images: int = Field(default=2000, ge=1)
    batch: int = Field(default=64, ge=1)


class ImageSft(Strict):
    """Supervised fine-tuning on images with DeepSpeed."""

    epochs: int = Field(ge=1)
    global_batch: int = Field(ge=1)  # samples of one optimizer step, over all workers
    micro_batch: int = Field(ge=1)  # samples of one forward pass of one worker
    learning_rate: float = Field(gt=0)
    warmup_share: float = Field(default=0.03, ge=0, le=1)  # of all steps; then a cosine to `final_lr_share`
    final_lr_share: float = Field(default=0.0, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    zero_stage: Literal[1, 2, 3] = 2
    save_every: int = Field(default=500, ge=1)  # steps between checkpoints
    share_vision: bool = True  # a row whole: its vision prefix once, each conversation a text segment of its own
    attention: Literal["sdpa", "eager"] = "sdpa"
    max_tokens: int = Field(default=2048, ge=8)  # of a prefix with one conversation; text is cut at its end, never the prefix
    text: Text | None = None  # default: the checkpoint's, or Text() for a new model


class Evaluate(Strict):
    """Answers to evaluation rows by the cached path, and their scores."""

    benchmark: str
    read_as: Literal["own", "voco"] = "own"  # voco: a `none` checkpoint under the voco mask, the lower bound
    max_new_tokens: int = Field(default=8, ge=1)
    batch: int = Field(default=256, ge=1)  # questions of one forward pass
    unit_samples: int = Field(default=500, ge=1)
    resamples: int = Field(default=1000, ge=100)  # of the bootstrap


class Report(Strict):
    """One HTML file from any outputs."""

    title: str = "VoCo report"


class Expect(Strict):
    """Sizes of inputs that `plan` cannot see."""

    rows: int = Field(ge=1)
    bytes: int = Field(ge=1)


class Flow(Strict):
    """Jobs in order. An input `@name` is the output of the earlier stage of that name."""

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
    ingest: Ingest | None = None
    features: Features | None = None
    image_sft: ImageSft | None = None
    evaluate: Evaluate | None = None
    report: Report | None = None
    flow: Flow | None = None

    @property
    def block(self) -> Any:
        """The block named as the kind."""
        return getattr(self, self.kind)

    @model_validator(mode="after")
    def _combination(self) -> Self:
        if self.kind == "report" and self.report is None:
            raise ValueError("report: expected a block, got nothing; write `report: {}`")
        if self.block is None:
            raise ValueError(f"{self.kind}: expected a block, got nothing")
        for kind in ("ingest", "features", "image_sft", "evaluate", "report", "flow"):
            if kind != self.kind and getattr(self, kind) is not None:
                raise ValueError(f"{kind}: not for a job of kind {self.kind}")
        _check_inputs(self)
        _check_model(self)
        return self


# What each kind needs, and what it may have besides.
TAKES: dict[str, tuple[set[str], set[str]]] = {
    "ingest": ({"annotations"}, {"media"}),
    "features": ({"samples"}, set()),
    "image_sft": ({"samples", "features"}, {"checkpoint"}),
    "evaluate": ({"samples", "features", "checkpoint"}, {"upper", "lower"}),
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


def _check_model(job: Job) -> None:
    if job.kind != "image_sft":
        if job.model is not None or job.compression is not None:
            raise ValueError(f"{'model' if job.model else 'compression'}: not for a job of kind {job.kind}")
        return
    if job.compression is None:
        raise ValueError("compression: expected a block, got nothing")
    if job.model is not None and job.image_sft and job.image_sft.text and job.image_sft.text.template == "chatml":
        raise ValueError(
            "image_sft.text.template: chatml needs a checkpoint whose tokenizer has its markers; a new model has none"
        )
    if (job.model is None) == (job.inputs.checkpoint is None):
        raise ValueError("model: expected either a `model` block or `inputs.checkpoint`, and not both")
    block = job.image_sft
    assert block is not None
    if block.global_batch % (job.resources.workers * block.micro_batch):
        step = job.resources.workers * block.micro_batch
        got = f"got {block.global_batch}"
        raise ValueError(f"image_sft.global_batch: expected a multiple of workers x micro_batch = {step}, {got}")


def load(path: str, text: str | None = None) -> Job:
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
    return build(path, raw)


def build(path: str, raw: dict[str, Any]) -> Job:
    """A checked job from parsed YAML; `path` is only named in errors."""
    try:
        job = Job.model_validate(raw)
    except ValidationError as error:
        raise Refused(f"{path}: {mistakes.first_line(error, Job)}") from None
    if job.kind == "flow":
        job = _fill_stages(path, job)
    elif not job.output:
        raise Refused(f"{path}: output: expected a path or s3:// URI, got nothing")
    return job


def _fill_stages(path: str, job: Job) -> Job:
    """Default outputs and seeds of a flow's stages; `@name` must be an earlier stage."""
    assert job.flow is not None
    if not job.output:
        raise Refused(f"{path}: output: expected a path or s3:// URI, got nothing")
    stages: list[Job] = []
    for index, stage in enumerate(job.flow.stages):
        where = f"{path}: flow.stages[{index}]"
        if stage.kind == "flow":
            raise Refused(f"{where}.kind: a flow cannot hold a flow")
        earlier = [done.name for done in stages]
        if stage.name in earlier:
            raise Refused(f"{where}.name: {stage.name} is used twice")
        for key, uri in stage.inputs.uris().items():
            if uri.startswith("@") and uri[1:] not in earlier:
                raise Refused(f"{where}.{key}: expected an earlier stage, got {uri}{mistakes.hint(uri[1:], earlier, '@')}")
        changes: dict[str, Any] = {} if stage.output else {"output": storage.join(job.output, stage.name)}
        if "seed" not in stage.model_fields_set:
            changes["seed"] = job.seed
        if "resources" not in stage.model_fields_set:
            changes["resources"] = job.resources
        filled = stage.model_copy(update=changes)
        try:
            _check_model(filled)
        except ValueError as error:
            raise Refused(f"{where}.{error}") from None
        stages.append(filled)
    return job.model_copy(update={"flow": job.flow.model_copy(update={"stages": stages})})


def stage_with_inputs(stage: Job, outputs: dict[str, str]) -> Job:
    """The stage with every `@name` replaced by that stage's output."""

    def real(uri: str | None) -> str | None:
        return outputs[uri[1:]] if uri is not None and uri.startswith("@") else uri

    inputs = stage.inputs
    new = inputs.model_copy(
        update={
            **{key: real(getattr(inputs, key)) for key in ("annotations", "media", "features", "checkpoint", "upper", "lower")},
            "samples": [item.model_copy(update={"uri": real(item.uri)}) for item in inputs.samples],
            "outputs": [real(uri) for uri in inputs.outputs],
        }
    )
    return stage.model_copy(update={"inputs": new})


def content(job: Job) -> dict[str, Any]:
    """What is hashed into the run id, besides the inputs: kind, blocks and seed. Not resources, output or name."""
    if job.flow is not None:
        stages = [{**content(stage), "name": stage.name, "inputs": stage.inputs.uris()} for stage in job.flow.stages]
        return {"kind": job.kind, "seed": job.seed, "stages": stages}
    blocks = {key: getattr(job, key) for key in ("compression", "model", job.kind)}
    # neither the limits that fail a job nor the place where it works change what it writes
    unhashed = {"max_missing_share", "max_reject_share", "in_process_rows"}
    return {
        "kind": job.kind,
        "seed": job.seed,
        **{key: block.model_dump(exclude=unhashed) for key, block in blocks.items() if block is not None},
        "weights": [item.weight for item in job.inputs.samples],
    }


def run_id(job: Job, inputs: dict[str, str]) -> str:
    """`name` and 8 hex digits over the job's content and `inputs`: each input URI with what identifies its state."""
    text = json.dumps({**content(job), "input_states": inputs}, sort_keys=True)
    return f"{job.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


Flow.model_rebuild()
Job.model_rebuild()
