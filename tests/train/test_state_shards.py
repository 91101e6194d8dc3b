"""A checkpoint of any number of ranks and any ZeRO stage continues on any other, and is what the run was at that step."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import world
from ranks import launch_ranks
from s3_process import Server
from safetensors import safe_open
from safetensors.torch import load_file
from stored_features import write_features

from voco.store import parquet, storage
from voco.store.s3 import PatientS3
from voco.train import checkpoint_files, state_shards
from voco.train.initial_model import initial_model
from voco.train.state_shards import KINDS, read_head

HERE = Path(__file__).parent
SAVED, TOTAL = 3, 6  # steps of the first run, and of all; 5 steps are an epoch, whose last one has an empty part


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("state")
    world.write_samples(f"{root}/samples", world.sample_rows(55))
    write_features(f"{root}/features", [f"{root}/samples"])
    initial_model(world.sft_job(f"{root}/samples", f"{root}/features", f"{root}/out"), str(root))
    return root


def launch(folder: Path, ranks: int, cases: list[dict[str, Any]], **variables: str) -> str:
    """`cases` one after the other on real DeepSpeed processes over gloo. Returns what they printed."""
    return launch_ranks(HERE / "state_ranks.py", ranks, str(folder), json.dumps(cases), seconds=900, **variables)


def outcome(folder: Path, name: str, ranks: int) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / name / f"run-{ranks}.json").read_text())
    return facts


def saved(folder: Path, name: str, step: int) -> dict[str, dict[str, torch.Tensor]]:
    """The complete state of a checkpoint: by parameter and kind, put together from all ranks' files."""
    checkpoint = checkpoint_files.read_checkpoint(f"{folder}/{name}/checkpoints", step)
    assert checkpoint is not None
    pieces: dict[str, dict[str, list[tuple[int, torch.Tensor]]]] = {}
    for uri in checkpoint.files:
        tensors = load_file(uri)  # safetensors' own reader takes our files
        assert sorted(tensors) == sorted(KINDS)
        for fragment in read_head(uri).fragments:
            for kind in KINDS:
                part = tensors[kind][fragment.offset : fragment.offset + fragment.numel]
                pieces.setdefault(fragment.name, {}).setdefault(kind, []).append((fragment.start, part))
    return {
        name: {kind: torch.cat([part for _, part in sorted(parts, key=lambda item: item[0])]) for kind, parts in kinds.items()}
        for name, kinds in pieces.items()
    }


def copy_checkpoint(folder: Path, name: str, other: str, step: int) -> None:
    source = Path(checkpoint_files.step_uri(f"{folder}/{name}/checkpoints", step))
    target = Path(checkpoint_files.step_uri(f"{folder}/{other}/checkpoints", step))
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def check_resumed(
    folder: Path, name: str, unbroken: dict[str, Any], ranks: int, precision: str = "fp32", first: int = SAVED
) -> None:
    """Steps from `first` on, after a checkpoint, against those of the run that did not stop there."""
    resumed = outcome(folder, name, ranks)
    assert resumed["first"] == first
    assert [row["step"] for row in resumed["metrics"]] == list(range(TOTAL))
    tolerance = 1e-5 if precision == "fp32" else 2e-3  # bf16 sums of other micro-batches
    for row, expected in zip(resumed["metrics"], unbroken["metrics"], strict=True):
        assert row["sample_ids_sha256"] == expected["sample_ids_sha256"], (name, row["step"])
        assert row["loss"] == pytest.approx(expected["loss"], rel=tolerance), (name, row["step"])
        assert row["tokens"] == expected["tokens"]


def run_matrix(folder: Path, first: int, cases: dict[str, dict[str, Any]], others: dict[int, list[dict[str, Any]]]) -> None:
    """Train every case on `first` ranks, with a checkpoint at SAVED; then continue it as `others` say, on other ranks."""
    launch(
        folder, first, [{**case, "name": name, "steps": TOTAL, "changes": {"save_every": SAVED}} for name, case in cases.items()]
    )
    for ranks, continued in others.items():
        for case in continued:
            copy_checkpoint(folder, case["from"], case["name"], SAVED)
        launch(folder, ranks, [{**case, "steps": TOTAL} for case in continued])
        for case in continued:
            precision = case.get("precision", "fp32")
            check_resumed(folder, case["name"], outcome(folder, case["from"], first), ranks, precision)
            # what the engine computes with is the checkpoint's, to the bit
            state, loaded = saved(folder, case["from"], SAVED), load_file(folder / case["name"] / f"first-{ranks}.safetensors")
            start = load_file(folder / "initial" / "model" / "model.safetensors")
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            for name, kinds in state.items():
                assert torch.equal(loaded[name].flatten(), kinds["fp32"].to(dtype).float()), name
            assert any(not torch.equal(start[name].flatten(), kinds["fp32"]) for name, kinds in state.items() if name in start)
            frozen = [name for name in loaded if name not in state]
            assert frozen
            assert all(torch.equal(loaded[name], start[name].to(dtype).float()) for name in frozen)


