"""Run by test_step.py once per rank: gradients of one step under DeepSpeed, for several ways to cut the same batch."""

from __future__ import annotations

import sys
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from ranks import gloo_group

from voco.job.config import Training
from voco.model import weights
from voco.model.batch import collate, with_teacher
from voco.model.voco_llama import Distillation
from voco.precompute.feature_store import FeatureStore
from voco.sequence.sequence import Layout
from voco.store.samples import SampleTables, images_of
from voco.train.batches import TrainingSamples
from voco.train.packing import split_evenly
from voco.train.sampler import TableMix, epoch_order
from voco.train.step import backward
from voco.train.teacher import load_teacher
from voco.train.zero import deepspeed_config

BATCH = 8


def main(folder: str, cases: list[str]) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    tables = SampleTables([f"{folder}/samples"])
    order = epoch_order(TableMix(tables.sizes, tables.owners, (1.0,)), 0, 0, BATCH)
    results = {}
    for case in cases:
        name, accumulation, share, stage = case.split(":")
        layout = Layout(**weights.read_config(f"{folder}/initial")["layout"])
        if "queries" in name:
            layout = layout.model_copy(update={"method": "q_former", "tokens": 2, "q_former_layers": 2})
        model = weights.load_checkpoint(f"{folder}/initial", layout, torch.float32, method_seed=3)
        model.tower = None
        if name == "recomputed":
            model.language_model.train()
            model.language_model.activation_checkpointing_enable({"use_reentrant": False})
        block = Training(
            epochs=1, global_batch=BATCH, micro_batch=BATCH // world // int(accumulation), learning_rate=1e-3,
            precision="bf16" if name == "bf16" else "fp32", zero_stage=int(stage), max_tokens=512,
        )  # fmt: skip
        samples = TrainingSamples(tables, model.tokenizer, model.layout, block, images_of)
        own_rows = order.rank_rows(0, rank, world)
        own_samples = samples.take(own_rows)
        parts = [
            [own_samples[at] for at in row] for row in split_evenly([len(sample) for sample in own_samples], int(accumulation))
        ]
        if share == "alone":  # the same conversations, each a separate sample
            unshared = block.model_copy(update={"share_vision": False})
            loose = SampleTables([f"{folder}/samples"], share_vision=False)
            apart = TrainingSamples(loose, model.tokenizer, model.layout, unshared, images_of)
            all_rows = np.array([(g, p) for g, size in enumerate(apart.tables.sizes) for p in range(size)])
            single = apart.take(all_rows)
            assert len(single) == 28  # 12 images with two questions, 4 rows of text
            parts = [[s for s in single if s.sample_id in {sample.sample_id for sample in part}] for part in parts]
        store = FeatureStore(f"{folder}/features")
        batches = [collate(part, store, store.shape) for part in parts]
        if "taught" in name:
            plain = layout.model_copy(update={"method": "none"})
            teacher_samples = TrainingSamples(tables, model.tokenizer, plain, block, images_of).take(own_rows)
            rows = split_evenly([len(sample) for sample in own_samples], int(accumulation))
            teacher_batches = [collate([teacher_samples[at] for at in row], store, store.shape) for row in rows]
            batches = [with_teacher(batch, teacher) for batch, teacher in zip(batches, teacher_batches, strict=True)]
            other: tuple[Any, ...] = ()
            if "other" in name:
                resolved = block.model_copy(update={"attention": "segments"})
                settings = deepspeed_config(block, world)
                other = load_teacher(f"{folder}/other", plain, resolved, torch.float32, torch.device("cpu"), settings)
            model.distillation = Distillation(0.7, 2.0, *other)
        if stage == "1" and name.startswith("plain"):  # the obvious form: one backward, no DeepSpeed
            (batch,) = batches
            summed = model(batch.to("cpu", torch.float32))
            loss, kl = (term / len(batch.predict_id) for term in (summed if "taught" in name else (summed, torch.zeros(()))))
            loss.backward()
            results[name] = {"loss": float(loss), "kl": float(kl), "grads": {n: p.grad for n, p in model.named_parameters()}}
            continue
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=list(model.parameters()), config=deepspeed_config(block, world)
        )
        done = backward(engine, batches, 0, stop=False, cut=rank + 1)
        grads = {n: deepspeed.utils.safe_get_full_grad(p).float().clone() for n, p in model.named_parameters()}
        results[name] = {"loss": done.loss, "kl": done.kl or 0.0, "tokens": done.tokens, "cut": done.cut, "grads": grads}
    if rank == 0:
        torch.save(results, f"{folder}/world{world}.pt")


if __name__ == "__main__":
    with gloo_group():
        main(sys.argv[1], sys.argv[2:])
