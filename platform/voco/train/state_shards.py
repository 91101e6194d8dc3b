"""The optimizer's state that a rank owns, by parameter, and its file in a checkpoint: any ranks read what any other ranks wrote.

Under ZeRO each rank owns the fp32 master weights and Adam's two moments of a part of all trained numbers, as flat tensors. A
`Fragment` says which numbers of which parameter lie where in a flat tensor. A file has the flat tensors as they are, one after
the other, and the list of fragments: a rank of another layout (another number of ranks, another ZeRO stage) reads from all files
the byte ranges of its fragments. Weights that are not trained are in no file: a run loads them from its starting checkpoint.

DeepSpeed 0.19.8 has three layouts: stages 1 and 2 (`zero/stage_1_and_2.py`), stage 1 of bf16 with gradients in fp32
(`bf16_optimizer.py`) and stage 3 (`zero/stage3.py`).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from voco.store import storage
from voco.store.part_files import GAP_BYTES, read_in_order

KINDS = ("fp32", "exp_avg", "exp_avg_sq")  # the master weights, which in fp32 training are the weights, and the moments
HEADER_BYTES = 128 << 10  # read at first of a file: a fragment takes about 100 bytes
PIECE_BYTES = 32 << 20  # of one read
ALIGN_BYTES = 64  # of the first tensor in a file
SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in SAFETENSORS.items()}


class Fragment(NamedTuple):
    """`numel` numbers of a flattened parameter from `start` on, which lie at `offset` of a flat tensor."""

    name: str
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class FlatPart:
    """One flat tensor of master weights, with the optimizer that updates it and that one's parameter group."""

    flat: Tensor  # (n,)
    fragments: tuple[Fragment, ...]
    inner: torch.optim.Optimizer
    group: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by kind, each (n,). Raises KeyError before the first step."""
        return {kind: self.flat if kind == "fp32" else self.inner.state[self.flat][kind] for kind in KINDS}

    @property
    def steps(self) -> int:
        """Steps that Adam counts: of torch and DeepSpeed's CPU version in the state, of its fused version in the group."""
        return int(self.inner.state[self.flat].get("step", self.group.get("step", 0)))

    def set_steps(self, steps: int) -> None:
        state = self.inner.state[self.flat]
        if torch.is_tensor(state.get("step")):
            state["step"].fill_(steps)
        else:
            (state if "step" in state else self.group)["step"] = steps


def flat_parts(optimizer: Any) -> list[FlatPart]:
    """What this rank owns of a DeepSpeed optimizer of any ZeRO stage."""
    if hasattr(optimizer, "fp16_partitioned_groups"):
        return [_stage_3_part(optimizer, number) for number in range(len(optimizer.fp16_groups))]
    is_bf16 = hasattr(optimizer, "fp32_groups_flat_partition")
    flats = optimizer.fp32_groups_flat_partition if is_bf16 else optimizer.single_partition_of_fp32_groups
    groups = optimizer.bf16_groups if is_bf16 else optimizer.bit16_groups
    parts = []
    for flat, parameters, group in zip(flats, groups, optimizer.optimizer.param_groups, strict=True):
        fragments = []
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:  # a part of it is this rank's
                of_parameter, of_flat = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                fragments.append(Fragment(optimizer.param_names[parameter], of_parameter.start, of_flat.start, of_flat.numel))
        parts.append(FlatPart(flat, tuple(fragments), optimizer.optimizer, group))
    return parts


def _stage_3_part(optimizer: Any, number: int) -> FlatPart:
    """Each parameter is cut into equal slices, one for each rank; zeros fill the last ones."""
    fragments, offset = [], 0
    for parameter in optimizer.fp16_groups[number]:
        size = parameter.partition_numel()
        start = size * optimizer._get_param_partition_rank(parameter)
        numel = min(size, parameter.ds_numel - start)
        if numel > 0:
            fragments.append(Fragment(optimizer.param_names[parameter], start, offset, numel))
        offset += size
    flat, inner = optimizer.fp32_partitioned_groups_flat[number], optimizer.optimizer
    if optimizer.offload_optimizer and optimizer.subgroup_to_device[number] != "cpu":
        inner = optimizer.backup_optimizer
    return FlatPart(flat, tuple(fragments), inner, inner.param_groups[optimizer.sub_group_to_group_id[number]])


