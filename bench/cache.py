"""`make bench-cache`: frame caches written, read and trained from.

- The rate of a unit (decode, compress, write) over its forward passes alone, ours and the build of `bench/earlier.py`, each
  with one torch thread and, ours, one decoding thread; the more cores are idle, the nearer to 1.
- Reading and writing against torch.load and torch.save of a file for each video, on local disk.
- A training step from caches against the same step that decodes and compresses 8 frames.

Contents, losses and bytes are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import earlier
import numpy as np
import torch
from PIL import Image
from side_by_side import OUT, write

from voco.job.config import Model, Text
from voco.model import build
from voco.model.batch import collate_cached
from voco.model.cache import CacheKey, VocoCache
from voco.model.voco_llama import VocoLlama
from voco.precompute.frame_cache import CacheWriter, CompressedFrames, Frame, write_index
from voco.precompute.frame_store import FrameStore
from voco.precompute.frame_tensors import STORED, dequantise, join_frames, quantise, split_frames
from voco.run.units import part_uri
from voco.sequence.sequence import build_sample
from voco.store.number_types import frame_tensor_bytes
from voco.video.decode import Video
from voco.video.sample_frames import evenly_spaced

CLIPS, COPIES = 4, 5  # encoded clips of 15 s, and how many samples have each
SEVEN_B = (32, 32, 2, 128)  # layers, key-value heads, N, head width of LLaVA-1.5-7B
VIDEOS, FRAMES = 16, 8
PIXELS = torch.empty(0)
LIMITS = {
    "frame_rate_over_compress": 0.95, "read_over_torch_load": 2.0, "write_over_torch_save": 1.0, "train_over_recompute": 10.0,
}  # fmt: skip


def encode_clip(seed: int, seconds: int = 15, width: int = 596, height: int = 336) -> bytes:
    """An mp4 like WebVid's: 30 pictures a second, a drawn panorama that moves by a pixel."""
    drawn = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8 + 60, 3), np.uint8)
    wide = np.kron(drawn, np.ones((8, 8, 1), np.uint8))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast", "crf": "23", "g": "250"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * 30):
            view = np.ascontiguousarray(wide[:, number : number + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def median_share(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(float(run[key]) for run in runs)


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def compare_rates(clips: Path, scratch: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Runs of `cache_runs.py` under each build, in turn."""
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "earlier": []}
    for number in range(rounds):
        for name, folder in (("ours", None), ("earlier", earlier.source())):
            output = earlier.run("cache_runs.py", clips, scratch, folder=folder)
            result = json.loads(output.strip().rsplit("\n", 1)[-1])
            results[name].append(result)
            print(f"  round {number + 1}/{rounds} {name}: " + ", ".join(f"{key} {value:.3g}" for key, value in result.items()))
    return results


def make_caches(dtype: torch.dtype) -> tuple[CacheKey, list[VocoCache]]:
    """Caches of VIDEOS videos in the shape of 7B."""
    layers, heads, tokens, width = SEVEN_B
    key = CacheKey("bench", "voco", tokens, (1, 13), "bench")
    shape = (layers, heads, FRAMES * tokens, width)
    draws = [torch.randn(2, *shape, generator=torch.Generator().manual_seed(video)).to(dtype) for video in range(VIDEOS)]
    return key, [VocoCache(draw[0], draw[1], (tokens,) * FRAMES, key) for draw in draws]


def batches(caches: list[VocoCache]) -> Iterator[CompressedFrames]:
    for video, cache in enumerate(caches):
        yield CompressedFrames([Frame(f"{video:032x}", 0, frame, float(frame), PIXELS) for frame in range(FRAMES)], cache)


def write_ours(output: str, caches: list[VocoCache], stored: torch.dtype) -> dict[str, Any]:
    """A `frame_cache` output of the caches, by the job's own writer. Returns the part's manifest entry."""
    index: list[dict[str, Any]] = []
    writer = CacheWriter(caches[0], {"rope_theta": 1e4}, stored)
    entry = writer.write(part_uri(output, "frame_cache", 0), batches(caches), index)
    groups = [{**group, "file": entry["path"], "part_bytes": entry["bytes"]} for group in index]
    write_index(output, [{"index": groups, "rejects": [], "facts": writer.facts}])
    return entry


def read_ours(output: str) -> list[VocoCache]:
    store = FrameStore(output)
    return [store.read(f"{video:032x}", range(FRAMES)) for video in range(VIDEOS)]


def write_torch(folder: Path, caches: list[VocoCache]) -> None:
    folder.mkdir(exist_ok=True)
    for video, cache in enumerate(caches):
        torch.save({"keys": cache.keys, "values": cache.values}, folder / f"{video}.pt")


def read_torch(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(folder / f"{video}.pt") for video in range(VIDEOS)]


def check_sizes(scratch: Path, caches: list[VocoCache]) -> dict[str, float]:
    """Bytes on disk of a frame of each number type over the formula's. Exits where what is read is not what `quantise` gives."""
    shares = {}
    for name, stored in STORED.items():
        output = str(scratch / name)
        entry = write_ours(output, caches, stored)
        for cache, read in zip(caches, read_ours(output), strict=True):
            for tensor in ("keys", "values"):
                exact = split_frames(getattr(cache, tensor), SEVEN_B[2])
                expected = join_frames(dequantise(*quantise(exact, stored), exact.dtype))
                if not torch.equal(getattr(read, tensor), expected):
                    raise SystemExit(f"{name}: {tensor} are not read as they were written")
        formula = 2 * sum(frame_tensor_bytes(SEVEN_B, str(stored).removeprefix("torch.")))
        shares[name] = entry["bytes"] / (VIDEOS * FRAMES * formula)
        print(f"  {name}: {formula:,} bytes a frame by the formula, {shares[name]:.4f} of it on disk", flush=True)
        if name != "bf16":
            shutil.rmtree(output)
    return shares


def compare_files(scratch: Path, caches: list[VocoCache], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of reading and writing, ours and torch's, in turn."""
    output, peer = str(scratch / "bf16"), scratch / "torch"
    write_torch(peer, caches)
    for read, loaded in zip(read_ours(output), read_torch(peer), strict=True):
        if not (torch.equal(read.keys, loaded["keys"]) and torch.equal(read.values, loaded["values"])):
            raise SystemExit("ours and torch.load read other tensors")
    calls: dict[str, Callable[[], Any]] = {
        "ours_write": lambda: write_ours(output, caches, torch.bfloat16), "torch_write": lambda: write_torch(peer, caches),
        "ours_read": lambda: read_ours(output), "torch_read": lambda: read_torch(peer),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    size = sum(cache.bytes for cache in caches) / 1e9
    gb_s = {name: size / statistics.median(times) for name, times in seconds.items()}
    print("  GB/s: " + ", ".join(f"{name} {value:.2f}" for name, value in gb_s.items()), flush=True)
    return {who: {action: gb_s[f"{who}_{action}"] for action in ("write", "read")} for who in ("ours", "torch")}


def training_model(folder: Path) -> VocoLlama:
    """The Llama of bench-step, 6 layers of width 512, behind a small CLIP of 576 positions."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, image_size=336, patch_size=14
    )
    CLIPVisionModel(tower).save_pretrained(folder)
    llama = {"layers": 6, "width": 512, "heads": 8, "kv_heads": 8, "mlp_width": 1376, "vocabulary": 512}
    block = Model.model_validate({"llama": llama, "tower": {"name": "clip", "path": str(folder), "image_size": 336}})
    return build.create_model(block, "voco", 1, Text(template="question_answer"), ["what moves in the video?"] * 9, seed=0)


def compare_training(scratch: Path, data: bytes, rounds: int) -> dict[str, float]:
    """Seconds of a step (read, forward, backward) on one video of 8 frames, from its cache and from its bytes."""
    model = training_model(scratch / "tower")
    assert model.tower is not None
    preprocess, sample_id = model.tower.preprocess, "0" * 32

    def compress() -> VocoCache:
        video = Video(data)
        frames = video.frames(evenly_spaced(video.num_frames, FRAMES))
        return model.compress(torch.stack([preprocess(Image.fromarray(frame)) for frame in frames]))

    index: list[dict[str, Any]] = []
    cache, output = compress(), str(scratch / "one")
    writer = CacheWriter(cache, model.language_model.config.rope_parameters, cache.keys.dtype)
    frames = [Frame(sample_id, 0, frame, float(frame), PIXELS) for frame in range(FRAMES)]
    entry = writer.write(part_uri(output, "frame_cache", 0), [CompressedFrames(frames, cache)], index)
    groups = [{**group, "file": entry["path"], "part_bytes": entry["bytes"]} for group in index]
    write_index(output, [{"index": groups, "rejects": [], "facts": writer.facts}])
    store = FrameStore(output, limit=0)  # reads the file at each step
    words = "the red square moves to the left of the blue circle and then up again until it leaves the picture"
    turns = [{"role": "user", "text": "what moves in the video?"}, {"role": "assistant", "text": words}]
    names = [str(frame) for frame in range(FRAMES)]
    sample = build_sample(sample_id, [turns], names, model.tokenizer, model.layout, cached=True)

    def step(read: Callable[[], VocoCache]) -> float:
        model.zero_grad(set_to_none=True)
        loss = model(collate_cached([sample], [read()]))
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        return float(loss.detach())

    losses = [step(lambda: store.read(sample_id, range(FRAMES))), step(compress)]
    print(f"  {len(sample)} tokens of text; losses {losses[0]:.5f} and {losses[1]:.5f}", flush=True)
    if abs(losses[0] - losses[1]) > 1e-4 * losses[1]:
        raise SystemExit("the two do not train the same")
    seconds: dict[str, list[float]] = {"cached": [], "recomputed": []}
    for _ in range(rounds):
        seconds["cached"].append(timed(lambda: step(lambda: store.read(sample_id, range(FRAMES)))))
        seconds["recomputed"].append(timed(lambda: step(compress)))
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=OUT) as folder:
        scratch = Path(folder)
        clips = scratch / "clips"
        clips.mkdir()
        encoded = [encode_clip(seed) for seed in range(CLIPS)]
        for number, data in zip(range(CLIPS * COPIES), itertools.cycle(encoded), strict=False):
            (clips / f"{number:032x}.mp4").write_bytes(data)
        rates = compare_rates(clips, scratch, options.rounds)
        _, caches = make_caches(torch.bfloat16)
        sizes = check_sizes(scratch, caches)
        files = compare_files(scratch, caches, 3 * options.rounds)
        steps = compare_training(scratch, encoded[0], options.rounds)
    figures = {
        "frame_rate_over_compress": median_share(rates["ours"], "share"),
        "frame_rate_over_compress_earlier": median_share(rates["earlier"], "share"),
        "read_over_torch_load": files["ours"]["read"] / files["torch"]["read"],
        "write_over_torch_save": files["ours"]["write"] / files["torch"]["write"],
        "train_over_recompute": steps["recomputed"] / steps["cached"],
        **{f"bytes_over_formula_{name}": share for name, share in sizes.items()},
    }
    own, before = ({key: median_share(rates[name], key) for key in ("unit_s", "alone_s", "decode_s")} for name in rates)
    own |= {f"{action}_gb_s": value for action, value in files["ours"].items()} | {"step_s": steps["cached"]}
    peers = {
        "134c529": before, "torch": {f"{action}_gb_s": value for action, value in files["torch"].items()},
        "recomputed": {"step_s": steps["recomputed"]},
    }  # fmt: skip
    ratio = {
        "134c529, a unit": before["unit_s"] / own["unit_s"], "torch.load": figures["read_over_torch_load"],
        "torch.save": figures["write_over_torch_save"], "a step that recomputes 8 frames": figures["train_over_recompute"],
    }  # fmt: skip
    work = f"{CLIPS * COPIES} clips of 15 s at 1 frame a second; caches of 7B shape at N = 2, {FRAMES} frames a video; one thread"
    write("cache", work, own, peers, ratio, load, figures)
    for name, limit in LIMITS.items():
        print(f"  {name}: {figures[name]:.3g}, limit {limit:g}{'' if figures[name] >= limit else ': below'}")


if __name__ == "__main__":
    main()
