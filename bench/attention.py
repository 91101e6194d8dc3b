"""`make bench-attention`: one layer's attention under the VoCo mask: two causal segments against other exact implementations.

32 heads of 128, 576 vision tokens, N <voco>, T text tokens, one sample, one thread, forward pass. Peers: torch's kernel with
a dense mask, FlexAttention compiled with the same mask, and plain causal attention, which sees more pairs. Every exact result
is compared with fp64 before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

import torch
from side_by_side import in_turn, median, write
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention as attention

from voco.model.attention.causal_segments import causal_segments
from voco.model.attention.flex import flex_plan
from voco.model.attention.plan import plan_attention
from voco.model.attention.voco_mask import TokenIds, allowed
from voco.sequence.sequence import NONE, PREFIX, TEXT, VISION, VOCO

HEADS, WIDTH, SLOTS = 32, 128, 576
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # largest error, of outputs near 1
HOST = torch.device("cpu")


def token_ids(n: int, text: int) -> TokenIds:
    """BOS, vision, one separator, N <voco>, text."""
    kind = [PREFIX] + [VISION] * SLOTS + [PREFIX] + [VOCO] * n + [TEXT] * text
    view = [0] * (len(kind) - text) + [NONE] * text
    talk = [NONE] * (len(kind) - text) + [0] * text
    return TokenIds(*(torch.tensor([column]) for column in (kind, [0] * len(kind), view, talk)))


def timed(run: Callable[[], Tensor]) -> dict[str, float]:
    """Milliseconds of one call, of processor time: one thread, and other processes do not count."""
    started = time.process_time()
    run()
    return {"ms": (time.process_time() - started) * 1e3}


def contenders(ids: TokenIds, dtype: torch.dtype, flex: Callable[..., Tensor] | None) -> dict[str, Callable[[], Tensor]]:
    """Each as a call without arguments. What a training step computes once for all its layers is computed here."""
    generator = torch.Generator().manual_seed(0)
    length = ids.kind.shape[1]
    # as projections leave them: (1, L, H, E), with heads moved to the front
    q, k, v = (torch.randn(1, length, HEADS, WIDTH, generator=generator).to(dtype).transpose(1, 2) for _ in range(3))
    mask, scale = allowed(ids, "voco")[:, None], WIDTH**-0.5
    calls: dict[str, Callable[[], Tensor]] = {
        "segments": partial(plan_attention("segments", ids, True, HOST).attend, q, k, v, scale),
        "dense mask": partial(attention, q, k, v, attn_mask=mask, scale=scale),
        "plain causal": partial(attention, q, k, v, is_causal=True, scale=scale),
    }
    if flex is not None:
        blocks = flex_plan(ids, True, HOST, None).blocks
        calls["flex"] = partial(flex, q, k, v, block_mask=blocks, scale=scale)
    expected = attention(q.double(), k.double(), v.double(), attn_mask=mask, scale=scale)
    for name, run in calls.items():
        got = run().transpose(1, 2) if name == "segments" else run()
        error = float((got.double() - expected).abs().max())
        if name != "plain causal" and error > LIMIT[dtype]:
            raise SystemExit(f"{name}: {error:.1e} from the reference in fp64 at {length} tokens, {dtype}")
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64], help="N")
    parser.add_argument("--texts", type=int, nargs="+", default=[114, 512, 1500], help="T")
    parser.add_argument("--no-flex", action="store_true", help="FlexAttention needs a C++ compiler on a CPU")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    load = os.getloadavg()[0]
    flex = None if options.no_flex else torch.compile(flex_attention, dynamic=False)
    segments: dict[str, float] = {}
    peers: dict[str, dict[str, float]] = {}
    ratio: dict[str, float] = {}
    started = time.perf_counter()
    for dtype in (torch.float32, torch.bfloat16):
        for n in options.tokens:
            for text in options.texts:
                ids = token_ids(n, text)
                label = f"{str(dtype).split('.')[1]} N={n} T={text}"
                print(label, flush=True)
                calls = contenders(ids, dtype, flex if n == options.tokens[0] else None)
                results = in_turn({name: partial(timed, run) for name, run in calls.items()}, options.rounds)
                ms = {name: median(times, "ms") for name, times in results.items()}
                segments[label] = ms.pop("segments")
                for name, value in ms.items():
                    peers.setdefault(name, {})[label] = value
                    ratio[f"{name}, {label}"] = value / segments[label]
                pairs = sum(len(s.queries) * (2 * len(s.keys) - len(s.queries) + 1) // 2 for s in causal_segments(ids, True))
                ratio[f"bound by pairs, {label}"] = ids.kind.shape[1] ** 2 / pairs
    write(
        "attention",
        f"forward of one layer, {HEADS} heads of {WIDTH}, {SLOTS} vision tokens, 1 sample, 1 thread, ms; plain causal sees more",
        segments,
        peers,
        ratio,
        load,
    )
    print(f"{time.perf_counter() - started:.0f} s in all, compiling included")


if __name__ == "__main__":
    main()
