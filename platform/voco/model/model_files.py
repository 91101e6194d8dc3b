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
from safetensors import safe_open
from safetensors.torch import load as load_bytes
from torch import Tensor
from transformers.utils import cached_file

from voco import storage
from voco.errors import Refused


@contextmanager
def files_at(path: str) -> Iterator[str]:
    """A name that transformers can load from: a local directory as it is, a copy of an `s3://` one, or a hub name."""
    if not path.startswith("s3://"):
        yield path
        return
    with tempfile.TemporaryDirectory() as place:
        yield str(storage.get_directory(path.rstrip("/"), Path(place) / "model"))


def facts(name: str, file: str) -> dict[str, Any] | None:
    """A JSON file of a directory or hub name; None where there is none."""
    found = Path(name) / file
    if not Path(name).is_dir() and not name.startswith(("/", ".")):
        told = cached_file(name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
        found = found if told is None else Path(told)
    return dict(json.loads(found.read_text())) if found.is_file() else None


def colours(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation that pixels are normalised with; None where no processor is saved."""
    stored = facts(name, "preprocessor_config.json") or (facts(name, "processor_config.json") or {}).get("image_processor")
    return None if stored is None else (tuple(stored["image_mean"]), tuple(stored["image_std"]))


def tensors(folder: str, *prefixes: str) -> dict[str, Tensor]:
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


def tensor_file(uri: str) -> dict[str, Tensor]:
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
