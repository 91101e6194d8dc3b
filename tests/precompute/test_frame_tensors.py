"""Stored number types of frame caches, element by element: the nearest number of the type, its bound, bytes and order."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from voco.model.cache import CacheKey, VocoCache
from voco.precompute.frame_tensors import (
    STORED,
    cache_metadata,
    dequantise,
    dtype_name,
    quantise,
    split_frames,
    to_column,
)
from voco.precompute.stored_frames import StoredFrames, even_runs, stored_tensors
from voco.store.number_types import SCALED_LIMITS, frame_tensor_bytes

SHAPE = (3, 2, 2, 4)  # layers, key-value heads, tokens, head width
FRAMES = 5


def numbers(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(F, D, H, N, E) whose heads differ in magnitude by up to 2^12, and a head of zeros."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(FRAMES, *SHAPE, generator=draw) * 2.0 ** torch.arange(-6, 0).view(3, 2, 1, 1).mul(2)
    values[1, 2, 1] = 0
    return values.to(dtype)


def join_frames(frames: torch.Tensor) -> torch.Tensor:
    """(D, H, F * N, E), frame after frame, of (F, D, H, N, E)."""
    return frames.permute(1, 2, 0, 3, 4).flatten(2, 3)


def joined(groups: list[tuple[pa.Table, list[int]]], name: str, facts: dict[str, Any]) -> torch.Tensor:
    """The numbers of a column of the frames at these rows, as a batch has them."""
    parts = tuple(part for table, rows in groups for part in stored_tensors(table, rows, name, facts))
    count, tokens = sum(len(rows) for _, rows in groups), facts["shape"][2]
    key = CacheKey("c" * 64, "voco", tokens, (1, 13), "p")
    return StoredFrames(parts, parts, (tokens,) * count, key, getattr(torch, facts["model_dtype"])).joined().keys


def e4m3_numbers() -> list[float]:
    """Every finite number of float8_e4m3fn in order, by its definition: 1, 4 and 3 bits, bias 7, no infinity (2209.05433)."""
    positive = []
    for code in range(127):  # 127 is no number
        exponent, mantissa = code >> 3, code & 7
        positive.append(math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10))
    return sorted({sign * number for number in positive for sign in (-1.0, 1.0)})


E4M3 = e4m3_numbers()


def nearest_e4m3(number: float) -> float:
    """By a search of all numbers; of two that are as near, the one with the even last bit."""
    best = min(abs(number - candidate) for candidate in E4M3)
    near = [candidate for candidate in E4M3 if abs(number - candidate) == best]
    magnitudes = sorted({abs(candidate) for candidate in E4M3})
    return next(candidate for candidate in near if len(near) == 1 or magnitudes.index(abs(candidate)) % 2 == 0)


def test_the_numbers_of_e4m3_are_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert sorted(set(codes[~codes.isnan()].tolist())) == E4M3
    assert E4M3[-1] == SCALED_LIMITS["float8_e4m3fn"] == 448.0


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_number_is_the_nearest_of_its_head_and_within_the_bound(name: str, dtype: torch.dtype) -> None:
    exact = numbers(dtype=dtype)
    stored, scales = quantise(exact, STORED[name])
    assert scales is not None
    assert (stored.dtype, scales.dtype, scales.shape) == (STORED[name], torch.float32, (FRAMES, 3, 2))
    restored = dequantise(stored, scales, torch.float32)
    limit = SCALED_LIMITS[dtype_name(STORED[name])]
    moved = 0
    for at in np.ndindex(*exact.shape):
        head = exact[at[:3]].float()
        scale = np.float32(float(head.abs().max())) / np.float32(limit)
        assert float(scales[at[:3]]) == float(scale)
        number = float(exact[at])
        if scale == 0:
            assert float(restored[at]) == 0.0
            continue
        quotient = max(-limit, min(limit, float(np.float32(number) / scale)))
        code = float(round(quotient)) if name == "int8" else nearest_e4m3(quotient)
        assert float(stored[at].float()) == code
        assert float(restored[at]) == float(np.float32(code) * scale)
        bound = scale / 2 if name == "int8" else max(abs(number) * 2**-4, scale * 2**-10)
        assert abs(float(restored[at]) - number) <= bound * (1 + 1e-6)
        moved += float(restored[at]) != number
    assert moved > exact.numel() // 2, "or the bound proves nothing"


def test_a_heads_scale_is_independent_of_other_heads_and_frames() -> None:
    """A large number in one head costs the others nothing: with one scale for all, the small heads would be zeros."""
    exact = numbers()
    exact[0, 0, 0, 0, 0] = 1e6
    for name in ("int8", "fp8"):
        changed, before = (dequantise(*quantise(values, STORED[name]), torch.float32) for values in (exact, numbers()))
        assert torch.equal(changed[0, 0, 1:], before[0, 0, 1:])
        assert torch.equal(changed[0, 1:], before[0, 1:])
        assert torch.equal(changed[1:], before[1:])
        alone = dequantise(*quantise(exact[3], STORED[name]), torch.float32)
        assert torch.equal(alone, changed[3]), "a frame is the same alone and among others"


def test_bf16_is_torchs_cast_and_the_models_own_type_is_unchanged() -> None:
    exact = numbers()
    stored, scales = quantise(exact, STORED["bf16"])
    assert scales is None
    assert torch.equal(stored, exact.bfloat16())
    assert torch.equal(dequantise(stored, None, torch.float32), exact.bfloat16().float())
    same, scales = quantise(exact, torch.float32)
    assert scales is None
    assert torch.equal(same, exact)


def test_golden_codes() -> None:
    head = torch.tensor([[127.0, -63.5, 0.5, 1.5], [2.5, -1.0, 0.0, -127.0]]).view(1, 1, 2, 4)
    stored, scales = quantise(head, torch.int8)
    assert scales is not None
    assert scales.tolist() == [[1.0]]
    assert stored.flatten().tolist() == [127, -64, 0, 2, 2, -1, 0, -127]  # halves to the even number
    head = torch.tensor([[448.0, 17.0, 19.0, -(2.0**-9)], [2.0**-10, 3 * 2.0**-10, 0.1, 464.0 - 16]]).view(1, 1, 2, 4)
    stored, scales = quantise(head, torch.float8_e4m3fn)
    assert scales is not None
    assert scales.tolist() == [[1.0]]
    assert stored.float().flatten().tolist() == [448, 16, 20, -(2.0**-9), 0, 2 * 2.0**-9, 0.1015625, 448]


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_extreme_numbers_stay_numbers(name: str) -> None:
    for largest in (3.4e38, 1e-44, 1e-40):
        values = torch.tensor([largest, -largest, largest / 3, 0.0]).view(1, 1, 1, 4)
        restored = dequantise(*quantise(values, STORED[name]), torch.float32)
        assert bool(restored.isfinite().all())
        assert float((restored - values).abs().max()) <= largest
    for wrong in (math.inf, -math.inf, math.nan):
        values = torch.tensor([1.0, wrong]).view(1, 1, 1, 2)
        with pytest.raises(ValueError, match="not finite cannot be stored as"):
            quantise(values, STORED[name])


@pytest.mark.parametrize("name", [None, "bf16", "int8", "fp8"])
def test_columns_have_the_bytes_of_the_formula_and_read_back_in_any_order(name: str | None) -> None:
    dtype = torch.float32 if name is None else STORED[name]
    layers, heads, tokens, width = SHAPE
    exact = [join_frames(numbers(seed)) for seed in (1, 2)]
    key = CacheKey("c" * 64, "voco", tokens, (1, 13), "p")
    cache = VocoCache(exact[0], exact[1], (tokens,) * FRAMES, key)
    facts = json.loads(cache_metadata(cache, {"rope_theta": 1e4}, dtype))
    assert (facts["dtype"], facts["model_dtype"], facts["shape"]) == (dtype_name(dtype), "float32", list(SHAPE))
    columns = {}
    for column, values in (("keys", cache.keys), ("values", cache.values)):
        stored, scales = quantise(split_frames(values, tokens), dtype)
        columns[column] = to_column(stored)
        if scales is not None:
            columns[f"{column}_scales"] = to_column(scales)
    table = pa.table(columns)
    width_of = {field.name: field.type.byte_width for field in table.schema}
    number_bytes = {None: 4, "bf16": 2, "int8": 1, "fp8": 1}[name]
    scale_bytes = 4 * layers * heads if name in ("int8", "fp8") else 0
    assert width_of["keys"] == width_of["values"] == layers * heads * tokens * width * number_bytes
    assert sum(width_of.values()) == 2 * (layers * heads * tokens * width * number_bytes + scale_bytes)
    assert frame_tensor_bytes(SHAPE, dtype_name(dtype)) == (width_of["keys"], scale_bytes)
    first, rest = table.slice(0, 2).combine_chunks(), table.slice(2).combine_chunks()
    for column, seed in (("keys", 1), ("values", 2)):
        expected = dequantise(*quantise(numbers(seed), dtype), torch.float32)
        read = joined([(first, [0, 1]), (rest, [0, 1, 2])], column, facts)
        assert read.dtype == torch.float32
        assert torch.equal(read, join_frames(expected))
        shuffled = joined([(rest, [2, 0]), (first, [1]), (rest, [1])], column, facts)
        assert torch.equal(shuffled, join_frames(expected[[4, 2, 1, 3]]))


def test_split_and_join_are_frame_after_frame() -> None:
    frames = numbers()
    together = join_frames(frames)
    assert together.shape == (3, 2, FRAMES * 2, 4)
    assert torch.equal(together[:, :, 6:8], frames[3])
    assert torch.equal(split_frames(together, 2), frames)


def test_a_column_of_a_slice_is_read_at_its_offset() -> None:
    frames = numbers()
    column = to_column(frames)
    assert column[2].as_py() == frames[2].numpy().tobytes()
    facts = {"dtype": "float32", "model_dtype": "float32", "shape": list(SHAPE)}
    table = pa.table({"keys": column}).slice(1, 3)
    assert torch.equal(joined([(table, [0, 1, 2])], "keys", facts), join_frames(frames[1:4]))
    assert torch.equal(joined([(table, [2, 0, 0])], "keys", facts), join_frames(frames[[3, 1, 1]]))


@pytest.mark.parametrize("name", [None, "bf16", "int8", "fp8"])
@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16])
def test_frames_are_written_into_part_of_a_batch_of_any_type_and_with_fewer_tokens(name: str | None, model: torch.dtype) -> None:
    """Rounded to the compressor's type first, then to the batch's: what a reader of that type has always got."""
    stored_as = model if name is None else STORED[name]
    facts = {"dtype": dtype_name(stored_as), "model_dtype": dtype_name(model), "shape": list(SHAPE)}
    columns, expected = {}, {}
    for column, seed in (("keys", 1), ("values", 2)):
        stored, scales = quantise(numbers(seed, model), stored_as)
        columns[column] = to_column(stored)
        if scales is not None:
            columns[f"{column}_scales"] = to_column(scales)
        expected[column] = dequantise(stored, scales, model)
    table = pa.table(columns)
    key = CacheKey("c" * 64, "voco", SHAPE[2], (1, 13), "p")
    rows = [0, 2, 4, 1]
    parts = [tuple(stored_tensors(table, rows, column, facts)) for column in ("keys", "values")]
    frames = StoredFrames(parts[0], parts[1], (SHAPE[2],) * len(rows), key, model)
    for n in (1, 2):
        few = frames.take(n)
        assert few.tokens == (n,) * len(rows)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            batch = torch.full((2, *SHAPE[:2], len(rows) * n + 3, SHAPE[3]), 7.0, dtype=dtype)
            few.copy_to(batch[0][:, :, 2:-1], batch[1][:, :, 2:-1])
            for written, column in zip(batch, ("keys", "values"), strict=True):
                assert torch.equal(written[:, :, 2:-1], join_frames(expected[column][rows][..., :n, :]).to(dtype))
                assert bool((written[:, :, :2] == 7).all())
                assert bool((written[:, :, -1:] == 7).all())
    with pytest.raises(ValueError, match="cannot read 3 tokens of frames that have"):
        frames.take(3)


@pytest.mark.parametrize(
    ("rows", "slices"),
    [
        ([], []), ([3], [(3, 4, 1)]), ([0, 1, 2], [(0, 3, 1)]), ([0, 3, 6, 7, 8], [(0, 7, 3), (7, 9, 1)]),
        ([2, 0, 0, 1], [(2, 3, 1), (0, 1, 1), (0, 2, 1)]), ([5, 4], [(5, 6, 1), (4, 5, 1)]),
    ],
)  # fmt: skip
def test_rows_as_slices(rows: list[int], slices: list[tuple[int, int, int]]) -> None:
    runs = list(even_runs(rows))
    assert [(run.start, run.stop, run.step) for run in runs] == slices
    assert [row for run in runs for row in range(100)[run]] == rows
