"""Figures that need a GPU, at 7B shapes with random weights in bf16: `PYTHONPATH=platform:bench python bench/gpu.py`.

Needs torch and transformers, no Ray and no DeepSpeed. Kernel checks; a step against transformers with a dense 4D mask; MFU;
time to the first token and decoding at batch 1, 8 and 64 against no cache and a full cache; compressed frames a second; a step
in which the frozen tower runs against stored features. Every line is printed as soon as it is measured. Without a GPU everything
runs at the mini shape, as a check that it works.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import inference
import step
import torch
from side_by_side import OUT
from transformers import CLIPVisionConfig, CLIPVisionModel

from voco.model.attention.plan import check_backend, plan_attention
from voco.model.attention.voco_mask import allowed
from voco.model.batch import collate
from voco.model.vision.tower import CLIP, VisionTower

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16 operations a second, by their makers
LIMIT = 0.9999  # least cosine of outputs and gradients to the reference in fp32


def number_type(device: torch.device) -> torch.dtype:
    """bf16 on a GPU; fp32 on a CPU, because processors without bf16 instructions emulate it, many times slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def record(table: dict[str, float], name: str, value: float) -> None:
    table[name] = value
    print(f"{name:64}{value:12,.4g}", flush=True)


def kernels(table: dict[str, float], device: torch.device, names: list[str]) -> None:
    """Every backend's outputs and gradients against the dense mask in fp32: three samples of unequal texts."""
    net, _ = inference.model("mini", str(device), number_type(device))
    samples = [step.token_sample(net.layout, f"{text}", text) for text in (40, 200, 7)]
    store = {sample.sample_id: torch.randn(step.SLOTS, step.FEATURES) for sample in samples}
    ids = collate(samples, store.__getitem__, (step.SLOTS, step.FEATURES)).token_ids
    length = ids.kind.shape[1]
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(1, 8, length, 64, generator=draw).to(device, number_type(device)) for _ in range(4)]
    mask = allowed(ids, "voco")[:, None].to(device)
    reference = [tensor.float().clone().requires_grad_() for tensor in states[:3]]
    expected = torch.nn.functional.scaled_dot_product_attention(*reference, attn_mask=mask).transpose(1, 2)
    expected.backward(states[3].float().transpose(1, 2))
    for name in names:
        inputs = [tensor.clone().requires_grad_() for tensor in states[:3]]
        got = plan_attention(name, ids, True, device).attend(*inputs, 64**-0.5)
        got.backward(states[3].transpose(1, 2))
        pairs = [(got, expected), *((a.grad, b.grad) for a, b in zip(inputs, reference, strict=True))]
        least = min(step.cosine(first.detach(), second.detach()) for first, second in pairs)
        record(table, f"{name}: least cosine of output and gradients", least)
        if least < LIMIT:
            raise SystemExit(f"{name} is not exact")


@contextmanager
def clean(device: torch.device) -> Iterator[None]:
    """Free the memory afterwards."""
    yield
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def median_s(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 1):  # the first warms up
        inference.wait(device)
        began = time.perf_counter()
        run()
        inference.wait(device)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds[1:])[rounds // 2]


def training(table: dict[str, float], shape: str, device: torch.device, names: list[str], rounds: int) -> None:
    """Forward, loss and backward with recomputed activations, uneven and even texts; then MFU, counting real tokens only."""
    for label, texts in step.TEXTS.items():
        seconds = {}
        for name in (*names, "dense 4D mask"):
            with clean(device):
                net, peer = inference.model(shape, str(device), number_type(device), name if name in names else "segments")
                samples = [step.token_sample(net.layout, f"{text}", text) for text in texts]
                store = {sample.sample_id: torch.randn(step.SLOTS, step.FEATURES) for sample in samples}
                batch = collate(samples, store.__getitem__, (step.SLOTS, step.FEATURES)).to(device, number_type(device))
                sizes = [len(sample) for sample in samples]
                if name in names:
                    net.train()
                    net.language_model.gradient_checkpointing_enable({"use_reentrant": False})
                    run = partial(step.own_step, net, batch)
                else:
                    peer.train()
                    peer.gradient_checkpointing_enable({"use_reentrant": False})
                    inputs = {key: value.to(device) for key, value in step.padded(batch_on_host(batch), sizes).items()}
                    run = partial(step.peer_step, net, peer, batch, sizes, inputs)
                seconds[name] = median_s(run, device, rounds)
                record(table, f"{name}, {label} texts: s a step", seconds[name])
                weights = sum(weight.numel() for weight in net.language_model.parameters())
                tokens = sum(sizes)
                del net, peer, batch, run
            if device.type == "cuda" and name in names:
                peak = next((value for gpu, value in PEAK.items() if gpu in torch.cuda.get_device_name()), None)
                if peak is not None:
                    record(table, f"{name}, {label} texts: MFU of real tokens", 6 * weights * tokens / seconds[name] / peak)
        for name in names:
            record(table, f"{name}, {label} texts: ratio to dense 4D mask", seconds["dense 4D mask"] / seconds[name])


def batch_on_host(batch: Any) -> Any:
    return batch.to("cpu", torch.float32)


def answering(table: dict[str, float], shape: str, device: torch.device, batches: list[int], rounds: int) -> None:
    for text in inference.TEXTS if device.type == "cuda" else inference.TEXTS[:1]:
        for size in batches:
            with clean(device):
                net, peer = inference.model(shape, str(device), number_type(device))
                features = torch.randn(size, inference.SLOTS, inference.FEATURES).to(device, number_type(device))
                work = inference.Work(net, peer, features, inference.questions(size, text))
                figures, cache_sizes = inference.measure(work, rounds)
                for name, times in figures.items():
                    for key, value in times.items():
                        record(table, f"{name}, batch {size}, T={text}: {key}", value)
                for name in ("no cache", "full cache"):
                    for key in ("first_ms", "token_ms"):
                        record(table, f"batch {size}, T={text}: {key}, {name} to ours", figures[name][key] / figures["ours"][key])
                record(
                    table,
                    f"batch {size}, T={text}: bytes kept, full cache to ours",
                    cache_sizes["full cache"] / cache_sizes["ours"],
                )
                del net, peer, work, features


def clip_tower(shape: str) -> VisionTower:
    """CLIP ViT-L/14 at 336 with random weights, or a small net of its width at the mini shape."""
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    small = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16}
    vision = CLIPVisionConfig(image_size=336, patch_size=14, **(large if shape == "7b" else small))
    return VisionTower({"name": "clip", "image_size": 336, "layer": -2}, CLIPVisionModel(vision), *CLIP)


