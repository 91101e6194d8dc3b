"""Each worker reads its part of the starting model, and trains the weights that it would train of a complete copy."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import shapes
import tiny
import torch
from ranks import launch_ranks

from voco.job.config import Model, Text
from voco.model import build, weights
from voco.store import storage
from voco.train import weight_placement
from voco.train.weight_placement import node_copy

HERE = Path(__file__).parent
TILES = shapes.tower(grid_pinpoints=[[32, 64], [64, 32], [64, 64]])
CASES = (  # kind : start : method : precision : stage
    "image_sft:fp32:voco:fp32:3",
    "image_sft:fp32:voco:bf16:3",
    "image_sft:fp32:q_former:bf16:3",
    "image_sft:tied:voco:fp32:3",
    "image_sft:tiles:none:fp32:3",
    "align:fp32:none:bf16:3",
    "image_sft:bf16:voco:bf16:2",
    "image_sft:tied:voco:fp32:1",
    "align:fp32:none:fp32:2",
)


def save(folder: Path, block: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    model = build.create_model(
        Model.model_validate(block), "none", 0, Text(template="question_answer"), ["red", "green", "what is it?"], seed=1
    )
    weights.save_checkpoint(model, {name: w.to(dtype) for name, w in weights.own_state(model).items()}, folder / "model")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each rank of two, by case."""
    folder = tmp_path_factory.mktemp("weights")
    save(folder / "fp32", shapes.MODEL)
    save(folder / "bf16", shapes.MODEL, torch.bfloat16)
    save(folder / "tiles", {"llama": shapes.LLAMA, "tower": TILES})
    tiny.llama(torch.float32, tie_word_embeddings=True).save_pretrained(folder / "lm")
    tiny.tokenizer().save_pretrained(folder / "lm")
    save(folder / "tied", {"pretrained": str(folder / "lm"), "tower": shapes.TOWER})
    launch_ranks(HERE / "placed_weights.py", 2, str(folder), *CASES)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_of_a_complete_copy_bit_by_bit(results: list[dict[str, Any]], case: str) -> None:
    for result in results:
        before, now = result[case]["before"], result[case]["now"]
        for moment in ("first", "fp32", "last"):
            assert before[moment].keys() == now[moment].keys()
            for name, weight in before[moment].items():
                assert torch.equal(weight, now[moment][name]), (moment, name)
        assert before["loss"] == now["loss"] > 1.0
        assert any(not torch.equal(now["first"][name], now["last"][name]) for name in now["fp32"]), "nothing was trained"
    assert results[0][case]["now"]["loss"] == results[1][case]["now"]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_under_zero_3_each_rank_reads_its_slices_alone(results: list[dict[str, Any]], case: str) -> None:
    first = results[0][case]["now"]["first"]
    drawn = "q_former." if ":q_former:" in case else "voco."
    numbers = sum(weight.numel() for name, weight in first.items() if not name.startswith(drawn))
    read = [result[case]["read"] for result in results]
    if case.endswith(":3"):
        assert sum(read) == numbers
        assert max(read) - min(read) <= len(first)  # a weight of an odd number of elements
    else:
        assert read == [numbers, numbers]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fp32:fp32", "fp32:bf16", "tied:fp32"])
def test_a_teacher_sharded_under_zero_3_computes_the_same_states(results: list[dict[str, Any]], start: str) -> None:
    for result in results:
        complete, again, *sharded = result[f"teacher:{start}"]
        assert complete["states"].abs().max() > 0.1
        for other in (again, *sharded):
            assert torch.equal(other["states"], complete["states"])
            assert torch.equal(other["head"], complete["head"])
        assert again["numbers"] > 10_000
        assert sharded[-1]["numbers"] == 0


def test_a_model_in_s3_is_downloaded_once_for_a_node(s3_server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight workers of a node come at the same time; what they mapped outlives the copy."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    (s3_server / "start").mkdir()
    save(s3_server / "start" / "m", shapes.MODEL)
    downloads: list[str] = []
    get_directory = storage.get_directory

    def counting(uri: str, local: Path) -> Path:
        downloads.append(uri)
        return get_directory(uri, local)

    monkeypatch.setattr(weight_placement.storage, "get_directory", counting)
    inside = threading.Barrier(8, timeout=60)
    loaded: list[Any] = []

    def work() -> None:
        with node_copy("s3://start/m") as folder:
            assert folder.parent.stat().st_mode & 0o777 == 0o700
            loaded.append(weights.load_checkpoint("s3://start/m", folder=folder))
            inside.wait()  # as `dist.barrier` does in a worker group

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 8
    assert len(downloads) == 1
    assert not list((tmp_path / "temporary").iterdir())
    expected = weights.own_state(weights.load_checkpoint(str(s3_server / "start" / "m")))
    for model in loaded:
        assert all(torch.equal(weight, expected[name]) for name, weight in weights.own_state(model).items())


def test_a_copy_that_a_killed_attempt_left_is_used_and_half_a_copy_is_not(
    s3_server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (s3_server / "left").mkdir()
    save(s3_server / "left" / "m", shapes.MODEL)
    for is_complete in (True, False):
        with node_copy("s3://left/m") as folder:
            weights_file = folder / "model.safetensors"
            size = weights_file.stat().st_size
            kept = {path.name: path.read_bytes() for path in folder.iterdir()}
            parent = folder.parent
        (parent / "model").mkdir(parents=True)
        for name, data in kept.items():
            (parent / "model" / name).write_bytes(data if is_complete else data[:100])
        if is_complete:
            (parent / "complete").touch()
            (parent / "model" / "mark").touch()
        with node_copy("s3://left/m") as folder:
            assert (folder / "mark").exists() == is_complete
            assert (folder / "model.safetensors").stat().st_size == size


def test_a_local_model_is_not_copied(tmp_path: Path) -> None:
    save(tmp_path / "m", shapes.MODEL)
    with node_copy(str(tmp_path / "m")) as folder:
        assert folder == tmp_path / "m" / "model"
    assert folder.exists()
