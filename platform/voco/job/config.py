"""The blocks of a job file: one class for every key that holds a mapping, one field for every key in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from voco.job.chat_templates import CHAT_TEMPLATES
from voco.job.tables import ATTENTION, AUTO, FORMATS, METHODS, METRICS

MAX_FRAMES = 4096  # of one video, by default; more are dropped evenly
PILLOW_MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
VIRTUAL_RANKS = 64  # shares of a global batch below 1,024 samples, and so its most workers (docs/data.md, "Order in training")

# linear layers of a decoder layer of every supported language model, by what `lora.targets` calls them
LINEAR_GROUPS: dict[str, tuple[str, ...]] = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj")}
LINEAR_GROUPS["linear"] = (*LINEAR_GROUPS["attention"], "gate_proj", "up_proj", "down_proj")

if TYPE_CHECKING:  # for the type checker a name is any string; at run time it is a name of its table
    TrainedMethod: TypeAlias = str
    FormatName: TypeAlias = str
    MetricName: TypeAlias = str
    AttentionName: TypeAlias = str
    ChatTemplateName: TypeAlias = str
    LinearName: TypeAlias = str
else:
    TrainedMethod = Literal[tuple(name for name, row in METHODS.items() if row.trains)]
    FormatName = Literal[tuple(FORMATS)]
    MetricName = Literal[tuple(METRICS)]
    AttentionName = Literal[(AUTO, *ATTENTION)]
    ChatTemplateName = Literal[tuple(CHAT_TEMPLATES)]
    LinearName = Literal[LINEAR_GROUPS["linear"]]


class Strict(BaseModel):
    """Immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), serialize_by_alias=True)


class WeightedSamples(Strict):
    """One `samples/` table in a training mix."""

    uri: str
    weight: float = Field(default=1.0, gt=0)  # rows seen in one epoch, as a multiple of the table's rows


# inputs that are one URI
SINGLE = (
    "annotations", "answers", "media", "val", "features", "frame_cache", "checkpoint", "teacher", "upper", "lower", "calibration",
)  # fmt: skip


class Inputs(Strict):
    """What a job reads; each kind takes only some of these (`spec.STAGES`)."""

    annotations: str | None = None  # the source's annotation file
    answers: str | None = None  # the answers to an evaluation set's questions, where they are a separate file
    media: str | None = None  # the folder, or the zip file, that media paths are relative to
    samples: list[WeightedSamples] = []  # outputs of ingest
    val: str | None = None  # training with `validate`: another output of ingest, whose first rows it looks at on the way
    features: str | None = None  # output of features: vision features by image hash; default: the checkpoint's tower runs
    frame_cache: str | None = None  # output of frame_cache: keys and values of every frame's <voco> tokens
    checkpoint: str | None = None  # output of a training job
    teacher: str | None = None  # image_sft with distill: another checkpoint, of method none; default: the same network
    vocabulary: list[str] = []  # outputs of ingest whose text a new tokenizer is trained on; default: the job's samples
    upper: str | None = None  # evaluate: answers of the upper bound, for retention
    lower: str | None = None  # evaluate: answers of the lower bound
    calibration: str | None = None  # evaluate with `tokens: auto`: answers to held-out questions at every N, for its threshold
    outputs: list[str] = []  # report: outputs of any kind

    def uris(self) -> dict[str, str]:
        """Every input that is given, by its key path."""
        uris = {f"inputs.{key}": uri for key in SINGLE if (uri := getattr(self, key)) is not None}
        uris |= {f"inputs.samples[{index}].uri": item.uri for index, item in enumerate(self.samples)}
        uris |= {f"inputs.vocabulary[{index}]": uri for index, uri in enumerate(self.vocabulary)}
        return uris | {f"inputs.outputs[{index}]": uri for index, uri in enumerate(self.outputs)}

    @property
    def sample_uris(self) -> list[str]:
        return [item.uri for item in self.samples]

    def replaced(self, resolved: Callable[[str], str]) -> Inputs:
        """The same inputs with `resolved(uri)` instead of every URI."""
        changes: dict[str, Any] = {key: resolved(uri) for key in SINGLE if (uri := getattr(self, key)) is not None}
        changes["samples"] = [item.model_copy(update={"uri": resolved(item.uri)}) for item in self.samples]
        changes["vocabulary"] = [resolved(uri) for uri in self.vocabulary]
        changes["outputs"] = [resolved(uri) for uri in self.outputs]
        return self.model_copy(update=changes)


