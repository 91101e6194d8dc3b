"""Ray Train's trainer without what only Ray datasets need: training reads its tables itself, in an order that can be resumed."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray 2.60 starts a process for the datasets of each training, also of one without any: seconds of a small training."""

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, DatasetsCallback)]
