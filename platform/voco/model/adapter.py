"""LoRA and DoRA by peft: small trained factors beside the language model's frozen linear layers, and their merge into them.

LoRA, arXiv 2106.09685: a layer's weight W (O, I) becomes W + alpha / rank x BA, with A (rank, I) and B (O, rank), B zero at the
start. DoRA, arXiv 2402.09353: each row of that sum is scaled to a trained length, W's own at the start.

peft renames the base weights (`q_proj.weight` to `q_proj.base_layer.weight`); outside of training their names stay as they are.
The row of <voco>, which a base model has never trained, learns beside the adapter where images are read; no cache contains it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from voco.job.config import Lora

LANGUAGE_MODEL, EMBEDDING = "language_model.", "language_model.model.embed_tokens.weight"
VOCO_ROW = "voco_embedding"  # the parameter of VocoLlama that takes the place of <voco>'s row
NAME = "default"  # peft's name of an adapter, part of its parameters' names
FACTOR_A, FACTOR_B, MAGNITUDE = (f"{part}.{NAME}.weight" for part in ("lora_A", "lora_B", "lora_magnitude_vector"))
# peft's names in its files, without the adapter's own; a file's row of <voco> replaces that of the embedding
PEFT_PREFIX, PEFT_ROW = "base_model.model.", "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
PEFT_WEIGHTS = "adapter_model.safetensors"

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]


def base_name(name: str) -> str | None:
    """The name that a weight has without an adapter; None for a weight of the adapter."""
    return None if is_adapter(name) else name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Whether a parameter of a model belongs to its adapter: factors, magnitudes and the row of <voco>."""
    return name == VOCO_ROW or f".{FACTOR_A}" in name or f".{FACTOR_B}" in name or f".{MAGNITUDE}" in name


def attach(model: Any, lora: Lora, seed: int, learns_voco: bool, gather: Gather = lambda _weights: nullcontext()) -> None:
    """Freeze a VocoLlama's language model and put trained factors beside its `lora.targets`; the model computes as before.

    `learns_voco`: the job embeds <voco> tokens, so their row is trained too. The factors are a function of `seed` alone.
    `gather` makes weights that are sharded complete in its block. Its base weights may have any number type.
    """
    from peft import inject_adapter_in_model

    language_model = model.language_model
    language_model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in language_model.model.layers:  # one at a time: DoRA measures the rows of complete weights
            targets = [module for name, module in layer.named_modules() if name.rsplit(".", 1)[-1] in lora.layers]
            with gather([module.weight for module in targets] if lora.dora else []):
                inject_adapter_in_model(peft_config(lora), layer, NAME)
    for name, weight in language_model.named_parameters():
        weight.requires_grad_(is_adapter(f"{LANGUAGE_MODEL}{name}"))
    if learns_voco:
        table = language_model.model.embed_tokens.weight
        with gather([table]):
            model.voco_embedding = nn.Parameter(table[model.layout.voco_id].detach().clone())
    model.lora = lora


def peft_config(lora: Lora, voco_id: int | None = None, base: str | None = None) -> Any:
    """peft's configuration. `voco_id`: a row of the embedding that is trained too; `base`: the model that it belongs to."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.full_alpha,
        target_modules=list(lora.layers),
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        trainable_token_indices=None if voco_id is None else {"embed_tokens": [voco_id]},
    )


def merged_names(trained: Mapping[str, Tensor]) -> set[str]:
    """The base weights that `merged` changes, by the names of the adapter's weights."""
    names = {name.replace(f".{FACTOR_A}", ".weight") for name in trained if name.endswith(f".{FACTOR_A}")}
    return names | ({EMBEDDING} if VOCO_ROW in trained else set())


def merged(name: str, weight: Tensor, trained: Mapping[str, Tensor], lora: Lora, voco_id: int) -> Tensor:
    """A base weight, by its name without an adapter, with what the adapter's `trained` weights add; in its own number type.

    The sum is computed in fp32, or fp64. A weight that no adapter changes is returned as it is.
    """
    if name == EMBEDDING and VOCO_ROW in trained:
        table = weight.detach().clone()
        table[voco_id] = trained[VOCO_ROW].to(table)
        return table
    prefix = name.removesuffix("weight")
    if f"{prefix}{FACTOR_A}" not in trained:
        return weight
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    a, b = (trained[f"{prefix}{factor}"].to(weight.device, exact) for factor in (FACTOR_A, FACTOR_B))
    total = weight.detach().to(exact) + lora.full_alpha / lora.rank * (b @ a)
    if lora.dora:
        magnitude = trained[f"{prefix}{MAGNITUDE}"].to(weight.device, exact)
        total *= (magnitude / torch.linalg.norm(total, dim=1))[:, None]
    return total.to(weight.dtype)


def save_adapter(trained: Mapping[str, Tensor], lora: Lora, voco_id: int, base: str, folder: Path) -> None:
    """The adapter in peft's own format, which `peft.PeftModel.from_pretrained` reads on the base's language model.

    peft 0.21, `utils/save_and_load.py`: `adapter_config.json`, and weights named without the adapter's name.
    """
    config = peft_config(lora, voco_id if VOCO_ROW in trained else None, base)
    config.inference_mode = True  # as peft saves it
    config.save_pretrained(str(folder))
    tensors = {peft_name(name): tensor.detach().cpu().contiguous() for name, tensor in trained.items() if is_adapter(name)}
    if VOCO_ROW in trained:
        tensors[PEFT_ROW] = tensors[PEFT_ROW][None]  # a table of the trained rows
    save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})


def peft_name(name: str) -> str:
    """The name of an adapter's weight in peft's files, for a parameter of a VocoLlama; a magnitude has no `.weight` there."""
    if name == VOCO_ROW:
        return PEFT_ROW
    inner = name.removeprefix(LANGUAGE_MODEL).replace(f".{NAME}.weight", ".weight")
    return PEFT_PREFIX + (inner.removesuffix(".weight") if ".lora_magnitude_vector" in inner else inner)