class Tower(Strict):
    """The frozen vision net and its preprocessing. Both are part of every cache key."""

    name: Literal["efficientnet_lite0", "clip", "siglip"]
    image_size: int = Field(ge=32)  # pixels; the image is made square and resized
    fit: Literal["pad", "squeeze"] = "pad"  # how it is made square: LLaVA's padding with the mean colour, or squeezed
    path: str | None = None  # clip, siglip: a directory or hub name of transformers' weights, or of a LLaVA that contains them
    layer: int = -2  # clip, siglip: the hidden state that is used, as LLaVA does
    grid_pinpoints: list[list[int]] | None = Field(
        default=None, min_length=1
    )  # LLaVA-1.6: the resolutions that an image is cut into tiles at
    decoder: Literal["pil", "fast"] = "pil"  # pil: LLaVA's pixels; fast: nearly those (extra `fast`), with their own cache keys

    @model_validator(mode="after")
    def _check_tower(self) -> Self:
        if (self.name in ("clip", "siglip")) != (self.path is not None):
            raise ValueError("expected `path` with clip and siglip, and only with them")
        sides = self.grid_pinpoints or [[self.image_size] * 2]
        if any(len(pair) != 2 or min(pair) < 1 or any(side % self.image_size for side in pair) for pair in sides):
            raise ValueError(f"expected grid_pinpoints of [height, width], multiples of image_size, got {self.grid_pinpoints}")
        if self.decoder != "pil" and (self.grid_pinpoints is not None or self.fit != "pad"):
            raise ValueError("expected decoder pil with grid_pinpoints or fit squeeze: the fast one only pads")
        return self


class Llama(Strict):
    """A new Llama, for small machines."""

    layers: int = Field(ge=1)
    width: int = Field(ge=8)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    mlp_width: int = Field(ge=8)
    vocabulary: int = Field(ge=300)  # entries of the byte-level BPE that is trained on the job's own samples

    @model_validator(mode="after")
    def _check_widths(self) -> Self:
        if self.width % self.heads or self.heads % self.kv_heads or self.width // self.heads % 2:
            raise ValueError("expected width to be an even multiple of heads and heads a multiple of kv_heads")
        return self


class Model(Strict):
    """A new model; a job that starts from `inputs.checkpoint` has no such block."""

    llama: Llama | None = None
    pretrained: str | None = None  # or: a directory, whose config.json says what it is, a GGUF file, or smollm2-135m
    projector: str | None = None  # pretrained: LLaVA's aligned projector, mm_projector.bin or .safetensors; default: a new one
    tower: Tower | None = None  # default: the LLaVA's own
    expect: Llama | None = None  # the shape of `pretrained`, for `voco plan` where it cannot read its config.json

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.llama is None) == (self.pretrained is None):
            raise ValueError("expected either `llama`, a new model, or `pretrained`, existing weights, and not both")
        if self.llama is not None and (self.tower is None or self.projector is not None):
            raise ValueError("expected `tower`, and no `projector`, with `llama`")
        return self


class Text(Strict):
    """How turns become a prompt; saved in the checkpoint."""

    template: ChatTemplateName = "vicuna_v1"
    newlines: Literal["keep", "strip"] = "keep"  # strip: as the released code does
    system: str | None = None  # the system prompt, "" for none; default: the model's own, else the template's

    @model_validator(mode="after")
    def _check_system(self) -> Self:
        if self.system and CHAT_TEMPLATES[self.template].system is None:
            raise ValueError(f"expected no `system`: {self.template} has no room for a system prompt")
        return self


class Ingest(Strict):
    """Source files to `samples/` and `rejects/`."""

    format: FormatName
    dataset: str
    split: str = "train"
    check: Literal["full", "header"] = Field(default="header", alias="validate")  # decode every pixel, or the header only
    duplicates: Literal["reject", "keep"] = "reject"
    max_missing_share: float | None = Field(default=None, ge=0, le=1)  # default 0.02, and 1.0 for video sets
    max_reject_share: float = Field(default=0.01, ge=0, le=1)
    allow_empty: bool = False  # a job that writes no row succeeds; by default it fails
    max_text_bytes: int = Field(default=1 << 20, ge=1)
    max_media_bytes: int = Field(default=1 << 30, ge=1)
    inline_max_bytes: int = Field(default=256 << 20, ge=0)  # a larger medium lies under `blobs/`, by its sha256
    max_pixels: int = Field(default=PILLOW_MAX_PIXELS, ge=1)
    max_aspect: float = Field(default=200.0, ge=1)  # longer side over shorter: images are padded to a square for the model
    unit_rows: int = Field(default=2000, ge=1)  # samples of a work unit; a kill costs each worker at most one unit
    shard_bytes: int = Field(default=256 << 20, ge=1)  # of media in one Parquet file; a unit with more writes several
    allow_private_addresses: bool = False  # cc3m_tsv: download from loopback, private and link-local addresses too
    honour_noai: bool = True  # cc3m_tsv: leave out images whose X-Robots-Tag forbids training
    download_threads: int = Field(default=16, ge=1, le=256)  # downloads of one worker at a time
    download_timeout_s: float = Field(default=20.0, gt=0)  # of one attempt, redirects included
    download_retries: int = Field(default=2, ge=0, le=10)  # after 0.5 s, 1 s, 2 s, ...
    in_process_rows: int = Field(default=2000, ge=0)  # up to this many samples, the driver does the work itself


class Features(Strict):
    """Vision features of every unique image, once."""

    tower: Tower
    unit_images: int = Field(default=2000, ge=1)
    batch: int = Field(default=64, ge=1)


class Validate(Strict):
    """Validation during training, on the first rows of `inputs.val`."""

    every: int = Field(ge=1)  # steps
    rows: int = Field(default=200, ge=1)  # of samples/, over all workers: each with all its conversations
    answers: bool = False  # also answer their questions, by the cached path, and mark the answers
    metric: MetricName = "gqa"  # the rule that marks them
    max_new_tokens: int = Field(default=8, ge=1)
    stop_after: int | None = Field(default=None, ge=1)  # end early after so many validations without a better one
    export: Literal["best", "last"] | None = None  # which step's weights are the output; default: best with `stop_after`

    @property
    def exports_best(self) -> bool:
        return self.export == "best" or (self.export is None and self.stop_after is not None)


