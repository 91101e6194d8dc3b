"""Validation in a real training on a local Ray: its loss and score are those of the weights at that step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import world

import pipelines
from voco.errors import Refused
from voco.job.spec import Job
from voco.model import weights
from voco.model.batch import collate
from voco.precompute.feature_store import FeatureStore
from voco.run import manifest
from voco.sequence.sequence import build_sample
from voco.store import parquet
from voco.store.samples import SampleTables, images_of

pytestmark = pytest.mark.ray
ROWS = 7  # of 12, dealt to two workers


@pytest.fixture(scope="module")
def root(ray_local: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("validation")
    world.write_samples(str(root / "train"), world.sample_rows(40))
    world.write_samples(str(root / "val"), world.sample_rows(12, evaluation=True, first=100, text_every=0), rows_per_group=5)
    pipelines.run(world.features_job([str(root / "train"), str(root / "val")], str(root / "features")))
    return root


def validated_job(root: Path, output: str, validate: dict[str, Any], **changes: Any) -> Job:
    job = world.sft_job(str(root / "train"), str(root / "features"), str(root / output), **changes)
    raw = job.model_dump(exclude_none=True, exclude_unset=True)
    raw["inputs"]["val"] = str(root / "val")
    raw["image_sft"]["validate"] = validate
    return Job.model_validate(raw)


def loss_of(root: Path, output: str, rows: int) -> float:
    """The mean loss over the answers' tokens of the first rows, by the exported weights, sample by sample."""
    model = weights.load_checkpoint(str(root / output))
    store, total, tokens = FeatureStore(str(root / "features")), 0.0, 0
    listed = [
        row
        for _, table in SampleTables([str(root / "val")]).tables(["sample_id", "media", "conversations"])
        for row in table.to_pylist()
    ]
    for row in listed[:rows]:
        turns = [[*talk["turns"], {"role": "assistant", "text": talk["answers"][0]}] for talk in row["conversations"]]
        store.load(images_of(row))
        sample = build_sample(row["sample_id"], turns, images_of(row), model.tokenizer, model.layout)
        batch = collate([sample], store, store.shape)
        with torch.no_grad():
            total += float(model(batch.to("cpu", torch.float32)))
        tokens += len(batch.predict_id)
    return total / tokens


def test_loss_and_score_are_those_of_the_weights_at_that_step(root: Path) -> None:
    settings = {"every": 2, "rows": ROWS, "answers": True, "max_new_tokens": 4}
    job = validated_job(root, "sft", settings)
    done = pipelines.run(
        Job.model_validate({**job.model_dump(exclude_none=True), "resources": {"workers": 2, "peak_tflops": 0.001}})
    )
    table = parquet.read_table(str(root / "sft" / "metrics.parquet"))
    rows = table.to_pylist()
    assert [row["step"] for row in rows if row["val_loss"] is not None] == [1, 3, 4], "every second step and the last"
    assert rows[-1]["val_loss"] == pytest.approx(loss_of(root, "sft", ROWS), rel=1e-5)
    assert rows[-1]["val_loss"] != pytest.approx(loss_of(root, "sft", 12), rel=1e-3), "only the first rows"
    ask = {
        "name": "ask", "kind": "evaluate", "output": str(root / "ask"),
        "inputs": {"samples": [{"uri": str(root / "val")}], "features": str(root / "features"), "checkpoint": str(root / "sft")},
        "evaluate": {"benchmark": "halves", "max_new_tokens": 4, "resamples": 100, "limit": ROWS},
    }  # fmt: skip
    pipelines.run(Job.model_validate(ask))
    answers = parquet.read_table(str(root / "ask" / "answers" / "part-00000.parquet"))["correct"].to_pylist()
    assert len(answers) == 2 * ROWS
    assert rows[-1]["val_score"] == pytest.approx(sum(answers) / len(answers))
    assert done.statistics["exported_step"] == 5
    assert done.statistics["val_loss"] == rows[-1]["val_loss"]

    # the other columns of the same training
    assert {row["attempt"] for row in rows} == {0}
    assert all(row["samples_per_s"] * row["seconds"] == pytest.approx(8) for row in rows)
    assert all(row["tokens_per_s"] * row["seconds"] == pytest.approx(row["tokens_read"]) for row in rows)
    assert all(row["tokens_read"] > row["tokens"] and row["memory_bytes"] > 1 << 26 for row in rows)
    assert all(0 < row["mfu"] < 1 for row in rows)
    state = weights.load_checkpoint(str(root / "sft"))
    after = float(state.language_model.model.embed_tokens.weight[state.layout.voco_id].detach().norm())
    assert rows[-1]["voco_norm"] == pytest.approx(after, rel=0.05)
    assert len({row["voco_norm"] for row in rows}) == len(rows), "it learns"


@pytest.mark.slow
def test_an_early_end_exports_the_best_step(root: Path) -> None:
    """At a rate that is too high each step is worse than the first."""
    settings = {"every": 1, "rows": ROWS, "stop_after": 2}
    job = validated_job(root, "worse", settings, learning_rate=0.5, epochs=4, zero_stage=3, warmup_share=0.0)
    done = pipelines.run(job)
    rows = parquet.read_table(str(root / "worse" / "metrics.parquet")).to_pylist()
    losses = [row["val_loss"] for row in rows]
    best = losses.index(min(losses)) + 1
    assert len(rows) == best + 2 < 20
    assert done.counts["steps"] == best + 2
    assert done.statistics["exported_step"] == best
    assert loss_of(root, "worse", ROWS) == pytest.approx(min(losses), rel=1e-5)
    assert (root / "worse" / "checkpoints" / f"step-{best:08d}" / "progress.json").exists(), "kept besides the newest two"


def test_rows_that_cannot_be_validated_are_refused(root: Path) -> None:
    world.write_samples(str(root / "unseen"), world.sample_rows(3, evaluation=True, first=900, text_every=0))
    for val, settings, message in (
        ("unseen", {"every": 2}, r"inputs\.val: inputs\.features: .* lacks 3 of 3 images"),
        ("train", {"every": 2, "answers": True}, r"inputs\.val: .* expected a row that ends with a question; ingest it as split"),
    ):
        job = validated_job(root, f"no-{val}", settings)
        inputs = job.inputs.model_copy(update={"val": str(root / val)})
        with pytest.raises(Refused, match=message):
            pipelines.run(job.model_copy(update={"inputs": inputs}))
    assert manifest.read_manifest(str(root / "no-train")) is None
