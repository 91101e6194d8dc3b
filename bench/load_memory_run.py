"""The processes of bench/load_memory.py, under this build or the earlier one: `source`, `driver` and `rank`.

Memory is what the kernel counts for the process (proc(5), smaps_rollup), growth since the libraries were imported:

- `pss`: resident memory, in which a page that several processes map counts by its share. Pages of a mapped file are in it while
  they are mapped, though the kernel can drop them.
- `own`: anonymous memory, which belongs to the process alone and cannot be dropped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

VOCABULARY, WIDTH, MLP, HEADS = 32_000, 1_024, 2_816, 16  # with 18 layers 297 million weights
SAMPLED_S = 0.004


def memory() -> dict[str, int]:
    fields = {"Pss": "pss", "Anonymous": "own"}
    sizes = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in fields:
            sizes[fields[name]] = 1024 * int(rest.split()[0])
    return sizes


class Peak:
    """The largest growth of this process's memory while the block runs, in bytes, sampled every 4 ms."""

    def __enter__(self) -> Peak:
        self.before, self.most = memory(), {"pss": 0, "own": 0}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._ends.is_set():
            self.take()
            time.sleep(SAMPLED_S)

    def take(self) -> dict[str, int]:
        """The peak until now."""
        grown = self.growth()
        self.most = {name: max(size, grown[name]) for name, size in self.most.items()}
        return dict(self.most)

    def growth(self) -> dict[str, int]:
        return {name: size - self.before[name] for name, size in memory().items()}

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        self.take()


def earlier() -> bool:
    """Whether the imported source is that of the earlier build."""
    with suppress(ImportError):
        import voco.model.build  # noqa: F401

        return False
    return True


def write_source(folder: str, layers: str) -> dict[str, Any]:
    """A random language model as transformers saves it, in fp32, and a tokenizer."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=int(layers), num_attention_heads=HEADS
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    plain.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<pad>")])
    PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    return {"parameters": sum(weight.numel() for weight in model.parameters())}


def run_driver(folder: str, output: str) -> dict[str, Any]:
    """What the driver of `align` does with a pretrained language model: read it, add tokens, write the model to start from."""
    tower = {"name": "efficientnet_lite0", "image_size": 64}
    if earlier():
        from voco.blocks import Model, Text

        from voco.model import new, weights

        create, save = new.create, weights.save
    else:
        from voco.job.config import Model, Text
        from voco.model import build, weights

        create, save = build.create_model, weights.save_checkpoint
    block = Model.model_validate({"pretrained": folder, "tower": tower})
    with Peak() as peak:
        model = create(block, "none", 0, Text(template="plain"), [], 0)
        save(model, weights.own_state(model), Path(output) / "model")
    return {"own": peak.most["own"], "pss": peak.most["pss"], "bytes": os.path.getsize(f"{output}/model/model.safetensors")}


def run_rank(start: str, output: str, precision: str) -> dict[str, Any]:
    """One worker under ZeRO-3: load, DeepSpeed's engine, a teacher of the same size, and the weights at the end."""
    import deepspeed
    import torch
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    keys = {"epochs": 1, "global_batch": 4, "micro_batch": 1, "learning_rate": 1e-3, "zero_stage": 3, "attention": "segments"}
    from voco.model import weights
    from voco.train import checkpoints
    from voco.train.zero import deepspeed_config

    if earlier():
        from voco.blocks import ImageSft
        from voco.tokens import Layout

        from voco.train.worker_loop import _teacher
    else:
        from voco.job.config import ImageSft
        from voco.sequence.sequence import Layout
        from voco.train.teacher import load_teacher
        from voco.train.weight_placement import make_parameters
        from voco.train.worker_model import load_model
    block = ImageSft.model_validate({**keys, "precision": precision})
    layout = weights.read_config(start)["layout"]
    config = {
        "kind": "image_sft", "model": start, "layout": layout, "seed": 0, "features": "given", "frame_cache": "",
        "teacher": {"uri": start, "layout": layout}, "output": output,
    }  # fmt: skip
    settings = deepspeed_config(block, world)
    dist.barrier()
    with Peak() as peak:
        if earlier():
            model = weights.load(start, Layout(**layout), torch.float32, block.attention, new_q_former=0)
            model.tower = None
        else:
            model = load_model(config, block, "cpu", make_parameters(settings, torch.device("cpu")))
        loaded = peak.take()
        engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=settings)
        ready = peak.growth()
    dist.barrier()
    with Peak() as teaching:
        if earlier():
            teacher: Any = _teacher(config, block, engine)
        else:
            teacher = load_teacher(start, Layout(**layout), block, model.dtype, engine.device, settings)
        dist.barrier()
        taught = teaching.growth()
    del teacher
    dist.barrier()
    with Peak() as ending:
        (checkpoints.export if earlier() else checkpoints.export_weights)(config, model, 3, [], rank)
    result = {"load": loaded, "start": peak.most, "ready": ready, "teacher": teaching.most, "taught": taught}
    results = [None] * world
    dist.all_gather_object(results, {**result, "end": ending.most})
    dist.barrier()
    dist.destroy_process_group()
    return {"ranks": results} if rank == 0 else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=["source", "driver", "rank"])
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    role: Any = {"source": write_source, "driver": run_driver, "rank": run_rank}[options.role]
    print(json.dumps(role(*options.arguments)))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
