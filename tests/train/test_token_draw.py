"""Elastic N: samples of several N and uncompressed ones in one batch are what a model of each N computes alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
import world
from pydantic import ValidationError

from voco.job.compression import Compression
from voco.job.config import ImageSft
from voco.model.batch import collate
from voco.sequence.sequence import TokenSample, build_sample
from voco.store.samples import SampleTables, images_of
from voco.train.batches import ImageBatches
from voco.train.sampler import TableMix, epoch_order
from voco.train.token_draw import WHOLE, TokenDraw, token_draw

BLOCK = ImageSft(epochs=1, global_batch=12, micro_batch=12, learning_rate=1e-3, max_tokens=60)
SIZES = (1, 2, 4)


def compression(**keys: Any) -> Compression:
    return Compression.model_validate({"method": "voco", "tokens": [4, 1, 2], **keys})


class Features(dict[str, torch.Tensor]):
    """Random features of each image, made when they are asked for."""

    def load(self, names: Any) -> None:
        for name in names:
            seed = torch.Generator().manual_seed(int(name[:8], 16))
            self[name] = torch.randn(tiny.VISION_SLOTS, tiny.FEATURES, generator=seed, dtype=torch.float64)

    def __call__(self, name: str) -> torch.Tensor:
        return self[name]


def alone(sample_id: str, turns: list[Any], media: list[str], features: Any, n: int) -> tuple[Any, torch.Tensor]:
    """The obvious form: a model of this N alone, or of method none, and its loss of one sample."""
    model = tiny.model("none", 4) if n == WHOLE else tiny.model("voco", n)
    sample = build_sample(sample_id, turns, media, model.tokenizer, model.layout)
    loss = model(collate([sample], features, (tiny.VISION_SLOTS, tiny.FEATURES)).to("cpu", torch.float64))
    loss.backward()
    return model, loss.detach()


@pytest.mark.parametrize("attention", ["segments", "dense"])
def test_a_batch_of_several_n_is_what_models_of_each_n_compute(tmp_path, attention: str) -> None:
    """Losses and gradients of one batch, in fp64. Rows of text have no view, rows with an image two conversations."""
    uri = world.write_samples(str(tmp_path / "out"), world.sample_rows(12))
    tables, features, model = SampleTables([uri]), Features(), tiny.model("voco", 4)
    model.attention = attention
    rows = np.array([(group, row) for group, size in enumerate(tables.sizes) for row in range(size)])
    sizes = [(*SIZES, WHOLE)[index % 4] for index in range(len(rows))]
    (batch,) = ImageBatches(tables, features, model, BLOCK).micro_batches(rows, 1, sizes).batches
    loss = model(batch.to("cpu", torch.float64))
    loss.backward()

    listed = [row for group in range(len(tables.sizes)) for row in tables.read(group)]
    total, gradients = torch.zeros((), dtype=torch.float64), dict[str, torch.Tensor]()
    for row, n in zip(listed, sizes, strict=True):
        turns = [talk["turns"] for talk in row["conversations"]]
        model_alone, own = alone(row["sample_id"], turns, images_of(row), features, n)
        total += own
        for name, weight in model_alone.named_parameters():
            if weight.grad is not None:
                gradients[name] = gradients.get(name, torch.zeros_like(weight)) + weight.grad
    assert tiny.close(loss, total)
    for name, weight in model.named_parameters():
        if name in gradients:
            assert weight.grad is not None
            assert tiny.close(weight.grad, gradients[name]), name
    # or the equality proves nothing: N and the mask move the loss
    (at_four,) = ImageBatches(tables, features, model, BLOCK).micro_batches(rows, 1).batches
    assert abs(float(model(at_four.to("cpu", torch.float64)).detach() - total)) > 1e-2


def test_an_uncompressed_sample_of_several_images_is_plain_causal_beside_compressed_ones() -> None:
    """Its second image sees the first, its text sees both; another sample in the row sees nothing of it."""
    model, features = tiny.model("voco", 2), dict(zip("abc", tiny.features(3), strict=True))
    plain = tiny.model("none", 2)
    turns = [tiny.question("what is it?", "a kite"), tiny.question("and here?", "two boats")]
    parts = [(["a", "b"], True), (["c"], False), (["a"], True)]
    samples, expected = list[TokenSample](), torch.zeros((), dtype=torch.float64)
    for media, whole in parts:
        layout = (plain if whole else model).layout
        sample = build_sample("s", turns, media, model.tokenizer, layout)
        samples.append(TokenSample(**{**vars(sample), "whole": whole}))
        single = collate([sample], features.__getitem__, (tiny.VISION_SLOTS, tiny.FEATURES))
        expected += (plain if whole else model)(single.to("cpu", torch.float64)).detach()
    joined = collate(samples, features.__getitem__, (tiny.VISION_SLOTS, tiny.FEATURES)).to("cpu", torch.float64)
    for backend in ("segments", "dense"):
        model.attention = backend
        assert tiny.close(model(joined), expected)


def test_text_is_cut_at_the_same_token_for_every_n(tmp_path) -> None:
    """So a teacher of another layout predicts the same tokens, and N changes nothing but N."""
    uri = world.write_samples(str(tmp_path / "out"), world.sample_rows(12))
    tables, model = SampleTables([uri]), tiny.model("voco", 4)
    block = BLOCK.model_copy(update={"max_tokens": tiny.layout(tokens=4).view_length + 30})
    samples = ImageBatches(tables, Features(), model, block).samples
    rows = np.array([(group, row) for group, size in enumerate(tables.sizes) for row in range(size)])
    full = samples.take(rows)
    assert sum(sample.cut for sample in full) > 0
    for n in (*SIZES, WHOLE):
        taken = samples.take(rows, [n] * len(rows))
        assert [sample.predict_id.tolist() for sample in taken] == [sample.predict_id.tolist() for sample in full]
        assert [sample.cut for sample in taken] == [sample.cut for sample in full]
        voco = [int((sample.ids == model.layout.voco_id).sum()) for sample in taken]
        assert voco == [(4 if n == WHOLE else n) * len(sample.media) for sample in taken]


def test_the_draw_is_the_same_on_any_number_of_workers() -> None:
    draw = TokenDraw(compression(uncompressed_share=0.25), seed=7, total=50)
    order = epoch_order(TableMix((40, 40, 20), (0, 0, 0), (1.0,)), 7, 0, 12)
    for step in (0, 3, order.steps - 1):
        (together,) = [draw(order.rank_rows(step, 0, 1), step)]
        for world_size in (2, 3, 5):
            shared = [n for rank in range(world_size) for n in draw(order.rank_rows(step, rank, world_size), step)]
            assert shared == together
    rows = order.rank_rows(0, 0, 1)
    assert draw(rows, 0) != draw(rows, 1), "a sample's N changes between epochs"
    assert TokenDraw(draw.compression, 8, 50)(rows, 0) != draw(rows, 0)


def shares(draw: TokenDraw, step: int) -> dict[int, float]:
    """How often each N is drawn in a step of 4,000 samples."""
    drawn = draw(np.array([(0, row) for row in range(4000)]), step)
    return {n: drawn.count(n) / len(drawn) for n in sorted(set(drawn))}


@pytest.mark.parametrize(
    ("rule", "step", "expected"),
    [
        ("uniform", 0, {1: 1 / 3, 2: 1 / 3, 4: 1 / 3}),
        ("geometric", 0, {1: 4 / 7, 2: 2 / 7, 4: 1 / 7}),
        ("curriculum", 0, {4: 1.0}),
        ("curriculum", 17, {2: 1 / 2, 4: 1 / 2}),
        ("curriculum", 34, {1: 1 / 3, 2: 1 / 3, 4: 1 / 3}),
        ("curriculum", 99, {1: 1 / 3, 2: 1 / 3, 4: 1 / 3}),
    ],
)
def test_a_rule_draws_each_n_as_often_as_it_says(rule: str, step: int, expected: dict[int, float]) -> None:
    drawn = shares(TokenDraw(compression(draw=rule), seed=0, total=100), step)
    assert drawn.keys() == expected.keys()
    assert all(abs(drawn[n] - share) < 0.03 for n, share in expected.items())
    with_whole = shares(TokenDraw(compression(draw=rule, uncompressed_share=0.2), seed=0, total=100), step)
    assert abs(with_whole.pop(WHOLE) - 0.2) < 0.03
    assert all(abs(with_whole[n] - 0.8 * share) < 0.03 for n, share in expected.items())


def test_only_a_compression_that_differs_by_sample_draws() -> None:
    assert token_draw({"seed": 0}, 10) is None
    assert token_draw({"seed": 0, "compression": {"method": "voco", "tokens": 4}}, 10) is None
    drawn = token_draw({"seed": 0, "compression": {"method": "voco", "tokens": 4, "uncompressed_share": 0.5}}, 10)
    assert drawn is not None
    assert set(shares(drawn, 0)) == {WHOLE, 4}
    assert (compression().sizes, compression().most_tokens) == ((1, 2, 4), 4)


@pytest.mark.parametrize(
    ("block", "line"),
    [
        (
            {"method": "avg_pool", "tokens": [1, 4]},
            "tokens: samples can differ in <voco> tokens only: .* got avg_pool",
        ),
        (
            {"method": "none", "tokens": 1, "uncompressed_share": 0.5},
            "uncompressed_share: samples can differ in <voco>",
        ),
        ({"method": "voco", "tokens": [1, 1]}, "tokens: expected each N once"),
        ({"method": "voco", "tokens": 4, "draw": "geometric"}, "draw: expected several `tokens` to draw from, got 4"),
        ({"method": "voco", "tokens": []}, "at least 1 item"),
        ({"method": "voco", "tokens": [0, 1]}, "greater than or equal to 1"),
        ({"method": "voco", "tokens": 1, "uncompressed_share": 1.0}, "less than 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(block: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError, match=line):
        Compression.model_validate(block)
