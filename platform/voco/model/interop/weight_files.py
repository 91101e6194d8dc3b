"""Which files of a directory hold a model's weights, as transformers chooses them, and whether each of them is complete.

A directory may hold more: an older conversion, a copy in another number type, another project's own file. Only the files that
`model.safetensors`, `pytorch_model.bin` or an index names are the model.
Format of safetensors: eight bytes for the length of a JSON header, the header, and the tensors, whose last end is the file's.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from voco.errors import Refused

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
CHOICES = (SAFE, SAFE + INDEX, PICKLED, PICKLED + INDEX)  # transformers takes the first that is there
ADAPTER = "adapter_config.json"  # of PEFT, beside the weights of a LoRA
POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_BYTES = 1024  # a pointer is never as long
READ_AS_TEXT = {".json", ".model", ".txt", ".jinja"}  # configurations, tokenizers, chat templates


def weight_files(folder: str, source: str) -> list[Path]:
    """The files with the weights of a directory, each complete. `source` says in messages where the user named it.

    Raises Refused for an adapter without its model, for a directory without weights, and for a shard that is missing, cut or
    a git-lfs pointer.
    """
    directory = Path(folder)
    check_no_adapter(folder, source)
    config = directory / "config.json"
    named = _json(config, source).get("transformers_weights") if config.is_file() else None  # comes before all others
    chosen = named or next((name for name in CHOICES if (directory / name).is_file()), None)
    if chosen is None:
        other = sorted(path.name for path in directory.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))
        raise Refused(f"{source}: holds no weights: expected one of {', '.join(CHOICES)}, got {', '.join(other) or 'none'}")
    names = _shards(directory / chosen, source) if chosen.endswith(INDEX) else [chosen]
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise Refused(f"{source}: {chosen} names {name}, which is not inside the directory")
    files = [directory / name for name in names]
    for file in files:
        if not file.is_file():
            raise Refused(f"{source}: lacks {file.name}, which {chosen} names; download that file too")
        check_complete(file, source)
    return files


def check_no_adapter(folder: str, source: str) -> None:
    """Raises Refused for a LoRA: transformers would read it with another model, or not at all."""
    if (Path(folder) / ADAPTER).is_file():
        base = _json(Path(folder) / ADAPTER, source).get("base_model_name_or_path", "its base model")
        raise Refused(
            f"{source}: holds a LoRA ({ADAPTER}) and not a complete model; merge it into {base} and save the result "
            "(PEFT: merge_and_unload; LLaVA: scripts/merge_lora_weights.py)"
        )


def check_no_pointers(folder: str, source: str) -> None:
    """Raises Refused for a configuration or a tokenizer's file that git-lfs has not fetched."""
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in READ_AS_TEXT and path.is_file():
            check_no_pointer(path, source)


def check_no_pointer(path: Path, source: str) -> None:
    """Raises Refused for a git-lfs pointer, which has the name of the file that it stands for."""
    if path.stat().st_size < POINTER_BYTES and path.read_bytes().startswith(POINTER):
        raise Refused(f"{source}: {path.name} is a git-lfs pointer and not the file; run `git lfs pull` there")


def check_complete(path: Path, source: str) -> None:
    """Raises Refused for a pointer, and for a file that ends before its last tensor.

    A pickle of the old kind, which is no zip, does not say its length: reading it fails where it is cut.
    """
    check_no_pointer(path, source)
    if path.suffix == ".safetensors":
        size, expected = path.stat().st_size, _safetensors_bytes(path)
        if expected is None:
            raise Refused(f"{source}: {path.name} of {size} bytes has no complete safetensors header; download it again")
        if size < expected:
            raise Refused(f"{source}: {path.name} is cut: expected {expected} bytes, got {size}; download it again")
    else:
        with path.open("rb") as opened:
            zipped = opened.read(2) == b"PK"
        if (zipped and not zipfile.is_zipfile(path)) or not path.stat().st_size:
            raise Refused(f"{source}: {path.name} is cut at {path.stat().st_size} bytes; download it again")


def check_shapes(mismatched: Iterable[tuple[str, Any, Any]], source: str) -> None:
    """Raises Refused for transformers' `mismatched_keys`: (name, the file's shape, the shape that config.json asks for)."""
    for name, stored, expected in sorted(mismatched):
        raise Refused(f"{source}: expected {name} of shape {tuple(expected)}, as config.json says, got {tuple(stored)}")


def _shards(index: Path, source: str) -> list[str]:
    """The names of the files of an index, each once. Raises Refused where it names none or one outside the directory."""
    check_no_pointer(index, source)
    weights = _json(index, source).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise Refused(f"{source}: {index.name} names no file (weight_map); download it again")
    return sorted(set(map(str, weights.values())))


def _json(path: Path, source: str) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise Refused(f"{source}: {path.name} is not JSON: {error}; download it again") from error


def _safetensors_bytes(path: Path) -> int | None:
    """The size that the header of a safetensors file asks for; None without a complete header."""
    with path.open("rb") as opened:
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > path.stat().st_size:
            return None
        try:
            header: dict[str, Any] = json.loads(opened.read(length))
        except ValueError:
            return None
    ends = [facts["data_offsets"][1] for name, facts in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)
