"""Training without `features/`: the tower runs in the step on decoded pixels, with the loss and gradients of stored features."""

from __future__ import annotations

import hashlib
import io
import threading
from pathlib import Path
from typing import Any

import pytest
import shapes
import torch
import world
from PIL import Image

from voco.job.config import Model, Text, Training
from voco.model import build, weights
from voco.model.batch import Batch
from voco.model.voco_llama import Distillation, VocoLlama
from voco.precompute import features
from voco.precompute.feature_store import FeatureStore
from voco.run import units
from voco.sequence.sequence import Layout
from voco.store import index, schemas, storage
from voco.store.samples import SampleTables, blob_uri
from voco.train.batches import ImageBatches
from voco.train.live_images import LiveImages, UndecodableImage
from voco.train.worker_model import live_images, load_model

BLOCK = Training(
    epochs=1, global_batch=8, micro_batch=4, learning_rate=1e-3, precision="fp32", max_tokens=256, attention="segments"
)
TILES = shapes.tower(grid_pinpoints=[[32, 64], [64, 32], [64, 64]])
SIZES = [(64, 64), (64, 20), (30, 64), (40, 40)]  # width and height
ROWS, IN_GROUP = 16, 4
CPU = torch.device("cpu")


def rows_of_many_sizes() -> list[dict[str, Any]]:
    """Rows of images with two questions each, and rows of text; two rows have the same image."""
    rows = world.sample_rows(ROWS)
    with_media = [row for row in rows if row["media"]]
    for number, row in enumerate(with_media):
        (medium,) = row["media"]
        buffer = io.BytesIO()
        width, height = SIZES[number % len(SIZES)]
        Image.open(io.BytesIO(medium["bytes"])).resize((width, height)).save(buffer, "PNG")
        data = buffer.getvalue()
        medium |= {"bytes": data, "sha256": hashlib.sha256(data).hexdigest(), "width": width, "height": height}
    with_media[1]["media"] = with_media[0]["media"]
    return rows


