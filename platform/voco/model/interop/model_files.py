"""Files of models that other projects saved: their configuration, and weights by name without reading the rest."""

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

PREPROCESSOR = "preprocessor_config.json"  # transformers' file of an image processor


@contextmanager
def local_files(path: str) -> Iterator[str]:
    """A local directory itself, or a local copy of an `s3://` directory or a hub model. Raises Refused if there is none."""
    if not path.startswith("s3://"):
        yield path if Path(path).is_dir() or path.startswith(("/", ".")) else _download(path)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield str(storage.get_directory(path.rstrip("/"), Path(temporary) / "model"))


def _download(name: str) -> str:
    """The hub's files of a model, in the hub's own cache."""
    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors", "pytorch_model*.bin"])
    except (HFValidationError, OSError) as error:
        raise Refused(f"{name}: neither a directory nor a name on the hub: {one_line(error)}") from error


def read_json_file(folder: str, file: str) -> dict[str, Any] | None:
    """A JSON file of a directory; None where there is none."""
    path = Path(folder) / file
    return dict(json.loads(path.read_text())) if path.is_file() else None


def image_mean_std(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation for normalising pixels; None where no processor is saved."""
    processor = _processor(name)
    return None if processor is None else (tuple(processor["image_mean"]), tuple(processor["image_std"]))


def image_fit(name: str) -> str:
    """How images become square for a LLaVA that transformers saved: squeezed if its processor resizes to height and width.

    Else padded: LLaVA-1.5 was trained so, although its first processors in transformers crop.
    """
    processor = _processor(name) or {}
    resizes = "height" in (processor.get("size") or {})
    squeezes = resizes and not processor.get("do_pad") and not processor.get("do_center_crop")
    return "squeeze" if squeezes else "pad"


def _processor(name: str) -> dict[str, Any] | None:
    return read_json_file(name, PREPROCESSOR) or (read_json_file(name, "processor_config.json") or {}).get("image_processor")


def read_tensors(folder: str, *prefixes: str) -> dict[str, Tensor]:
    """Tensors of a local directory whose names start with one of the prefixes, by the rest of their name; files are mapped.

    Pickled files are read as weights only: they run no code.
    """
    tensors: dict[str, Tensor] = {}
    files = sorted(Path(folder).iterdir())
    safe = [file for file in files if file.suffix == ".safetensors"]
    pickled = [file for file in files if file.name.startswith("pytorch_model") and file.suffix == ".bin"]
    for file in safe:
        with safe_open(file, "pt") as opened:
            for name, short in _strip_prefix(opened.keys(), prefixes):
                tensors[short] = opened.get_tensor(name)
    for file in [] if safe else pickled:
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        tensors |= {short: weights[name] for name, short in _strip_prefix(weights, prefixes)}
    return tensors


def read_tensor_file(uri: str) -> dict[str, Tensor]:
    """All tensors of one small file, `.safetensors` or pickled (weights only), at a local path or `s3://`.

    Raises Refused for a pickle with anything else in it: it could run code.
    """
    data = storage.read_bytes(storage.resolve(uri))
    if uri.endswith(".safetensors"):
        return dict(load_bytes(data))
    try:
        return dict(torch.load(io.BytesIO(data), "cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise Refused(f"{uri}: holds more than tensors") from error


def _strip_prefix(names: Any, prefixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Names that start with a prefix, and the rest of each."""
    for name in names:
        for prefix in prefixes:
            if name.startswith(prefix):
                yield name, name.removeprefix(prefix)
                break