def test_two_ranks_become_one_under_each_stage(folder: Path) -> None:
    """And stage 3 becomes stage 1 and the reverse. 12 samples a step on 2 ranks: 3 micro-batches of each, the last ones empty."""
    cases = {f"two-{stage}": {"stage": stage} for stage in (1, 2, 3)}
    elastic = {"compression": {"method": "voco", "tokens": [1, 3], "uncompressed_share": 0.25}}
    cases["two-elastic"] = {"stage": 2, **elastic}  # a sample has the same N on any rank
    continued = [
        {"name": "one-elastic", "from": "two-elastic", "stage": 2, **elastic},
        {"name": "one-2", "from": "two-2", "stage": 2},
        {"name": "one-3-1", "from": "two-3", "stage": 1},
        {"name": "one-1-3", "from": "two-1", "stage": 3},
    ]
    run_matrix(folder, 2, cases, {1: continued})
    checkpoint = checkpoint_files.newest(f"{folder}/two-2/checkpoints")
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.workers, len(checkpoint.files)) == (TOTAL, 2, 2)
    # 12 bytes a trained number, the head and padding aside; frozen weights are in no file
    trained = sum(kinds["fp32"].numel() for kinds in saved(folder, "two-2", TOTAL).values())
    stored = sum(Path(uri).stat().st_size for uri in checkpoint.files)
    assert 12 * trained <= stored <= 12 * trained + 2 * 12_000
    progress = storage.read_json(f"{checkpoint_files.step_uri(f'{folder}/two-2/checkpoints', TOTAL)}/progress.json")
    for entry, uri in zip(progress["files"], checkpoint.files, strict=True):
        assert entry["sha256"] == storage.file_sha256(uri)
        assert entry["bytes"] == Path(uri).stat().st_size
    steps = storage.list_names(f"{folder}/two-2/checkpoints")
    assert steps == [f"step-{SAVED:08d}", f"step-{TOTAL:08d}"]
    assert parquet.read_table(checkpoint.metrics)["step"].to_pylist() == list(range(TOTAL))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "after"), [(1, 5), (4, 2)])
def test_any_ranks_become_any_ranks(folder: Path, first: int, after: int) -> None:
    """5 does not divide the 12 virtual ranks: some ranks train 3 samples a step and some 2."""
    cases = {f"from{first}-{stage}": {"stage": stage} for stage in (1, 2, 3)}
    continued = [
        {"name": f"to{first}-{after}-{stage}-{other}", "from": f"from{first}-{stage}", "stage": other}
        for stage in (1, 2, 3)
        for other in ((1, 2, 3) if after == 2 else (stage,))
    ]
    run_matrix(folder, first, cases, {after: continued})


@pytest.mark.slow
def test_two_ranks_become_eight_and_eight_one(folder: Path) -> None:
    """One after the other, as a group on spot machines grows and shrinks."""
    launch(folder, 2, [{"name": "pair", "stage": 2, "steps": TOTAL, "changes": {"save_every": 4}}])
    unbroken = outcome(folder, "pair", 2)
    for step, source, name, ranks in ((4, "pair", "eight", 8), (5, "eight", "single", 1)):
        copy_checkpoint(folder, source, name, step)
        launch(folder, ranks, [{"name": name, "stage": 2, "steps": TOTAL, "changes": {"save_every": 5}}])
        check_resumed(folder, name, unbroken, ranks, first=step)


@pytest.mark.slow
def test_bf16_masters_come_back_in_fp32(folder: Path) -> None:
    """Under ZeRO-1 with gradients in fp32 DeepSpeed has another optimizer; under ZeRO-3 small weights may stay whole."""
    cases = {f"half-{stage}": {"stage": stage, "precision": "bf16"} for stage in (1, 2, 3)}
    kept_whole = {"stage3_param_persistence_threshold": 1000, "sub_group_size": 5000}
    continued = [
        {"name": "half-one-2", "from": "half-2", "stage": 2, "precision": "bf16"},
        {"name": "half-one-3", "from": "half-1", "stage": 3, "precision": "bf16", "zero": kept_whole},
        {"name": "half-one-1", "from": "half-3", "stage": 1, "precision": "bf16", "data_types": {"grad_accum_dtype": "fp32"}},
        {
            "name": "half-offloaded",
            "from": "half-3",
            "stage": 2,
            "precision": "bf16",
            "zero": {"offload_optimizer": {"device": "cpu"}},
        },
    ]
    run_matrix(folder, 2, cases, {1: continued[:2], 3: continued[2:]})
    masters = saved(folder, "half-2", SAVED)
    assert any(not torch.equal(kinds["fp32"], kinds["fp32"].bfloat16().float()) for kinds in masters.values())


