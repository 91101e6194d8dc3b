"""What is specific to DeepSpeed: its configuration keys, and its sharded parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from voco.job.config import Training
from voco.train.sampler import micro_batches_of
from voco.train.zero_sizes import SUB_GROUP, bucket_elements, live_parameters, sums_in_fp32


def deepspeed_config(block: Training, workers: int, gpu: bool = False, width: int = 0) -> dict[str, Any]:
    """DeepSpeed's configuration for a training block on `workers` ranks with or without GPUs.

    `width` is the language model's, which the sizes of a GPU's buckets follow. docs/operations.md has a table of the settings.
    """
    beta2 = 0.999 if block.adam_beta2 is None else block.adam_beta2
    optimizer: dict[str, Any] = {
        "lr": block.learning_rate,
        "betas": [0.9, beta2],
        "weight_decay": block.weight_decay,
        # torch's own AdamW: each of DeepSpeed's is an extension that has to be compiled first, on GPUs with nvcc
        "torch_adam": True,
    }
    if gpu or block.offload != "none":
        # one kernel over a rank's flat shard, without the temporaries of its size that torch's other forms have; torch has it
        # for CPUs too, where offloaded states are updated. DeepSpeed passes the key on to torch.optim.AdamW
        optimizer["fused"] = True
    bf16: dict[str, Any] = {"enabled": block.precision == "bf16"}
    config: dict[str, Any] = {
        # step.py says which micro-batch is a step's last and divides by the global count of tokens, so DeepSpeed needs no
        # counts: these two only have to be positive
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": block.clip_grad_norm,
        "bf16": bf16,
        "zero_optimization": _zero_on_gpus(block, workers, width) if gpu else _zero_on_cpus(block),
        "optimizer": {"type": "AdamW", "params": optimizer},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }
    if block.offload != "none":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
    if block.offload == "parameters":
        config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": gpu}
    if gpu and block.precision == "bf16":
        # DeepSpeed's own search for overflow is one more pass over all gradients, an all-reduce and a wait for the device in each
        # step; `step.train_step` looks at the norm, which is computed anyway
        bf16["check_grad_overflow"] = False
        config["communication_data_type"] = "bf16"  # half the bytes of fp32; NCCL adds in fp32 and rounds once a hop
        if sums_in_fp32(block, 0 if block.micro_batch is None else micro_batches_of(block, workers)):
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _zero_on_cpus(block: Training) -> dict[str, Any]:
    return {
        "stage": block.zero_stage,
        # gather what a small model needs at once instead of parameter by parameter
        "stage3_param_persistence_threshold": 0,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": 50_000_000,
        "stage3_gather_16bit_weights_on_model_save": False,
    }


def _zero_on_gpus(block: Training, workers: int, width: int) -> dict[str, Any]:
    """Thresholds by model width as transformers' "auto" has them (its integrations/deepspeed.py)."""
    bucket, live = bucket_elements(width), live_parameters(block)
    return {
        "stage": block.zero_stage,
        "contiguous_gradients": True,
        # reduces one bucket while the backward pass fills another; with one rank there is nothing to send, and under ZeRO-1 and 2
        # the second buffer and a wait for the device after each backward pass would be for nothing
        "overlap_comm": workers > 1,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": 200_000_000,  # updated weights of ZeRO-1 and 2: 0.4 GB in bf16, instead of 1 GB
        "stage3_prefetch_bucket_size": bucket * 9 // 10,  # of the next layers while this one is computed
        "stage3_param_persistence_threshold": 10 * width,  # norms and biases stay whole: small messages only cost latency
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
        "sub_group_size": SUB_GROUP,
        "stage3_gather_16bit_weights_on_model_save": False,
    }


@contextmanager
def gather_parameter(parameter: torch.nn.Parameter, zero_stage: int) -> Iterator[None]:
    """Under ZeRO-3 a parameter is complete only in this block."""
    if zero_stage < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


@contextmanager
def gather_sharded(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Those of the parameters that ZeRO-3 has already sharded are complete in this block; every rank must enter it."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield
