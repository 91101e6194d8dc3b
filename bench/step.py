"""`make bench-step`: a training step (forward, loss, backward) of a 6-layer Llama of width 512 on four image samples.

Ours: one flat row, two causal segments a sample, logits of supervised rows only. Peer: transformers' LlamaForCausalLM on the
same embeddings, padded, with the VoCo mask as a 4D mask and the full logits in fp32. Loss and gradients are compared before
anything is timed. bf16 where the processor has instructions for it, else fp32: emulated bf16 would measure the emulation.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import earlier
import numpy as np
import torch
from side_by_side import in_turn, median, write
from step_latency import latency
from step_live import live
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from voco.demo.cluster import KEEP_FREED_MEMORY
from voco.model.attention.voco_mask import TokenIds, allowed
from voco.model.batch import Batch, collate
from voco.model.voco_llama import VocoLlama
from voco.sequence.sequence import NONE, PAD, TEXT, Layout, TokenSample, prefix_columns, text_start

TEXTS = {"uneven": (60, 110, 180, 420), "even": (120, 125, 130, 135)}  # tokens; the second half of each is trained
SLOTS, FEATURES, VOCABULARY, N = 576, 1024, 32_000, 1


def model(dtype: torch.dtype) -> VocoLlama:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=4096, attn_implementation="sdpa",
    )  # fmt: skip
    ids: dict[str, Any] = {"bos_id": 1, "eos_id": 2, "pad_id": 0, "image_id": 3, "voco_id": 4, "separator_ids": (13,)}
    layout = Layout(method="voco", tokens=N, vision_slots=SLOTS, template="vicuna_v1", newlines="keep", **ids)
    return VocoLlama(LlamaForCausalLM(config), layout, FEATURES).to(dtype)


def token_sample(layout: Layout, name: str, text: int, words: int = VOCABULARY) -> TokenSample:
    """A sample of one image and `text` tokens of the first `words` of the vocabulary, the second half trained."""
    columns = prefix_columns(layout, [N])
    size, start = len(columns["ids"]), text_start(layout, [N])
    drawn = np.random.default_rng(text).integers(20, words, text).tolist()
    columns = {
        "ids": columns["ids"] + drawn,
        "kinds": columns["kinds"] + [TEXT] * text,
        "view": columns["view"] + [NONE] * text,
        "conversation": [NONE] * size + [0] * text,
        "position": columns["position"] + list(range(start, start + text)),
    }
    arrays = {key: np.asarray(column, dtype=np.int64) for key, column in columns.items()}
    trained = np.arange(text // 2, text)
    return TokenSample(
        sample_id=name, predict_at=size + trained - 1, predict_id=np.asarray(drawn)[trained], media=(name,), cut=0, **arrays
    )


def padded(batch: Batch, sizes: list[int]) -> dict[str, torch.Tensor]:
    """The peer's inputs besides the embeddings: 4D mask, positions and labels, padded on the right."""
    labels = torch.full(batch.ids.shape, -100)
    labels[0, batch.predict_at] = batch.predict_id
    fill = {"kind": PAD, "sample": NONE, "view": NONE, "conversation": NONE}
    ids = TokenIds(*(pad_sequence(getattr(batch, name)[0].split(sizes), True, value) for name, value in fill.items()))
    return {
        "mask": allowed(ids, "voco")[:, None],
        "position": pad_sequence(batch.position[0].split(sizes), True, 0),
        "labels": pad_sequence(labels[0].split(sizes), True, -100),
    }


def own_step(net: VocoLlama, batch: Batch) -> torch.Tensor:
    net.zero_grad(set_to_none=True)
    loss = net(batch) / len(batch.predict_id)
    loss.backward()
    return loss.detach()


def peer_step(net: VocoLlama, peer: Any, batch: Batch, sizes: list[int], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    net.zero_grad(set_to_none=True)
    peer.zero_grad(set_to_none=True)
    embeds = pad_sequence(net.embed(batch)[0].split(sizes), True)
    logits = peer(
        inputs_embeds=embeds, attention_mask=inputs["mask"], position_ids=inputs["position"], use_cache=False
    ).logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), ignore_index=-100)
    loss.backward()
    return loss.detach()


def gradients(net: VocoLlama, peer: Any | None) -> dict[str, torch.Tensor]:
    """Every weight's gradient; the peer shares our embeddings and projector."""
    others = {} if peer is None else {f"language_model.{name}": weight for name, weight in peer.named_parameters()}
    by_name = {}
    for name, weight in net.named_parameters():
        grad = weight.grad if name not in others or "embed_tokens" in name else others[name].grad
        assert grad is not None, name
        by_name[name] = grad
    return by_name


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(F.cosine_similarity(first.double().flatten(), second.double().flatten(), dim=0))


