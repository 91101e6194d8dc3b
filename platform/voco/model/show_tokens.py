"""A sample as text: the kind of each token, what it may attend to, and which tokens are trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from voco.model.attention.voco_mask import allowed
from voco.model.batch import collate
from voco.sequence.sequence import NONE, PREFIX, TEXT, VISION, VOCO, Layout, TokenSample

NAMES = {TEXT: "text", PREFIX: "prefix", VISION: "vision", VOCO: "voco"}


def show_sample(sample: TokenSample, tokenizer: Any, layout: Layout) -> str:
    """Lines of text: runs of tokens with kinds, positions and trained text in [brackets], then the mask as a grid.

    A run is one row and one column of the grid: up to causality, its tokens may all attend to the same tokens.
    """
    grid = _grid(sample, layout, _runs(sample))
    head = "mask (rows attend to columns; # all of a run, + a part of it):"
    return "\n".join([*_run_lines(sample, tokenizer, layout), head, *grid])


def show_trained(sample: TokenSample, tokenizer: Any, layout: Layout, most_lines: int, width: int) -> str:
    """The same without the mask, in at most `most_lines` lines of at most `width` characters, each cut in its middle."""
    lines = _run_lines(sample, tokenizer, layout)
    if len(lines) > most_lines:
        lines = [*lines[: most_lines - 1], f"  ... {len(lines) - most_lines + 1} more runs"]
    return "\n".join(_cut(line, width) for line in lines)


def _cut(line: str, width: int) -> str:
    """The line, or its ends: the end of a conversation is what is trained."""
    half = (width - 5) // 2
    return line if len(line) <= width else f"{line[:half]} ... {line[-half:]}"


def _run_lines(sample: TokenSample, tokenizer: Any, layout: Layout) -> list[str]:
    """A head, and a line for each run of tokens."""
    trained = set(_trained(sample))
    lines = [f"sample {sample.sample_id}: {len(sample)} tokens, method {layout.method}, {len(sample.predict_id)} trained"]
    for first, last in _runs(sample):
        kind, span = int(sample.kinds[first]), f"{sample.position[first]}..{sample.position[last]}"
        part = f"view {sample.view[first]}" if kind != TEXT else f"conversation {sample.conversation[first]}"
        text = "" if kind in (VISION, VOCO) else _marked(sample, tokenizer, trained, first, last)
        lines.append(f"  {NAMES[kind]:<7} x{last - first + 1:<4} positions {span:<11} {part:<16} {text}")
    return lines


def _trained(sample: TokenSample) -> list[int]:
    """Indices of the tokens that the loss predicts."""
    conversation = sample.conversation
    texts = [index for index in range(len(sample)) if sample.kinds[index] == TEXT]
    starts = [index for index in texts if index == 0 or conversation[index] != conversation[index - 1]]
    trained: list[int] = []
    for predicting, token in zip(sample.predict_at.tolist(), sample.predict_id.tolist(), strict=True):
        index = predicting + 1
        if index >= len(sample) or sample.ids[index] != token or sample.kinds[predicting] != TEXT:
            index = next(start for start in starts if sample.ids[start] == token and start not in trained)
        trained.append(index)
    return trained


def _runs(sample: TokenSample) -> list[tuple[int, int]]:
    """First and last token of each stretch of one kind, view and conversation."""
    marks = list(zip(sample.kinds.tolist(), sample.view.tolist(), sample.conversation.tolist(), strict=True))
    starts = [index for index in range(len(marks)) if index == 0 or marks[index] != marks[index - 1]]
    return [(start, stop - 1) for start, stop in zip(starts, [*starts[1:], len(marks)], strict=True)]


def _marked(sample: TokenSample, tokenizer: Any, trained: set[int], first: int, last: int) -> str:
    text, bracket = "", False
    for index in range(first, last + 1):
        if (index in trained) != bracket:
            text += "[" if not bracket else "]"
            bracket = not bracket
        text += tokenizer.decode([int(sample.ids[index])]).replace("\n", "\\n")
    return text + ("]" if bracket else "")


def _grid(sample: TokenSample, layout: Layout, runs: list[tuple[int, int]]) -> list[str]:
    views = len(set(sample.view.tolist()) - {NONE})
    bare = replace(sample, media=(), tiles=None, packing=None)  # a mask needs ids only
    batch = collate([bare], lambda _: torch.empty(0), (layout.vision_slots, 1))
    mask = allowed(batch.token_ids, layout.method)[0]
    lines = []
    for row_first, row_last in runs:
        cells = ""
        for first, last in runs:
            block = mask[row_first : row_last + 1, first : last + 1]
            cells += "#" if bool(block.all()) else "+" if bool(block.any()) else "."
        name = NAMES[int(sample.kinds[row_first])]
        lines.append(f"  {name:<7} {cells}")
    return [*lines, f"  (views: {views}; rows and columns are the lines above, in their order)"]
