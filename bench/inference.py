"""`make bench-inference`: time to the first token and 32 decoded ones: VoCo caches against no cache and a full cache.

A Llama of 6 layers and width 512 with random weights, 576 vision tokens, N=1, T text tokens, batch 1, one thread. Peers are
transformers' own LlamaForCausalLM: the whole prefix read again (no cache), and its DynamicCache of the prefix reused (full).
No figure includes the vision tower. Before anything is timed, the peers must give the same greedy tokens, and ours those of the
masked pass repeated for every token.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from side_by_side import in_turn, median, write
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from voco.model.batch import collate
from voco.model.voco_llama import VocoLlama
from voco.sequence.sequence import NONE, TEXT, Layout, TokenSample, prefix_columns, text_start

SLOTS, FEATURES, VOCABULARY, N, NEW = 576, 1024, 32_000, 1, 32
TEXTS = (34, 114, 512)
SHAPES = {
    "mini": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def model(shape: str, device: str, dtype: torch.dtype, attention: str = "segments") -> tuple[VocoLlama, Any]:
    """Ours with random weights, and transformers' own model of the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, attn_implementation="sdpa", **SHAPES[shape])
    with torch.device(device):
        torch.set_default_dtype(dtype)
        plain = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    ids: dict[str, Any] = {"bos_id": 1, "eos_id": 2, "pad_id": 0, "image_id": 3, "voco_id": 4, "separator_ids": (13,)}
    layout = Layout(method="voco", tokens=N, vision_slots=SLOTS, template="vicuna_v1", newlines="keep", **ids)
    # the peer: its own modules around the same tensors, because two copies of 7B waste memory
    peer = copy.deepcopy(plain, {id(weight): weight for weight in plain.parameters()})
    net = VocoLlama(plain, layout, FEATURES, attention=attention).to(device=device, dtype=dtype).eval()
    return net, peer.eval()


def questions(batch: int, text: int) -> list[list[int]]:
    return np.random.default_rng(text).integers(20, VOCABULARY, (batch, text)).tolist()


@dataclass
class Work:
    """The input of every contender: an image and a question in each row."""

    net: VocoLlama
    peer: Any
    features: Tensor  # (B, V, C)
    prompts: list[list[int]]

    def full_prefix(self) -> Tensor:
        """(B, 1 + V + 1, W): BOS, projected features, separator: LLaVA's sequence before the text."""
        table, layout = self.net.language_model.model.embed_tokens, self.net.layout
        ends = torch.tensor([[layout.bos_id], list(layout.separator_ids)], device=self.net.device)
        first, last = (table(ids).expand(len(self.features), -1, -1) for ids in ends)
        return torch.cat((first, self.net.projector(self.features), last), dim=1)

    def text(self) -> Tensor:
        return self.net.language_model.model.embed_tokens(torch.tensor(self.prompts, device=self.net.device))

    def no_cache(self) -> Iterator[Tensor]:
        return self._peer(torch.cat((self.full_prefix(), self.text()), dim=1), DynamicCache())

    def full_cache(self, past: Any, size: int) -> Iterator[Tensor]:
        """`past` holds the prefix's keys and values; what an earlier run appended is removed."""
        cut(past, size)
        return self._peer(self.text(), past)

    def voco_cache(self, caches: list[Any]) -> Iterator[Tensor]:
        return self.net.decode_steps(caches, self.prompts)

    @torch.no_grad()
    def _peer(self, embeds: Tensor, past: Any) -> Iterator[Tensor]:
        while True:
            logits = self.peer(inputs_embeds=embeds, past_key_values=past, use_cache=True, logits_to_keep=1).logits[:, -1]
            token = self.net.choose(logits)
            yield token
            embeds = self.net.language_model.model.embed_tokens(token[:, None])

    @torch.no_grad()
    def compute_caches(self) -> tuple[Any, int, list[Any]]:
        """The prefix's DynamicCache with its size, and a VoCo cache for every row."""
        past = DynamicCache()
        prefix_embeds = self.full_prefix()
        self.peer.model(inputs_embeds=prefix_embeds, past_key_values=past, use_cache=True)
        return past, prefix_embeds.shape[1], self.net.compress_features([[view] for view in self.features])


def cut(past: Any, size: int) -> None:
    """Keep the first `size` tokens of transformers' cache."""
    if past.get_seq_length() > size:
        past.crop(size - past.get_seq_length())


def first_ids(tokens: Iterator[Tensor], count: int) -> list[list[int]]:
    return torch.stack(list(islice(tokens, count)), dim=1).tolist()


