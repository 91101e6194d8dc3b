"""Files of models that other projects saved: their configuration, and weights by name without reading the rest."""

from __future__ import annotations

import io
import json
import pickle
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from torch import Tensor

from voco.errors import Refused, one_line
from voco.model.interop.weight_files import POINTER, weight_files
from voco.store import storage

DOWNLOADED = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors", "pytorch_model*.bin"]


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
        return snapshot_download(name, allow_patterns=DOWNLOADED)
    except (HFValidationError, OSError) as error:
        raise Refused(f"{name}: neither a directory nor a name on the hub: {one_line(error)}") from error


def read_json_file(folder: str, file: str) -> dict[str, Any] | None:
    """A JSON file of a directory; None where there is none. Raises Refused where it is not JSON, such as a git-lfs pointer."""
    path = Path(folder) / file
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        pointer = path.read_bytes().startswith(POINTER)
        what = "a git-lfs pointer; run `git lfs pull` there" if pointer else f"no JSON: {one_line(error)}"
        raise Refused(f"{path}: is {what}") from error


def read_tensors(folder: str, *prefixes: str) -> dict[str, Tensor]:
    """Tensors of a local directory whose names start with one of the prefixes, by the rest of their name; files are mapped.

    Only the files that transformers would read count (`weight_files`). Pickled files are read as weights only: they run no
    code. Raises Refused for files that are not complete.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder, folder):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                for name, short in _strip_prefix(opened.keys(), prefixes):
                    tensors[short] = opened.get_tensor(name)
        else:
            weights = _unpickled(file, folder)
            tensors |= {short: weights[name] for name, short in _strip_prefix(weights, prefixes)}
    return tensors


def _unpickled(file: Path, source: str) -> dict[str, Tensor]:
    """The tensors of one of torch's files; those of the old kind, no zip, cannot be mapped."""
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)))
    except pickle.UnpicklingError as error:
        raise Refused(f"{source}: {file.name} holds more than tensors") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise Refused(f"{source}: {file.name} cannot be read: {one_line(error)}; download it again") from error


def read_tensor_file(uri: str) -> dict[str, Tensor]:
    """All tensors of one small file, `.safetensors` or pickled (weights only), at a local path or `s3://`.

    Raises Refused for a pickle with anything else in it: it could run code.
    """
    data = storage.read_bytes(storage.resolve(uri))
    if data.startswith(POINTER):
        raise Refused(f"{uri}: is a git-lfs pointer and not the file; run `git lfs pull` there")
    try:
        return dict(load_bytes(data) if uri.endswith(".safetensors") else torch.load(io.BytesIO(data), "cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise Refused(f"{uri}: holds more than tensors") from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise Refused(f"{uri}: is cut or damaged: {one_line(error)}; copy it again") from error


def _strip_prefix(names: Any, prefixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Names that start with a prefix, and the rest of each."""
    for name in names:
        for prefix in prefixes:
            if name.startswith(prefix):
                yield name, name.removeprefix(prefix)
                break
