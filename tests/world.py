"""A small `samples/` table of real images with questions, written directly, in the form of the ingest stage."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapes
from PIL import Image

from voco.job.config import Model, Text
from voco.job.spec import Job
from voco.model import build, weights
from voco.run import manifest
from voco.store import parquet, schemas, storage
from voco.store.index import group_facts, samples_rows, write_table_index

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 210), "yellow": (220, 210, 40)}


def picture(index: int) -> tuple[bytes, str, str]:
    """A PNG of two coloured halves with noise, and the colours left and right."""
    draw = np.random.default_rng(index)
    names = list(COLOURS)
    left, right = names[draw.integers(4)], names[draw.integers(4)]
    pixels = np.zeros((32, 32, 3), dtype=np.int64)
    pixels[:, :16], pixels[:, 16:] = COLOURS[left], COLOURS[right]
    pixels += draw.integers(-20, 20, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue(), left, right


def conversation(text: str, answer: str, evaluation: bool, category: str | None = None) -> dict[str, Any]:
    turns = [{"role": "user", "text": text}]
    if not evaluation:
        turns.append({"role": "assistant", "text": answer})
    answers = [answer] if evaluation else []
    return {"source_id": "q", "turns": turns, "placeholder": "before", "answers": answers, "choices": [], "category": category}


def sample_rows(count: int, evaluation: bool = False, first: int = 0, text_every: int = 5) -> list[dict[str, Any]]:
    """`count` rows; every `text_every`-th is text only."""
    rows: list[dict[str, Any]] = []
    for index in range(first, first + count):
        name = hashlib.sha256(str(index).encode()).hexdigest()[:32]
        row = {"sample_id": name, "dataset": "world", "split": "test" if evaluation else "train"}
        if text_every and index % text_every == 0 and not evaluation:
            talk = [conversation("say hello", f"hello {index % 3}", evaluation)]
            rows.append({**row, "modality": "text", "media": [], "conversations": talk})
            continue
        data, left, right = picture(index)
        medium = {"bytes": data, "path": f"{index}.png", "format": "png", "sha256": hashlib.sha256(data).hexdigest()}
        medium |= {"width": 32, "height": 32}
        talk = [
            conversation("what color is the left?", left, evaluation, "left"),
            conversation("what color is the right?", right, evaluation, "right"),
        ]
        rows.append({**row, "modality": "image", "media": [medium], "conversations": talk})
    return rows


def write_samples(output: str, rows: list[dict[str, Any]], rows_per_group: int = 8) -> str:
    """A finished `samples/` output at `output`."""
    table = pa.Table.from_pylist(rows, schema=schemas.SAMPLES)
    groups = [table.slice(start, rows_per_group) for start in range(0, len(rows), rows_per_group)]
    entry = parquet.write_table(storage.join(output, "samples", "part-00000.parquet"), groups, schemas.SAMPLES)
    finish(output, "ingest", samples=[entry], index=[write_samples_index(output, [entry])])
    return output


def write_samples_index(output: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The index of `samples/`, from its files. Returns its manifest entry."""
    facts = []
    for part in parts:
        with pq.ParquetFile(f"{output}/samples/{part['path']}") as file:
            facts += [group_facts(file.read_row_group(group)) for group in range(file.num_row_groups)]
    return write_table_index(output, [samples_rows(facts, parts)], schemas.SAMPLES_INDEX)


def finish(output: str, kind: str, **tables: list[dict[str, Any]]) -> None:
    """A manifest, which makes `output` a finished output that other jobs read."""
    name = output.rsplit("/", 1)[-1]
    record = manifest.Manifest(kind=kind, name=name, run_id=f"{name}-0", spec_sha256="", tables=tables)
    storage.write_json(storage.join(output, "manifest.json"), record.model_dump())


def untrained(output: str, method: str, tokens: int = 1, texts: Sequence[str] = ("red", "green")) -> str:
    """A finished checkpoint that nothing trained, for tests that need only its shape; its vocabulary comes from `texts`."""
    model = build.create_model(
        Model.model_validate(shapes.MODEL),
        method,
        tokens,
        Text(template="question_answer"),
        list(texts),
        seed=0,  # type: ignore[arg-type]
    )
    weights.save_checkpoint(model, weights.own_state(model), Path(output) / "model")
    finish(output, "image_sft")
    return output


def features_job(samples: list[str], output: str) -> Job:
    return Job.model_validate(
        {
            "name": "features", "kind": "features", "output": output, "features": {"tower": shapes.TOWER, "unit_images": 16},
            "inputs": {"samples": [{"uri": uri} for uri in samples]}, "resources": {"workers": 2},
        }
    )  # fmt: skip


def sft_job(samples: str, features: str, output: str, method: str = "voco", checkpoint: str | None = None, **changes: Any) -> Job:
    block = {
        "epochs": 1, "global_batch": 8, "micro_batch": 4, "learning_rate": 0.003, "precision": "fp32", "zero_stage": 2,
        "save_every": 100,
    }  # fmt: skip
    raw: dict[str, Any] = {
        "name": "sft", "kind": "image_sft", "output": output, "resources": {"workers": 2},
        "inputs": {"samples": [{"uri": samples}], "features": features},
        "compression": {"method": method, "tokens": 1}, "image_sft": {**block, **changes},
    }  # fmt: skip
    if checkpoint is None:
        raw["model"] = shapes.MODEL
        raw["image_sft"]["text"] = {"template": "question_answer"}
    else:
        raw["inputs"]["checkpoint"] = checkpoint
    return Job.model_validate(raw)
