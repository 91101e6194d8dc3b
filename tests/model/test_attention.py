"""Every backend gives the dense reference's values and gradients; the loss and the caches cost no more than they need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from voco.job.tables import ATTENTION, METHODS
from voco.model import lm_head
from voco.model.attention.plan import Backend, get_backend, plan_attention, resolve_backend
from voco.model.attention.segments import SegmentsPlan
from voco.model.batch import Batch, CachedBatch, collate, collate_cached
from voco.model.voco_llama import VocoLlama
from voco.sequence.sequence import build_sample

GPU = torch.cuda.is_available()


def cases() -> Iterator[tuple[str, str, torch.dtype]]:
    """Every backend that runs here, under every method that is trained; kernels that train on GPUs only, in bf16 there."""
    for name, row in ATTENTION.items():
        if name == "dense" or not get_backend(name).available():
            continue
        exact = "fp32" in row.precisions and (row.trains_on_cpu or not GPU)
        for method, method_row in METHODS.items():
            if method_row.trains:
                yield name, method, torch.float64 if exact else torch.bfloat16
        if exact:
            yield from ((name, "voco", dtype) for dtype in (torch.float32, torch.bfloat16))


SHAPES = [
    (1, ["what is it?", "and where in the picture?"]), (0, ["a text on its own"]), (2, ["left?"]), (0, ["x"]), (12, ["so?"]),
]  # fmt: skip


def batches(model: VocoLlama) -> tuple[Batch, CachedBatch]:
    """The same samples for one masked pass and with their views read from caches."""
    store = dict(enumerate(tiny.features(15, dtype=model.dtype)))
    plain, read, caches, start = [], [], [], 0
    for number, (views, texts) in enumerate(SHAPES):
        names = [str(start + view) for view in range(views)]
        talks = [tiny.question(text, "an answer"[: 3 + number]) for text in texts]
        plain.append(build_sample(f"s{number}", talks, names, tiny.TOKENIZER, model.layout))
        read.append(build_sample(f"s{number}", talks, names, tiny.TOKENIZER, model.layout, cached=True))
        compressed = model.compress_features([[store[int(name)] for name in names]]) if views else [None]
        caches.append(compressed[0])
        start += views
    masked = collate(plain, lambda name: store[int(name)], (tiny.VISION_SLOTS, tiny.FEATURES))
    return masked, collate_cached(read, caches)


def loss_states_gradients(model: VocoLlama, batch: Batch | CachedBatch, backward: bool = True) -> dict[str, torch.Tensor]:
    """The loss, the states and, with `backward`, every weight's gradient."""
    model.zero_grad()
    with torch.no_grad():
        loss = model(batch)
        states = model.hidden_cached(batch) if isinstance(batch, CachedBatch) else model.hidden(batch)
    if backward:
        loss = model(batch)
        loss.backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"loss": loss.detach(), "states": states, **grads}


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(("name", "method", "dtype"), cases())
def test_every_backend_equals_the_dense_reference(name: str, method: str, dtype: torch.dtype) -> None:
    row = ATTENTION[name]
    device = "cuda" if GPU and not row.trains_on_cpu else "cpu"
    wide = {"head_dim": 16} if device == "cuda" else {}  # FlexAttention has no narrower kernel
    model = tiny.model(method, 1 if METHODS[method].pooled else 2, dtype, **wide).to(device)
    trains = row.trains_on_cpu or device == "cuda"
    masked, cached = batches(model)
    for batch in (masked, cached) if METHODS[method].views_apart else (masked,):
        batch = batch.to(device, dtype)
        model.attention = "dense"
        expected = loss_states_gradients(model, batch)
        model.attention = name
        got = loss_states_gradients(model, batch, trains)
        assert got.keys() == expected.keys() or not trains
        for key in got:
            if dtype == torch.bfloat16:
                assert F.cosine_similarity(got[key].float().flatten(), expected[key].float().flatten(), dim=0) > 0.9999, key
            else:
                assert tiny.close(got[key], expected[key]), key


