"""Files of models that others saved: their configuration, and weights by name without reading the rest."""

from __future__ import annotations

import io
import json
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from safetensors.torch import load as load_bytes
from torch import Tensor

from voco.errors import Refused, one_line
from voco.store import storage


@contextmanager
def local_files(path: str) -> Iterator[str]:
    """A local directory: as it is, or of an `s3://` one or a hub name a copy. Raises Refused for what cannot be fetched."""
    if not path.startswith("s3://"):
        yield path if Path(path).is_dir() or path.startswith(("/", ".")) else _fetched(path)
        return
    with tempfile.TemporaryDirectory() as place:
        yield str(storage.get_directory(path.rstrip("/"), Path(place) / "model"))


def _fetched(name: str) -> str:
    """The hub's files of a model, kept in its own cache."""
    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors", "pytorch_model*.bin"])
    except (HFValidationError, OSError) as error:
        raise Refused(f"{name}: neither a directory nor a name that the hub gives: {one_line(error)}") from error


def read_json_file(folder: str, file: str) -> dict[str, Any] | None:
    """A JSON file of a directory; None where there is none."""
    found = Path(folder) / file
    return dict(json.loads(found.read_text())) if found.is_file() else None


def image_mean_std(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation that pixels are normalised with; None where no processor is saved."""
    stored = _processor(name)
    return None if stored is None else (tuple(stored["image_mean"]), tuple(stored["image_std"]))


def image_fit(name: str) -> str:
    """How images become square for a LLaVA that transformers saved: squeezed where its processor resizes to height and width.

    Else padded: LLaVA-1.5 was trained so, although its first processors in transformers crop.
    """
    stored = _processor(name) or {}
    squeezes = "height" in (stored.get("size") or {}) and not stored.get("do_pad") and not stored.get("do_center_crop")
    return "squeeze" if squeezes else "pad"


def _processor(name: str) -> dict[str, Any] | None:
    return read_json_file(name, "preprocessor_config.json") or (read_json_file(name, "processor_config.json") or {}).get(
        "image_processor"
    )


def read_tensors(folder: str, *prefixes: str) -> dict[str, Tensor]:
    """Tensors of a local directory whose names start with one of the prefixes, without it; files are mapped, not read whole.

    Pickled files are read as weights only: they run no code.
    """
    found: dict[str, Tensor] = {}
    names = sorted(Path(folder).iterdir())
    safe = [file for file in names if file.suffix == ".safetensors"]
    for file in safe:
        with safe_open(file, "pt") as held:
            for name, short in _starting(held.keys(), prefixes):
                found[short] = held.get_tensor(name)
    for file in [] if safe else [file for file in names if file.name.startswith("pytorch_model") and file.suffix == ".bin"]:
        whole = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        found |= {short: whole[name] for name, short in _starting(whole, prefixes)}
    return found


def read_tensor_file(uri: str) -> dict[str, Tensor]:
    """All tensors of one small file, `.safetensors` or pickled (weights only), at a local path or `s3://`.

    Raises Refused for a pickle that holds anything else: it could run code.
    """
    data = storage.read_bytes(storage.resolve(uri))
    if uri.endswith(".safetensors"):
        return dict(load_bytes(data))
    try:
        return dict(torch.load(io.BytesIO(data), "cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise Refused(f"{uri}: holds more than tensors") from error


def _starting(names: Any, prefixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name in names:
        for prefix in prefixes:
            if name.startswith(prefix):
                yield name, name.removeprefix(prefix)
                break