def masked_pass_ids(work: Work, count: int) -> list[list[int]]:
    """The slow, obvious form: the masked pass over the complete sequence, repeated for every token."""
    net, answers = work.net, []
    for row, prompt in enumerate(work.prompts):
        ids = list(prompt)
        for _ in range(count):
            columns, start = prefix_columns(net.layout, [N]), text_start(net.layout, [N])
            size = len(columns["ids"])
            columns = {
                "ids": columns["ids"] + ids,
                "kinds": columns["kinds"] + [TEXT] * len(ids),
                "view": columns["view"] + [NONE] * len(ids),
                "conversation": [NONE] * size + [0] * len(ids),
                "position": columns["position"] + list(range(start, start + len(ids))),
            }
            arrays = {key: np.asarray(column, dtype=np.int64) for key, column in columns.items()}
            none = np.zeros(0, dtype=np.int64)
            sample = TokenSample(sample_id="", predict_at=none, predict_id=none, media=("x",), cut=0, **arrays)
            batch = collate([sample], lambda _, row=row: work.features[row], (SLOTS, FEATURES)).to(net.device, net.dtype)
            with torch.no_grad():
                ids.append(int(net.choose(net.logits(batch)[:, -1])[0]))
        answers.append(ids[len(prompt) :])
    return answers


def check(work: Work, count: int) -> None:
    """Raises SystemExit when tokens differ. Only in fp32: in bf16 near ties fall either way."""
    past, size, caches = work.compute_caches()
    if first_ids(work.no_cache(), count) != first_ids(work.full_cache(past, size), count):
        raise SystemExit("transformers' own two ways differ")
    if first_ids(work.voco_cache(caches), count) != masked_pass_ids(work, count):
        raise SystemExit("ours differs from the masked pass")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(start: Callable[[], Iterator[Tensor]], device: torch.device) -> dict[str, float]:
    """Milliseconds to the first token, and for each later one."""
    wait(device)
    began = time.perf_counter()
    tokens = start()
    next(tokens)
    wait(device)
    first = time.perf_counter()
    for _ in islice(tokens, NEW - 1):
        pass
    wait(device)
    return {"first_ms": (first - began) * 1e3, "token_ms": (time.perf_counter() - first) * 1e3 / (NEW - 1)}


def measure(work: Work, rounds: int) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Medians of every contender, and the cached bytes of an image for each."""
    past, size, caches = work.compute_caches()
    calls = {
        "ours": partial(work.voco_cache, caches), "no cache": work.no_cache, "full cache": partial(work.full_cache, past, size)
    }  # fmt: skip
    timed(calls["ours"], work.net.device)  # what loads at its first use
    results = in_turn({name: partial(timed, call, work.net.device) for name, call in calls.items()}, rounds)
    figures = {name: {key: median(times, key) for key in ("first_ms", "token_ms")} for name, times in results.items()}
    cut(past, size)
    full = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in past.layers) // len(work.prompts)
    return figures, {"ours": caches[0].bytes, "full cache": full}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    net, peer = model("mini", "cpu", torch.float32)
    own: dict[str, float] = {}
    peers: dict[str, dict[str, float]] = {"no cache": {}, "full cache": {}}
    ratio: dict[str, float] = {}
    for text in TEXTS:
        print(f"T={text}", flush=True)
        work = Work(net, peer, torch.randn(1, SLOTS, FEATURES), questions(1, text))
        check(replace(work, prompts=questions(1, text)), 6)
        figures, cache_sizes = measure(work, options.rounds)
        for key, value in figures.pop("ours").items():
            own[f"T={text} {key}"] = value
        own["cache_bytes"], peers["full cache"]["cache_bytes"] = cache_sizes["ours"], cache_sizes["full cache"]
        for name, times in figures.items():
            for key, value in times.items():
                peers[name][f"T={text} {key}"] = value
                ratio[f"{name}, {'first token' if key == 'first_ms' else 'decoding'}, T={text}"] = value / own[f"T={text} {key}"]
        tokens = (2 + SLOTS + text) / text
        ratio[f"first token, of the token ratio {tokens:.1f}, T={text}"] = ratio[f"no cache, first token, T={text}"] / tokens
    ratio["bytes kept, full cache"] = peers["full cache"]["cache_bytes"] / own["cache_bytes"]
    work = f"6-layer Llama of width 512, fp32, {SLOTS} vision tokens, N={N}, T text tokens, {NEW} new ones, batch 1, 1 thread"
    write("inference", work, own, peers, ratio, load)


if __name__ == "__main__":
    main()
