"""A bare DeepSpeed loop over the samples of a training job: for `bench/train.py`. Prints the seconds and the loss of each step.

python bench/train_run.py MODEL JOB.yaml
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch


def main() -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29572"}
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from voco.job.load import load_job
    from voco.model import weights
    from voco.precompute.feature_store import FeatureStore
    from voco.store.samples import SampleTables
    from voco.train.batches import ImageBatches
    from voco.train.sampler import TableMix, epoch_order
    from voco.train.step import learning_rate
    from voco.train.zero import deepspeed_config

    model_uri, job_file = sys.argv[1:]
    job: Any = load_job(job_file)
    block = job.block
    torch.manual_seed(job.seed)
    model = weights.load_checkpoint(model_uri, dtype=torch.float32)
    model.tower = None
    model.requires_grad_(True)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    # a bare loop lets DeepSpeed count the micro-batches of a step; ours counts them itself
    config = deepspeed_config(block, 1) | {"gradient_accumulation_steps": block.global_batch // block.micro_batch}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    tables = SampleTables([item.uri for item in job.inputs.samples], block.share_vision)
    data = ImageBatches(tables, FeatureStore(job.inputs.features), model, block)
    mix = TableMix(tables.sizes, tables.owners, (1.0,))
    steps = mix.steps(block.global_batch)
    batches = []
    for epoch in range(block.epochs):
        order = epoch_order(mix, job.seed, epoch, block.global_batch)
        batches += [
            data.micro_batches(order.rank_rows(index, 0, 1), block.global_batch // block.micro_batch).batches
            for index in range(steps)
        ]
    seconds, losses = [], []
    for step, micro_batches in enumerate(batches):
        started = time.monotonic()
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), block.learning_rate, block.warmup_share, block.final_lr_share)
        tokens, total = sum(len(batch.predict_id) for batch in micro_batches), 0.0
        for batch in micro_batches:
            loss = engine(batch)
            engine.backward(loss * (len(micro_batches) / tokens))
            engine.step()
            total += float(loss.detach())
        losses.append(total / tokens)
        seconds.append(time.monotonic() - started)
    print(json.dumps({"seconds": seconds, "losses": losses}))


if __name__ == "__main__":
    main()
