"""Images cut into tiles through the stages on a real local Ray: features, image SFT under each method, answers."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import world
from PIL import Image

import pipelines
from voco.errors import Refused
from voco.job.config import Tower
from voco.job.spec import Job
from voco.model import weights
from voco.model.vision.tower import load_tower
from voco.precompute.feature_store import FeatureStore
from voco.store import parquet, storage

pytestmark = pytest.mark.slow
TOWER = {**world.TOWER, "grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
SIZES = [(64, 64), (64, 20), (30, 64), (40, 40)]  # width and height


def of_many_sizes(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with images of four shapes."""
    for at, row in enumerate(made):
        for medium in row["media"]:
            held = io.BytesIO()
            width, height = SIZES[at % 4]
            Image.open(io.BytesIO(medium["bytes"])).resize((width, height)).save(held, "PNG")
            data = held.getvalue()
            medium |= {"bytes": data, "sha256": hashlib.sha256(data).hexdigest(), "width": width, "height": height}
    return made


def changed(job: Job, **changes: Any) -> Job:
    return Job.model_validate({**job.model_dump(exclude_none=True, exclude_unset=True), **changes})


@pytest.fixture(scope="module")
def place(ray_local: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tiles")
    world.write_samples(str(place / "train"), of_many_sizes(world.sample_rows(24)))
    world.write_samples(str(place / "test"), of_many_sizes(world.sample_rows(8, evaluation=True, first=100, text_every=0)))
    job = world.features_job([str(place / "train"), str(place / "test")], str(place / "features"))
    pipelines.run(changed(job, features={"tower": TOWER, "unit_images": 16, "batch": 3}))
    return place


def sft(place: Path, method: str, **changes: Any) -> Job:
    job = world.sft_job(str(place / "train"), str(place / "features"), str(place / method), method, **changes)
    return changed(job, model={"llama": job.model.llama.model_dump(), "tower": TOWER})


def test_features_hold_every_tile(place: Path) -> None:
    store = FeatureStore(str(place / "features"))
    assert store.shape[0] == 4
    (row,) = (row for row in of_many_sizes(world.sample_rows(2)) if row["media"])
    assert store(row["media"][0]["sha256"]).shape == (3, *store.shape)
    tower = load_tower(Tower.model_validate(TOWER).model_dump(exclude_none=True))
    assert store.tower == tower.identity
    fresh = tower(tower.tiles(row["media"][0]["bytes"])[0])
    assert torch.equal(fresh, store(row["media"][0]["sha256"]))


@pytest.mark.parametrize(("method", "stage"), [("voco", 2), ("none", 3), ("q_former", 2)])
def test_trained_and_asked(place: Path, method: str, stage: int) -> None:
    pipelines.run(sft(place, method, zero_stage=stage))
    model, start = weights.load_checkpoint(str(place / method)), weights.load_checkpoint(str(place / method / "initial"))
    assert model.layout.anyres is not None
    assert not torch.equal(model.projector[0].weight, start.projector[0].weight)
    assert torch.equal(model.image_newline, start.image_newline) == (method != "none")
    output = str(place / f"answers-{method}")
    job = {
        "name": f"ask-{method.replace('_', '-')}", "kind": "evaluate", "output": output, "resources": {"workers": 2},
        "inputs": {
            "samples": [{"uri": str(place / "test")}], "features": str(place / "features"), "checkpoint": str(place / method),
        },
        "evaluate": {"benchmark": "tiles"},
    }  # fmt: skip
    assert pipelines.run(Job.model_validate(job)).counts["written"] == 16
    scores = parquet.read_table(storage.join(output, "scores", "part-00000.parquet")).to_pylist()
    (score,) = (row for row in scores if row["category"] == "all")
    token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, fp32
    tiles = (5 + 3 + 3 + 5) / 4
    if method == "voco":
        assert score["cache_bytes"] == tiles * token
    if method == "q_former":
        assert score["cache_bytes"] == tiles * (1 + 1 + 1) * token
    assert score["full_cache_bytes"] > score["cache_bytes"] or method == "none"


def test_a_prefix_that_is_too_long_is_refused_before_anything_starts(place: Path) -> None:
    job = sft(place, "voco", max_tokens=30)
    with pytest.raises(Refused, match=r"image_sft\.max_tokens: expected more than the prefix's 35 tokens, got 30"):
        pipelines.run(changed(job, output=str(place / "refused")))


def test_nothing_is_distilled_from_tiles(place: Path) -> None:
    job = sft(place, "voco", distill={"weight": 1.0})
    with pytest.raises(Refused, match=r"image_sft\.distill: not for a checkpoint that cuts images into tiles"):
        pipelines.run(changed(job, output=str(place / "taught")))