def timed(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one step, of processor time: one thread, and other processes do not count."""
    started = time.process_time()
    run()
    return {"s": time.process_time() - started}


def demo_steps(rounds: int, steps: int = 15) -> dict[str, float]:
    """Seconds of the demo's step in ours and in the earlier build, by `step_run.py`; equal losses and gradients first."""
    folders = {"ours": None, "earlier": earlier.source()}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    for _ in range(rounds):
        for name, folder in folders.items():
            output = earlier.run("step_run.py", steps, folder=folder, **KEEP_FREED_MEMORY)
            runs[name].append(json.loads(output.strip().rsplit("\n", 1)[-1]))
            print(
                f"  {name}: engine {runs[name][-1]['engine_s']:.4f} s, plain loop {runs[name][-1]['plain_s']:.4f} s", flush=True
            )
    own, before = runs["ours"][0], runs["earlier"][0]
    close = own["gradients"].keys() == before["gradients"].keys() and math.isclose(own["loss"], before["loss"], rel_tol=1e-5)
    if not close or any(not math.isclose(norm, before["gradients"][key], rel_tol=1e-4) for key, norm in own["gradients"].items()):
        raise SystemExit("the two builds do not train the same")
    seconds = {f"{name}_{key}": median(results, key) for name, results in runs.items() for key in ("engine_s", "plain_s")}
    return {**seconds, "ratio": seconds["earlier_engine_s"] / seconds["ours_engine_s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["bf16", "fp32"])
    parser.add_argument("--latency", type=float, metavar="MS", help="also a step that reads from storage this late")
    parser.add_argument("--demo", action="store_true", help="also the demo's step beside the earlier build's")
    parser.add_argument("--live", action="store_true", help="also a step in which the frozen tower runs, at the demo's shapes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    name = options.dtype or ("bf16" if fast else "fp32")
    net = model(torch.bfloat16 if name == "bf16" else torch.float32)
    peer = copy.deepcopy(net.language_model)
    peer.set_attn_implementation("sdpa")
    peer.model.rotary_emb = type(LlamaForCausalLM(LlamaConfig(num_hidden_layers=0, vocab_size=8)).model.rotary_emb)(peer.config)
    figures: dict[str, dict[str, float]] = {"ours": {}, "transformers, 4D mask": {}}
    ratio: dict[str, float] = {}
    for label, texts in TEXTS.items():
        samples = [token_sample(net.layout, f"{label}{text}", text) for text in texts]
        store = {sample.sample_id: torch.randn(SLOTS, FEATURES) for sample in samples}
        batch = collate(samples, store.__getitem__, (SLOTS, FEATURES)).to("cpu", net.dtype)
        sizes = [len(sample) for sample in samples]
        inputs = padded(batch, sizes)
        losses = [own_step(net, batch)]
        own_gradients = gradients(net, None)
        losses.append(peer_step(net, peer, batch, sizes, inputs))
        least = min(cosine(own_gradients[name], grad) for name, grad in gradients(net, peer).items())
        print(
            f"{label}: losses {losses[0]:.5f} and {losses[1]:.5f}, least cosine of a weight's gradients {least:.6f}", flush=True
        )
        if least < 0.9999 or abs(float(losses[0] - losses[1])) > 2e-3 * float(losses[1]):
            raise SystemExit("the two do not train the same")
        calls = {
            "ours": partial(own_step, net, batch),
            "transformers, 4D mask": partial(peer_step, net, peer, batch, sizes, inputs),
        }
        results = in_turn({key: partial(timed, run) for key, run in calls.items()}, options.rounds)
        for key, times in results.items():
            figures[key][f"{label}, s"] = median(times, "s")
        ratio[f"transformers, 4D mask, {label} texts"] = (
            figures["transformers, 4D mask"][f"{label}, s"] / figures["ours"][f"{label}, s"]
        )
        ratio[f"padding alone, {label} texts"] = len(sizes) * max(sizes) / sum(sizes)
    own = figures.pop("ours")
    work = f"one step of a 6-layer Llama, width 512, vocabulary {VOCABULARY:,}, {name}, 4 samples of 579 + text tokens, 1 thread"
    limits: dict[str, float] = {}
    if options.latency is not None:
        delayed = latency(options.latency)
        print(f"storage with {options.latency:g} ms: {delayed}", flush=True)
        limits[f"latency_{options.latency:g}ms"] = delayed["ratio"]
        ratio[f"storage with {options.latency:g} ms, no thread"] = delayed["storage_without_thread_s"] / delayed["storage_s"]
    if options.live:
        beside = live(2 * options.rounds + 1)
        print(f"frozen tower in the step, the demo's shapes: {beside}", flush=True)
        ratio["the demo's step with its tower, to stored features"] = beside["ratio"]
    if options.demo:
        both = demo_steps(options.rounds)
        print(f"the demo's step, both builds: {both}", flush=True)
        ratio["134c529, the demo's step"] = limits["demo_over_134c529"] = both["ratio"]
        ratio["a plain torch loop, the demo's step"] = both["ours_plain_s"] / both["ours_engine_s"]
    write("step", work, own, figures, ratio, load, limits or None)


if __name__ == "__main__":
    main()