def test_what_is_not_complete_is_never_used(folder: Path) -> None:
    """A killed worker's directory, a cut file, a file that is gone: the checkpoint before is the newest, the rest is removed."""
    launch(folder, 2, [{"name": "broken", "stage": 2, "steps": 4, "changes": {"save_every": 2}}])
    root = Path(f"{folder}/broken/checkpoints")
    target = Path(checkpoint_files.step_uri(str(root), 4))
    good = {file.name: file.read_bytes() for file in target.iterdir()}
    (name,) = [name for name in good if name.startswith("rank-00001")]

    def newest() -> int:
        checkpoint = checkpoint_files.newest(str(root))
        assert checkpoint is not None
        return checkpoint.step

    assert newest() == 4
    (target / "progress.json").unlink()
    assert newest() == 2
    (target / "progress.json").write_bytes(good["progress.json"])
    (target / name).write_bytes(good[name][:-1])
    assert newest() == 2
    (target / name).unlink()
    assert newest() == 2
    (target / name).write_bytes(good[name])
    (target / "metrics.parquet").unlink()
    assert newest() == 2
    (target / f".{name}.0123abcd.partial").write_bytes(b"cut")
    launch(folder, 1, [{"name": "broken", "stage": 2, "steps": 3}])
    assert outcome(folder, "broken", 1)["first"] == 2
    assert storage.list_names(str(root)) == ["step-00000002", "step-00000003"]
    assert not list(target.parent.rglob("*.partial"))


def test_a_full_disk_costs_a_checkpoint_and_not_the_training(folder: Path) -> None:
    """The operating system refuses files above a size to rank 1 alone: no rank takes what the others wrote for a checkpoint."""
    case = {"name": "full", "stage": 2, "steps": 4, "changes": {"save_every": 2}, "file_limit": 60_000}
    printed = launch(folder, 2, [case])
    lines = [line for line in printed.splitlines() if "is not saved" in line]
    assert len(lines) == 2, printed[-3000:]
    assert "the checkpoint of step 2 is not saved: rank 1: no space is left: [Errno 27] File too large" in lines[0]
    assert "training continues" in lines[0]
    assert len(outcome(folder, "full", 2)["metrics"]) == 4  # the training itself ended
    assert storage.list_names(f"{folder}/full/checkpoints") == []


def test_a_fault_of_a_rank_s_data_ends_all_ranks_in_the_same_step(folder: Path) -> None:
    """Storage that is away may be back after a new start; anything else would be the same. The save in work is completed."""
    faults = {"KeyError": "UnusableData", "FileNotFoundError": "UnusableData", "ConnectionError": "DataLost"}
    block = {"stage": 2, "steps": 5, "changes": {"save_every": 2}}
    launch(folder, 2, [{"name": f"fault-{fault}", "fault": fault, **block} for fault in faults])
    for fault, kind in faults.items():
        facts = outcome(folder, f"fault-{fault}", 2)
        assert facts["failed"].startswith(f"{kind}: {fault}:"), facts["failed"]
        assert [row["step"] for row in facts["metrics"]] == [0, 1]
        checkpoint = checkpoint_files.newest(f"{folder}/fault-{fault}/checkpoints")
        assert checkpoint is not None
        assert checkpoint.step == 2


@pytest.mark.slow
def test_storage_that_is_down_while_saving_delays_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    """The server is stopped when training begins and comes back some seconds later; nothing is lost, and nothing ends."""
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    server = Server(tmp_path / "s3", tmp_path / "log")
    case = {"name": "far", "stage": 2, "steps": 4, "changes": {"save_every": 2}, "output": "s3://bucket/far"}
    off = tmp_path / "off"
    try:

        def interrupt() -> None:
            while not off.exists():
                time.sleep(0.05)
            server.stop()
            off.unlink()  # training continues into the outage
            time.sleep(8)
            server.start()

        thread = threading.Thread(target=interrupt)
        thread.start()
        launch(folder, 2, [{**case, "outage": str(off)}], **server.environment())
        thread.join()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.environment().items():
                patch.setenv(name, value)
            PatientS3.clear_instance_cache()  # another test's server may be cached
            checkpoint = checkpoint_files.newest("s3://bucket/far/checkpoints")
            assert checkpoint is not None
            assert (checkpoint.step, len(checkpoint.files)) == (4, 2)
            assert [head.steps for head in map(read_head, checkpoint.files)] == [4, 4]
        launch(folder, 1, [{**case, "steps": 5}], **server.environment())
        assert outcome(folder, "far", 1)["first"] == 4
    finally:
        server.stop()


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sft-0" / "step-00000008" / "state").mkdir(parents=True)
    with pytest.raises(checkpoint_files.UnreadableCheckpoint, match="--replace"):
        checkpoint_files.newest(str(tmp_path))


