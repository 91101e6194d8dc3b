"""Images cut into tiles through the stages on a real local Ray: features, image SFT under each method, answers."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
import shapes
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

pytestmark = pytest.mark.ray
TOWER = {**shapes.TOWER, "grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
SIZES = [(64, 64), (64, 20), (30, 64), (40, 40)]  # width and height


def of_many_sizes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with images of four shapes."""
    for index, row in enumerate(rows):
        for medium in row["media"]:
            buffer = io.BytesIO()
            width, height = SIZES[index % 4]
            Image.open(io.BytesIO(medium["bytes"])).resize((width, height)).save(buffer, "PNG")
            data = buffer.getvalue()
            medium |= {"bytes": data, "sha256": hashlib.sha256(data).hexdigest(), "width": width, "height": height}
    return rows


def changed(job: Job, **changes: Any) -> Job:
    return Job.model_validate({**job.model_dump(exclude_none=True, exclude_unset=True), **changes})


@pytest.fixture(scope="module")
def root(ray_local: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiles")
    world.write_samples(str(root / "train"), of_many_sizes(world.sample_rows(24)))
    world.write_samples(str(root / "test"), of_many_sizes(world.sample_rows(8, evaluation=True, first=100, text_every=0)))
    job = world.features_job([str(root / "train"), str(root / "test")], str(root / "features"))
    pipelines.run(changed(job, features={"tower": TOWER, "unit_images": 16, "batch": 3}))
    return root


def sft(root: Path, method: str, **changes: Any) -> Job:
    job = world.sft_job(str(root / "train"), str(root / "features"), str(root / method), method, **changes)
    return changed(job, model={"llama": job.model.llama.model_dump(), "tower": TOWER})


def test_features_hold_every_tile(root: Path) -> None:
    store = FeatureStore(str(root / "features"))
    assert store.shape[0] == 4
    (row,) = (row for row in of_many_sizes(world.sample_rows(2)) if row["media"])
    assert store(row["media"][0]["sha256"]).shape == (3, *store.shape)
    tower = load_tower(Tower.model_validate(TOWER).model_dump(exclude_none=True))
    assert store.tower == tower.identity
    fresh = tower(tower.tiles(row["media"][0]["bytes"])[0])
    assert torch.equal(fresh, store(row["media"][0]["sha256"]))


@pytest.mark.parametrize(
    ("method", "stage"),
    [("voco", 2), pytest.param("none", 3, marks=pytest.mark.slow), pytest.param("q_former", 2, marks=pytest.mark.slow)],
)
def test_train_and_evaluate(root: Path, method: str, stage: int) -> None:
    pipelines.run(sft(root, method, zero_stage=stage))
    model, start = weights.load_checkpoint(str(root / method)), weights.load_checkpoint(str(root / method / "initial"))
    assert model.layout.anyres is not None
    assert not torch.equal(model.projector[0].weight, start.projector[0].weight)
    assert torch.equal(model.image_newline, start.image_newline) == (method != "none")
    output = str(root / f"answers-{method}")
    job = {
        "name": f"ask-{method.replace('_', '-')}", "kind": "evaluate", "output": output, "resources": {"workers": 2},
        "inputs": {
            "samples": [{"uri": str(root / "test")}], "features": str(root / "features"), "checkpoint": str(root / method),
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


def test_a_prefix_that_is_too_long_is_refused_before_anything_starts(root: Path) -> None:
    job = sft(root, "voco", max_tokens=30)
    with pytest.raises(Refused, match=r"image_sft\.max_tokens: expected more than the prefix's 35 tokens, got 30"):
        pipelines.run(changed(job, output=str(root / "refused")))


def test_tiles_cannot_be_distilled(root: Path) -> None:
    job = sft(root, "voco", distill={"weight": 1.0})
    with pytest.raises(Refused, match=r"image_sft\.distill: not for a checkpoint that cuts images into tiles"):
        pipelines.run(changed(job, output=str(root / "taught")))
