"""One build's frame caches of the clips in a folder: seconds of a unit, and of its forward passes alone. For `bench/cache.py`.

Run it under the source of either build (`bench/earlier.py`). The last line on stdout is the result. Rows are given from memory,
so that the two builds need no samples of each other's format.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

MODEL = {
    "llama": {"layers": 4, "width": 256, "heads": 8, "kv_heads": 8, "mlp_width": 688, "vocabulary": 300},
    "tower": {"name": "efficientnet_lite0", "image_size": 128},
}
BLOCK = {"fps": 1.0, "batch": 16}
ROUNDS = 1


def is_earlier() -> bool:
    return importlib.util.find_spec("voco.blocks") is not None


def checkpoint(folder: Path) -> str:
    """An untrained checkpoint, in the build's own format."""
    if is_earlier():
        from voco.blocks import Model, Text  # type: ignore[import-not-found]

        from voco.model import new, weights  # type: ignore[attr-defined]

        create, save = new.create, weights.save
    else:
        from voco.job.config import Model, Text
        from voco.model import build, weights

        create, save = build.create_model, weights.save_checkpoint
    model = create(Model.model_validate(MODEL), "voco", 2, Text(template="question_answer"), ["what happens?"], seed=0)
    save(model, weights.own_state(model), folder / "model")
    return str(folder)


def rows(clips: Path) -> list[dict[str, Any]]:
    names = sorted(clips.glob("*.mp4"))
    return [
        {
            "sample_id": name.stem,
            "dataset": "clips",
            "modality": "video",
            "media": [{"bytes": name.read_bytes(), "sha256": name.stem}],
        }
        for name in names
    ]


def worker(output: str, maker: str, listed: list[dict[str, Any]]) -> tuple[Any, Any]:
    """The build's worker, which reads `listed`, and its frames decoded one after the other."""
    if is_earlier():
        from voco.video import frame_cache  # type: ignore[attr-defined]

        frame_cache.read_media = lambda wanted: iter(listed)
        built = frame_cache.FrameWorker(output, maker, BLOCK)
        return built, lambda: list(built._frames(pa.table({"row": [0]}), []))
    from voco.precompute import frame_cache

    frame_cache.read_at = lambda *given, **keys: iter(listed)
    built = frame_cache.FrameWorker(output, maker, BLOCK, threads=1)
    return built, lambda: list(itertools.chain.from_iterable(map(built._decode, listed)))


def main() -> None:
    torch.set_num_threads(1)
    listed = rows(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory(dir=sys.argv[2]) as scratch:
        own, decode = worker(f"{scratch}/output", checkpoint(Path(scratch)), listed)
        started = time.perf_counter()
        frames = decode()
        decode_s = time.perf_counter() - started
        batches = [frames[start : start + BLOCK["batch"]] for start in range(0, len(frames), int(BLOCK["batch"]))]
        seconds: dict[str, list[float]] = {"alone": [], "unit": []}
        for _ in range(ROUNDS):
            started = time.perf_counter()
            for batch in batches:
                own.model.compress(torch.stack([frame.pixels for frame in batch]))
            seconds["alone"].append(time.perf_counter() - started)
            started = time.perf_counter()
            record = own(0, pa.table({"row": [0] * len(listed)}))
            seconds["unit"].append(time.perf_counter() - started)
        if record["counts"]["written"] != len(frames):
            raise SystemExit(f"{record['counts']['written']} of {len(frames)} frames were written")
    share = [alone / unit for alone, unit in zip(seconds["alone"], seconds["unit"], strict=True)]
    result = {"frames": len(frames), "decode_s": decode_s, "share": statistics.median(share)}
    print(json.dumps({**result, **{f"{name}_s": statistics.median(times) for name, times in seconds.items()}}))


if __name__ == "__main__":
    main()
