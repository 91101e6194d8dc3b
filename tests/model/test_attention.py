"""Every backend gives the dense reference's values and gradients; the loss and the caches cost no more than they need."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from voco.model import lm_head
from voco.model.attention.backends import SegmentsPlan, plan_attention
from voco.model.batch import Batch, CachedBatch, collate, collate_cached
from voco.model.voco_llama import VocoLlama
from voco.sequence.sequence import build_sample

GPU = torch.cuda.is_available()
CASES = [("segments", method, torch.float64) for method in ("voco", "none", "avg_pool", "q_former")]
CASES += [("segments", "voco", torch.float32), ("segments", "voco", torch.bfloat16), ("flex", "voco", torch.float32)]
CASES += (
    [("flex", "none", torch.float64)]
    if not GPU
    else [(n, m, torch.bfloat16) for n in ("flex", "varlen") for m in ("voco", "none")]
)
SHAPES = [
    (1, ["what is it?", "and where in the picture?"]), (0, ["a text of its own"]), (2, ["left?"]), (0, ["x"]), (12, ["so?"]),
]  # fmt: skip


def batches(model: VocoLlama) -> tuple[Batch, CachedBatch]:
    """The same samples for one masked pass and with their views read from caches."""
    store = dict(enumerate(tiny.features(15, dtype=model.dtype)))
    plain, read, caches, start = [], [], [], 0
    for at, (views, texts) in enumerate(SHAPES):
        names = [str(start + view) for view in range(views)]
        talks = [tiny.question(text, "an answer"[: 3 + at]) for text in texts]
        plain.append(build_sample(f"s{at}", talks, names, tiny.TOKENIZER, model.layout))
        read.append(build_sample(f"s{at}", talks, names, tiny.TOKENIZER, model.layout, cached=True))
        made = model.compress_features([[store[int(name)] for name in names]]) if views else [None]
        caches.append(made[0])
        start += views
    whole = collate(plain, lambda name: store[int(name)], (tiny.VISION_SLOTS, tiny.FEATURES))
    return whole, collate_cached(read, caches)


def found(model: VocoLlama, batch: Batch | CachedBatch) -> dict[str, torch.Tensor]:
    """The loss, the states and every weight's gradient; FlexAttention has none on a CPU."""
    model.zero_grad()
    with torch.no_grad():
        loss = model(batch)
        states = model.hidden_cached(batch) if isinstance(batch, CachedBatch) else model.hidden(batch)
    if model.attention != "flex" or GPU:
        loss = model(batch)
        loss.backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"loss": loss.detach(), "states": states, **grads}


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(("name", "method", "dtype"), CASES)
def test_every_backend_equals_the_dense_reference(name: str, method: str, dtype: torch.dtype) -> None:
    device = "cuda" if GPU and name != "segments" else "cpu"
    wide = {"head_dim": 16} if device == "cuda" else {}  # FlexAttention has no narrower kernel
    model = tiny.model(method, 1 if method in ("avg_pool", "q_former") else 2, dtype, **wide).to(device)
    cases = batches(model)
    for batch in cases if method == "voco" else cases[:1]:
        batch = batch.to(device, dtype)
        model.attention = "dense"
        expected = found(model, batch)
        model.attention = name
        got = found(model, batch)
        assert len(got) > 2 or (name == "flex" and not GPU)
        for key in got:
            if dtype == torch.bfloat16:
                assert F.cosine_similarity(got[key].float().flatten(), expected[key].float().flatten(), dim=0) > 0.9999, key
            else:
                assert tiny.close(got[key], expected[key]), key


def each_alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: Any) -> torch.Tensor:
    """What FlashAttention's varlen computes, a segment after the other: causal, aligned at the end."""
    query_ends, key_ends, longest_query, longest_key, scale = more
    shared, out = q.shape[1] // k.shape[1], []
    for index in range(len(query_ends) - 1):
        mine, theirs = (slice(int(ends[index]), int(ends[index + 1])) for ends in (query_ends, key_ends))
        queries, keys = (one.stop - one.start for one in (mine, theirs))
        assert (queries, keys) <= (longest_query, longest_key)
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        pairs = (one.repeat_interleave(shared, 1) for one in (k[theirs], v[theirs]))
        heads = (one.transpose(0, 1) for one in (q[mine], *pairs))
        out.append(F.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("method", ["voco", "none"])
def test_varlen_cuts_the_same_segments(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel runs on GPUs only; where segments start and end, and the way back, do not."""
    monkeypatch.setattr("voco.model.attention.backends.varlen_kernel", lambda: each_alone)
    model = tiny.model(method, 2, torch.bfloat16)
    cases = batches(model)
    for batch in cases if method == "voco" else cases[:1]:
        model.attention = "dense"
        expected = found(model, batch)
        model.attention = "varlen"
        got = found(model, batch)
        assert got.keys() == expected.keys()
        for key in got:
            assert F.cosine_similarity(got[key].float().flatten(), expected[key].float().flatten(), dim=0) > 0.9999, key


def test_recomputed_layers_get_the_same_segments() -> None:
    plain, recomputed = tiny.model(), tiny.model()
    recomputed.language_model.train()
    recomputed.language_model.activation_checkpointing_enable({"use_reentrant": False})
    first, second = (
        batches(plain)[0],
        collate([build_sample("o", [tiny.question("other?", "b")], [], tiny.TOKENIZER, plain.layout)], str, (9, 6)),
    )
    expected = found(plain, first)
    recomputed.zero_grad()
    loss = recomputed(first)
    with torch.no_grad():
        recomputed(second)  # another batch between forward and backward leaves no trace
    loss.backward()
    for name, weight in recomputed.named_parameters():
        assert weight.grad is not None, name
        assert tiny.close(weight.grad, expected[name]), name


def test_equal_and_nearly_equal_segments_share_a_call_and_long_caches_are_oblong() -> None:
    model = tiny.model()
    whole, _ = batches(model)
    squares = plan_attention("segments", whole.token_ids, "voco", torch.device("cpu"))
    assert isinstance(squares, SegmentsPlan)
    counts = [(call.count, call.mask is None) for call in squares.calls]
    assert sum(count for count, _ in counts) == 15 + sum(len(texts) for _, texts in SHAPES)
    assert len(counts) < 12
    assert not all(square for _, square in counts), "the text behind 12 views reads more keys than it has tokens"
    alone = collate([build_sample("o", [tiny.question("b")], [], tiny.TOKENIZER, model.layout)], str, (9, 6))
    one = plan_attention("segments", alone.token_ids, "voco", torch.device("cpu"))
    assert isinstance(one, SegmentsPlan)
    assert (one.starts, one.back) == (((0, 0),), None), "one sequence in order is taken as it is"


class Largest(TorchDispatchMode):
    """Counts the numbers of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.numel())
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
    wanted = torch.autograd.grad(expected * 0.5, (states, linear.weight))
    assert loss.dtype == exact
    assert tiny.close(loss, expected)
    for one, other in zip(got, wanted, strict=True):
        if dtype == torch.bfloat16:
            assert F.cosine_similarity(one.float().flatten(), other.float().flatten(), dim=0) > 0.9999
        else:
            assert tiny.close(one, other)


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
    last = [one for one in ran if "layers.2" in one[0] or "lm_head" in one[0]]
    kept = 4 if method == "voco" else rows
    assert last == [("model.layers.2.self_attn.k_proj", kept), ("model.layers.2.self_attn.v_proj", kept)]
    assert ("model.layers.1.mlp.down_proj", rows) in ran
