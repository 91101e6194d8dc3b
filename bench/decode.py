"""`make bench-decode`: frames of videos: ours, decord and PyAV in order, at 8 and 100 frames; and which of them are right.

First the matrix of `tests/numbered_clips.py`, whose pictures spell their numbers: a cell is right when ten frames, picked across
its groups of pictures, are the frames that were asked for. Then the time from encoded bytes to RGB, on clips that all read right.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import decord
import numbered_clips
import numpy as np
from side_by_side import ROOT, write

from voco.video.decode import Video
from voco.video.sample_frames import evenly_spaced

SHARED = Path(os.environ.get("VOCO_SHARED", ROOT.parent / "shared")) / "data"
PICKS = [47, 5, 95, 0, 60, 61, 11, 12, 23, 80]
COUNTS = (8, 100)
Reader = Callable[[bytes, Callable[[int], list[int]]], np.ndarray]


def exact(data: bytes, choose: Callable[[int], list[int]]) -> np.ndarray:
    video = Video(data)
    return video.frames(choose(video.num_frames))


def by_decord(data: bytes, choose: Callable[[int], list[int]]) -> np.ndarray:
    reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1)
    return reader.get_batch(choose(len(reader))).asnumpy()


def pyav_in_order(data: bytes, choose: Callable[[int], list[int]]) -> np.ndarray:
    """The plain loop: count the packets, then decode from the start and convert the frames that are wanted."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        numbers = choose(sum(1 for packet in container.demux(stream) if packet.size))
    frames = {}
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if number in numbers:
                frames[number] = frame.to_ndarray(format="rgb24")
            if number == max(numbers):
                break
    return np.stack([frames[number] for number in numbers])


READERS: dict[str, Reader] = {"ours": exact, "decord": by_decord, "pyav_in_order": pyav_in_order}


def right_cells() -> dict[str, int]:
    """Cells of the matrix that each reader gets right."""
    right = dict.fromkeys(READERS, 0)
    for cell in numbered_clips.CELLS:
        data, wrong = numbered_clips.clip(cell), []
        for name, read in READERS.items():
            try:
                frames = read(data, lambda count: PICKS)
                if cell.variant == "turned" and frames.shape[1] < frames.shape[2]:
                    frames = np.rot90(frames, -1, axes=(1, 2))
                good = [numbered_clips.read_number(frame) for frame in frames] == PICKS
            except Exception:  # noqa: BLE001 - decord raises what it likes: a cell that is not read is not right
                good = False
            right[name] += good
            wrong += [] if good else [name]
        if wrong:
            print(f"  {'-'.join(cell)}: wrong by {', '.join(wrong)}", flush=True)
    return right


def clips() -> dict[str, bytes]:
    """A clip of 15 s at 596x336 like WebVid's, one with short groups of pictures, and real files where they are present."""
    generated = {"mp4 h264, keyint 250": _panorama(250), "mp4 h264, keyint 30": _panorama(30)}
    real = ("clips/demo.mp4", "clips/av1_video.mkv", "chat/qwen3-vl/videos/v_TpB_zMG3XBA.mp4")
    return generated | {Path(name).name: (SHARED / name).read_bytes() for name in real if (SHARED / name).exists()}


def _panorama(keyint: int, seconds: int = 15, width: int = 596, height: int = 336) -> bytes:
    drawn = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8 + 80, 3), np.uint8)
    wide = np.kron(drawn, np.ones((8, 8, 1), np.uint8))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast", "crf": "23", "g": str(keyint)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * 30):
            view = np.ascontiguousarray(wide[:height, number % 600 : number % 600 + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    right = right_cells()
    total = len(numbered_clips.CELLS)
    print(f"right cells of {total}: " + ", ".join(f"{name} {count}" for name, count in right.items()), flush=True)
    figures: dict[str, dict[str, float]] = {name: {"cells_right": right[name], "cells": total} for name in READERS}
    ratios: dict[str, float] = {}
    for clip, data in clips().items():
        for count in COUNTS:
            seconds = _time(data, count, options.rounds)
            for name, value in seconds.items():
                figures[name][f"{clip}, {count} frames, ms"] = 1000 * value
            for peer in ("decord", "pyav_in_order"):
                ratios[f"{clip}, {count} frames, against {peer}"] = seconds[peer] / seconds["ours"]
            print(
                f"  {clip}, {count} frames: " + ", ".join(f"{name} {1000 * s:.1f} ms" for name, s in seconds.items()), flush=True
            )
    write("decode", "encoded bytes to RGB frames, one thread", figures.pop("ours"), figures, ratios, load)


def _time(data: bytes, count: int, rounds: int) -> dict[str, float]:
    """Median seconds of each reader, in turn, after all gave the same pictures within colour conversion."""

    def choose(frames: int) -> list[int]:
        return evenly_spaced(frames, count)

    pictures: dict[str, Any] = {name: read(data, choose).astype(np.int16) for name, read in READERS.items()}
    for name, frames in pictures.items():
        distance = np.abs(frames - pictures["ours"]).mean()
        if distance > 2:
            raise SystemExit(f"{name}: other pictures than ours, {distance:.1f} levels apart")
    seconds: dict[str, list[float]] = {name: [] for name in READERS}
    for _ in range(rounds):
        for name, read in READERS.items():
            started = time.perf_counter()
            read(data, choose)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
