"""Which rows a validation reads, which step is best and when it ends a training, from series by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clips
import pytest
import shapes
import torch
import torch.distributed as dist
import world

from voco.errors import Refused
from voco.evaluate.metrics import get_metric
from voco.job.config import Model, Text, Training, Validate, VideoSft
from voco.job.load import build_job
from voco.job.run_id import hashed_content
from voco.model import build, weights
from voco.model.batch import collate_cached
from voco.model.generation import prompt_ids
from voco.model.voco_llama import VocoLlama
from voco.precompute import frame_cache
from voco.precompute.frame_store import FrameStore
from voco.run import units
from voco.sequence.sequence import build_sample
from voco.store.samples import SampleTables
from voco.train.launch import validated
from voco.train.validation import Validation, answered_turns, best_step, first_addresses, is_exhausted, pass_rows
from voco.train.video_batches import VideoBatches

RAW: dict[str, Any] = {
    "name": "sft", "kind": "image_sft", "output": "/out", "resources": {"workers": 2},
    "inputs": {"samples": [{"uri": "/samples"}], "checkpoint": "/checkpoint", "val": "/held-out"},
    "compression": {"method": "voco", "tokens": 1},
    "image_sft": {"epochs": 1, "global_batch": 8, "micro_batch": 4, "learning_rate": 0.003, "validate": {"every": 10}},
}  # fmt: skip


def raw_job(**changes: Any) -> dict[str, Any]:
    """The job with other keys of its block."""
    return {**RAW, "image_sft": {**RAW["image_sft"], **changes}}


def metrics(losses: list[float | None], scores: list[float | None] | None = None) -> list[dict[str, Any]]:
    pairs = zip(losses, scores or [None] * len(losses), strict=True)
    return [{"step": step, "val_loss": loss, "val_score": score} for step, (loss, score) in enumerate(pairs)]


def test_the_first_addresses_are_the_same_for_any_number_of_ranks() -> None:
    rows = first_addresses([3, 2, 4], 7)
    assert rows.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0], [2, 1]]
    assert first_addresses([3], 7).tolist() == [[0, 0], [0, 1], [0, 2]]
    dealt = [rows[rank::3].tolist() for rank in range(3)]
    assert sorted(row for share in dealt for row in share) == rows.tolist()
    assert first_addresses([], 7).shape == (0, 2)


def test_a_question_gets_its_most_frequent_reference_as_the_answer() -> None:
    question = [{"role": "user", "text": "which colour?"}]
    turns = answered_turns({"turns": question, "answers": ["red", "blue", "blue"]})
    assert turns == [*question, {"role": "assistant", "text": "blue"}]
    assert answered_turns({"turns": question, "answers": []}) == question
    answered = [*question, {"role": "assistant", "text": "green"}]
    assert answered_turns({"turns": answered, "answers": ["red"]}) == answered


def test_the_best_step_has_the_least_loss_or_the_highest_score() -> None:
    losses, scores = [None, 3.0, None, 2.0, None, 2.0], [None, 0.5, None, 0.2, None, 0.5]
    assert best_step(metrics(losses), Validate(every=2)) == 4, "steps done at the earliest of equal ones"
    assert best_step(metrics(losses, scores), Validate(every=2, answers=True)) == 2
    assert best_step(metrics([None, None]), Validate(every=2)) is None
    assert best_step([{"step": 0}, {"step": 1, "val_loss": float("nan")}], Validate(every=2)) is None


def test_a_training_ends_after_so_many_validations_without_a_better_one() -> None:
    losses = [3.0, 2.0, 2.5, 1.9, 1.95, 1.9, 2.0]
    settings = Validate(every=1, stop_after=3)
    assert [is_exhausted(metrics(losses[:end]), settings) for end in range(len(losses) + 1)] == [False] * 7 + [True]
    assert not is_exhausted(metrics(losses), Validate(every=1))


def test_what_is_exported() -> None:
    assert not Validate(every=1).exports_best
    assert Validate(every=1, stop_after=2).exports_best
    assert Validate(every=1, export="best").exports_best
    assert not Validate(every=1, stop_after=2, export="last").exports_best
    import pyarrow as pa

    table = pa.Table.from_pylist(metrics([None, 3.0, None, 2.0]))
    assert validated(table, 2) == {"exported_step": 2, "val_loss": 3.0, "val_score": None}
    assert validated(table, 3) == {"exported_step": 3, "val_loss": None, "val_score": None}


def test_a_pass_has_the_rows_of_a_micro_batch() -> None:
    common: dict[str, Any] = {"epochs": 1, "global_batch": 8, "learning_rate": 0.1}
    assert pass_rows(Training(micro_batch=4, **common)) == 4
    assert pass_rows(Training(micro_tokens=8192, max_tokens=2048, **common)) == 4
    assert pass_rows(Training(micro_tokens=1000, max_tokens=2048, **common)) == 1


def test_the_block_and_its_input_come_together() -> None:
    job = build_job("job.yaml", RAW)
    assert job.inputs.uris()["inputs.val"] == "/held-out"
    assert job.block.validation.rows == 200
    without = {**RAW["inputs"]}
    without.pop("val")
    with pytest.raises(Refused, match=r"inputs\.val: expected a value with `image_sft\.validate`, got nothing"):
        build_job("job.yaml", {**RAW, "inputs": without})
    with pytest.raises(Refused, match=r"image_sft\.validate: expected a value with `inputs\.val`, got nothing"):
        build_job("job.yaml", raw_job(validate=None))
    with pytest.raises(Refused, match=r"image_sft\.validate\.answers: under ZeRO-3 .*zero_stage 1 or 2"):
        build_job("job.yaml", raw_job(validate={"every": 5, "answers": True}, zero_stage=3))
    with pytest.raises(Refused, match=r"image_sft\.validate\.evry: unknown key; did you mean every"):
        build_job("job.yaml", raw_job(validate={"every": 5, "evry": 3}))


def test_a_job_without_validation_keeps_its_run_id() -> None:
    raw = raw_job()
    raw["image_sft"].pop("validate")
    raw = {**raw, "inputs": {key: value for key, value in RAW["inputs"].items() if key != "val"}}
    content = hashed_content(build_job("job.yaml", raw))
    assert "validate" not in content["image_sft"]
    assert "val" not in content["inputs"]
    assert hashed_content(build_job("job.yaml", RAW))["image_sft"]["validate"]["every"] == 10


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    folder = tmp_path_factory.mktemp("group")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Engine:
    """What a validation uses of DeepSpeed's."""

    device = torch.device("cpu")

    def __init__(self, model: VocoLlama) -> None:
        self.module = model

    def __call__(self, batch: Any) -> Any:
        return self.module(batch)