class StateCopy:
    """A rank's file in host memory, which later saves use again: page-locked where the state is on a GPU.

    `copy` needs the optimizer's states: call it after a step. The file is a safetensors file with three tensors of (n,), one for
    each kind, whose metadata has the fragments (offsets in n) and the steps of Adam.
    https://huggingface.co/docs/safetensors#format
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self._buffer: Tensor | None = None
        self._copied: Any = None

    def copy(self) -> None:
        """Copy the state as it is now. On a GPU this returns before the copy is complete; later work there cannot change it."""
        parts = flat_parts(self.optimizer)
        header, sizes = _header(parts)
        total = len(header) + sum(sizes.values())
        is_cuda = any(part.flat.is_cuda for part in parts)
        if self._buffer is None or len(self._buffer) != total:
            self._buffer = _host_memory(total, is_cuda)
        self._buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        at = len(header)
        for kind in KINDS:
            for part in parts:
                tensor = part.tensors()[kind].detach()
                target = self._buffer[at : at + tensor.nbytes].view(tensor.dtype)
                target.copy_(tensor, non_blocking=is_cuda)
                at += tensor.nbytes
        if is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def view(self) -> memoryview:
        """The file's bytes, once the copy is complete. Another thread may ask."""
        assert self._buffer is not None
        if self._copied is not None:
            self._copied.synchronize()
        return self._buffer.numpy().data


def _host_memory(size: int, page_locked: bool) -> Tensor:
    """Bytes to copy into. Torch's own page-locked memory is a power of two, up to twice as large, so these are locked later."""
    buffer = torch.empty(size, dtype=torch.uint8)
    if page_locked:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        runtime.cudaHostRegister(buffer.data_ptr(), size, 1)  # where it cannot, copies are right and slower
    return buffer


def _header(parts: Sequence[FlatPart]) -> tuple[bytes, dict[str, int]]:
    """The head of a rank's file, as long for any step, and the bytes of each kind after it."""
    fragments, first = [], 0
    for part in parts:
        fragments += [[name, start, first + offset, numel] for name, start, offset, numel in part.fragments]
        first += part.flat.numel()
    dtypes = {kind: parts[0].tensors()[kind].dtype for kind in KINDS}
    sizes = {kind: first * dtype.itemsize for kind, dtype in dtypes.items()}
    steps = f"{max(part.steps for part in parts):012d}"
    head: dict[str, Any] = {"__metadata__": {"steps": steps, "fragments": json.dumps(fragments, separators=(",", ":"))}}
    at = 0
    for kind in KINDS:
        head[kind] = {"dtype": SAFETENSORS[dtypes[kind]], "shape": [first], "data_offsets": [at, at + sizes[kind]]}
        at += sizes[kind]
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN_BYTES)
    return len(text).to_bytes(8, "little") + text, sizes


@dataclass(frozen=True)
class RankFile:
    """What the head of a rank's file says."""

    uri: str
    steps: int
    fragments: tuple[Fragment, ...]
    starts: dict[str, tuple[torch.dtype, int]]  # by kind: number type, and where its first byte is


def read_head(uri: str) -> RankFile:
    """Raises ValueError for a file that `StateCopy` did not write."""
    fs, path = storage.filesystem(uri)
    first = storage.read_range(fs, path, 0, HEADER_BYTES)
    length = int.from_bytes(first[:8], "little")
    text = first[8 : 8 + length]
    if len(text) < length:
        text += storage.read_range(fs, path, 8 + len(text), length - len(text))
    try:
        head = json.loads(text)
        facts = head.pop("__metadata__")
        fragments = tuple(Fragment(*fragment) for fragment in json.loads(facts["fragments"]))
        starts = {kind: (DTYPES[head[kind]["dtype"]], 8 + length + int(head[kind]["data_offsets"][0])) for kind in KINDS}
        return RankFile(uri, int(facts["steps"]), fragments, starts)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{uri}: not the state of a training: {error}") from error


class StateBytes(NamedTuple):
    """Bytes of a file that become the numbers of `target`, a 1-D view of this rank's state."""

    uri: str
    at: int
    dtype: torch.dtype
    target: Tensor

    @property
    def size(self) -> int:
        return self.target.numel() * self.dtype.itemsize