def virtual_ranks(global_batch: int) -> int:
    """How many equal shares a global batch is drawn from; each is one worker's.

    Its largest divisor up to `VIRTUAL_RANKS`, or up to an eighth of it where that is more, for clusters of many workers.
    """
    most = min(global_batch, max(VIRTUAL_RANKS, global_batch // 8))
    return next(count for count in range(most, 0, -1) if global_batch % count == 0)


class Training(Strict):
    """Supervised training with DeepSpeed. `align` trains the projector only."""

    epochs: int = Field(ge=1)
    global_batch: int = Field(ge=1)  # samples of one optimizer step, over all workers
    micro_batch: int | None = Field(default=None, ge=1)  # samples of one forward pass of one worker, on average: passes get
    # equal numbers of tokens. Or instead:
    micro_tokens: int | None = Field(default=None, ge=8)  # most tokens of one forward pass; only a longer sample exceeds them
    learning_rate: float = Field(gt=0)
    warmup_share: float = Field(default=0.03, ge=0, le=1)  # of all steps; then a cosine to `final_lr_share`
    final_lr_share: float = Field(default=0.0, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta2: float | None = Field(default=None, ge=0, lt=1)  # default: 0.999; short runs from scratch want 0.95
    clip_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    zero_stage: Literal[1, 2, 3] = 2
    save_every: int = Field(default=500, ge=1)  # steps between checkpoints
    share_vision: bool = True  # a row is one sample: its vision prefix once, each conversation a separate text segment
    attention: AttentionName = "auto"  # all give the same result; auto: varlen on GPUs that have its kernel, else segments
    checkpoint_activations: bool = False  # keep only each layer's input and recompute the rest: less memory, a third slower
    compile: bool = False  # torch.compile of the decoder's layers: docs/operations.md, "GPU settings"
    offload: Literal["none", "optimizer", "parameters"] = "none"  # to host memory: Adam's state; and under ZeRO-3 also weights
    max_tokens: int = Field(default=2048, ge=8)  # of a prefix with one conversation; text is cut at its end, never the prefix
    text: Text | None = None  # default: the checkpoint's, or Text() for a new model
    validation: Validate | None = Field(default=None, alias="validate")

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        if (self.micro_batch is None) == (self.micro_tokens is None):
            got = "neither" if self.micro_batch is None else "both"
            raise ValueError(f"expected either `micro_batch` or `micro_tokens`, got {got}")
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError(f"offload: parameters can be in host memory under zero_stage 3 only, got {self.zero_stage}")
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile: not under zero_stage 3, which gathers weights while a layer runs: expected 1 or 2")
        return self


class Lora(Strict):
    """Low-rank adapters (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353): the language model is frozen and they are trained."""

    rank: int = Field(ge=1)
    alpha: float | None = Field(default=None, gt=0)  # a layer's change is alpha / rank x BA; default: 2 x rank
    targets: Literal["linear", "attention"] | Annotated[list[LinearName], Field(min_length=1)] = "linear"
    dropout: float = 0.0  # training here has none, so 0 only
    dora: bool = False  # also train the length of each row of the sum

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the adapted layers, which every decoder layer has."""
        return LINEAR_GROUPS[self.targets] if isinstance(self.targets, str) else tuple(self.targets)

    @property
    def full_alpha(self) -> float:
        """`alpha`, or its default."""
        return 2 * self.rank if self.alpha is None else self.alpha

    @model_validator(mode="after")
    def _check_adapter(self) -> Self:
        if self.dropout:
            raise ValueError(f"dropout: expected 0, because a step may not depend on the number of workers, got {self.dropout}")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"targets: expected each layer once, got {list(self.layers)}")
        return self


class FineTuning(Training):
    """Training of the language model: all of it, or an adapter."""

    lora: Lora | None = None  # default: every weight of the language model is trained


def lora_of(block: Training) -> Lora | None:
    """The adapter that a job trains instead of its language model, if any."""
    return block.lora if isinstance(block, FineTuning) else None


class Distill(Strict):
    """Learning from the uncompressed model: the loss is CE + weight x T^2 x KL(teacher || student), over answer tokens."""

    weight: float = Field(ge=0)
    temperature: float = Field(default=1.0, gt=0)


class ImageSft(FineTuning):
    """Supervised fine-tuning on images under the job's compression method."""

    distill: Distill | None = None  # the teacher is `inputs.teacher`, or the same network under the plain mask


class VideoSft(FineTuning):
    """Supervised fine-tuning on videos, which reads frame caches and no pixel."""

    max_frames: int = Field(default=MAX_FRAMES, ge=1)  # of one sample; more are dropped evenly


class FrameCache(Strict):
    """Frames of every video (an image is one frame), each compressed alone by the checkpoint."""

    fps: float | None = Field(default=None, ge=0.001)  # frames of one second ...
    frames: int | None = Field(default=None, ge=1)  # ... or the midpoints of this many equal parts
    max_frames: int = Field(default=MAX_FRAMES, ge=1)  # of one video; more are dropped evenly
    batch: int = Field(default=64, ge=1)  # frames of one forward pass
    dtype: Literal["bf16", "int8", "fp8"] | None = None  # of stored keys and values; default: the model's
    unit_samples: int = Field(default=50, ge=1)  # a unit is one file, and a temporary file of that size while it is written
    max_reject_share: float = Field(default=0.01, ge=0, le=1)  # samples with a frame that cannot be decoded

    @model_validator(mode="after")
    def _check_rate(self) -> Self:
        if (self.fps is None) == (self.frames is None):
            raise ValueError("expected either `fps` or `frames`, and not both")
        return self


class Report(Strict):
    """One HTML file from any outputs."""

    title: str = "VoCo report"
