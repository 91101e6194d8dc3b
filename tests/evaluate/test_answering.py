"""Evaluation of real checkpoints: every N' from one compression, FastV, and the cost with a full cache and without a cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import shapes
import tiny
import torch
import world

import pipelines
from voco.commands.show import show_output
from voco.errors import JobFailed, Refused
from voco.evaluate import answering, preflight
from voco.evaluate.adaptive import AdaptiveReading, choose_threshold, held_out_margins, mean_cost
from voco.evaluate.aggregate import example_line
from voco.evaluate.predictions import short_answer
from voco.evaluate.scores import read_answers
from voco.job.config import Model, Text
from voco.job.evaluation import Evaluate
from voco.job.resources import Resources
from voco.job.spec import Job
from voco.methods import fastv
from voco.model import build, weights
from voco.model.flops import compress_flops, read_flops
from voco.model.voco_llama import VocoLlama
from voco.precompute import feature_store, features, frame_cache
from voco.precompute.live_features import LiveFeatures
from voco.report.summary import write_report_job
from voco.run import unit_records, units
from voco.sequence.anyres import Anyres
from voco.store import index, parquet, schemas
from voco.store.samples import row_addresses, unique_images
from voco.store.schemas import ALL

MODEL = {"llama": shapes.llama(layers=3), "tower": shapes.TOWER}
SLOTS, IMAGES = 4, 6  # vision tokens of an image of 32 pixels, and images, each with two questions
COUNTS = [4, 1, 2]


def save(root: Path, method: str, tokens: int) -> str:
    """A sensitive checkpoint: its weights are scaled so that N, positions and dropped tokens change answers."""
    texts = [turn["text"] for row in world.sample_rows(8) for talk in row["conversations"] for turn in talk["turns"]]
    block = Model.model_validate(MODEL)
    model = build.create_model(block, method, tokens, Text(template="question_answer"), texts, seed=2)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, weight in model.language_model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(12.0 if "q_proj" in name or "k_proj" in name else 4.0)
    weights.save_checkpoint(model, weights.own_state(model), root / "model")
    world.finish(str(root), "image_sft")
    return str(root)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("answering")
    world.write_samples(str(root / "samples"), world.sample_rows(IMAGES, evaluation=True, text_every=0), rows_per_group=2)
    count = features.list_images(str(root / "features"), [str(root / "samples")], 100)
    tower = Model.model_validate(MODEL).tower
    assert tower is not None
    arguments = {"output": str(root / "features"), "tower": tower.model_dump(exclude_none=True), "batch": 8, "threads": 1}
    local(str(root / "features"), count, features.FeatureWorker, arguments)
    index.join_pieces(str(root / "features"), count, schemas.FEATURES_INDEX)
    world.finish(str(root / "features"), "features")
    save(root / "voco", "voco", 4)
    save(root / "none", "none", 1)
    return root


def local(output: str, count: int, worker: Any, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    return units.run_units(output, count, worker, arguments, Resources(), in_process=True, label="test")


def evaluate(
    root: Path,
    output: Path,
    checkpoint: str,
    frames: str | None = None,
    live: bool = False,
    adaptive: AdaptiveReading | None = None,
    **block: Any,
) -> list[dict[str, Any]]:
    """Answers of two units, in this process; `live` ones by the checkpoint's own tower."""
    keys = {"benchmark": "halves", "max_new_tokens": 4, "batch": 5, "unit_samples": 4, **block}
    count = answering.list_evaluation_rows(str(output), [str(root / "samples")], Evaluate.model_validate(keys))
    sources: dict[str, Any] = {
        "features": None if frames or live else str(root / "features"),
        "frame_cache": frames,
        "threads": 2,
    }
    sources["adaptive"] = adaptive
    local(
        str(output),
        count,
        answering.AnswerWorker,
        {"output": str(output), "checkpoint": str(root / checkpoint), **sources, "block": keys},
    )
    return table(output).to_pylist()


def test_a_limit_answers_the_first_samples_only(root: Path, tmp_path: Path) -> None:
    block = Evaluate(benchmark="halves", limit=3, unit_samples=2)
    assert answering.list_evaluation_rows(str(tmp_path), [str(root / "samples")], block) == 2
    listed = [row for unit in range(2) for row in units.WorkList(str(tmp_path)).read(unit).to_pylist()]
    everything = list(row_addresses([str(root / "samples")]))
    assert [row["row"] for row in listed] == [row["row"] for row in everything[:3]]
    assert len(everything) > 3


