"""How large ZeRO's buffers on a GPU are: arithmetic for DeepSpeed's configuration (zero.py) and for the memory of `voco plan`."""

from __future__ import annotations

from voco.job.config import Training

LEAST_BUCKET = 1 << 24  # 32 MiB in bf16: links between GPUs are near their full rate from messages of about this size on
LIVE_PARAMETERS = 1_000_000_000  # gathered at a time under ZeRO-3: 2 GB in bf16
LIVE_OFFLOADED = 200_000_000  # the same where weights lie in host memory to save a GPU's: 0.4 GB, above a large embedding table
SUB_GROUP = 100_000_000  # parameters of one update under ZeRO-3, whose gradients become fp32 only then: 0.4 GB


def bucket_elements(width: int) -> int:
    """Gradients that are reduced in one message, by the model's width: its square, as transformers' "auto" (its
    integrations/deepspeed.py), but at least `LEAST_BUCKET`, because squares of small widths are small messages.
    """
    return max(width * width, LEAST_BUCKET)


def live_parameters(block: Training) -> int:
    """Parameters that ZeRO-3 keeps gathered at most, beside those of the running module."""
    return LIVE_OFFLOADED if block.offload == "parameters" else LIVE_PARAMETERS


def sums_in_fp32(block: Training, micro_batches: int) -> bool:
    """Whether a GPU adds up the gradients of a step's micro-batches in fp32: 2 bytes a parameter more, over the ranks.

    A sum in bf16 loses what is under 1/256 of it. Not under ZeRO-1, where each rank would hold 4 bytes of every parameter, nor
    under ZeRO-2 with `offload`, where the sums would stay on the GPU.
    """
    several = block.micro_tokens is not None or micro_batches > 1
    split = block.zero_stage == 3 or (block.zero_stage == 2 and block.offload == "none")
    return several and split and block.precision == "bf16"
