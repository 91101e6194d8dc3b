"""What a job would do, read from its file and from existing outputs. Runs nothing; needs neither Ray nor torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from voco.commands.estimate import trained_parameters
from voco.commands.shapes import (
    ModelShape,
    cached_frame_bytes,
    checkpoint_model,
    count_parameters,
    llama_config,
    new_model,
    unreachable,
)
from voco.commands.training_memory import CHECKPOINT_BYTES, zero_parts
from voco.errors import Refused
from voco.job.config import FrameCache, ImageSft, Ingest, Llama, Training, lora_of
from voco.job.evaluation import Evaluate
from voco.job.load import resolve_stage
from voco.job.spec import Flow, Job, Sweep
from voco.job.trials import sweep_trials
from voco.report.table import bytes_text
from voco.run import manifest
from voco.store import storage

Models = dict[str, ModelShape | None]  # of trained models, by output


@dataclass(frozen=True)
class InputSize:
    """Rows and bytes of an input or output; None where unknown. `source` says where the figures come from."""

    rows: int | None
    bytes: int | None
    source: str
    samples: int | None = None  # rows of samples/: those about the same media are one
    conversations: int | None = None

    def __str__(self) -> str:
        figures = [f"{self.rows:,} rows"] if self.rows is not None else []
        figures += [bytes_text(self.bytes)] if self.bytes is not None else []
        return f"{self.source}: {', '.join(figures)}" if figures else self.source


def input_size(job: Job, key: str, uri: str, stage_sizes: dict[str, InputSize]) -> InputSize:
    """State and size of one input. Raises Refused when it is missing.

    `stage_sizes` are the outputs of earlier stages by `@name`. Not checked: a placeholder, or storage that does not answer.
    """
    if uri.startswith("@"):
        name, _, path = uri.partition("/")
        return InputSize(None, None, f"{path} of {name[1:]}, not made yet") if path else stage_sizes[name]
    parts = [part.expect for prefix, part in job.parts.items() if key.startswith(f"{prefix}.")]
    expect = next(iter(parts), None) or job.expect
    unchecked = InputSize(None, None, "not checked")
    if expect is not None:
        media = job.inputs.media is not None  # they have the bytes, and the annotations the rows
        rows, size = (None if key == "inputs.media" else expect.rows), (None if media and key != "inputs.media" else expect.bytes)
        unchecked = InputSize(rows, size, "not checked, expect", expect.media, expect.rows)
    if storage.is_placeholder(uri):
        return unchecked
    resolved = storage.resolve(uri)
    try:
        if not storage.exists(resolved):
            raise Refused(f"{key}: {uri} does not exist")
        if key == "inputs.media":
            return InputSize(None, None, "present")
        if key in ("inputs.annotations", "inputs.answers"):
            return InputSize(None, storage.file_size(resolved), "present")
        finished = manifest.read_manifest(resolved)
    except unreachable(resolved):
        return unchecked
    if finished is None:
        raise Refused(f"{key}: {uri} has no manifest.json: it is not a finished output of a job")
    return _manifest_size(finished)


def _manifest_size(finished: manifest.Manifest) -> InputSize:
    files = [entry for entries in finished.tables.values() for entry in entries]
    rows = sum(int(entry.get("rows", 0)) for entry in finished.tables.get("samples") or files)
    conversations = finished.statistics.get("figures", {}).get("conversations", {}).get("sum")
    samples = rows if "samples" in finished.tables else None
    return InputSize(rows or None, sum(int(entry["bytes"]) for entry in files), "present", samples, conversations)


@storage.s3_patience(0)
def plan_lines(file: str, job: Job) -> list[str]:
    """The plan, a line each. Raises Refused for an input that is missing."""
    is_flow = isinstance(job.block, Flow)
    lines = [f"{job.name}: {job.kind}" + (f", {len(job.stages)} stages" if is_flow else "")]
    lines.append(f"  output {job.output}: {output_state(job)}")
    free = None if storage.is_placeholder(job.output) else storage.free_bytes(job.output_uri)
    if free is not None:
        lines.append(f"  free disk there: {bytes_text(free)}")
    stage_sizes: dict[str, InputSize] = {}
    outputs: dict[str, str] = {}
    models: Models = {}
    for number, stage in enumerate(job.stages, 1):
        resolved = resolve_stage(stage, outputs) if is_flow else stage
        if is_flow:
            state = output_state(resolved)
            lines.append(f"[{number}/{len(job.stages)}] {stage.name}: {stage.kind} -> {stage.output}: {state}")
        prefix = f"{file}: flow.stages[{number - 1}]." if is_flow else f"{file}: "
        sizes: dict[str, InputSize] = {}
        for key, uri in stage.uris().items():
            try:
                sizes[key] = input_size(stage, key, uri, stage_sizes)
            except Refused as error:
                raise Refused(f"{prefix}{error}") from None
            lines.append(f"  {key} {uri}: {sizes[key]}")
        try:
            lines += [f"  {line}" for line in _source_preview(stage)]
        except Refused as error:
            raise Refused(f"{prefix}{error}") from None
        lines.append(f"  resources: {_resources(stage)}")
        lines += [f"  {line}" for line in stage_details(resolved, sizes, models)]
        if stage.stage.trains:
            models[stage.output] = _model_shape(resolved, models)
        outputs[stage.name] = stage.output
        stage_sizes[f"@{stage.name}"] = _output_size(stage)
    return lines


def _source_preview(stage: Job) -> list[str]:
    """What the first source rows of an ingest are. Raises Refused for a file that `run` would refuse.

    Nothing for storage that does not answer, and for questions whose answers are in a second file.
    """
    uri = stage.inputs.annotations
    if not isinstance(stage.block, Ingest) or uri is None or stage.inputs.answers is not None or storage.is_placeholder(uri):
        return []
    from voco.ingest.preview import preview

    resolved = storage.resolve(uri)
    try:
        return [preview(stage.block, resolved)]
    except unreachable(resolved):
        return []


def _output_size(stage: Job) -> InputSize:
    """The size of a stage's output, as later stages of the flow can know it."""
    output = stage.output_uri
    try:
        finished = None if storage.is_placeholder(stage.output) else manifest.read_manifest(output)
    except unreachable(output):
        finished = None
    if finished is not None:
        return _manifest_size(finished)
    if stage.kind == "ingest" and stage.expect is not None:
        expect = stage.expect
        return InputSize(expect.rows, expect.bytes, f"from {stage.name}, expect", expect.media, expect.rows)
    return InputSize(None, None, f"from {stage.name}, not made yet")


