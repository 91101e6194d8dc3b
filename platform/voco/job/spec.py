"""One YAML file is one job: the keys that every job has, and the table of its kinds.

Unknown keys, wrong types and impossible combinations are refused before anything starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, create_model, model_validator

from voco.job.chat_templates import CHAT_TEMPLATES
from voco.job.compression import Compression
from voco.job.config import (
    Features,
    FrameCache,
    ImageSft,
    Ingest,
    Inputs,
    Model,
    Report,
    Strict,
    Training,
    VideoSft,
    virtual_ranks,
)  # fmt: skip
from voco.job.evaluation import Evaluate
from voco.job.resources import Resources
from voco.job.tables import ATTENTION, AUTO, METHODS, Table
from voco.store import storage

OWN_CHECKPOINT = "@train"  # in a sweep's `evaluate`: the checkpoint of the trial


class Sweep(Strict):
    """Trials on Ray Tune: each trains, then evaluates. `@train` in `evaluate` is the trial's own checkpoint."""

    axes: dict[str, list[Any]] = Field(min_length=1)  # dotted key of the training job -> its values; trials are the product
    train: Job
    evaluate: Job
    concurrent: int = Field(default=1, ge=1)  # trials at a time, each with its own workers


class Flow(Strict):
    """Jobs in order. An input `@name` is the output of the earlier stage of that name, `@name/path` a path inside it."""

    stages: list[Job] = Field(min_length=1)


@dataclass(frozen=True)
class Stage:
    """A kind of job. `pipelines/KIND.py`, or the module that the row names, runs it: `run(job, run_id) -> Manifest`."""

    block: type[Strict]  # the config block, whose key is the kind
    title: str
    needs: frozenset[str] = frozenset()  # inputs
    may: frozenset[str] = frozenset()  # further inputs
    beside: frozenset[str] = frozenset()  # which of `compression` and `model` it takes
    # name prefixes of the weights that it trains, `method.` those of the method itself; empty: it trains nothing
    trains: tuple[str, ...] = ()
    in_driver: bool = False  # it uses no Ray workers
    own_wandb_run: bool = False  # inside a flow too; the outputs of other stages are recorded in the flow's run
    module: str | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.block, type) and issubclass(self.block, Strict)):
            raise TypeError(f"expected a block that is a voco.job.config.Strict, got {self.block!r}")


def _inputs(names: str) -> frozenset[str]:
    return frozenset(names.split())


STAGES = Table(
    "stages",
    {
        "ingest": Stage(Ingest, "Ingest", needs=_inputs("annotations"), may=_inputs("answers media")),
        "align": Stage(
            Training,
            "Alignment",
            needs=_inputs("samples"),
            may=_inputs("checkpoint features val vocabulary"),
            beside=_inputs("model"),
            trains=("projector.",),
        ),
        "features": Stage(Features, "Vision features", needs=_inputs("samples")),
        "image_sft": Stage(
            ImageSft,
            "Image SFT",
            needs=_inputs("samples"),
            may=_inputs("checkpoint features teacher val vocabulary"),
            beside=_inputs("compression model"),
            trains=("projector.", "method.", "language_model."),
        ),
        "frame_cache": Stage(FrameCache, "Frame caches", needs=_inputs("samples checkpoint"), may=_inputs("features")),
        # a video model's caches come from its frozen compressor and do not pass through the projector
        "video_sft": Stage(
            VideoSft,
            "Video SFT",
            needs=_inputs("samples frame_cache checkpoint"),
            may=_inputs("val"),
            beside=_inputs("compression"),
            trains=("language_model.",),
        ),
        "evaluate": Stage(
            Evaluate,
            "Evaluation",
            needs=_inputs("samples checkpoint"),
            may=_inputs("features frame_cache upper lower calibration"),
            own_wandb_run=True,
        ),
        "sweep": Stage(Sweep, "Sweep", own_wandb_run=True),
        "report": Stage(Report, "Report", needs=_inputs("outputs"), in_driver=True),
        "flow": Stage(Flow, "Flow", in_driver=True, own_wandb_run=True),
    },
    Stage,
)


class Expect(Strict):
    """Sizes of inputs that `plan` cannot see."""

    rows: int = Field(ge=1)
    bytes: int = Field(ge=1)
    media: int | None = Field(default=None, ge=0)  # distinct images or videos; default: one for each row
    text_tokens: float | None = Field(default=None, gt=0)  # of one row, on average
    seconds: float | None = Field(default=None, gt=0)  # of one video, on average


