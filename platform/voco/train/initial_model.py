"""The model that a training job starts from: its checkpoint, or a new one, under the layout that it is trained in."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from voco.errors import Refused
from voco.job.config import Compression, Method, Text
from voco.job.spec import Job
from voco.sequence.chat_template import end_of_answer_id
from voco.sequence.sequence import Layout
from voco.store import storage
from voco.store.samples import SampleTables

Q_FORMER_LAYERS = 2  # of a new one; each has cross-attention, in BLIP-2 every second of twelve
TOKENIZER_ROWS = 200_000  # rows whose text a new tokenizer is trained on, at most


def initial_model(job: Job, output: str) -> tuple[str, Layout]:
    """The directory that holds the model to start from, and the layout that this job trains it under.

    A new model is written to `<output>/initial` once; a function of the job's seed and samples.
    """
    from voco.model import build, weights

    block, compression = job.block, job.compression
    method: Method = "none" if compression is None else compression.method
    tokens = 0 if compression is None else compression.tokens  # align has no <voco>
    if job.inputs.checkpoint is not None:
        config = weights.read_config(job.inputs.checkpoint)
        layout = Layout(**config["layout"])
        told = layout.template != "plain" or job.kind == "align"  # plain is of captions: it drops every question
        inherited = Text(template=layout.template, newlines=layout.newlines) if told else Text()  # type: ignore[arg-type]
        text = block.text or inherited
        changes: dict[str, Any] = {"method": method, "tokens": tokens, "template": text.template, "newlines": text.newlines}
        changes["q_former_layers"] = _q_former_layers(compression, layout)
        if text.template != layout.template:
            changes["eos_id"] = end_of_answer_id(text.template, weights.read_tokenizer(job.inputs.checkpoint))
        return storage.resolve(job.inputs.checkpoint), layout.model_copy(update=changes)
    assert job.model is not None
    initial = storage.join(output, "initial")
    if not storage.exists(storage.join(initial, "model", "config.json")):
        text = block.text or (Text(template="plain") if job.kind == "align" else Text())
        model = build.create_model(job.model, method, tokens, text, _texts(job), job.seed, _q_former_layers(compression))
        with tempfile.TemporaryDirectory() as folder:
            weights.save_checkpoint(model, weights.own_state(model), Path(folder) / "model")
            storage.put_directory(Path(folder) / "model", storage.join(initial, "model"))
    return initial, Layout(**weights.read_config(initial)["layout"])


def _q_former_layers(compression: Compression | None, held: Layout | None = None) -> int:
    """Layers of the job's Q-Former: 0 for other methods, those of the checkpoint's layout `held` if it has one."""
    if compression is None or compression.method != "q_former":
        return 0
    if held is None or held.method != "q_former":
        return compression.q_former_layers or Q_FORMER_LAYERS
    layers = compression.q_former_layers or held.q_former_layers
    if (compression.tokens, layers) != (held.tokens, held.q_former_layers):
        raise Refused(
            f"compression: the checkpoint's Q-Former has {held.tokens} queries and {held.q_former_layers} layers, got "
            f"{compression.tokens} and {layers}; start from a checkpoint of another method for a new one"
        )
    return layers


def _texts(job: Job) -> Iterator[str]:
    uris = job.inputs.vocabulary or [item.uri for item in job.inputs.samples]
    tables = SampleTables([storage.resolve(uri) for uri in uris], [1.0] * len(uris))
    for row in itertools.islice(tables.rows(["conversations"]), TOKENIZER_ROWS):
        for conversation in row["conversations"]:
            yield from (turn["text"] for turn in conversation["turns"])
