"""`make bench-cache`: frame caches written, read and trained from.

- The rate of a unit (decode, compress, write) over its forward passes alone, ours and the build of `bench/earlier.py`, each
  with one torch thread and, ours, one decoding thread; the more cores are idle, the nearer to 1. A unit is the default's 50
  clips. Batches of 16 frames: on a CPU they are as fast as larger ones, and less waits at a unit's start and end.
- Writing against torch.save of a file for each video, on local disk; neither waits until the disk has it, and ours is hashed.
- Reading against torch.load of those files: from opening to a batch of all videos, in new tensors, whose numbers are joined and
  usable; of complete videos, and of 8 of 64 frames of each. `mmap`: torch.load with mmap=True, which reads what is used.
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
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import earlier
import numpy as np
import torch
from PIL import Image
from side_by_side import OUT, write

from voco.demo.cluster import KEEP_FREED_MEMORY
from voco.job.config import Model, Text
from voco.model import build
from voco.model.batch import collate_cached
from voco.model.cache import CacheKey, VocoCache
from voco.model.voco_llama import VocoLlama
from voco.precompute.frame_cache import CacheWriter, CompressedFrames, Frame, write_index
from voco.precompute.frame_store import FrameStore
from voco.precompute.frame_tensors import STORED, dequantise, quantise, split_frames
from voco.run.units import part_uri
from voco.sequence.sequence import build_sample
from voco.store.number_types import frame_tensor_bytes
from voco.video.decode import Video
from voco.video.sample_frames import evenly_spaced, thin_evenly

CLIPS, COPIES = 2, 25  # encoded clips of 15 s, and how many samples have each
SEVEN_B = (32, 32, 2, 128)  # layers, key-value heads, N, head width of LLaVA-1.5-7B
VIDEOS, FRAMES = 16, 8
LONG_VIDEOS, LONG_FRAMES = 4, 64  # of which FRAMES are read
PIXELS = torch.empty(0)
# glibc keeps freed memory, as in the demo's cluster: the tensors of both take pages that the process has already
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
            shown = ", ".join(f"{key} {value:.3g}" for key, value in result.items())
            print(f"  round {number + 1}/{rounds} {name}: {shown}", flush=True)
    return results


def make_caches(videos: int = VIDEOS, frames: int = FRAMES) -> list[VocoCache]:
    """bf16 caches in the shape of 7B."""
    layers, heads, tokens, width = SEVEN_B
    key = CacheKey("bench", "voco", tokens, (1, 13), "bench")
    shape = (layers, heads, frames * tokens, width)
    draws = [torch.randn(2, *shape, generator=torch.Generator().manual_seed(video)).bfloat16() for video in range(videos)]
    return [VocoCache(draw[0], draw[1], (tokens,) * frames, key) for draw in draws]


def batches(caches: list[VocoCache]) -> Iterator[CompressedFrames]:
    for video, cache in enumerate(caches):
        frames = [Frame(f"{video:032x}", 0, frame, float(frame), PIXELS) for frame in range(len(cache.tokens))]
        yield CompressedFrames(frames, cache)


def write_ours(output: str, caches: list[VocoCache], stored: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """A `frame_cache` output of the caches, by the job's own writer. Returns the part's manifest entry."""
    index: list[dict[str, Any]] = []
    writer = CacheWriter(caches[0], {"rope_theta": 1e4}, stored)
    entry = writer.write(part_uri(output, "frame_cache", 0), batches(caches), index)
    groups = [{**group, "file": entry["path"], "part_bytes": entry["bytes"]} for group in index]
    write_index(output, [{"index": groups, "rejects": [], "facts": writer.facts}])
    return entry


def write_torch(folder: Path, caches: list[VocoCache]) -> None:
    folder.mkdir(exist_ok=True)
    for video, cache in enumerate(caches):
        torch.save({"keys": cache.keys, "values": cache.values}, folder / f"{video}.pt")


def read_ours(output: str, videos: int, frames: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (D, H, M, E) of these frames of every video, as `CacheReader.place_keys` joins them."""
    store = FrameStore(output)
    caches = [store.read(f"{video:032x}", frames) for video in range(videos)]
    layers, heads, tokens, width = SEVEN_B
    size = len(frames) * tokens
    keys, values = (torch.empty(layers, heads, videos * size, width, dtype=torch.bfloat16) for _ in range(2))
    for video, cache in enumerate(caches):
        part = slice(video * size, (video + 1) * size)
        cache.copy_to(keys[:, :, part], values[:, :, part])
    return keys, values