class Tracking(Strict):
    """Weights & Biases; offline unless WANDB_MODE says otherwise. Not part of a run's id."""

    wandb: bool = True
    project: str = "voco"


class _Job(Strict):
    """One job file. Besides these keys it has the block named after its kind, and no other kind's block."""

    name: str = Field(pattern=r"^[a-z0-9-]{1,40}$")
    kind: str
    output: str = ""  # a stage of a flow: <flow output>/<stage name> when it is left out
    seed: int = 0
    inputs: Inputs = Inputs()
    resources: Resources = Resources()
    compression: Compression | None = None
    model: Model | None = None
    expect: Expect | None = None
    tracking: Tracking = Tracking()

    @property
    def block(self) -> Any:
        """The block named after the kind."""
        return getattr(self, self.kind)

    @property
    def stage(self) -> Stage:
        """The kind's row of STAGES."""
        return STAGES[self.kind]

    @property
    def stages(self) -> list[Job]:
        """The stages of a flow; for other kinds the job itself."""
        return self.block.stages if isinstance(self.block, Flow) else [self]

    @property
    def parts(self) -> dict[str, Job]:
        """The jobs inside a sweep, by key path; none for other kinds."""
        if not isinstance(self.block, Sweep):
            return {}
        return {"sweep.train": self.block.train, "sweep.evaluate": self.block.evaluate}

    @property
    def output_uri(self) -> str:
        """The resolved output. A job keeps its paths as written; code reads this and `resolved_inputs` instead."""
        return storage.resolve(self.output)

    @property
    def resolved_inputs(self) -> Inputs:
        """The resolved inputs. For the driver, which passes resolved paths to the workers."""
        return self.inputs.replaced(storage.resolve)

    def uris(self) -> dict[str, str]:
        """Every input of the job and of its parts, by key path."""
        uris = self.inputs.uris()
        for path, part in self.parts.items():
            uris |= {f"{path}.{key}": uri for key, uri in part.inputs.uris().items() if uri != OWN_CHECKPOINT}
        return uris

    @model_validator(mode="after")
    def _combination(self) -> Self:
        if self.block is None:
            hint = "; write `report: {}`" if self.kind == "report" else ""
            raise ValueError(f"{self.kind}: expected a block, got nothing{hint}")
        for kind in STAGES:
            if kind != self.kind and getattr(self, kind) is not None:
                raise ValueError(f"{kind}: not for a job of kind {self.kind}")
        self._check_inputs()
        for key in ("compression", "model"):
            if getattr(self, key) is not None and key not in self.stage.beside:
                raise ValueError(f"{key}: not for a job of kind {self.kind}")
        self.check_training()
        if isinstance(self.block, Sweep):
            _check_sweep(self.block)
        return self

    def _check_inputs(self) -> None:
        needs, may = self.stage.needs, self.stage.may
        given = {path.split(".")[1].split("[")[0] for path in self.inputs.uris()}
        for key in sorted(needs - given):
            raise ValueError(f"inputs.{key}: expected a value for a job of kind {self.kind}, got nothing")
        for key in sorted(given - needs - may):
            raise ValueError(f"inputs.{key}: not for a job of kind {self.kind}, which takes {', '.join(sorted(needs | may))}")
        if (self.inputs.upper is None) != (self.inputs.lower is None):
            raise ValueError("inputs: expected `upper` and `lower` together, for retention")
        if not isinstance(self.block, Evaluate):
            return
        if self.inputs.features is not None and self.inputs.frame_cache is not None:
            raise ValueError("inputs: expected `features` or `frame_cache`, got both")
        if self.block.is_adaptive != (self.inputs.calibration is not None):
            raise ValueError("inputs.calibration: expected an evaluation of held-out rows with `tokens: auto`, and only with it")
        if self.block.read_as in ("fastv", "none") and self.inputs.frame_cache is not None:
            raise ValueError(f"evaluate.read_as: {self.block.read_as} reads images: expected no `inputs.frame_cache`")

    def check_training(self) -> None:
        """Combinations of a training block with the job's other keys. Raises ValueError, which starts with the key."""
        if not self.stage.trains:
            return
        block: Training = self.block
        if self.compression is None and "compression" in self.stage.beside:
            raise ValueError("compression: expected a block, got nothing")
        if isinstance(block, VideoSft):
            _check_video(block, self.compression)
        if isinstance(block, ImageSft):
            self._check_distillation(block)
        self._check_validation(block)
        self._check_template(block)
        self._check_attention(block)
        if (self.model is None) == (self.inputs.checkpoint is None):
            got = "neither" if self.model is None else "both"
            raise ValueError(f"model: expected either a `model` block or `inputs.checkpoint`, got {got}")
        shares = virtual_ranks(block.global_batch)
        if self.resources.most_workers > shares:
            got = f"for a global_batch of {block.global_batch}, which has so many shares, got {self.resources.most_workers}"
            raise ValueError(f"resources.workers: expected at most {shares} {got}")

    def _check_validation(self, block: Training) -> None:
        key, validation = f"{self.kind}.validate", block.validation
        if (validation is None) != (self.inputs.val is None):
            given, missing = ("inputs.val", key) if validation is None else (key, "inputs.val")
            raise ValueError(f"{missing}: expected a value with `{given}`, got nothing")
        if validation is not None and validation.answers and block.zero_stage == 3:
            ways = "expected zero_stage 1 or 2, or no answers"
            raise ValueError(f"{key}.answers: under ZeRO-3 each token would gather every weight: {ways}")

    def _check_template(self, block: Training) -> None:
        is_new_llama = self.model is not None and self.model.llama is not None
        if is_new_llama and block.text is not None and CHAT_TEMPLATES[block.text.template].needs_control_tokens:
            name = block.text.template
            raise ValueError(
                f"{self.kind}.text.template: {name} needs a tokenizer that has its markers; that of a new model has none"
            )

    def _check_attention(self, block: Training) -> None:
        if block.attention == AUTO:
            return
        name, row = block.attention, ATTENTION[block.attention]
        if not row.trains_on_cpu and not self.resources.gpus_per_worker:
            raise ValueError(f"{self.kind}.attention: {name} trains on GPUs only: expected segments, or gpus_per_worker")
        if block.precision not in row.precisions:
            kernel = f"{name} has no {block.precision} kernel"
            raise ValueError(f"{self.kind}.attention: {kernel}: expected segments, or precision {row.precisions[0]}")

    def _check_distillation(self, block: ImageSft) -> None:
        if block.distill is None:
            if self.inputs.teacher is not None:
                raise ValueError("inputs.teacher: expected a block image_sft.distill, which sets its weight")
        elif self.inputs.teacher is None and self.compression and not METHODS[self.compression.method].views_apart:
            got = f"got {self.compression.method}; give a checkpoint as inputs.teacher"
            raise ValueError(f"image_sft.distill: a network teaches itself under method voco only: {got}")