def each_alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """What FlashAttention's varlen computes, one segment after the other: causal, aligned at the end."""
    query_ends, key_ends, longest_query, longest_key, scale = arguments
    shared, out = q.shape[1] // k.shape[1], []
    for index in range(len(query_ends) - 1):
        queries_span, keys_span = (slice(int(ends[index]), int(ends[index + 1])) for ends in (query_ends, key_ends))
        queries, keys = (span.stop - span.start for span in (queries_span, keys_span))
        assert (queries, keys) <= (longest_query, longest_key)
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        pairs = (states.repeat_interleave(shared, 1) for states in (k[keys_span], v[keys_span]))
        heads = (states.transpose(0, 1) for states in (q[queries_span], *pairs))
        out.append(F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("method", ["voco", "none"])
def test_varlen_cuts_the_same_segments(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel runs on GPUs only; the bounds of segments and the way back are checked here."""
    monkeypatch.setattr("voco.model.attention.varlen.varlen_kernel", lambda: each_alone)
    model = tiny.model(method, 2, torch.bfloat16)
    masked, cached = batches(model)
    for batch in (masked, cached) if method == "voco" else (masked,):
        model.attention = "dense"
        expected = loss_states_gradients(model, batch)
        model.attention = "varlen"
        got = loss_states_gradients(model, batch)
        assert got.keys() == expected.keys()
        for key in got:
            assert F.cosine_similarity(got[key].float().flatten(), expected[key].float().flatten(), dim=0) > 0.9999, key


@pytest.mark.parametrize("name", ATTENTION)
def test_every_row_has_a_backend(name: str) -> None:
    backend = get_backend(name)
    assert isinstance(backend, Backend)
    assert backend.available() or backend.needs


def test_recomputed_layers_get_the_same_segments() -> None:
    plain, recomputed = tiny.model(), tiny.model()
    recomputed.language_model.train()
    recomputed.language_model.activation_checkpointing_enable({"use_reentrant": False})
    first, second = (
        batches(plain)[0],
        collate([build_sample("o", [tiny.question("other?", "b")], [], tiny.TOKENIZER, plain.layout)], str, (9, 6)),
    )
    expected = loss_states_gradients(plain, first)
    recomputed.zero_grad()
    loss = recomputed(first)
    with torch.no_grad():
        recomputed(second)  # another batch between forward and backward changes nothing
    loss.backward()
    for name, weight in recomputed.named_parameters():
        assert weight.grad is not None, name
        assert tiny.close(weight.grad, expected[name]), name


def test_equal_and_nearly_equal_segments_share_a_call_and_long_caches_are_oblong() -> None:
    model = tiny.model()
    masked, _ = batches(model)
    squares = plan_attention("segments", masked.token_ids, True, torch.device("cpu"))
    assert isinstance(squares, SegmentsPlan)
    counts = [(call.count, call.mask is None) for call in squares.calls]
    assert sum(count for count, _ in counts) == 15 + sum(len(texts) for _, texts in SHAPES)
    assert len(counts) < 12
    assert not all(square for _, square in counts), "the text after 12 views reads more keys than it has tokens"
    alone = collate([build_sample("o", [tiny.question("b")], [], tiny.TOKENIZER, model.layout)], str, (9, 6))
    single = plan_attention("segments", alone.token_ids, True, torch.device("cpu"))
    assert isinstance(single, SegmentsPlan)
    assert (single.starts, single.back) == (((0, 0),), None), "one sequence in order is used unchanged"


class Largest(TorchDispatchMode):
    """Counts the numbers in the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_equals_cross_entropy_and_never_holds_all_logits(dtype: torch.dtype, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    rows, width, vocabulary = 50, 8, 96
    monkeypatch.setattr(lm_head, "LOGITS", 12 * vocabulary)
    linear = torch.nn.Linear(width, vocabulary, bias=False).to(dtype)
    states, targets = torch.randn(rows, width, dtype=dtype).requires_grad_(), torch.randint(0, vocabulary, (rows,))
    with Largest() as largest:
        loss = lm_head.LMHead(linear)(states, targets)
        got = torch.autograd.grad(loss * 0.5, (states, linear.weight))
    assert largest.numbers == 12 * vocabulary
    exact = dtype if dtype == torch.float64 else torch.float32
    expected = F.cross_entropy(linear(states).to(exact), targets, reduction="sum")
    gradients = torch.autograd.grad(expected * 0.5, (states, linear.weight))
    assert loss.dtype == exact
    assert tiny.close(loss, expected)
    for gradient, reference in zip(got, gradients, strict=True):
        if dtype == torch.bfloat16:
            assert F.cosine_similarity(gradient.float().flatten(), reference.float().flatten(), dim=0) > 0.9999
        else:
            assert tiny.close(gradient, reference)


def test_a_frozen_head_gets_no_gradient_and_states_do() -> None:
    linear = torch.nn.Linear(4, 9, bias=False).requires_grad_(False)
    states = torch.randn(3, 4, requires_grad=True)
    lm_head.LMHead(linear)(states, torch.tensor([1, 2, 3])).backward()
    assert states.grad is not None
    assert linear.weight.grad is None


@pytest.mark.parametrize("method", ["voco", "none"])
def test_compressing_stops_at_the_last_projections(method: str) -> None:
    model = tiny.model(method)
    ran: list[tuple[str, int]] = []
    for name, module in model.language_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _m, _i, out, name=name: ran.append((name, out.numel() // out.shape[-1])))
    model.compress_features([tiny.features(2)])
    rows = 2 * (tiny.VISION_SLOTS + 2 + 2)
    last = [call for call in ran if "layers.2" in call[0] or "lm_head" in call[0]]
    projected = 4 if method == "voco" else rows
    assert last == [("model.layers.2.self_attn.k_proj", projected), ("model.layers.2.self_attn.v_proj", projected)]
    assert ("model.layers.1.mlp.down_proj", rows) in ran


def test_auto_is_varlen_on_gpus_that_have_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [(torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 128), (torch.bfloat16, 20), (torch.bfloat16, 320)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {resolve_backend("auto", *case) for case in cases} == {"segments"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert [resolve_backend("auto", *case) for case in cases] == ["varlen", "varlen", "segments", "segments", "segments"]
    assert resolve_backend("dense", torch.bfloat16, 128) == "dense"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert resolve_backend("auto", torch.bfloat16, 128) == "segments"
