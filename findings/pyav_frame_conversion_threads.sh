#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg 8), seen 2026-11-30: `frame.to_ndarray(format="rgb24")` spends nearly all of its time on starting threads.
#
# One would guess that turning a small decoded frame into RGB costs what the conversion costs, and that a codec context with
# thread_count = 1 keeps a reader in one thread. In fact libswscale's context is given as many threads as the machine has cores, for
# each call anew: a frame of 340 x 256 takes 0.13 to 0.67 ms by to_ndarray and 0.05 ms by a VideoReformatter that is kept and called
# with threads=1, on two cores; the pixels are the same. With 100 frames of a clip the conversion, not the decoder, decides.
# This prints both times and the ratio, and fails when the default is no longer at least 1.5 times as slow or the pixels differ.
# On a machine with one core there is nothing to see.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check av==18.1.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import os
import statistics
import time

import av
import numpy as np
from av.video.reformatter import VideoReformatter

drawn = np.random.default_rng(0).integers(0, 255, (256, 340, 3), np.uint8)
frame = av.VideoFrame.from_ndarray(drawn, format="rgb24").reformat(format="yuv420p")
reformatter = VideoReformatter()


def default():
    return frame.to_ndarray(format="rgb24")


def single():
    return reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()


def milliseconds(convert):
    times = []
    for _ in range(200):
        started = time.perf_counter()
        convert()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


assert np.array_equal(default(), single())
slow, fast = milliseconds(default), milliseconds(single)
print(f"PyAV {av.__version__}, {os.cpu_count()} cores: to_ndarray {slow:.3f} ms, reformat with threads=1 {fast:.3f} ms: {slow / fast:.1f} x")
assert os.cpu_count() == 1 or slow > 1.5 * fast, "the default is no longer slower"
PYTHON