def test_the_newest_and_the_kept_checkpoints_stay(tmp_path: Path) -> None:
    for step in range(1, 8):
        uri = checkpoint_files.step_uri(str(tmp_path), step)
        checkpoint_files.write_metrics(f"{uri}/metrics.parquet", [])
        if step != 3:
            storage.write_json(f"{uri}/progress.json", {"step": step, "workers": 1, "files": []})
    checkpoint_files.delete_old(str(tmp_path), 2, keep={2})
    assert checkpoint_files.steps_in(str(tmp_path)) == [2, 6, 7]
    assert checkpoint_files.newest(str(tmp_path)).step == 7
    checkpoint_files.delete_checkpoint(str(tmp_path), 7)
    assert checkpoint_files.newest(str(tmp_path)).step == 6


def part(flat: torch.Tensor, *fragments: state_shards.Fragment) -> state_shards.FlatPart:
    flat.requires_grad_()
    inner = torch.optim.AdamW([flat], lr=0.1)
    return state_shards.FlatPart(flat, fragments, inner, inner.param_groups[0])


def test_a_file_that_lacks_numbers_is_refused(tmp_path: Path) -> None:
    own = part(torch.zeros(10), state_shards.Fragment("w", 4, 0, 10))
    state_shards._create_states(own)
    head = state_shards.RankFile("file", 1, (state_shards.Fragment("w", 0, 0, 12),), {"fp32": (torch.float32, 64)})
    with pytest.raises(ValueError, match="lacks 2 numbers of w"):
        list(state_shards._spans([own], [head]))
    (tmp_path / "other").write_bytes(b"\x10\0\0\0\0\0\0\0" + b"{}" + b" " * 14)
    with pytest.raises(ValueError, match="not the state of a training"):
        read_head(str(tmp_path / "other"))


def test_states_are_created_without_a_change_of_the_weights() -> None:
    values = torch.randn(7)
    own = part(values.clone(), state_shards.Fragment("w", 0, 0, 7))
    state_shards._create_states(own)
    own.set_steps(41)
    assert torch.equal(own.flat.detach(), values)
    assert own.flat.grad is None
    assert own.steps == 41
    assert own.group["lr"] == 0.1
    assert not own.tensors()["exp_avg"].any()


def test_neighbouring_bytes_are_one_read() -> None:
    """Of spans in a file, those with a gap of at most 64 KB; none becomes longer than a piece."""
    numbers = torch.zeros(20 << 20)
    spans = [
        state_shards.StateBytes("a", 64 + 4 * start, torch.float32, numbers[start : start + size])
        for start, size in ((0, 10), (10, 5), (16 << 10, 7), (10 << 20, 8 << 20), (18 << 20, 1 << 20))
    ]
    groups = list(state_shards._joined([*reversed(spans), spans[0]._replace(uri="b")]))
    assert [len(group) for group in groups] == [3, 1, 1, 1]
    pieces = list(state_shards._cut(state_shards.StateBytes("a", 64, torch.float32, numbers)))
    assert [piece.size for piece in pieces] == [32 << 20, 32 << 20, 16 << 20]
    assert [piece.at for piece in pieces] == [64, 64 + (32 << 20), 64 + (64 << 20)]


def test_headers_are_those_of_safetensors(tmp_path: Path) -> None:
    """Written by hand for a file that needs no copy: its reader must see the same."""
    own = part(torch.arange(11.0), state_shards.Fragment("näme", 0, 0, 11))
    state_shards._create_states(own)
    head, sizes = state_shards._header([own])
    assert len(head) % 64 == 0
    (tmp_path / "f").write_bytes(head + b"".join(own.tensors()[kind].detach().numpy().tobytes() for kind in KINDS))
    assert sum(sizes.values()) == 132
    with safe_open(tmp_path / "f", "pt") as file:
        assert torch.equal(file.get_tensor("fp32"), torch.arange(11.0))
        assert json.loads(file.metadata()["fragments"]) == [["näme", 0, 0, 11]]
    assert read_head(str(tmp_path / "f")).fragments == own.fragments
