"""The attention plan of a batch, and the backends that make one: the rows of `ATTENTION` in job/tables.py.

A plan says which queries see which keys, in the form that a backend's kernel takes. It is made once per pass and travels
through transformers' layers as the argument `plan`, so recomputed layers get the same one. All backends give the same numbers.

Legend: B rows, Q queries, K keys of a row; H query heads, G key-value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import AttentionInterface

from voco.job.tables import ATTENTION, AUTO
from voco.model.attention.voco_mask import TokenIds

NAME = "voco"  # of `attend` among transformers' attention functions


class AttentionPlan(Protocol):
    """Which queries of one batch see which keys."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """(B, Q, H, E) of query (B, H, Q, E), key and value (B, G, K, E); rows of padding hold anything finite."""


@dataclass(frozen=True)
class RowsPlan:
    """What attention of only some queries takes: U queries and their W keys, all in one row, and a plan over these alone."""

    keys: Tensor  # (W,) int64, ascending, rows of the flattened (B x K) whose keys and values are read
    queries: Tensor  # (U,) int64, the index among `keys` of each query's row
    back: Tensor  # (M,) int64, the index among the queries of each row that was named
    plan: AttentionPlan  # of one row with U queries and W keys


@runtime_checkable
class RowsPlanner(Protocol):
    """A plan of as many queries as keys that can leave out the queries that nobody reads, and the keys that only those see."""

    def for_rows(self, rows: Tensor) -> RowsPlan:
        """The part for `rows` (M,) int64, on the host, of the flattened (B x Q). U may be more: queries between two of them."""


@dataclass(frozen=True)
class Backend:
    """An attention backend. Its row of `ATTENTION` has what job files are checked against.

    `plan(ids, views_apart, device, queries)` plans `voco_mask.pair_mask(ids, views_apart, queries)`, exactly; the ids are on the
    host and the plan's tensors on the device.
    """

    plan: Callable[[TokenIds, bool, torch.device, int | None], AttentionPlan]
    available: Callable[[], bool] = lambda: True  # on this machine
    needs: str = ""  # what the machine must have, for the message where it is not available


def get_backend(name: str) -> Backend:
    """The backend of a row of `ATTENTION`. Raises ValueError for a name that is not in the table."""
    if name not in ATTENTION:
        raise ValueError(f"attention {name!r} cannot honour the mask exactly; use one of {sorted(ATTENTION)}")
    return ATTENTION.implementation(name, __package__, "BACKEND", Backend)


def check_backend(name: str) -> None:
    """Raises ValueError for a name that is not in the table, and for a backend that cannot run on this machine."""
    backend = get_backend(name)
    if not backend.available():
        raise ValueError(f"attention {name!r} needs {backend.needs}; use 'segments'")


def resolve_backend(name: str, dtype: torch.dtype, head: int) -> str:
    """The backend that `name` stands for on this machine, for states of `dtype` in heads `head` wide.

    `auto` is varlen where its kernel runs: FlashAttention takes bf16 and fp16, and heads whose width is a multiple of 8 up to
    256. Elsewhere, and on CPUs, it is segments.
    """
    if name != AUTO:
        return name
    takes = dtype in (torch.bfloat16, torch.float16) and head % 8 == 0 and head <= 256
    return "varlen" if takes and get_backend("varlen").available() else "segments"


def plan_attention(
    name: str, ids: TokenIds, views_apart: bool, device: torch.device, queries: int | None = None
) -> AttentionPlan:
    """The plan of a backend for the last `queries` tokens of each row (default: all). `ids` are on the host."""
    return get_backend(name).plan(ids, views_apart, device, queries)


def attend(
    _module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    scaling: float,
    plan: AttentionPlan | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function that transformers' attention layers call. Raises ValueError without a plan, and for dropout and capped scores,
    which no backend does. A sliding window is allowed: `VocoLlama` keeps samples inside it.
    """
    if plan is None:
        raise ValueError("this model's attention needs a plan: call the VocoLlama, not its language model")
    if unsupported := [name for name in ("dropout", "softcap") if options.get(name)]:
        raise ValueError(f"attention with {unsupported[0]} {options[unsupported[0]]} is not supported")
    return plan.attend(query, key, value, scaling), None


AttentionInterface.register(NAME, attend)
