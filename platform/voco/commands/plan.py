"""What a job would do, read from its file and from what is there already. Runs nothing; needs neither Ray nor torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from voco.errors import Refused
from voco.job.config import ImageSft, Llama, Training
from voco.job.spec import TRAINING, Job, resolve_stage
from voco.run import manifest
from voco.store import storage


@dataclass(frozen=True)
class InputSize:
    """Rows and bytes of an input or output; None where nothing tells. `source` says what does."""

    rows: int | None
    bytes: int | None
    source: str

    def __str__(self) -> str:
        parts = [f"{self.rows:,} rows" if self.rows is not None else "", _bytes(self.bytes) if self.bytes is not None else ""]
        known = ", ".join(part for part in parts if part)
        return f"{self.source}: {known}" if known else self.source


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def input_size(job: Job, key: str, uri: str, made: dict[str, InputSize]) -> InputSize:
    """State and size of one input. Raises Refused when it is missing.

    `made` holds the outputs of earlier stages by `@name`. Not checked: a placeholder, or storage that does not answer.
    """
    if uri.startswith("@"):
        name, _, inside = uri.partition("/")
        return InputSize(None, None, f"{inside} of {name[1:]}, not made yet") if inside else made[name]
    expected = next((part.expect for where, part in job.parts.items() if key.startswith(f"{where}.")), None) or job.expect
    unchecked = (
        InputSize(expected.rows, expected.bytes, "not checked, expect") if expected else InputSize(None, None, "not checked")
    )
    if storage.is_placeholder(uri):
        return unchecked
    place = storage.resolve(uri)
    try:
        if not storage.exists(place):
            raise Refused(f"{key}: {uri} does not exist")
        if key == "inputs.media":
            return InputSize(None, None, "present")
        if key in ("inputs.annotations", "inputs.answers"):
            return InputSize(None, storage.file_size(place), "present")
        found = manifest.read_manifest(place)
    except _unreachable(place):
        return unchecked
    if found is None:
        raise Refused(f"{key}: {uri} has no manifest.json: it is not a finished output of a job")
    return _of_manifest(found)


def _unreachable(place: str) -> tuple[type[BaseException], ...]:
    """What storage raises when it does not answer, or has no credentials."""
    if not place.startswith("s3://"):
        return (TimeoutError,)
    from botocore.exceptions import BotoCoreError

    return (OSError, BotoCoreError)


def _of_manifest(found: manifest.Manifest) -> InputSize:
    files = [entry for entries in found.tables.values() for entry in entries]
    samples = found.tables.get("samples") or files
    rows = sum(int(entry.get("rows", 0)) for entry in samples)
    return InputSize(rows or None, sum(int(entry["bytes"]) for entry in files), "present")


@storage.s3_patience(0)
def plan_lines(file: str, job: Job) -> list[str]:
    """The plan, a line each. Raises Refused for an input that is missing."""
    stages = job.flow.stages if job.flow is not None else [job]
    out = [f"{job.name}: {job.kind}" + (f", {len(stages)} stages" if job.flow is not None else "")]
    out.append(f"  output {job.output}: {output_state(job)}")
    free = None if storage.is_placeholder(job.output) else storage.free_bytes(storage.resolve(job.output))
    if free is not None:
        out.append(f"  free disk there: {_bytes(free)}")
    made: dict[str, InputSize] = {}
    outputs: dict[str, str] = {}
    for number, stage in enumerate(stages, 1):
        if job.flow is not None:
            state = output_state(resolve_stage(stage, outputs))
            out.append(f"[{number}/{len(stages)}] {stage.name}: {stage.kind} -> {stage.output}: {state}")
        where = f"{file}: flow.stages[{number - 1}]." if job.flow is not None else f"{file}: "
        sizes: dict[str, InputSize] = {}
        for key, uri in stage.uris().items():
            try:
                sizes[key] = input_size(stage, key, uri, made)
            except Refused as error:
                raise Refused(f"{where}{error}") from None
            out.append(f"  {key} {uri}: {sizes[key]}")
        out.append(f"  resources: {_resources(stage)}")
        out += [f"  {line}" for line in stage_details(stage, sizes)]
        outputs[stage.name] = stage.output
        made[f"@{stage.name}"] = _made(stage, sizes)
    return out


def _made(stage: Job, sizes: dict[str, InputSize]) -> InputSize:
    """What a later stage of the flow knows of this one's output."""
    output = storage.resolve(stage.output)
    try:
        found = None if storage.is_placeholder(stage.output) else manifest.read_manifest(output)
    except _unreachable(output):
        found = None
    if found is not None:
        return _of_manifest(found)
    if stage.kind == "ingest" and stage.expect is not None:
        return InputSize(stage.expect.rows, stage.expect.bytes, f"from {stage.name}, expect")
    return InputSize(None, None, f"from {stage.name}, not made yet")


def output_state(job: Job) -> str:
    """`new`, `unfinished`, `finished`, or whose it is. A run id is only known when the inputs are there.

    `not checked`: a placeholder, or storage that does not answer.
    """
    if storage.is_placeholder(job.output):
        return "not checked"
    output = storage.resolve(job.output)
    try:
        return _held_state(job, output)
    except _unreachable(output):
        return "not checked"


def _held_state(job: Job, output: str) -> str:
    held = manifest.output_run_id(output)
    if held is None:
        return "foreign: holds files that no job wrote" if storage.list_names(output) else "new"
    try:
        run_id = manifest.job_run_id(job)
    except Refused:  # an input is not there (yet): whose output it is cannot be told
        return f"holds run {held}"
    if held != run_id:
        return f"foreign: holds run {held}, this job is {run_id}; use another output, or --replace"
    return f"finished as {held}" if manifest.read_manifest(output) is not None else f"unfinished, continues {held}"


@storage.s3_patience(0)
def plan_exit_code(file: str, job: Job) -> int:
    """0; Refused when `run` would refuse the output. A flow's stages are told in the lines: --replace makes them again."""
    state = output_state(job)
    if state.startswith("foreign"):
        raise Refused(f"{file}: output: {job.output} is {state}")
    return 0


def _resources(job: Job) -> str:
    held = job.resources
    gpus = f", {held.gpus_per_worker:g} GPU each" if held.gpus_per_worker else ""
    return f"{held.workers} x {held.cpus_per_worker:g} CPU{gpus}" + (f" ({held.accelerator})" if held.accelerator else "")


def stage_details(job: Job, sizes: dict[str, InputSize]) -> list[str]:
    """What is known of the work of one stage: steps and memory, frames and bytes, trials."""
    if job.kind in TRAINING:
        return training_plan(job, sizes)
    if job.sweep is not None:
        from voco.job.trials import sweep_trials

        found = sweep_trials(job)
        inner = {key.removeprefix("sweep.train."): size for key, size in sizes.items()}
        lines = [f"{len(found)} trials, {job.sweep.concurrent} at a time: {', '.join(trial.name for trial in found)}"]
        return lines + [f"each trial: {line}" for line in [_resources(job.sweep.train), *training_plan(job.sweep.train, inner)]]
    if job.frame_cache is not None:
        return _frame_bytes(job)
    if job.evaluate is not None and job.evaluate.fastv is not None:
        held = job.evaluate.fastv
        return [f"FastV: {held.layer} layers see all vision tokens, the others {held.keep:.1%}; every question runs its images"]
    if job.evaluate is not None and job.evaluate.tokens is not None:
        return [f"every question at N = {', '.join(map(str, job.evaluate.tokens))}, from one compression of its views"]
    return []


def _frame_bytes(job: Job) -> list[str]:
    """Bytes of a cached frame, when the checkpoint is there to tell its shape."""
    uri = job.inputs.checkpoint or ""
    place = storage.join("" if uri.startswith("@") or storage.is_placeholder(uri) else storage.resolve(uri), "model/config.json")
    formula = "2 x layers x kv_heads x head_dim x N x bytes of the dtype (524,288 at 7B, N=1, bf16)"
    if place.startswith("/model") or not storage.exists(place):
        return [f"bytes a frame: {formula}"]
    config = storage.read_json(place)
    held, n = config["language_model"], config["layout"]["tokens"]
    width = held.get("head_dim") or held["hidden_size"] // held["num_attention_heads"]
    each = 4 if "32" in str(held.get("dtype")) else 2
    count = 2 * held["num_hidden_layers"] * held["num_key_value_heads"] * width * n * each
    return [f"bytes a frame: {formula} = {count:,}"]


def training_plan(job: Job, sizes: dict[str, InputSize]) -> list[str]:
    """Steps of a training job, and what a new model takes in memory, with the arithmetic."""
    block: Training = job.block
    counted = [(sizes[f"inputs.samples[{index}].uri"].rows, item.weight) for index, item in enumerate(job.inputs.samples)]
    out = []
    if all(rows is not None for rows, _ in counted):
        rows = sum(round((count or 0) * weight) for count, weight in counted)
        each = math.ceil(rows / block.global_batch)
        how = "" if block.share_vision else " (at least: every conversation is a sample of its own)"
        out.append(f"steps: ceil({rows:,} rows / {block.global_batch}) x {block.epochs} epochs = {each * block.epochs:,}{how}")
    else:
        out.append(f"steps: rows / {block.global_batch} x {block.epochs} epochs; rows are known once the samples are there")
    if block.precision == "bf16" and not job.resources.gpus_per_worker:
        out.append("precision: workers without a GPU multiply bf16 many times slower than fp32 on most CPUs; consider fp32")
    if isinstance(block, ImageSft) and block.distill is not None:
        whose = "the same network under the plain mask" if job.inputs.teacher is None else "inputs.teacher, whole on every worker"
        out.append(f"distillation: a second forward pass a step, of {whose}")
    if job.model is not None and job.model.llama is not None:
        out += training_memory(job, job.model.llama)
    return out


def count_parameters(llama: Llama) -> int:
    """Weights of the language model: embedding and output head apart, no biases, two norms a layer and one at the end."""
    head = llama.width // llama.heads
    attention = 2 * llama.width * llama.width + 2 * llama.width * llama.kv_heads * head
    layer = attention + 3 * llama.width * llama.mlp_width + 2 * llama.width
    return llama.layers * layer + 2 * llama.vocabulary * llama.width + llama.width


def training_memory(job: Job, llama: Llama) -> list[str]:
    """Bytes a worker for weights, gradients and Adam's state under ZeRO; activations and the projector come on top."""
    block: Training = job.block
    count, workers, stage = count_parameters(llama), job.resources.workers, block.zero_stage
    # bf16: 2 + 2 bytes and 12 of fp32 master weights and moments; fp32: 4 + 4 and 8 of moments.
    weights, gradients, adam = (2, 2, 12) if block.precision == "bf16" else (4, 4, 8)
    split = [workers if stage >= least else 1 for least in (3, 2, 1)]
    total = sum(count * size / share for size, share in zip((weights, gradients, adam), split, strict=True))
    terms = " + ".join(
        f"{size}" + (f"/{share}" if share > 1 else "") for size, share in zip((weights, gradients, adam), split, strict=True)
    )
    return [
        f"language model: {count:,} parameters",
        f"memory a worker, ZeRO-{stage}: {count:,} x ({terms}) bytes = {_bytes(total)}, plus activations, projector and tower",
    ]
