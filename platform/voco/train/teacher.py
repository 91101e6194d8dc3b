"""The frozen teacher of distillation on a training worker: a complete copy, or sharded under ZeRO-3 as the student is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from voco.job.config import Training
from voco.model.batch import Batch
from voco.model.checkpoint_layout import WEIGHTS_FILE
from voco.model.voco_llama import VocoLlama
from voco.model.weight_reader import WeightReader
from voco.model.weights import EMBEDDING, HEAD, load_checkpoint, parameter_on
from voco.sequence.sequence import Layout
from voco.train.weight_placement import make_parameters, node_copy


def load_teacher(
    uri: str, layout: Layout, block: Training, dtype: torch.dtype, device: torch.device, settings: dict[str, Any]
) -> tuple[VocoLlama, Callable[[Batch], Tensor] | None, Tensor | None]:
    """The teacher in training's number type, and `states` and `head` of `Distillation`, for a sharded one. On every rank.

    `settings` are DeepSpeed's for the student. Without ZeRO-3 every rank has a complete copy; on CPUs those of a node are the
    pages of one file, if it is stored in that type.

    Under ZeRO-3 each rank has its slice of every weight, and a layer is complete while it runs. The output head alone is
    complete on every rank, because the loss multiplies it by chunks of states outside of the teacher.
    """
    shards = settings["zero_optimization"]["stage"] == 3
    with node_copy(uri) as folder:
        model = load_checkpoint(
            uri, layout, dtype, block.attention, device, with_tower=False, folder=folder,
            make_parameter=make_parameters(settings, device) if shards else None,
        ).requires_grad_(False)  # fmt: skip
        if not shards:
            return model, None, None
        reader = WeightReader(str(folder / WEIGHTS_FILE))
        name = f"{HEAD}weight" if f"{HEAD}weight" in reader.tensors else EMBEDDING
        head = parameter_on(device)(reader, name, dtype).detach()
    model.language_model.lm_head = nn.Identity()
    return model, _gathering(model, settings), head


class _PredictedStates(nn.Module):
    """A teacher's states for its predictions as a forward pass, which DeepSpeed's hooks gather weights for."""

    def __init__(self, model: VocoLlama) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return self.model.hidden(batch, views_apart=False, rows=batch.predict_at)


def _gathering(model: VocoLlama, settings: dict[str, Any]) -> Any:
    """The model under an engine of DeepSpeed without an optimizer, as its ZeRO-3 inference has it."""
    import deepspeed

    zero = {key: value for key, value in settings["zero_optimization"].items() if key != "offload_optimizer"}
    frozen = {key: value for key, value in settings.items() if key != "optimizer"} | {"zero_optimization": zero}
    engine, *_ = deepspeed.initialize(model=_PredictedStates(model), config=frozen)
    engine.eval()
    return engine
