"""Ray Train's trainer without the helper processes that a training here has no use for."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from voco.run.units import is_one_node


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray 2.60 starts a process for the datasets of each training, also of one without any: seconds of a small training.

    Training reads its tables itself, in an order that can be resumed. On one machine the cleaner of placement groups is left out
    as well: what a dead controller leaves reserved is free again when its job ends, and nobody else waits for it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused: tuple[type, ...] = (DatasetsCallback,)
        if is_one_node():
            unused += (PlacementGroupCleanerCallback,)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]
