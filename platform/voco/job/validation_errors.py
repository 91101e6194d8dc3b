"""How a mistake in a job file is reported: `key.path: expected ..., got ...; did you mean ...`."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import BaseModel, ValidationError

from voco.job.tables import broken_hint

_NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?")


def did_you_mean(wrong: str, known: list[str], mark: str = "") -> str:
    """`; did you mean ...?` when a known name is close, else nothing."""
    near = difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean {mark}{near[0]}?" if near else ""


def first_error(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake as `key.path: expected ..., got ...; did you mean ...`; unknown keys come first."""
    mistakes = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    item = mistakes[0]
    path = ""
    location = tuple(part for part in item["loc"] if not str(part).startswith("("))  # without the tags of a union
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    got = item["input"]
    shown = repr(got) if isinstance(got, str | int | float | bool | type(None)) else type(got).__name__
    kind = item["type"]
    if kind == "extra_forbidden":
        key, known = str(location[-1]), _fields_at(root, location[:-1])
        hint = broken_hint(key) or did_you_mean(key, known) or "; expected one of " + ", ".join(known)
        return f"{path}: unknown key{hint}"
    if kind == "missing":
        return f"{path}: expected a value, got nothing"
    if kind == "value_error":
        message = str(item["ctx"]["error"])
        if not path:
            return message
        return f"{path}: {message}" if message.startswith("expected") else f"{path}.{message}"  # else it starts with a key
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", item["ctx"]["expected"]) or [item["ctx"]["expected"]]
        return (
            f"{path}: expected {item['ctx']['expected']}, got {shown}{broken_hint(str(got)) or did_you_mean(str(got), allowed)}"
        )
    hint = ""
    if kind == "string_type" and isinstance(got, int | float):  # a name such as 2024, or 1e5
        hint = "; write it in quotes"
    elif kind in ("float_type", "int_type") and isinstance(got, str) and _NUMBER.fullmatch(got):
        hint = "; write it without quotes"
    return f"{path}: expected {_expected(item)}, got {shown}{hint}"


def _expected(item: Any) -> str:
    message = str(item["msg"]).removeprefix("Input should be ")
    return message.removeprefix("a valid ").removeprefix("String should ")


def _fields_at(root: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed at this location of the file."""
    model = root
    for part in location:
        if isinstance(part, int):
            continue
        names = {field.alias or name: name for name, field in model.model_fields.items()}
        annotation: Any = model.model_fields[names[part]].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        candidates += [inner for outer in candidates for inner in getattr(outer, "__args__", ())]
        model = next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
    return [field.alias or name for name, field in model.model_fields.items()]
