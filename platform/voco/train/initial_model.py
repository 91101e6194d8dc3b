"""The model that a training job starts from: its checkpoint or a new model, and the layout that it is trained under."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from voco.errors import Refused
from voco.job.chat_templates import CHAT_TEMPLATES
from voco.job.compression import Compression
from voco.job.config import Text
from voco.job.spec import Job
from voco.model.checkpoint_layout import has_model
from voco.sequence.chat_template import end_of_answer_id
from voco.sequence.sequence import Layout
from voco.store import storage
from voco.store.samples import SampleTables

Q_FORMER_LAYERS = 2  # of a new Q-Former; each has cross-attention (in BLIP-2 every second of twelve)
TOKENIZER_ROWS = 200_000  # rows whose text a new tokenizer is trained on, at most


def initial_model(job: Job, output: str) -> tuple[str, Layout]:
    """The directory of the model to start from, and the layout that this job trains it under.

    A new model is written to `<output>/initial` once; it is a function of the job's seed and samples.
    """
    compression = job.compression
    method = "none" if compression is None else compression.method
    tokens = 0 if compression is None else compression.most_tokens  # align has no <voco>
    if job.inputs.checkpoint is not None:
        return job.resolved_inputs.checkpoint or "", _continued_layout(job, job.inputs.checkpoint, method, tokens)
    from voco.model import build, weights

    assert job.model is not None
    initial = storage.join(output, "initial")
    if not has_model(initial):
        text = job.block.text or (Text(template="plain") if job.kind == "align" else None)
        model = build.create_model(
            job.model, method, tokens, text, _vocabulary_texts(job), job.seed, _q_former_layers(compression)
        )
        with tempfile.TemporaryDirectory() as folder:
            weights.save_checkpoint(model, weights.own_state(model), Path(folder) / "model")
            storage.put_directory(Path(folder) / "model", storage.join(initial, "model"))
    return initial, Layout(**weights.read_config(initial)["layout"])


def _continued_layout(job: Job, checkpoint: str, method: str, tokens: int) -> Layout:
    """A checkpoint's layout with the job's method, N and chat template; a caption template is not inherited."""
    from voco.model import weights

    layout = Layout(**weights.read_config(checkpoint)["layout"])
    inherits = job.kind == "align" or not CHAT_TEMPLATES[layout.template].drops_questions
    own = Text(template=layout.template, newlines=layout.newlines, system=layout.system)  # type: ignore[arg-type]
    text = job.block.text or (own if inherits else Text())
    changes: dict[str, Any] = {"method": method, "tokens": tokens, "template": text.template, "newlines": text.newlines}
    changes["system"] = layout.system if text.system is None and text.template == layout.template else text.system
    changes["q_former_layers"] = _q_former_layers(job.compression, layout)
    if text.template != layout.template:
        changes["eos_id"] = end_of_answer_id(text.template, weights.read_tokenizer(checkpoint))
    return layout.model_copy(update=changes)


def _q_former_layers(compression: Compression | None, layout: Layout | None = None) -> int:
    """Layers of the job's Q-Former: 0 for other methods, those of the checkpoint's `layout` if it has one."""
    if compression is None or compression.method != "q_former":
        return 0
    if layout is None or layout.method != "q_former":
        return compression.q_former_layers or Q_FORMER_LAYERS
    layers = compression.q_former_layers or layout.q_former_layers
    if (compression.most_tokens, layers) != (layout.tokens, layout.q_former_layers):
        raise Refused(
            f"compression: the checkpoint's Q-Former has {layout.tokens} queries and {layout.q_former_layers} layers, got "
            f"{compression.most_tokens} and {layers}; start from a checkpoint of another method for a new one"
        )
    return layers


def _vocabulary_texts(job: Job) -> Iterator[str]:
    uris = job.inputs.vocabulary or [item.uri for item in job.inputs.samples]
    tables = SampleTables([storage.resolve(uri) for uri in uris])
    for row in itertools.islice(tables.rows(["conversations"]), TOKENIZER_ROWS):
        for conversation in row["conversations"]:
            yield from (turn["text"] for turn in conversation["turns"])