def video_rows() -> list[dict[str, Any]]:
    """Three clips with a question each, one of them without a reference, and a question without a video."""
    rows = []
    for index, frames in enumerate((8, 12, 3)):
        data = clips.clip(frames, offset=index)
        digest = hashlib.sha256(data).hexdigest()
        medium = {"bytes": data, "path": f"{index}.mp4", "format": "mp4", "sha256": digest, "width": 64, "height": 64}
        medium |= {"duration_s": frames / 4, "fps": 4.0, "num_frames": frames}
        talk = world.conversation(f"what happens in {index}?", "it gets brighter", True)
        talk = {**talk, "answers": ["it gets brighter", "brighter", "brighter"] if index else []}
        row = {"sample_id": digest[:32], "dataset": "clips", "split": "test", "modality": "video", "media": [medium]}
        rows.append({**row, "conversations": [talk]})
    talk = {**world.conversation("say hello", "hello", True), "answers": ["hello"]}
    text = {"sample_id": "0" * 32, "dataset": "clips", "split": "test", "modality": "text", "media": []}
    return [*rows, {**text, "conversations": [talk]}]


def test_videos_are_validated_from_their_frame_caches(group: None, tmp_path: Path) -> None:
    built = build.create_model(
        Model.model_validate(shapes.MODEL), "voco", 2, Text(template="question_answer"), ["it gets brighter"], seed=3
    )
    weights.save_checkpoint(built, weights.own_state(built), tmp_path / "checkpoint" / "model")
    model = weights.load_checkpoint(str(tmp_path / "checkpoint"))
    samples = world.write_samples(str(tmp_path / "val"), video_rows(), rows_per_group=2)
    cache = str(tmp_path / "cache")
    count = frame_cache.list_media_samples(cache, [samples], unit_samples=2)
    worker, listing = (
        frame_cache.FrameWorker(cache, str(tmp_path / "checkpoint"), {"fps": 1.0, "batch": 3}),
        units.WorkList(cache),
    )
    frame_cache.write_index(cache, [worker(unit, listing.read(unit)) for unit in range(count)])
    settings = {"every": 1, "rows": 10, "answers": True, "metric": "token_f1", "max_new_tokens": 3}
    common: dict[str, Any] = {"epochs": 1, "global_batch": 8, "micro_batch": 2, "learning_rate": 0.1}
    block = VideoSft(**common, validate=settings)
    frames = FrameStore(cache)
    data = VideoBatches(SampleTables([samples]), frames, model, block)
    model.train()
    result = Validation(data, model, block, rank=0, world=1).run(Engine(model))
    assert model.training, "the model is in the mode that it was in"
    model.eval()

    marks, total, tokens = [], 0.0, 0
    for row in video_rows():
        talk, shown = row["conversations"][0], row["media"]
        selected = frames.select_frames(row["sample_id"], 100) if shown else []
        views = frames.read(row["sample_id"], selected, 2) if shown else None
        if not talk["answers"]:
            continue
        answer = "brighter" if shown else "hello"
        turns = [*talk["turns"], {"role": "assistant", "text": answer}]
        names = [str(index) for index in selected]
        sample = build_sample(row["sample_id"], [turns], names, model.tokenizer, model.layout, cached=True)
        with torch.no_grad():
            total += float(model(collate_cached([sample], [views])))
        tokens += len(sample.predict_id)
        prompt = prompt_ids(talk["turns"], model.tokenizer, model.layout, has_views=bool(shown))
        (ids,) = model.answer_ids([views], [prompt], 3)
        marks.append(get_metric("token_f1").mark(model.tokenizer.decode(ids, skip_special_tokens=True), talk["answers"]))
    assert result.loss == pytest.approx(total / tokens, rel=1e-5)
    assert (result.score, result.answers) == (pytest.approx(sum(marks) / 3), 3)

    # elastic N: every sample's frames at its own N, of the same caches
    rows = first_addresses(data.samples.tables.sizes, 10)
    sizes = [1 + index % 2 for index in range(len(rows))]
    (mixed,) = data.micro_batches(rows, 1, sizes).batches
    expected = []
    for row, n in zip(video_rows(), sizes, strict=True):
        selected = frames.select_frames(row["sample_id"], 100) if row["media"] else []
        names, turns = [str(index) for index in selected], answered_turns(row["conversations"][0])
        arguments = (row["sample_id"], [turns], names, model.tokenizer, model.layout)
        sample = build_sample(*arguments, voco_tokens=[n] * len(selected), cached=True)
        cache = frames.read(row["sample_id"], selected, n) if selected else None
        with torch.no_grad():
            expected.append(float(model(collate_cached([sample], [cache]))))
    with torch.no_grad():
        assert float(model(mixed)) == pytest.approx(sum(expected), rel=1e-5)
        assert abs(float(model(data.micro_batches(rows, 1).batches[0])) - sum(expected)) > 1e-3
