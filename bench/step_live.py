"""Part of `make bench-step`: a training step in which the frozen tower runs, over the same step on stored features.

At the demo's shapes: its language model, EfficientNet-Lite0 at 64 pixels, 16 samples of 9 questions. The pixels are decoded
already, as they are in training, where threads decode ahead; the seconds of decoding are listed beside.
"""

from __future__ import annotations

import io
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from side_by_side import ROOT, in_turn, median

SAMPLES, TEXT = 16, 180  # of a micro-batch of the demo's sweep; tokens of a scene's questions and answers, about


def model() -> Any:
    """The demo's model as its job file describes it, untrained."""
    from voco.job.config import Text
    from voco.job.load import load_job
    from voco.model.build import create_model

    (align,) = (stage for stage in load_job(str(ROOT / "jobs/demo/flow.yaml")).stages if stage.kind == "align")
    words = [f"w{number}" for number in range(2000)]
    return create_model(align.model, "voco", 1, Text(template="question_answer"), words, seed=0)


def encoded(number: int) -> bytes:
    """A PNG of noise as large as the demo's scenes."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def live(rounds: int) -> dict[str, float]:
    """Seconds of processor time of both steps and of decoding their images, and the steps' ratio; equal losses first."""
    from step import own_step, timed, token_sample

    from voco.model.batch import collate

    net = model()
    samples = [token_sample(net.layout, f"{number}", TEXT, words=500) for number in range(SAMPLES)]
    files = {sample.sample_id: encoded(number) for number, sample in enumerate(samples)}
    began = time.process_time()
    pixels = {name: net.tower.tiles(data)[0] for name, data in files.items()}
    decode_s = time.process_time() - began
    stored = {name: net.tower(image)[0] for name, image in pixels.items()}
    shape = (net.layout.vision_slots, net.feature_width)
    net.detach_tower()
    batches = {
        "stored features": collate(samples, stored.__getitem__, shape).to("cpu", torch.float32),
        "live tower": collate(samples, pixels.__getitem__, shape).to("cpu", torch.float32),
    }
    losses = {name: float(own_step(net, batch)) for name, batch in batches.items()}
    if abs(losses["live tower"] - losses["stored features"]) > 1e-5 * losses["stored features"]:
        raise SystemExit(f"the two do not train the same: {losses}")
    results = in_turn({name: partial(timed, partial(own_step, net, batch)) for name, batch in batches.items()}, rounds)
    seconds = {name: median(times, "s") for name, times in results.items()}
    ratio = seconds["live tower"] / seconds["stored features"]
    return {**{f"{name}_s": value for name, value in seconds.items()}, "decode_s": decode_s, "ratio": ratio}
