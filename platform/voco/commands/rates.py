"""What machines are assumed to do, and cost: the figures behind the hours of `voco plan`. `--prices FILE` replaces any of them.

They are round figures for a first estimate, not measurements of your machines: docs/operations.md says where each comes from.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from voco.errors import Refused, one_line
from voco.job.config import Strict
from voco.job.resources import Resources
from voco.job.validation_errors import first_error
from voco.model.flops import PEAK_TFLOPS

Positive = Annotated[float, Field(gt=0)]


class Node(Strict):
    """One machine of the cluster."""

    gpus: int = Field(default=0, ge=0)
    cpus: int = Field(default=8, ge=1)
    per_hour: float = Field(ge=0)  # its price


class Rates(Strict):
    """Rates of one worker, and prices of nodes by accelerator (`cpu`: nodes without a GPU)."""

    mfu: float = Field(default=0.4, gt=0, le=1)  # of the peak, that the matrix products of a pass reach on average
    peak_tflops: dict[str, Positive] = Field(default={})  # dense, bf16; by Ray's accelerator type. Adds to PEAK_TFLOPS
    cpu_gflops: Positive = 20.0  # of one core, fp32, as reached
    storage_mb_s: Positive = 300.0  # read or written by one worker
    host_copy_gb_s: Positive = 10.0  # from a worker's GPU to page-locked memory, all GPUs of a node at a time
    images_s: Positive = 150.0  # JPEGs of about 640 x 480, decoded and resized by one core
    headers_s: Positive = 1500.0  # images read, hashed and checked by their header, by one core
    frames_s: Positive = 60.0  # video frames, decoded and resized by one core
    decode_tokens_s: Positive = 2000.0  # new tokens of a batch of answers, by one worker
    currency: str = "USD"
    nodes: dict[str, Node] = Field(default={})

    def flops(self, resources: Resources, bf16: bool = True) -> float:
        """Operations a second of one worker; 0.0 for a GPU whose peak is unknown."""
        if not resources.gpus_per_worker:
            return self.cpu_gflops * 1e9 * resources.cpus_per_worker
        if resources.peak_tflops is not None:
            return resources.peak_tflops * 1e12 * self.mfu
        peak = ({**PEAK_TFLOPS, **self.peak_tflops}).get(resources.accelerator or "", 0.0)
        return peak * 1e12 * self.mfu * resources.gpus_per_worker * (1.0 if bf16 else 0.5)

    def price(self, resources: Resources, hours: float) -> float | None:
        """Whole nodes x hours x price, for the workers of a stage; None where the file has no price for such a node."""
        node = self.nodes.get(resources.accelerator or "" if resources.gpus_per_worker else "cpu")
        if node is None:
            return None
        gpus = resources.most_workers * resources.gpus_per_worker
        number = gpus / node.gpus if gpus and node.gpus else resources.most_workers * resources.cpus_per_worker / node.cpus
        return math.ceil(number) * hours * node.per_hour


def read_rates(path: str | None) -> Rates:
    """The rates of a `--prices` file, YAML; the defaults for None. Raises Refused for a file that is not one."""
    if path is None:
        return Rates()
    try:
        return Rates.model_validate(yaml.safe_load(Path(path).read_text()) or {})
    except ValidationError as error:
        raise Refused(f"{path}: {first_error(error, Rates)}") from None
    except OSError as error:
        raise Refused(f"--prices: {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise Refused(f"{path}: expected a YAML file: {one_line(error)}") from None
