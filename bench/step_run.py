"""One build's training step at the demo's shapes: DeepSpeed's engine with our step, and the same model in a plain torch loop.

For `bench/step.py`; run it under the source of either build (`bench/earlier.py`). The last line on stdout is the result: seconds
of processor time of a step, its loss, and the norm of every weight's gradient.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

MODEL = {
    "llama": {"layers": 4, "width": 128, "heads": 8, "kv_heads": 8, "mlp_width": 256, "vocabulary": 640},
    "tower": {"name": "efficientnet_lite0", "image_size": 64},
}  # of jobs/demo/flow.yaml
TRAINING = {
    "epochs": 1, "global_batch": 16, "micro_batch": 16, "learning_rate": 1e-3, "precision": "fp32", "weight_decay": 0.1,
}  # fmt: skip
QUESTIONS = 9  # of a scene, about
CORNERS, THINGS = ("top left", "top right", "bottom left", "bottom right"), ("red", "green", "blue", "teal", "brown", "gray")


def is_earlier() -> bool:
    return importlib.util.find_spec("voco.blocks") is not None


def conversations(scene: int) -> list[list[dict[str, str]]]:
    turns = []
    for number in range(QUESTIONS):
        corner, thing = CORNERS[(scene + number) % 4], THINGS[(scene * 5 + number) % 6]
        question = f"what color is at the {corner}?" if number % 2 else f"is there a {thing} circle next to the {corner} one?"
        turns.append([{"role": "user", "text": question}, {"role": "assistant", "text": thing if number % 2 else "yes"}])
    return turns


def build() -> tuple[Any, Any, Any, Callable[..., Any], Callable[..., dict[str, Any]]]:
    """The model, a batch, the training block, the build's step of an engine, and its configuration of DeepSpeed."""
    if is_earlier():
        from voco.blocks import Model, Text, Training  # type: ignore[import-not-found]

        from voco import tokens  # type: ignore[attr-defined]
        from voco.model import new  # type: ignore[attr-defined]

        create, build_sample = new.create, tokens.build
    else:
        from voco.job.config import Model, Text, Training
        from voco.model.build import create_model as create
        from voco.sequence.sequence import build_sample
    from voco.model.batch import collate
    from voco.train.step import train_step
    from voco.train.zero import deepspeed_config

    words = [turn["text"] for scene in range(16) for turns in conversations(scene) for turn in turns]
    model = create(Model.model_validate(MODEL), "voco", 1, Text(template="question_answer"), words, seed=0)
    model.tower = None
    layout, shape = model.layout, (model.layout.vision_slots, model.feature_width)
    features = {str(scene): torch.randn(shape, generator=torch.Generator().manual_seed(scene)) for scene in range(16)}
    samples = [build_sample(name, conversations(int(name)), [name], model.tokenizer, layout) for name in features]
    batch = collate(samples, features.__getitem__, shape).to("cpu", torch.float32)
    return model, batch, Training.model_validate(TRAINING), train_step, deepspeed_config


def gradient_norms(model: Any, batch: Any) -> tuple[float, dict[str, float]]:
    model.zero_grad(set_to_none=True)
    loss = model(batch) / len(batch.predict_id)
    loss.backward()
    norms = {name: float(weight.grad.double().norm()) for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(loss), norms


def process_seconds(step: Callable[[], Any], steps: int) -> float:
    """Median seconds of processor time of a step, after three that do not count."""
    times = []
    for _ in range(steps + 3):
        started = time.process_time()
        step()
        times.append(time.process_time() - started)
    return statistics.median(times[3:])


def plain_loop(model: Any, batch: Any, block: Any) -> Callable[[], Any]:
    """A step of torch alone: forward, backward, clip, AdamW."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=block.learning_rate, weight_decay=block.weight_decay)

    def step() -> None:
        loss = model(batch) / len(batch.predict_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def engine_step(engine: Any, batch: Any, train_step: Callable[..., Any]) -> Callable[[], Any]:
    """A step of the build's own training loop."""
    if is_earlier():
        return lambda: train_step(engine, [batch], 0, False, 0)
    from voco.train.batches import StepData

    data = StepData([batch], 0, tuple(batch.sample_ids))
    return lambda: train_step(engine, data, len(batch.sample_ids), 0, 0, 0.0)


def main() -> None:
    steps = int(sys.argv[1])
    torch.set_num_threads(1)
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "29571")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model, batch, block, train_step, deepspeed_config = build()
    loss, norms = gradient_norms(model, batch)
    plain_s = process_seconds(plain_loop(model, batch, block), steps)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=deepspeed_config(block, 1))
    engine_s = process_seconds(engine_step(engine, batch, train_step), steps)
    tokens = int(batch.ids.shape[1])
    print(json.dumps({"engine_s": engine_s, "plain_s": plain_s, "loss": loss, "tokens": tokens, "gradients": norms}))


if __name__ == "__main__":
    main()