def step_from_host(net: Any, batch: Any, device: torch.device) -> torch.Tensor:
    return step.own_step(net, batch.to(device, torch.float32))


def live_tower(table: dict[str, float], shape: str, device: torch.device, rounds: int) -> None:
    """A step, activations recomputed, in which the frozen tower runs on decoded pixels, over the same on stored features."""
    with clean(device):
        net, _ = inference.model(shape, str(device), number_type(device))
        net.tower = clip_tower(shape)
        tower = net.detach_tower().tower.to(device, number_type(device))
        net.train()
        net.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        samples = [step.token_sample(net.layout, f"{text}", text) for text in step.TEXTS["uneven"]]
        names = [sample.sample_id for sample in samples]
        draw = torch.Generator().manual_seed(0)
        pixels = {name: torch.randint(0, 256, (1, 336, 336, 3), dtype=torch.uint8, generator=draw) for name in names}
        stored = {name: tower(image)[0].cpu() for name, image in pixels.items()}
        seconds, losses = {}, {}
        for name, store in (("stored features", stored), ("live tower", pixels)):
            batch = collate(samples, store.__getitem__, (step.SLOTS, step.FEATURES))  # copied to the device in the step
            run = partial(step_from_host, net, batch, device)
            losses[name] = float(run())
            seconds[name] = median_s(run, device, rounds)
            record(table, f"{name}, uneven texts: s a step", seconds[name])
        if abs(losses["live tower"] - losses["stored features"]) > 0.01 * losses["stored features"]:
            raise SystemExit(f"the live tower does not train the same: {losses}")
        record(table, "live tower, uneven texts: ratio to stored features", seconds["live tower"] / seconds["stored features"])


def compressing(table: dict[str, float], shape: str, device: torch.device, batch: int, rounds: int) -> None:
    """Frames a second, pixels to caches."""
    with clean(device):
        tower = clip_tower(shape)
        net, _ = inference.model(shape, str(device), number_type(device))
        net.tower = tower.to(device)
        pixels = torch.randint(0, 256, (batch, 336, 336, 3), dtype=torch.uint8)
        seconds = median_s(lambda: net.compress(pixels), device, rounds)
        record(table, f"frames a second, batch {batch}, tower in fp32", batch / seconds)
        net.tower = tower.to(number_type(device))
        record(
            table,
            f"frames a second, batch {batch}, tower as the model",
            batch / median_s(lambda: net.compress(pixels), device, rounds),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=list(inference.SHAPES), default="7b" if gpu else "mini")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64] if gpu else [1, 2])
    parser.add_argument("--rounds", type=int, default=5 if gpu else 1)
    parser.add_argument("--to", type=Path, default=OUT / "gpu.json", help="(default: %(default)s)")
    options = parser.parse_args()
    device = torch.device("cuda" if gpu else "cpu")
    names = ["segments"]
    for name in ("varlen", "flex") if gpu else ():
        check_backend(name)
        names.append(name)
    machine = torch.cuda.get_device_name() if gpu else "CPU"
    print(f"{machine}, shape {options.shape}, {number_type(device)}, torch {torch.__version__}; random weights", flush=True)
    table: dict[str, float] = {}
    kernels(table, device, names)
    with torch.no_grad():
        answering(table, options.shape, device, options.batches, options.rounds)
        compressing(table, options.shape, device, 32 if gpu else 2, options.rounds)
    live_tower(table, options.shape, device, options.rounds)
    training(table, options.shape, device, names, options.rounds)
    options.to.parent.mkdir(parents=True, exist_ok=True)
    options.to.write_text(
        json.dumps({"name": "gpu", "machine": machine, "shape": options.shape, "figures": table}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
