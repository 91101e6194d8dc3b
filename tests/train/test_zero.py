"""The optimizer that a training block asks DeepSpeed for."""

from __future__ import annotations

import pytest

from voco.job.config import Training
from voco.train.zero import deepspeed_config


@pytest.mark.parametrize(("beta2", "betas"), [(None, [0.9, 0.999]), (0.95, [0.9, 0.95]), (0.0, [0.9, 0.0])])
def test_beta2_reaches_the_optimizer(beta2: float | None, betas: list[float]) -> None:
    block = Training(epochs=1, global_batch=8, micro_batch=2, learning_rate=0.1, weight_decay=0.2, adam_beta2=beta2)
    parameters = deepspeed_config(block, workers=2)["optimizer"]["params"]
    assert (parameters["lr"], parameters["betas"], parameters["weight_decay"]) == (0.1, betas, 0.2)