def test_an_example_is_one_line_with_question_answer_and_reference() -> None:
    answer = {"prompt": "what\nis it?", "prediction": "a 'cat'", "references": ["cat", "cat", "dog"]}
    assert example_line("look", answer) == """look: 'what is it?' -> "a 'cat'" (right: 'cat or dog')"""
    assert example_line("look", {**answer, "references": []}) == """look: 'what is it?' -> "a 'cat'\""""


def table(output: Path) -> pa.Table:
    return pa.concat_tables([parquet.read_table(units.part_uri(str(output), "answers", unit)) for unit in range(2)])


def predictions(answers: list[dict[str, Any]], n: int) -> list[tuple[str, int, str]]:
    return [(row["sample_id"], row["conversation_index"], row["prediction"]) for row in answers if row["n"] == n]


def test_every_n_is_answered_from_one_compression_as_from_its_own(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressed: list[int] = []
    original = VocoLlama._compress_units

    def spy(self: VocoLlama, units: Any, counts: Any, sizes: Any) -> Any:
        compressed.extend(sum(count) for count in counts)
        return original(self, units, counts, sizes)

    monkeypatch.setattr(VocoLlama, "_compress_units", spy)
    together = evaluate(root, tmp_path / "all", "voco", tokens=COUNTS)
    assert compressed == [4] * IMAGES, "each image once, at the largest N"
    assert [row["n"] for row in together].count(1) == 2 * IMAGES
    for n in COUNTS:
        compressed.clear()
        alone = evaluate(root, tmp_path / f"n{n}", "voco", tokens=[n])
        assert compressed == [n] * IMAGES
        assert predictions(together, n) == predictions(alone, n)
    assert len({str([text for _, _, text in predictions(together, n)]) for n in COUNTS}) == 3, "or equality proves nothing"
    assert predictions(evaluate(root, tmp_path / "own", "voco"), 4) == predictions(together, 4)


def test_a_unit_that_runs_again_has_the_same_bytes(root: Path, tmp_path: Path) -> None:
    evaluate(root, tmp_path / "out", "voco", tokens=COUNTS)
    part, record = (
        Path(units.part_uri(str(tmp_path / "out"), "answers", 1)),
        Path(unit_records.unit_record_uri(str(tmp_path / "out"), 1)),
    )
    before = part.read_bytes()
    part.unlink()
    record.unlink()
    evaluate(root, tmp_path / "out", "voco", tokens=COUNTS)
    assert part.read_bytes() == before


def test_stored_features_are_read_side_by_side(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two reads wait for each other, so they cannot be one after the other: S3 takes 30 ms for each."""
    together = threading.Barrier(2, timeout=20)
    original = feature_store.FeatureStore._read

    def read(self: feature_store.FeatureStore, position: int) -> Any:
        together.wait()
        return original(self, position)

    monkeypatch.setattr(feature_store.FeatureStore, "_read", read)
    assert len(evaluate(root, tmp_path, "voco", tokens=[4])) == 2 * IMAGES


def test_frame_caches_are_read_once_for_every_n(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = str(tmp_path / "frames")
    count = frame_cache.list_media_samples(output, [str(root / "samples")], unit_samples=100)
    arguments = {"output": output, "checkpoint": str(root / "voco"), "block": {"fps": 1.0}}
    frame_cache.write_index(output, local(output, count, frame_cache.FrameWorker, arguments))
    reads: list[str] = []
    original = answering.FrameStore.read
    monkeypatch.setattr(answering.FrameStore, "read", lambda self, *args: reads.append(args[0]) or original(self, *args))
    together = evaluate(root, tmp_path / "all", "voco", frames=output, tokens=COUNTS)
    assert len(reads) == len(set(reads)) == IMAGES
    images = evaluate(root, tmp_path / "images", "voco", tokens=COUNTS)
    assert [predictions(together, n) for n in COUNTS] == [predictions(images, n) for n in COUNTS]


@pytest.mark.parametrize(
    ("checkpoint", "block"),
    [("voco", {"tokens": COUNTS}), ("none", {}), ("none", {"read_as": "fastv", "fastv": {"layer": 1, "keep": 0.5}})],
    ids=["voco", "none", "fastv"],
)
def test_the_tower_answers_as_stored_features_do(root: Path, tmp_path: Path, checkpoint: str, block: dict[str, Any]) -> None:
    stored = evaluate(root, tmp_path / "stored", checkpoint, **block)
    live = evaluate(root, tmp_path / "live", checkpoint, live=True, **block)
    assert live == stored
    assert len({row["prediction"] for row in live}) > 1, "or equality proves nothing"


def test_live_features_are_the_stored_ones_in_any_grouping(root: Path) -> None:
    """Bit for bit where the tower sees as many images at a time; else within the rounding to fp16."""
    tower = weights.load_checkpoint(str(root / "voco")).tower
    assert tower is not None
    store, listed = feature_store.FeatureStore(str(root / "features")), list(unique_images([str(root / "samples")]))
    names = [image["sha256"] for image in listed]
    for size in (IMAGES, 4, 1):
        live = LiveFeatures(listed, tower, threads=2)
        for start in range(0, IMAGES, size):
            taken = live.take(names[start : start + size])
            assert list(taken) == names[start : start + size]
            for name, features_of_image in taken.items():
                assert features_of_image.dtype == torch.float16
                limit = 0.0 if size == IMAGES else 2**-10
                assert torch.allclose(features_of_image.float(), store(name).float(), rtol=limit, atol=limit / 16)
        live.close()
    with pytest.raises(ValueError, match=f"expected the list's next image, {names[0]}, got {names[1]}"):
        LiveFeatures(listed, tower, threads=1).take(names[1:])


def test_an_image_that_cannot_be_decoded_is_named_and_fails_the_job(root: Path, tmp_path: Path) -> None:
    rows = world.sample_rows(IMAGES, evaluation=True, text_every=0)
    rows[2]["media"][0]["bytes"] = b"no image"
    world.write_samples(str(tmp_path / "samples"), rows, rows_per_group=2)
    keys = {"benchmark": "halves", "max_new_tokens": 4, "unit_samples": 4}
    output = str(tmp_path / "out")
    count = answering.list_evaluation_rows(output, [str(tmp_path / "samples")], Evaluate.model_validate(keys))
    sources = {"checkpoint": str(root / "voco"), "features": None, "frame_cache": None}
    records = local(output, count, answering.AnswerWorker, {"output": output, **sources, "block": keys})
    assert {row["sample_id"] for row in table(tmp_path / "out").to_pylist()} == {row["sample_id"] for row in rows} - {
        rows[2]["sample_id"]
    }
    line = f"halves: 1 images cannot be decoded; ingest with `validate: full` .*: {rows[2]['media'][0]['sha256']}: unsupported"
    with pytest.raises(JobFailed, match=line):
        features.check_decoded("halves", records)


def test_a_voco_checkpoint_that_reads_uncompressed_is_one_of_method_none(root: Path, tmp_path: Path) -> None:
    """The same weights, saved as an uncompressed checkpoint, give the same answers, other than compressed."""
    shutil.copytree(root / "voco", tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "model" / "config.json").read_text())
    config["layout"]["method"] = "none"
    (tmp_path / "plain" / "model" / "config.json").write_text(json.dumps(config))
    whole = evaluate(root, tmp_path / "whole", "voco", read_as="none")
    plain = evaluate(root, tmp_path / "of-none", str(tmp_path / "plain"))
    assert [row["prediction"] for row in whole] == [row["prediction"] for row in plain]
    assert [row["prediction"] for row in whole] != [row["prediction"] for row in evaluate(root, tmp_path / "own", "voco")]
    assert {(row["method"], row["n"]) for row in whole} == {("voco_uncompressed", 4)}


def test_adaptive_answers_are_those_of_the_reading_that_was_sure(root: Path, tmp_path: Path) -> None:
    """Each question's answer, margin and cost against the answers at every N."""
    fixed = {
        (row["sample_id"], row["conversation_index"], row["n"]): row
        for row in evaluate(root, tmp_path / "all", "voco", tokens=COUNTS)
    }
    margins = sorted(row["margin"] for row in fixed.values())
    reading = AdaptiveReading(tuple(sorted(COUNTS)), margins[len(margins) // 2])
    answers = evaluate(root, tmp_path / "auto", "voco", adaptive=reading, tokens="auto", budget=2.0)
    assert len(answers) == 2 * IMAGES
    for answer in answers:
        cost = 0
        for n in reading.sizes:
            single = fixed[answer["sample_id"], answer["conversation_index"], n]
            cost += n
            if reading.is_sure(single["margin"], n):
                break
        assert (answer["prediction"], answer["tokens_read"]) == (single["prediction"], cost)
        assert answer["margin"] == pytest.approx(single["margin"], abs=1e-5)
        assert (answer["method"], answer["n"]) == ("voco_adaptive", 4)
    assert len({answer["tokens_read"] for answer in answers}) > 1, "or the threshold decides nothing"


def test_fastv_answers_with_n_the_tokens_that_stay(root: Path, tmp_path: Path) -> None:
    own = evaluate(root, tmp_path / "own", "none")
    all_tokens = evaluate(root, tmp_path / "all", "none", read_as="fastv", fastv={"layer": 2, "keep": 1.0})
    half = evaluate(root, tmp_path / "half", "none", read_as="fastv", fastv={"layer": 1, "keep": 0.5})
    assert predictions(all_tokens, SLOTS) == predictions(own, 1)
    assert {(row["method"], row["n"], row["cache_hit"]) for row in half} == {("fastv", 2, False)}
    model = weights.load_checkpoint(str(root / "none"))
    store = feature_store.FeatureStore(str(root / "features"))
    for row, sample in zip(half[::2], world.sample_rows(IMAGES, evaluation=True, text_every=0), strict=True):
        prompt = answering.prompt_ids(sample["conversations"][0]["turns"], model.tokenizer, model.layout, True)
        views = [store(medium["sha256"]) for medium in sample["media"]]
        (ids,) = fastv.fastv_answers(model, [views], [prompt], 1, 2, 4)
        assert row["prediction"] == model.tokenizer.decode(ids, skip_special_tokens=True).strip()


def job(root: Path, output: Path, checkpoint: str, calibration: Path | None = None, **block: Any) -> Job:
    inputs: dict[str, Any] = {"samples": [{"uri": str(root / "samples")}], "features": str(root / "features")}
    if calibration is not None:
        inputs["calibration"] = str(calibration)
    return Job.model_validate(
        {
            "name": "ask", "kind": "evaluate", "output": str(output), "resources": {"workers": 1},
            "inputs": {**inputs, "checkpoint": str(root / checkpoint)},
            "evaluate": {"benchmark": "halves", "max_new_tokens": 4, "resamples": 100, **block},
        }
    )  # fmt: skip


def scored(output: Path) -> dict[int, dict[str, Any]]:
    rows = parquet.read_table(units.part_uri(str(output), "scores", 0)).to_pylist()
    return {row["n"]: row for row in rows if row["category"] == ALL}


@pytest.mark.ray
def test_a_budget_is_kept_by_a_threshold_from_held_out_rows(root: Path, tmp_path: Path, ray_local: str) -> None:
    """The complete job. Refused: rows that are scored too, and answers of another checkpoint."""
    held_out = world.sample_rows(8, evaluation=True, text_every=0, first=100)
    world.write_samples(str(tmp_path / "val"), held_out)
    calibrating = job(root, tmp_path / "calibration", "voco", tokens=COUNTS)
    raw = {
        **calibrating.model_dump(exclude_none=True),
        "inputs": {"samples": [{"uri": str(tmp_path / "val")}], "checkpoint": str(root / "voco")},
    }
    pipelines.run(Job.model_validate(raw))
    calibration = read_answers(str(tmp_path / "calibration"))
    sizes, margins = held_out_margins(calibration)
    assert sizes == (1, 2, 4)

    def adaptive(checkpoint: str = "voco", budget: float = 2.5, answers: str = "calibration") -> Job:
        output = tmp_path / f"auto-{budget}-{answers}-{Path(checkpoint).name}"
        return job(root, output, checkpoint, tmp_path / answers, tokens="auto", budget=budget)

    job_at_2_5 = adaptive()
    pipelines.run(job_at_2_5)
    (row,) = scored(Path(job_at_2_5.output)).values()
    answers = read_answers(job_at_2_5.output)
    assert (row["method"], row["n"]) == ("voco_adaptive", 4)
    assert row["mean_tokens"] == pytest.approx(np.mean(answers["tokens_read"].to_pylist()))
    assert {*answers["tokens_read"].to_pylist()} <= {1, 3, 7}
    assert mean_cost(margins, sizes, choose_threshold(margins, sizes, 2.5)) <= 2.5
    cheapest = adaptive(budget=1.0)
    pipelines.run(cheapest)
    assert {*read_answers(cheapest.output)["tokens_read"].to_pylist()} == {1}
    shutil.copytree(root / "voco", tmp_path / "copy")
    with pytest.raises(Refused, match=r"inputs\.calibration: expected answers of .*copy, got those of "):
        pipelines.run(adaptive(checkpoint=str(tmp_path / "copy")))
    pipelines.run(job(root, tmp_path / "same", "voco", tokens=COUNTS))
    with pytest.raises(Refused, match="samples are scored by this job too; expected held-out ones"):
        pipelines.run(adaptive(answers="same"))


@pytest.mark.ray
def test_scores_have_a_row_for_each_n_with_its_own_bytes_and_operations(root: Path, tmp_path: Path, ray_local: str) -> None:
    pipelines.run(job(root, tmp_path / "voco", "voco", tokens=COUNTS))
    pipelines.run(job(root, tmp_path / "none", "none"))
    pipelines.run(job(root, tmp_path / "fastv", "none", read_as="fastv", fastv={"layer": 1, "keep": 0.5}))
    config = weights.load_checkpoint(str(root / "voco")).language_model.config
    token_bytes = 2 * 3 * 2 * 8 * 4  # keys and values, layers, heads, width, fp32
    scores = scored(tmp_path / "voco")
    assert sorted(scores) == sorted(COUNTS)
    assert {row["questions"] for row in scores.values()} == {2 * IMAGES}
    prefix = 1 + SLOTS + 1  # BOS and the separator around
    for n, row in scores.items():
        assert row["method"] == "voco"
        assert (row["cache_bytes"], row["full_cache_bytes"]) == (n * token_bytes, (prefix + 4) * token_bytes)
        assert row["uncached_flops"] - row["prefill_flops"] == pytest.approx(compress_flops(config, prefix, n))
    step = scores[2]["prefill_flops"] - scores[1]["prefill_flops"]
    assert scores[4]["prefill_flops"] - scores[2]["prefill_flops"] == pytest.approx(2 * step)
    (none,) = scored(tmp_path / "none").values()  # full-KV caching: the cache is the complete prefix with its <voco>
    assert none["cache_bytes"] == none["full_cache_bytes"] == (prefix + 1) * token_bytes
    # a text of t tokens against a prefix of p that is ready, or both in one causal pass: the difference is the prefix's own
    alone = read_flops(config, 0, prefix + 1) - 2 * config.hidden_size * config.vocab_size
    assert none["uncached_flops"] - none["prefill_flops"] == pytest.approx(alone)
    (fast,) = scored(tmp_path / "fastv").values()
    assert (fast["method"], fast["n"], fast["cache_bytes"]) == ("fastv", 2, (prefix + 1) * token_bytes - 2 * token_bytes * 2 // 3)
    assert fast["prefill_flops"] == fast["uncached_flops"] < none["uncached_flops"]


@pytest.mark.parametrize(
    ("checkpoint", "block", "line"),
    [
        ("voco", {"tokens": [5]}, "evaluate.tokens: expected at most the checkpoint's 4, got 5"),
        ("none", {"tokens": [1]}, "evaluate.tokens: only <voco> can be read in part: .* voco, got none"),
        ("voco", {"read_as": "fastv", "fastv": {"layer": 1, "keep": 0.5}}, "read_as: fastv reads a .* none, got voco"),
        ("voco", {"read_as": "voco"}, "evaluate.read_as: voco reads a checkpoint of method none, got voco"),
        ("none", {"read_as": "none"}, "evaluate.read_as: none reads a checkpoint of method voco without compression, got none"),
        ("none", {"read_as": "fastv", "fastv": {"layer": 3, "keep": 0.5}}, "fewer than the model's 3 layers, got 3"),
        ("none", {"read_as": "fastv", "fastv": {"layer": 1, "keep": 0.1}}, "leaves one of 4 vision tokens"),
    ],
)
def test_what_a_checkpoint_cannot_do_is_refused_before_anything_starts(
    root: Path, tmp_path: Path, checkpoint: str, block: dict[str, Any], line: str
) -> None:
    with pytest.raises(Refused, match=line):
        pipelines.run(job(root, tmp_path / "out", checkpoint, **block))
    assert not (tmp_path / "out" / "work").exists()


def test_rows_of_training_are_refused_before_anything_starts(root: Path, tmp_path: Path) -> None:
    world.write_samples(str(tmp_path / "train"), world.sample_rows(IMAGES, text_every=0))
    of_training = job(root, tmp_path / "out", "voco")
    inputs = of_training.inputs.model_validate({**of_training.inputs.model_dump(), "samples": [{"uri": str(tmp_path / "train")}]})
    with pytest.raises(Refused, match="not an evaluation row: it must end on a user turn"):
        pipelines.run(of_training.model_copy(update={"inputs": inputs}))
    assert not (tmp_path / "out" / "work").exists()


@pytest.mark.ray
def test_a_set_without_references_becomes_predictions_and_no_score(root: Path, tmp_path: Path, ray_local: str) -> None:
    """Through samples, answers, scores, report and the listing of an output: the score is missing everywhere, never 0."""
    rows = world.sample_rows(IMAGES, evaluation=True, text_every=0)
    for number, talk in enumerate(talk for row in rows for talk in row["conversations"]):
        talk |= {"answers": [], "source_id": str(2 * IMAGES - number)}
    world.write_samples(str(tmp_path / "questions"), rows, rows_per_group=2)
    evaluation = job(root, tmp_path / "out", "voco", tokens=[4, 1], benchmark="vizwiz-test", unit_samples=4)
    inputs = evaluation.inputs.model_validate(
        {**evaluation.inputs.model_dump(), "samples": [{"uri": str(tmp_path / "questions")}]}
    )
    done = pipelines.run(evaluation.model_copy(update={"inputs": inputs}))
    answers = table(tmp_path / "out").to_pylist()
    assert {row["correct"] for row in answers} == {None}
    for row in scored(tmp_path / "out").values():
        assert (row["score"], row["score_low"], row["retention"], row["questions"], row["samples"]) == (None,) * 3 + (12, 6)
    assert [entry["path"] for entry in done.tables["predictions"]] == ["vizwiz-test-n1.json", "vizwiz-test-n4.json"]
    for n, entry in zip((1, 4), done.tables["predictions"], strict=True):
        data = (tmp_path / "out" / "predictions" / entry["path"]).read_bytes()
        assert (entry["rows"], entry["bytes"], entry["sha256"]) == (12, len(data), hashlib.sha256(data).hexdigest())
        # by id, which counts down from the first image to the last
        assert [item["image"] for item in json.loads(data)] == [
            f"{index}.png" for index in range(IMAGES - 1, -1, -1) for _ in "ab"
        ]
        by_id = {int(row["source_id"]): short_answer(row) for row in answers if row["n"] == n}
        assert [item["answer"] for item in json.loads(data)] == [by_id[number] for number in range(1, 13)]
    pipelines.run(job(root, tmp_path / "scored", "voco"))
    counts, text = write_report_job([str(tmp_path / "out"), str(tmp_path / "scored")], str(tmp_path), "t")
    assert "vizwiz" not in text[0]
    assert "halves: 12 questions" in text[0]
    assert counts["counts"]["written"] == 1
    write_report_job([str(tmp_path / "out")], str(tmp_path), "t")
    shown = show_output(str(tmp_path / "out"))
    assert "[no reference]" in shown
    assert "missing" in shown


@pytest.mark.ray
def test_a_benchmark_is_marked_by_its_own_rule_and_its_official_figures_are_recorded(
    root: Path, tmp_path: Path, ray_local: str, caplog: pytest.LogCaptureFixture
) -> None:
    """POPE by its name: an answer without `no` is yes, and the mean F1 is in the manifest, the score stays the mean mark."""
    rows = world.sample_rows(IMAGES, evaluation=True, text_every=0)
    for number, talk in enumerate(talk for row in rows for talk in row["conversations"]):
        talk |= {"answers": ["yes" if number % 3 else "no"], "category": ("popular", "random")[number % 2]}
    world.write_samples(str(tmp_path / "questions"), rows, rows_per_group=2)
    evaluation = job(root, tmp_path / "out", "voco", benchmark="pope", unit_samples=4)
    inputs = evaluation.inputs.model_validate(
        {**evaluation.inputs.model_dump(), "samples": [{"uri": str(tmp_path / "questions")}]}
    )
    with caplog.at_level("INFO", "voco.evaluate"):
        done = pipelines.run(evaluation.model_copy(update={"inputs": inputs}))
    answers = table(tmp_path / "out").to_pylist()
    assert not any("no" in row["prediction"].split() for row in answers)  # nonsense, which LLaVA's rule reads as yes
    assert [row["correct"] for row in answers] == [float(row["references"] == ["yes"]) for row in answers]
    figures = done.statistics["official"]["figures"]["4"]
    assert figures["f1"] == pytest.approx(0.8)  # in each category 4 of 6 are yes: precision 2/3, recall 1
    assert figures["accuracy"] == pytest.approx(scored(tmp_path / "out")[4]["score"]) == pytest.approx(2 / 3)
    assert "ask: official pope: f1 0.8000, accuracy 0.6667" in caplog.text


@pytest.mark.parametrize(("frames", "limit", "fits"), [(5, 4096, True), (6, 4096, False), (6, 5, True)])
def test_a_video_that_leaves_no_position_is_refused(frames: int, limit: int, fits: bool) -> None:
    """After the prefix, 4 new tokens and one of a question, five frames of one token fit."""
    layout = tiny.layout("voco", 1).model_copy(update={"vision_slots": 4})
    config = {"layout": layout.model_dump(), "language_model": {"max_position_embeddings": layout.cached_from + 5 + 4 + 1}}
    store = SimpleNamespace(most_frames=frames)
    block = Evaluate.model_validate({"benchmark": "x", "max_frames": limit, "max_new_tokens": 4})
    with nullcontext() if fits else pytest.raises(Refused, match=r"evaluate\.max_frames: a video has 6 frames"):
        preflight.check_length(config, block, store)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "block", "line"),
    [
        (
            {"anyres": Anyres(grid_pinpoints=((32, 64),), tile=32)},
            {"read_as": "fastv", "fastv": {"layer": 1, "keep": 0.5}},
            "cuts images into tiles",
        ),
        ({"template": "plain"}, {}, "trained on captions"),
        ({"tokens": 0}, {"read_as": "voco"}, "read_as: voco reads through <voco> tokens"),
    ],
)
def test_what_a_layout_cannot_do(changes: dict[str, Any], block: dict[str, Any], line: str) -> None:
    layout = tiny.layout("none").model_copy(update=changes)
    config = {"layout": layout.model_dump(), "language_model": {"num_hidden_layers": 3}}
    with pytest.raises(ValueError, match=line):
        preflight.reading_layout(config, Evaluate.model_validate({"benchmark": "x", **block}))


@pytest.mark.parametrize(("upper", "line"), [("all", "inputs.upper: expected answers at one N, got 3: 1, 2, 4"), ("few", "same")])
def test_bounds_that_cannot_be_used_are_refused_before_anything_is_answered(
    root: Path, tmp_path: Path, upper: str, line: str
) -> None:
    evaluate(root, tmp_path / "all", "voco", tokens=COUNTS)
    evaluate(root, tmp_path / "lower", "none", read_as="voco")
    shutil.copytree(tmp_path / "lower", tmp_path / "few")
    Path(units.part_uri(str(tmp_path / "few"), "answers", 1)).unlink()
    for name in ("all", "few", "lower"):
        world.finish(str(tmp_path / name), "evaluate")
    bounded = job(root, tmp_path / "out", "voco")
    inputs = {**bounded.inputs.model_dump(), "upper": str(tmp_path / upper), "lower": str(tmp_path / "lower")}
    with pytest.raises(Refused, match=line):
        pipelines.run(bounded.model_copy(update={"inputs": bounded.inputs.model_validate(inputs)}))
    assert not list((tmp_path / "out").glob("answers/*"))
