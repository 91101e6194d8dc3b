"""Run by test_adapter.py once per rank: steps of an image SFT job with an adapter under DeepSpeed, and the export at its end."""

from __future__ import annotations

import json
import sys

import deepspeed
import torch.distributed as dist
from ranks import gloo_group

from voco.job.config import ImageSft
from voco.model import weights
from voco.model.batch import collate
from voco.precompute.feature_store import FeatureStore
from voco.store.samples import SampleTables, images_of
from voco.train import checkpoints
from voco.train.batches import TrainingSamples
from voco.train.sampler import TableMix, epoch_order
from voco.train.step import backward
from voco.train.weight_placement import make_parameters, worker_device
from voco.train.worker_model import load_model
from voco.train.zero import deepspeed_config

BATCH, STEPS = 8, 4


def main(folder: str, cases: list[str]) -> None:
    """Each case is JSON: its name, the ZeRO stage and the block's other keys."""
    rank, world = dist.get_rank(), dist.get_world_size()
    tables = SampleTables([f"{folder}/samples"])
    order = epoch_order(TableMix(tables.sizes, tables.owners, (1.0,)), 0, 0, BATCH)
    store = FeatureStore(f"{folder}/features")
    for case in cases:
        keys = json.loads(case)
        name = keys.pop("name")
        block = ImageSft(
            **{"epochs": 1, "global_batch": BATCH, "micro_batch": BATCH // world, "learning_rate": 0.01, "precision": "fp32",
               "max_tokens": 512, "attention": "segments", **keys}
        )  # fmt: skip
        layout = weights.read_config(f"{folder}/initial")["layout"]
        config = {"kind": "image_sft", "model": f"{folder}/initial", "layout": layout, "seed": 5, "features": "stored"}
        config |= {"frame_cache": "", "output": f"{folder}/{name}", "block": block.model_dump()}
        settings, device = deepspeed_config(block, world), worker_device()
        model = load_model(config, block, device, make_parameters(settings, device))  # under ZeRO-3 in shards, as a worker does
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=settings)
        samples = TrainingSamples(tables, model.tokenizer, model.layout, block, images_of)
        metrics = []
        for step in range(STEPS):
            rows = samples.take(order.rank_rows(step % 2, rank, world))
            result = backward(engine, [collate(rows, store, store.shape)], step, stop=0)
            engine.step()
            metrics.append({"step": step, "loss": result.loss, "tokens": result.tokens})
        checkpoints.export_weights(config, model, block.zero_stage, metrics, rank)


if __name__ == "__main__":
    with gloo_group():
        main(sys.argv[1], sys.argv[2:])
