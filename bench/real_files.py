"""Every source and every clip of `../shared/data`, real files that others made, through ingest: rows read, written and rejected.

    python bench/real_files.py [FOLDER]

Needs no Ray: each source is a job that the driver runs itself. A reject is printed with its reason.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from side_by_side import ROOT

import pipelines
from voco.ingest.media.decoder import Decoder
from voco.ingest.media.folder import MediaRoot
from voco.ingest.media.source import MediaLimits
from voco.ingest.media.video import read_video
from voco.ingest.source_row import BadRow
from voco.job.load import build_job

QWEN_IMAGES = "qwen"  # a folder that is laid out here
SOURCES = {  # annotations: format, media, answers
    "chat/llama-factory/mllm_demo.json": ("chat_json", "chat/llama-factory", None),
    "chat/llama-factory/mllm_video_demo.json": ("chat_json", "chat/llama-factory", None),
    "chat/qwen3-vl/single_images.json": ("llava_json", QWEN_IMAGES, None),
    "chat/qwen3-vl/video.json": ("llava_json", "chat/qwen3-vl/videos", None),
    "activitynet-qa/test_q.json": ("video_qa", "chat/qwen3-vl/videos", "activitynet-qa/test_a.json"),
    "clips/return_all_test.tar": ("webdataset", None, None),
}
VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm")
LIMITS = MediaLimits("full", 1 << 30, 10**8, 200.0, 1 << 30)


def main() -> None:
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "data"
    if not data.exists():
        raise SystemExit(f"{data} does not exist")
    print(f"{'source':<44}{'format':<14}{'read':>6}{'written':>9}{'rejected':>10}  reasons")
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(data / "chat/qwen3-vl/images", f"{scratch}/qwen/demo/images")  # as its rows name them
        for number, (source, (name, media, answers)) in enumerate(SOURCES.items()):
            ingest(data, source, name, media, answers, f"{scratch}/{number}")
    print(f"\n{'clip':<44}{'format':<8}{'frames':>7}{'seconds':>9}{'fps':>8}  size")
    decoder = Decoder()
    for file in sorted(path for path in data.glob("**/*") if path.suffix in VIDEOS and path.is_file()):
        try:
            medium = read_video(MediaRoot(str(file.parent)), file.name, LIMITS, decoder)
        except BadRow as bad:
            print(f"{file.name:<44}{bad.reason}: {bad.detail}")
            continue
        size = f"{medium['width']} x {medium['height']}"
        figures = f"{medium['num_frames']:>7}{medium['duration_s']:>9.2f}{medium['fps']:>8.2f}"
        print(f"{file.name:<44}{medium['format']:<8}{figures}  {size}")


def ingest(data: Path, source: str, name: str, media: str | None, answers: str | None, output: str) -> None:
    inputs = {"annotations": str(data / source)}
    inputs |= {key: str(data / path) for key, path in (("media", media), ("answers", answers)) if path is not None}
    if media == QWEN_IMAGES:
        inputs["media"] = str(Path(output).parent / QWEN_IMAGES)
    split = "train" if answers is None else "test"
    block = {"format": name, "dataset": "real", "split": split, "validate": "full", "allow_empty": True, "in_process_rows": 10**6}
    block |= {"max_missing_share": 1.0, "max_reject_share": 1.0}
    job = build_job(source, {"name": "real", "kind": "ingest", "inputs": inputs, "output": output, "ingest": block})
    with contextlib.redirect_stdout(io.StringIO()):
        counts = pipelines.run(job).counts
    rejected = counts["rejected"]
    reasons = ", ".join(f"{reason} {count}" for reason, count in rejected.items())
    print(f"{source:<44}{name:<14}{counts['read']:>6}{counts['written']:>9}{sum(rejected.values()):>10}  {reasons}")
    for file in sorted(Path(output, "rejects").glob("*.parquet"))[: 1 if rejected else 0]:
        row = pq.read_table(file).slice(0, 1).to_pylist()[0]
        print(f"{'':<44}first: {row['detail'][:110]}")


if __name__ == "__main__":
    main()