@pytest.fixture(scope="module", params=["one view", "tiles"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples, the features of their images, and a checkpoint of each method."""
    root = tmp_path_factory.mktemp("live")
    world.write_samples(str(root / "samples"), rows_of_many_sizes(), rows_per_group=IN_GROUP)
    tower = TILES if request.param == "tiles" else shapes.TOWER
    output = str(root / "features")
    worker = features.FeatureWorker(output, tower, 8, threads=2)
    count = features.list_images(output, [str(root / "samples")], 100)
    for unit in range(count):
        worker(unit, units.WorkList(output).read(unit))
    index.join_pieces(output, count, schemas.FEATURES_INDEX)
    block = Model.model_validate({"llama": shapes.LLAMA, "tower": tower})
    for method in ("voco", "none", "avg_pool"):
        model = build.create_model(block, method, 2, Text(template="question_answer"), ["red", "green"], seed=1)  # type: ignore[arg-type]
        weights.save_checkpoint(model, weights.own_state(model), root / method / "model")
    return root


def config(root: Path, method: str, threads: int = 3) -> dict[str, Any]:
    """What a worker gets of a job without features and frame caches."""
    layout = weights.read_config(str(root / method))["layout"]
    inputs = {"features": "", "frame_cache": "", "threads": threads}
    return {**inputs, "kind": "image_sft", "model": str(root / method), "layout": layout, "seed": 0}


def every_row(tables: SampleTables) -> Any:
    return torch.tensor([(group, row) for group, size in enumerate(tables.sizes) for row in range(size)]).numpy()


def batches_of(root: Path, method: str, live: bool, taught: bool, share: bool = True) -> tuple[VocoLlama, list[Batch]]:
    """The model and all samples as two micro-batches, from pixels or from features."""
    facts = config(root, method)
    model = load_model(facts if live else {**facts, "features": "given"}, BLOCK)
    images = live_images(facts, BLOCK, model, CPU) if live else FeatureStore(str(root / "features"))
    block = BLOCK.model_copy(update={"share_vision": share})
    tables = SampleTables([str(root / "samples")], share)
    teacher = Layout(**facts["layout"]).model_copy(update={"method": "none"}) if taught else None
    model.distillation = Distillation(0.7, 2.0) if taught else None
    data = ImageBatches(tables, images, model, block, teacher).micro_batches(every_row(tables), 2)
    return model, data.batches  # type: ignore[return-value]


def loss_and_gradients(model: VocoLlama, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    results = [model(batch.to("cpu", torch.float32)) for batch in batches]
    losses = [result[0] if isinstance(result, tuple) else result for result in results]
    total = torch.stack(losses).sum()
    total.backward()
    return float(total.detach()), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(
    ("method", "taught", "share"),
    [("voco", False, True), ("voco", False, False), ("voco", True, True), ("none", False, True), ("avg_pool", False, True)],
)
def test_loss_and_gradients_are_those_of_stored_features(root: Path, method: str, taught: bool, share: bool) -> None:
    if taught and weights.read_config(str(root / method))["layout"]["anyres"] is not None:
        pytest.skip("distillation is refused for tiles")
    model, from_features = batches_of(root, method, live=False, taught=taught, share=share)
    expected, gradients = loss_and_gradients(model, from_features)
    model, from_pixels = batches_of(root, method, live=True, taught=taught, share=share)
    for stored, pixels in zip(from_features, from_pixels, strict=True):
        assert pixels.pixels is not None
        assert (pixels.pixels.dtype, len(pixels.features)) == (torch.uint8, 0)
        encoded = pixels.encoded(model.encode_pixels)
        # the tower rounds to fp16; batches of other sizes may differ before that in the last bits of fp32
        assert encoded.features.dtype == torch.float16
        assert torch.allclose(encoded.features.float(), stored.features.float(), rtol=2**-10, atol=2**-14)
        for name in ("ids", "position", "vision_at", "predict_at", "predict_id", "kind", "view"):
            assert torch.equal(getattr(pixels, name), getattr(stored, name))
    loss, live_gradients = loss_and_gradients(model, from_pixels)
    assert abs(loss - expected) <= 1e-5 * expected
    assert live_gradients.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert largest > 1e-2
    for name, gradient in gradients.items():
        assert (live_gradients[name] - gradient).abs().max() <= 1e-4 * largest, name
    # a wrong picture would be noticed
    (first, second) = from_pixels
    assert first.pixels is not None
    turned = Batch(**{**vars(first), "pixels": first.pixels.flip(0, 2)})
    assert abs(loss_and_gradients(model, [turned, second])[0] - expected) > 1e-4 * expected


def test_the_loss_is_exactly_equal_on_the_same_features(root: Path) -> None:
    """What the tower makes of the pixels, given as features."""
    model, batches = batches_of(root, "voco", live=True, taught=False)
    given = [batch.encoded(model.encode_pixels) for batch in batches]
    assert all(batch.pixels is None for batch in given)
    assert loss_and_gradients(model, batches)[0] == loss_and_gradients(model, given)[0]


def test_the_tower_is_none_of_the_models_weights(root: Path) -> None:
    model = load_model(config(root, "voco"), BLOCK)
    assert model.detached_tower is not None
    names = [*dict(model.named_parameters()), *model.state_dict(), *weights.own_state(model)]
    assert not [name for name in names if "tower" in name]
    assert not any(weight.requires_grad for weight in model.detached_tower.tower.parameters())
    with_features = load_model({**config(root, "voco"), "features": "given"}, BLOCK)
    assert with_features.detached_tower is None
    assert set(model.state_dict()) == set(with_features.state_dict())
    with pytest.raises(ValueError, match="no vision tower; use features"):
        with_features.encode_pixels(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))


def test_pixels_do_not_depend_on_threads_and_an_image_is_decoded_once(root: Path) -> None:
    model = load_model(config(root, "voco"), BLOCK)
    assert model.detached_tower is not None
    tower, rows = model.detached_tower.tower, [row for row in rows_of_many_sizes() if row["media"]]
    decoded: list[bytes] = []
    lock = threading.Lock()

    def preprocess(data: bytes) -> torch.Tensor:
        with lock:
            decoded.append(data)
        return tower.tiles(data)[0]

    for threads in (1, 4):
        decoded.clear()
        images = LiveImages(preprocess, threads)
        images.load(rows)
        for row in reversed(rows):
            (medium,) = row["media"]
            assert torch.equal(images(medium["sha256"]), tower.tiles(medium["bytes"])[0])
        images.load(rows[:2])  # one image, still there from before
        images(rows[0]["media"][0]["sha256"])
        assert sorted(decoded) == sorted({row["media"][0]["bytes"] for row in rows})
        with pytest.raises(KeyError):
            images(rows[2]["media"][0]["sha256"])  # of an earlier step
        images.close()


def test_an_image_that_is_no_picture_ends_the_run_by_name(root: Path, tmp_path: Path) -> None:
    rows = rows_of_many_sizes()
    bad = [row for row in rows if row["media"]][3]
    bad["media"][0] |= {"bytes": b"no image"}
    world.write_samples(str(tmp_path / "samples"), rows, rows_per_group=IN_GROUP)
    facts = config(root, "voco")
    model = load_model(facts, BLOCK)
    tables = SampleTables([str(tmp_path / "samples")])
    data = ImageBatches(tables, live_images(facts, BLOCK, model, CPU), model, BLOCK)
    addresses = every_row(tables)
    at = [row["sample_id"] for row in rows].index(bad["sample_id"])
    data.micro_batches(addresses[:at], 1)  # the steps before it train
    line = f"sample {bad['sample_id']}: image {bad['media'][0]['sha256']} cannot be decoded.*unsupported_format"
    with pytest.raises(UndecodableImage, match=line):
        data.micro_batches(addresses, 1)


def test_a_medium_under_blobs_is_read_too(root: Path, tmp_path: Path) -> None:
    rows = rows_of_many_sizes()
    (medium,) = next(row["media"] for row in rows if row["media"])
    storage.write_bytes(blob_uri(str(tmp_path / "samples"), medium["sha256"]), medium["bytes"])
    medium["bytes"] = None
    world.write_samples(str(tmp_path / "samples"), rows, rows_per_group=IN_GROUP)
    facts = config(root, "voco")
    model = load_model(facts, BLOCK)
    pixels = []
    for samples in (root / "samples", tmp_path / "samples"):
        tables = SampleTables([str(samples)])
        data = ImageBatches(tables, live_images(facts, BLOCK, model, CPU), model, BLOCK)
        (batch,) = data.micro_batches(every_row(tables), 1).batches
        assert isinstance(batch, Batch)
        pixels.append(batch.pixels)
    assert torch.equal(*pixels)  # type: ignore[arg-type]
