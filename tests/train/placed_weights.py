"""Run by test_weight_placement.py once per rank: the weights of a job as each worker places them, and as they were before.

"Before" is a complete fp32 copy in every process, which DeepSpeed converts, sends from rank 0 and shards.
"""

from __future__ import annotations

import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from ranks import gloo_group

from voco.job.spec import STAGES
from voco.model import weights
from voco.model.batch import Batch, collate
from voco.model.voco_llama import VocoLlama
from voco.model.weight_reader import WeightReader
from voco.sequence.sequence import Layout, build_sample
from voco.train.teacher import load_teacher
from voco.train.weight_placement import make_parameters
from voco.train.worker_model import load_model, training_dtype
from voco.train.zero import deepspeed_config, gather_parameter

TURNS = [{"role": "user", "text": "what is it?"}, {"role": "assistant", "text": "a red kite"}]


def counted(read: list[int]) -> None:
    """Add up the elements that this process reads or maps of files."""
    read_into, mapped = WeightReader.read_into, WeightReader.mapped

    def counting_slice(self: WeightReader, values: torch.Tensor, name: str, start: int) -> None:
        read.append(values.numel())
        read_into(self, values, name, start)

    def counting_map(self: WeightReader, name: str) -> torch.Tensor:
        read.append(self.tensors[name].numel)
        return mapped(self, name)

    WeightReader.read_into, WeightReader.mapped = counting_slice, counting_map  # type: ignore[method-assign]


def outcome(model: Any, block: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Every weight, the trained ones in fp32 as the optimizer has them, the loss of a sample, and all weights after a step."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=settings)
    batch = one_sample(model).to("cpu", training_dtype(block))
    result: dict[str, Any] = {"first": complete(model, block.zero_stage)}
    result["fp32"] = {
        name: deepspeed.utils.safe_get_full_fp32_param(weight).clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    loss = engine(batch)
    engine.backward(loss)
    engine.step()
    return {**result, "loss": float(loss), "last": complete(model, block.zero_stage)}


def one_sample(model: VocoLlama) -> Batch:
    anyres = model.layout.anyres
    tiles = () if anyres is None else (anyres.tiles((32, 64)),)
    shape = (model.layout.vision_slots, model.feature_width)
    features = torch.randn(*tiles, *shape, generator=torch.Generator().manual_seed(5))
    sizes = None if anyres is None else [(32, 64)]
    sample = build_sample("s", [TURNS], ["f"], model.tokenizer, model.layout, sizes=sizes)  # type: ignore[arg-type, list-item]
    return collate([sample], lambda _: features, shape)


def teachers(folder: str, start: str, precision: str) -> list[dict[str, torch.Tensor]]:
    """States and head of a teacher that is complete, then of the same one sharded, twice; each is asked for a sample's states."""
    results = []
    layout = Layout(**weights.read_config(f"{folder}/{start}")["layout"])
    for stage in (1, 3):
        keys = {"global_batch": 4, "micro_batch": 2, "epochs": 1, "learning_rate": 0.01, "attention": "segments"}
        block: Any = STAGES["image_sft"].block.model_validate({**keys, "precision": precision, "zero_stage": stage})
        settings, dtype = deepspeed_config(block, dist.get_world_size()), training_dtype(block)
        model, states, head = load_teacher(f"{folder}/{start}", layout, block, dtype, torch.device("cpu"), settings)
        batch = one_sample(model).to("cpu", dtype)
        for _ in range(2):
            with torch.no_grad():
                if states is None:
                    answer, full = model.hidden(batch, rows=batch.predict_at), model.language_model.lm_head.weight
                else:
                    answer, full = states(batch), head
            results.append({"states": answer.clone(), "head": full.detach().clone()})
        left = sum(weight.numel() for weight in model.parameters())
        results[-1]["numbers"] = torch.tensor(left)  # of complete weights, between two passes
    return results


def complete(model: Any, stage: int) -> dict[str, torch.Tensor]:
    values = {}
    for name, weight in model.named_parameters():
        with gather_parameter(weight, stage):
            values[name] = weight.detach().clone()
    return values


def main(folder: str, cases: list[str]) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    read: list[int] = []
    counted(read)
    results: dict[str, Any] = {}
    for case in cases:
        kind, start, method, precision, stage = case.split(":")
        keys = {"global_batch": 4, "micro_batch": 2, "epochs": 1, "learning_rate": 0.01, "attention": "segments"}
        block: Any = STAGES[kind].block.model_validate({**keys, "precision": precision, "zero_stage": int(stage)})
        stored = weights.read_config(f"{folder}/{start}")["layout"]
        changes = {"method": method, "tokens": 0 if method == "none" else 2, "q_former_layers": 2 if "former" in method else 0}
        inputs = {"features": "given", "frame_cache": "", "kind": kind, "seed": 7}
        config = {**inputs, "model": f"{folder}/{start}", "layout": {**stored, **changes}}
        settings = deepspeed_config(block, world)
        before = load_model(config, block.model_copy(update={"precision": "fp32"}))
        results[case] = {"before": outcome(before, block, settings)}
        read.clear()
        model = load_model(config, block, "cpu", make_parameters(settings, torch.device("cpu")))
        results[case]["read"] = sum(read)
        results[case]["now"] = outcome(model, block, settings)
    for start, precision in (("fp32", "fp32"), ("fp32", "bf16"), ("tied", "fp32")):
        results[f"teacher:{start}:{precision}"] = teachers(folder, start, precision)
    torch.save(results, f"{folder}/rank{rank}.pt")


if __name__ == "__main__":
    with gloo_group():
        main(sys.argv[1], sys.argv[2:])
