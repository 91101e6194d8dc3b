"""What is specific to DeepSpeed: its configuration keys, and its sharded parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from voco.job.config import Training


def deepspeed_config(block: Training, workers: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a training block on `workers` ranks."""
    beta2 = 0.999 if block.adam_beta2 is None else block.adam_beta2
    return {
        "train_batch_size": block.global_batch,
        "train_micro_batch_size_per_gpu": block.micro_batch,
        "gradient_accumulation_steps": block.global_batch // (workers * block.micro_batch),
        "gradient_clipping": block.clip_grad_norm,
        "bf16": {"enabled": block.precision == "bf16"},
        "zero_optimization": {
            "stage": block.zero_stage,
            # gather what a small model needs at once instead of parameter by parameter
            "stage3_param_persistence_threshold": 0,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        },
        "optimizer": {
            "type": "AdamW",
            # torch's own AdamW: DeepSpeed's CPU version is a C++ extension that has to be compiled first
            "params": {
                "lr": block.learning_rate,
                "betas": [0.9, beta2],
                "weight_decay": block.weight_decay,
                "torch_adam": True,
            },
        },
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
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
