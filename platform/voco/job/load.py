"""A job file read, checked and completed: defaults of a flow's stages, and the trials of a sweep."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from voco.errors import Refused, one_line
from voco.job import validation_errors
from voco.job.spec import OWN_CHECKPOINT, Flow, Job, Sweep
from voco.job.trials import sweep_trials
from voco.store import storage


class _JobLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which reads YAML 1.1, with the exponents of YAML 1.2: there `2e-5` and `1.5e3` are numbers, not text.

    The form is `tag:yaml.org,2002:float` of the core schema (YAML 1.2.2, section 10.3.2). Text in quotes stays text.
    """


_JobLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+\Z"), list("-+.0123456789")
)


def load_job(path: str, text: str | None = None) -> Job:
    """Read a job file. Local paths in it stay as written, relative to the working directory of whoever runs it.

    Raises Refused with one line for the first mistake: `file: key.path: expected ..., got ...; did you mean ...`.
    """
    try:
        raw = yaml.load(Path(path).read_text() if text is None else text, _JobLoader)
    except FileNotFoundError as error:
        raise Refused(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:  # a directory, a picture
        raise Refused(f"{path}: expected a YAML file: {one_line(error)}") from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise Refused(f"{path}: not YAML: {problem}") from error
    if not isinstance(raw, dict):
        raise Refused(f"{path}: expected a mapping of keys, got {'nothing' if raw is None else type(raw).__name__}")
    return build_job(path, raw)


def build_job(path: str, raw: dict[str, Any]) -> Job:
    """A checked job from parsed YAML; `path` is named in errors only."""
    try:
        job = Job.model_validate(raw)
    except ValidationError as error:
        raise Refused(f"{path}: {validation_errors.first_error(error, Job)}") from None
    if not job.output:
        raise Refused(f"{path}: output: expected a path or s3:// URI, got nothing")
    if isinstance(job.block, Flow):
        return _complete_stages(path, job, job.block)
    return _complete_parts(f"{path}: ", job)


def _complete_stages(path: str, job: Job, flow: Flow) -> Job:
    """Default outputs, seeds, resources and tracking of a flow's stages; `@name` must be an earlier stage."""
    stages: list[Job] = []
    for index, stage in enumerate(flow.stages):
        prefix = f"{path}: flow.stages[{index}]"
        if isinstance(stage.block, Flow):
            raise Refused(f"{prefix}.kind: a flow cannot contain a flow")
        earlier = [done.name for done in stages]
        if stage.name in earlier:
            raise Refused(f"{prefix}.name: {stage.name} is used twice")
        for key, uri in stage.uris().items():
            name = uri[1:].split("/")[0]
            if uri.startswith("@") and name not in earlier:
                hint = validation_errors.did_you_mean(name, earlier, "@")
                raise Refused(f"{prefix}.{key}: expected an earlier stage, got {uri}{hint}")
        output = stage.output or storage.join(job.output, stage.name)
        inherited = _inherit(f"{prefix}.", stage, job).model_copy(update={"output": output})
        stages.append(_complete_parts(f"{prefix}.", inherited))
    return with_block(job, stages=stages)


def _inherit(prefix: str, part: Job, parent: Job) -> Job:
    """The part with the seed, resources and tracking of its parent, unless it has its own."""
    keys = [key for key in ("seed", "resources", "tracking") if key not in part.model_fields_set]
    inherited = part.model_copy(update={key: getattr(parent, key) for key in keys})
    try:
        inherited.check_training()
    except ValueError as error:
        raise Refused(f"{prefix}{error}") from None
    return inherited


def _complete_parts(prefix: str, job: Job) -> Job:
    """A sweep's inner jobs completed; every trial must be a job that could be submitted alone."""
    if not isinstance(job.block, Sweep):
        return job
    parts = {path.split(".")[1]: _inherit(f"{prefix}{path}.", part, job) for path, part in job.parts.items()}
    completed = with_block(job, **parts)
    try:
        sweep_trials(completed)
    except ValidationError as error:
        raise Refused(f"{prefix}sweep.axes: {validation_errors.first_error(error, Job)}") from None
    except (ValueError, KeyError) as error:
        raise Refused(f"{prefix}sweep.axes: {error.args[0]}") from None
    return completed


def with_block(job: Job, **changes: Any) -> Job:
    """A copy of the job whose block has these changes."""
    return job.model_copy(update={job.kind: job.block.model_copy(update=changes)})


def resolve_stage(stage: Job, outputs: dict[str, str], keep: str = "") -> Job:
    """The stage with every `@name` replaced by that stage's output, `@name/path` by the path inside it, except `keep`."""

    def resolved(uri: str) -> str:
        if not uri.startswith("@") or uri == keep:
            return uri
        name, _, path = uri[1:].partition("/")
        return storage.join(outputs[name], path) if path else outputs[name]

    with_inputs = stage.model_copy(update={"inputs": stage.inputs.replaced(resolved)})
    if not isinstance(stage.block, Sweep):
        return with_inputs
    parts = {path.split(".")[1]: resolve_stage(part, outputs, OWN_CHECKPOINT) for path, part in stage.parts.items()}
    return with_block(with_inputs, **parts)