def read_torch(folder: Path, videos: int, frames: Sequence[int], mmap: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with torch.load and torch.cat."""
    loaded = [torch.load(folder / f"{video}.pt", mmap=mmap) for video in range(videos)]
    keys, values = ([tensors[name] for tensors in loaded] for name in ("keys", "values"))
    if len(frames) * SEVEN_B[2] < keys[0].shape[2]:
        rows = torch.tensor([frame * SEVEN_B[2] + token for frame in frames for token in range(SEVEN_B[2])])
        keys, values = ([tensor[:, :, rows] for tensor in tensors] for tensors in (keys, values))
    return torch.cat(keys, dim=2), torch.cat(values, dim=2)


def check_sizes(scratch: Path, caches: list[VocoCache]) -> dict[str, float]:
    """Bytes on disk of a frame of each number type over the formula's. Exits where what is read is not what `quantise` gives."""
    shares = {}
    for name, stored in STORED.items():
        output = str(scratch / name)
        entry = write_ours(output, caches, stored)
        read = read_ours(output, VIDEOS, range(FRAMES))
        for tensor, written in zip(read, ("keys", "values"), strict=True):
            exact = torch.cat([split_frames(getattr(cache, written), SEVEN_B[2]) for cache in caches])
            frames = split_frames(tensor, SEVEN_B[2])
            for start in range(0, len(frames), FRAMES):  # in pieces, for their fp32 forms
                part = slice(start, start + FRAMES)
                if not torch.equal(frames[part], dequantise(*quantise(exact[part], stored), exact.dtype)):
                    raise SystemExit(f"{name}: {written} are not read as they were written")
        formula = 2 * sum(frame_tensor_bytes(SEVEN_B, str(stored).removeprefix("torch.")))
        shares[name] = entry["bytes"] / (VIDEOS * FRAMES * formula)
        print(f"  {name}: {formula:,} bytes a frame by the formula, {shares[name]:.4f} of it on disk", flush=True)
        shutil.rmtree(output)
    return shares


def compare_files(scratch: Path, rounds: int, videos: int, total: int) -> dict[str, float]:
    """GB/s of writing `videos` of `total` frames and of reading FRAMES of each into a batch, ours and torch's, in turn."""
    caches, frames = make_caches(videos, total), thin_evenly(list(range(total)), FRAMES)
    output, peer = str(scratch / f"ours-{total}"), scratch / f"torch-{total}"
    calls: dict[str, Callable[[], Any]] = {
        "ours_write": lambda: write_ours(output, caches), "torch_write": lambda: write_torch(peer, caches),
        "ours_read": lambda: read_ours(output, videos, frames), "torch_read": lambda: read_torch(peer, videos, frames),
        "mmap_read": lambda: read_torch(peer, videos, frames, mmap=True),
    }  # fmt: skip
    first = {name: call() for name, call in calls.items()}
    for name in ("ours_read", "mmap_read"):
        if not all(map(torch.equal, first[name], first["torch_read"])):
            raise SystemExit(f"{name} and torch.load read other tensors")
    del first
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    size = sum(cache.bytes for cache in caches) / 1e9
    used = {name: size * (FRAMES / total if name.endswith("read") else 1) for name in calls}
    gb_s = {name: used[name] / statistics.median(times) for name, times in seconds.items()}
    shown = ", ".join(f"{name} {value:.2f}" for name, value in gb_s.items())
    print(f"  {videos} videos of {total} frames, {FRAMES} read; GB/s of what is written or used: {shown}", flush=True)
    shutil.rmtree(output)
    shutil.rmtree(peer)
    return gb_s


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
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if not KEEP_FREED_MEMORY.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_FREED_MEMORY})
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
        sizes = check_sizes(scratch, make_caches())
        files = compare_files(scratch, 4 * options.rounds, VIDEOS, FRAMES)
        few = compare_files(scratch, 2 * options.rounds, LONG_VIDEOS, LONG_FRAMES)
        steps = compare_training(scratch, encoded[0], 2 * options.rounds)
    figures = {
        "frame_rate_over_compress": median_share(rates["ours"], "share"),
        "frame_rate_over_compress_earlier": median_share(rates["earlier"], "share"),
        "read_over_torch_load": files["ours_read"] / files["torch_read"],
        "read_over_torch_mmap": files["ours_read"] / files["mmap_read"],
        "write_over_torch_save": files["ours_write"] / files["torch_write"],
        "read_8_of_64_over_torch_load": few["ours_read"] / few["torch_read"],
        "read_8_of_64_over_torch_mmap": few["ours_read"] / few["mmap_read"],
        "train_over_recompute": steps["recomputed"] / steps["cached"],
        **{f"bytes_over_formula_{name}": share for name, share in sizes.items()},
    }
    own, before = ({key: median_share(rates[name], key) for key in ("unit_s", "alone_s", "decode_s")} for name in rates)
    speeds = {
        who: {
            **{f"{action}_gb_s": files[f"{who}_{action}"] for action in ("write", "read") if f"{who}_{action}" in files},
            "read_8_of_64_gb_s": few[f"{who}_read"],
        }
        for who in ("ours", "torch", "mmap")
    }
    own |= speeds["ours"] | {"step_s": steps["cached"]}
    peers = {
        "134c529": before, "torch": speeds["torch"], "torch, mmap": speeds["mmap"], "recomputed": {"step_s": steps["recomputed"]},
    }  # fmt: skip
    ratio = {
        "134c529, a unit": before["unit_s"] / own["unit_s"], "torch.load, to a batch": figures["read_over_torch_load"],
        "torch.load, 8 of 64 frames": figures["read_8_of_64_over_torch_load"],
        "torch.load with mmap": figures["read_over_torch_mmap"],
        "torch.load with mmap, 8 of 64": figures["read_8_of_64_over_torch_mmap"],
        "torch.save": figures["write_over_torch_save"], "a step that recomputes 8 frames": figures["train_over_recompute"],
    }  # fmt: skip
    work = f"{CLIPS * COPIES} clips of 15 s at 1 frame a second; caches of 7B shape at N = 2, {FRAMES} frames a video; one thread"
    write("cache", work, own, peers, ratio, load, figures)
    for name, limit in LIMITS.items():
        print(f"  {name}: {figures[name]:.3g}, limit {limit:g}{'' if figures[name] >= limit else ': below'}")


if __name__ == "__main__":
    main()