def load_state(optimizer: Any, uris: Sequence[str]) -> None:
    """Fill this rank's state from the files of all ranks of a checkpoint, and the weights from it. A collective of all ranks.

    Raises ValueError where the files lack a number that is trained here.
    """
    files = list(read_in_order(read_head, uris))
    is_stage_3 = hasattr(optimizer, "fp16_partitioned_groups")
    if is_stage_3:
        optimizer.checkpoint_event_prologue()  # no weight is gathered while its shards change
    parts = flat_parts(optimizer)
    for part in parts:
        if "exp_avg" not in part.inner.state[part.flat]:
            _create_states(part)
        part.set_steps(max(file.steps for file in files))
    with torch.no_grad():
        for _ in read_in_order(_read, _joined(_spans(parts, files))):
            pass
        if is_stage_3:
            for number in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
            optimizer.checkpoint_event_epilogue()
        else:
            optimizer.update_lp_params()
    dist.barrier()


def _create_states(part: FlatPart) -> None:
    """Have an optimizer create the moments, which it does in its first step: a step of rate and gradient zero.

    So their number type, device and memory are those that the optimizer itself chooses.
    """
    groups, gradient = part.inner.param_groups, part.flat.grad
    part.flat.grad = torch.zeros_like(part.flat)
    part.inner.param_groups = [{**part.group, "params": [part.flat], "lr": 0.0}]
    try:
        part.inner.step()
    finally:
        part.inner.param_groups, part.flat.grad = groups, gradient


def _spans(parts: Sequence[FlatPart], files: Sequence[RankFile]) -> Iterator[StateBytes]:
    """Where the numbers of this rank's fragments are. Raises ValueError for one that is in no file."""
    stored: dict[str, list[tuple[Fragment, RankFile]]] = defaultdict(list)
    for file in files:
        for fragment in file.fragments:
            stored[fragment.name].append((fragment, file))
    for part in parts:
        tensors = part.tensors()
        for own in part.fragments:
            missing = own.numel
            for fragment, file in stored[own.name]:
                start = max(own.start, fragment.start)
                numel = min(own.start + own.numel, fragment.start + fragment.numel) - start
                if numel <= 0:
                    continue
                missing -= numel
                for kind, (dtype, first) in file.starts.items():
                    at = first + (fragment.offset + start - fragment.start) * dtype.itemsize
                    target = tensors[kind].detach().narrow(0, own.offset + start - own.start, numel)
                    yield from _cut(StateBytes(file.uri, at, dtype, target))
            if missing:
                raise ValueError(f"the checkpoint lacks {missing:,} numbers of {own.name}")


def _cut(span: StateBytes) -> Iterator[StateBytes]:
    """The same bytes in pieces of at most `PIECE_BYTES`."""
    most = PIECE_BYTES // span.dtype.itemsize
    for first in range(0, span.target.numel(), most):
        yield span._replace(at=span.at + first * span.dtype.itemsize, target=span.target[first : first + most])


def _joined(spans: Iterable[StateBytes]) -> Iterator[list[StateBytes]]:
    """Spans that one read takes: neighbours in a file, up to `PIECE_BYTES` together."""
    group: list[StateBytes] = []
    for span in sorted(spans, key=lambda span: (span.uri, span.at)):
        is_next = group and group[0].uri == span.uri and span.at - (group[-1].at + group[-1].size) <= GAP_BYTES
        if group and not (is_next and span.at + span.size - group[0].at <= PIECE_BYTES):
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def _read(spans: list[StateBytes]) -> None:
    """Copy the bytes of neighbouring spans into place by one read."""
    fs, path = storage.filesystem(spans[0].uri)
    first, end = spans[0].at, spans[-1].at + spans[-1].size
    data = storage.read_range(fs, path, first, end - first)
    if len(data) != end - first:
        raise ValueError(f"{spans[0].uri}: ends before byte {end}")
    buffer = bytearray(data) if not isinstance(data, bytearray) else data
    for span in spans:
        numbers = torch.frombuffer(buffer, dtype=span.dtype, count=span.target.numel(), offset=span.at - first)
        span.target.copy_(numbers)
