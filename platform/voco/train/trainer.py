"""Ray Train's trainer with the decisions of elastic.py, and without the helper processes that a training here has no use for."""

from __future__ import annotations

from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from voco.train.elastic import CleanerCallback, ResizePolicy, RestartPolicy


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray 2.60 starts a process for the datasets of each training, also of one without any: seconds of a small training.

    Training reads its tables itself, in an order that can be resumed. The cleaner of placement groups runs for trials only: Ray
    removes a group whose controller and job are both dead, and the job of a trial is the sweep, which may last for days.
    """

    def __init__(self, *arguments: Any, folder: str, **options: Any) -> None:
        """`folder` holds the run's checkpoints."""
        super().__init__(*arguments, **options)
        self._folder = folder

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        callbacks = [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]
        in_trial = ray.get_runtime_context().get_actor_id() is not None
        return [*callbacks, *([CleanerCallback()] if in_trial else [])]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["failure_policy"] = RestartPolicy(self.run_config.failure_config, self._folder)
        if self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = ResizePolicy(self.scaling_config)
        return super()._initialize_and_run_controller(**arguments)