def _check_video(block: VideoSft, compression: Compression | None) -> None:
    if block.checkpoint_activations:
        raise ValueError("video_sft.checkpoint_activations: with it, transformers ignores the frame caches; leave it off")
    if compression is not None and compression.uncompressed_share is not None:
        raise ValueError("compression.uncompressed_share: frame caches hold <voco> tokens alone: expected none in video_sft")
    if compression is not None and not METHODS[compression.method].views_apart:
        raise ValueError(f"compression.method: frame caches hold <voco> tokens: expected voco, got {compression.method}")


def _check_sweep(sweep: Sweep) -> None:
    if sweep.train.kind not in ("image_sft", "video_sft"):
        raise ValueError(f"sweep.train.kind: expected image_sft or video_sft, got {sweep.train.kind}")
    if sweep.evaluate.kind != "evaluate":
        raise ValueError(f"sweep.evaluate.kind: expected evaluate, got {sweep.evaluate.kind}")
    if sweep.evaluate.inputs.checkpoint != OWN_CHECKPOINT:
        raise ValueError(f'sweep.evaluate.inputs.checkpoint: expected "{OWN_CHECKPOINT}", the checkpoint of the trial itself')


if TYPE_CHECKING:
    Job = _Job
else:  # one optional key for each row of STAGES
    for _kind in [kind for kind in STAGES if kind in _Job.model_fields or kind in dir(_Job) or kind.startswith("_")]:
        STAGES.reject(_kind, "an installed package", "a kind cannot have this name: jobs have it for something else")
    _blocks = {kind: (row.block | None, None) for kind, row in STAGES.items()}
    Job = create_model("Job", __base__=_Job, __module__=__name__, kind=(Literal[tuple(STAGES)], ...), **_blocks)
    Sweep.model_rebuild()
    Flow.model_rebuild()
    Job.model_rebuild(force=True)
