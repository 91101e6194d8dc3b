"""DeepSpeed's settings: the optimizer that a block asks for, what a GPU changes, and what DeepSpeed reads from them."""

from __future__ import annotations

from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from voco.job.config import Training
from voco.train.zero import deepspeed_config

BUCKET = 1 << 24


def training(**changes: Any) -> Training:
    values = {"epochs": 1, "global_batch": 8, "micro_batch": 2, "learning_rate": 0.1, "weight_decay": 0.2}
    return Training.model_validate(values | changes)


@pytest.mark.parametrize(("beta2", "betas"), [(None, [0.9, 0.999]), (0.95, [0.9, 0.95]), (0.0, [0.9, 0.0])])
def test_beta2_reaches_the_optimizer(beta2: float | None, betas: list[float]) -> None:
    parameters = deepspeed_config(training(adam_beta2=beta2), workers=2)["optimizer"]["params"]
    assert (parameters["lr"], parameters["betas"], parameters["weight_decay"]) == (0.1, betas, 0.2)


def test_settings_of_cpus() -> None:
    assert deepspeed_config(training(zero_stage=3, precision="fp32"), workers=2, width=64) == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        },
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 0.1, "betas": [0.9, 0.999], "weight_decay": 0.2, "torch_adam": True},
        },
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


def test_settings_of_gpus_at_7b() -> None:
    config = deepspeed_config(training(zero_stage=3), workers=2, gpu=True, width=4096)
    assert config["zero_optimization"] == {
        "stage": 3,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_bucket_size": 4096 * 4096,
        "allgather_bucket_size": 200_000_000,
        "stage3_prefetch_bucket_size": 15_099_494,
        "stage3_param_persistence_threshold": 40_960,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "sub_group_size": 100_000_000,
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    assert config["optimizer"]["params"]["fused"]
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert config["communication_data_type"] == "bf16"
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(("width", "bucket"), [(896, BUCKET), (4096, BUCKET), (5120, 5120 * 5120)])
def test_buckets_follow_the_width_but_are_never_small(width: int, bucket: int) -> None:
    zero = deepspeed_config(training(), workers=8, gpu=True, width=width)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_param_persistence_threshold"]) == (bucket, 10 * width)


def test_one_gpu_has_nothing_to_overlap_with() -> None:
    assert not deepspeed_config(training(), workers=1, gpu=True, width=64)["zero_optimization"]["overlap_comm"]


@pytest.mark.parametrize(
    ("changes", "workers", "in_fp32"),
    [
        ({"zero_stage": 2}, 2, True),
        ({"zero_stage": 3}, 2, True),
        ({"zero_stage": 2}, 4, False),  # one micro-batch a step: nothing is added up
        ({"zero_stage": 1}, 2, False),  # 4 bytes of every parameter on every rank
        ({"zero_stage": 2, "offload": "optimizer"}, 2, False),  # the sums would be on the GPU
        ({"zero_stage": 3, "offload": "parameters"}, 2, True),
        ({"zero_stage": 3, "precision": "fp32"}, 2, False),
        ({"zero_stage": 3, "micro_batch": None, "micro_tokens": 4096}, 4, True),
    ],
)
def test_gradients_of_several_micro_batches_are_added_in_fp32(changes: dict[str, Any], workers: int, in_fp32: bool) -> None:
    config = deepspeed_config(training(**changes), workers, gpu=True, width=64)
    assert (config.get("data_types") == {"grad_accum_dtype": "fp32"}) == in_fp32
    assert ("communication_data_type" in config) == (changes.get("precision") != "fp32")


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", ["none", "optimizer", "parameters"])
def test_deepspeed_reads_every_setting(stage: int, offload: str) -> None:
    if offload == "parameters" and stage < 3:
        return
    read = DeepSpeedConfig(deepspeed_config(training(zero_stage=stage, offload=offload), workers=2, gpu=True, width=4096))
    zero = read.zero_config
    assert (zero.stage, zero.overlap_comm, zero.reduce_bucket_size, zero.sub_group_size) == (stage, True, BUCKET, 100_000_000)
    assert (zero.prefetch_bucket_size, zero.param_persistence_threshold) == (15_099_494, 40_960)
    live = 200_000_000 if offload == "parameters" else 1_000_000_000
    assert (zero.max_live_parameters, zero.max_reuse_distance) == (live, live)
    assert not zero.model_extra, "a key that DeepSpeed does not know"
    assert (zero.offload_optimizer is not None, zero.offload_param is not None) == (offload != "none", offload == "parameters")
    assert str(read.communication_data_type) == "torch.bfloat16"
    assert not read.bfloat16_config.check_grad_overflow
    assert read.optimizer_params["fused"]


def test_offloaded_states_are_updated_by_the_fused_kernel_on_cpus_too() -> None:
    parameters = deepspeed_config(training(offload="optimizer"), workers=2)["optimizer"]["params"]
    assert parameters["fused"]
    assert "fused" not in deepspeed_config(training(), workers=2)["optimizer"]["params"]