def output_state(job: Job) -> str:
    """`new`, `unfinished`, `finished`, or which run it belongs to. A run id is only known when the inputs exist.

    `not checked`: a placeholder, or storage that does not answer.
    """
    if storage.is_placeholder(job.output):
        return "not checked"
    output = job.output_uri
    try:
        return _reachable_state(job, output)
    except unreachable(output):
        return "not checked"


def _reachable_state(job: Job, output: str) -> str:
    owner = manifest.output_run_id(output)
    if owner is None:
        return "foreign: holds files that no job wrote" if storage.list_names(output) else "new"
    try:
        run_id = manifest.job_run_id(job)
    except Refused:  # an input does not exist (yet), so the run id is unknown
        return f"holds run {owner}"
    if owner != run_id:
        return f"foreign: holds run {owner}, this job is {run_id}; use another output, or --replace"
    return f"finished as {owner}" if manifest.read_manifest(output) is not None else f"unfinished, continues {owner}"


@storage.s3_patience(0)
def plan_exit_code(file: str, job: Job) -> int:
    """0; Refused when `run` would refuse the output. A flow's stages only appear in the lines: --replace runs them again."""
    state = output_state(job)
    if state.startswith("foreign"):
        raise Refused(f"{file}: output: {job.output} is {state}")
    return 0


def _resources(job: Job) -> str:
    if job.stage.in_driver:
        return "none but the driver"
    resources = job.resources
    gpus = f", {resources.gpus_per_worker:g} GPU each" if resources.gpus_per_worker else ""
    accelerator = f" ({resources.accelerator})" if resources.accelerator else ""
    return f"{resources.workers_text} x {resources.cpus_per_worker:g} CPU{gpus}{accelerator}"


def _model_shape(job: Job, models: Models) -> ModelShape | None:
    """The shape of the model that a stage starts from; None where neither an earlier stage nor a file says it."""
    uri = job.inputs.checkpoint or ""
    if job.model is not None:
        return new_model(job.model)
    return models[uri] if uri in models else checkpoint_model(uri)


def stage_details(job: Job, sizes: dict[str, InputSize], models: Models | None = None) -> list[str]:
    """Details of a stage's work: steps and memory, frames and bytes, or trials. `models` are those of earlier stages' outputs."""
    block = job.block
    if job.stage.trains:
        return training_plan(job, sizes, models)
    if isinstance(block, Sweep):
        trials = sweep_trials(job)
        train_sizes = {key.removeprefix("sweep.train."): size for key, size in sizes.items()}
        lines = [_resources(block.train), *training_plan(block.train, train_sizes, models)]
        names = ", ".join(trial.name for trial in trials)
        return [f"{len(trials)} trials, {block.concurrent} at a time: {names}", *(f"each trial: {line}" for line in lines)]
    if isinstance(block, FrameCache):
        return [_frame_plan(job)]
    if isinstance(block, Evaluate):
        return _evaluation_plan(block)
    return []


def _evaluation_plan(block: Evaluate) -> list[str]:
    if block.fastv is not None:
        layers, share = block.fastv.layer, block.fastv.keep
        return [f"FastV: {layers} layers see all vision tokens, the others {share:.1%}; every question runs its images"]
    if block.is_adaptive:
        return [f"every question at the smallest N first, and again while unsure: {block.budget:g} tokens of a view on average"]
    if block.tokens is not None:
        return [f"every question at N = {', '.join(map(str, block.fixed_tokens))}, from one compression of its views"]
    return []


def _frame_plan(job: Job) -> str:
    """Bytes of a cached frame: of the checkpoint's shape where it exists, else of Vicuna-7B's with N = 1 as an example."""
    block: FrameCache = job.block
    model = checkpoint_model(job.inputs.checkpoint or "")
    number = {None: "bytes of the model's dtype", "bf16": "2 bytes"}.get(block.dtype, "1 byte + 4 of a scale")
    formula = f"bytes a frame: 2 x layers x kv_heads x (head_dim x N x {number})"
    if model is None:
        return f"{formula}; at 7B with N = 1 {cached_frame_bytes((32, 32, 1, 128), block.dtype or 'bf16'):,}"
    return f"{formula} = {model.frame_bytes(block.dtype):,}"


def training_plan(job: Job, sizes: dict[str, InputSize], models: Models | None = None) -> list[str]:
    """Steps of a training job, and the memory of a new model, with the arithmetic."""
    block: Training = job.block
    tables = [(sizes[f"inputs.samples[{index}].uri"], item.weight) for index, item in enumerate(job.inputs.samples)]
    unit, note = ("samples" if block.share_vision else "conversations"), ""
    counts = [size.samples if block.share_vision else size.conversations for size, _ in tables]
    if None in counts:  # rows of a source are conversations, rows of samples/ are samples
        counts, unit = [size.rows for size, _ in tables], "rows"
        note = (
            " (at most: rows about the same media are one sample)"
            if block.share_vision
            else " (at least: a row may have several)"
        )
    known = [count for count in counts if count is not None]
    lines = []
    if len(known) == len(tables):
        total = sum(round(count * weight) for count, (_, weight) in zip(known, tables, strict=True))
        steps = math.ceil(total / block.global_batch)
        lines.append(
            f"steps: ceil({total:,} {unit} / {block.global_batch}) x {block.epochs} epochs = {steps * block.epochs:,}{note}"
        )
    else:
        lines.append(f"steps: rows / {block.global_batch} x {block.epochs} epochs; rows are known once the samples exist")
    if block.precision == "bf16" and not job.resources.gpus_per_worker:
        lines.append("precision: workers without a GPU multiply bf16 many times slower than fp32 on most CPUs; consider fp32")
    if isinstance(block, ImageSft) and block.distill is not None:
        own = job.inputs.teacher is None
        placed = "in shards" if block.zero_stage == 3 else "complete on every worker"
        teacher = "the same network under the plain mask" if own else f"inputs.teacher, {placed}"
        lines.append(f"distillation: a second forward pass a step, of {teacher}")
    if lora_of(block) is not None:
        lines.append(_lora_plan(job, _model_shape(job, models or {})))
    if job.model is not None and job.model.llama is not None:
        lines += training_memory(job, job.model.llama)
    return lines


def _lora_plan(job: Job, model: ModelShape | None) -> str:
    """What an adapter trains, in numbers where the model's shape is known."""
    lora = lora_of(job.block)
    assert lora is not None
    name = "DoRA" if lora.dora else "LoRA"
    text = f"{name}: rank {lora.rank}, alpha {lora.full_alpha:g}, on {', '.join(lora.layers)}"
    if model is None:
        return f"{text}: rank x (inputs + outputs) trained parameters each"
    count = trained_parameters(model.compressed(job.compression), job.block)
    saved = count + ("projector." in job.stage.trains) * model.projector_parameters
    share = f"{count / model.parameters:.2%} of the language model's"
    return f"{text}: {count:,} trained parameters, {share}; a checkpoint has {bytes_text(CHECKPOINT_BYTES * saved)}"


def training_memory(job: Job, llama: Llama) -> list[str]:
    """Bytes a worker for weights, gradients and Adam's state under ZeRO; activations and the projector come on top."""
    block: Training = job.block
    count, workers, stage = count_parameters(llama_config(llama)), job.resources.fewest_workers, block.zero_stage
    parts = zero_parts(block, workers, job.resources.gpus_per_worker > 0)
    frozen, terms = 0, [f"{size}/{ranks}" if ranks > 1 else f"{size}" for size, ranks in parts]
    memory = f"{count:,} x ({' + '.join(terms)}) bytes"
    shape = new_model(job.model) if job.model is not None and lora_of(block) is not None else None
    if shape is not None:  # frozen weights have no gradient and no state
        trained = trained_parameters(shape.compressed(job.compression), block)
        frozen = count - trained
        memory = f"({count:,} x {terms[0]} + {trained:,} x ({' + '.join(terms[1:])})) bytes"
    each = [size / ranks * (count - frozen * (part > 0)) for part, (size, ranks) in enumerate(parts)]
    memory += f" = {bytes_text(sum(each))}"
    if block.offload != "none":  # Adam's state, gradients where they are split, and the weights
        first = 0 if block.offload == "parameters" else 1 if block.zero_stage >= 2 else 2
        memory += f", of which {bytes_text(sum(each[first:]))} in host memory"
    of = f" of {workers}" if job.resources.is_elastic else ""  # the fewest, whose shards are the largest
    return [
        f"language model: {count:,} parameters",
        f"memory a worker{of}, ZeRO-{stage}: {memory}, plus activations, projector and tower",
    ]
