"""One row of an output made visible in a terminal: `voco show OUTPUT`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from voco.errors import Refused
from voco.report.comparison import compare
from voco.report.outputs import Output, gather_outputs
from voco.report.table import bytes_text, seconds_text, text_table
from voco.run import manifest
from voco.run.manifest import Manifest
from voco.store import parquet, storage

LONGEST_TEXT = 400  # characters of one text
ANSWERS_SHOWN = 8
FRAMES_SHOWN = 12
REJECTS_SHOWN = 3  # of each reason


def show_output(output: str) -> str:
    """What an output holds, as text: its counts, then one row or a few of each of its tables.

    Characters that would steer a terminal are shown by their code. Raises Refused for an output that is not finished.
    """
    place = storage.resolve(output)
    found = manifest.read_manifest(place)
    if found is None:
        there = "is not finished: it has no manifest.json" if storage.list_names(place) else "does not exist"
        raise Refused(f"{output}: {there}")
    held = Output(place, found)
    head = f"{found.name}: {found.kind}, run {found.run_id}, {seconds_text(found.seconds)}"
    parts = [head, _counts(found), *(section(held) for section in SECTIONS.get(found.kind, [_tables]))]
    return "\n\n".join(part for part in parts if part)


def printable(text: str) -> str:
    """Text without control or formatting characters, which can steer a terminal; long text is cut."""
    cut = text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
    return "".join(
        char if char.isprintable() else "\\n" if char == "\n" else char.encode("unicode_escape").decode() for char in cut
    )


def _counts(found: Manifest) -> str:
    counts = {name: value for name, value in found.counts.items() if not isinstance(value, dict)}
    return ", ".join(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in counts.items())


def _samples(output: Output) -> str:
    """The first sample that has media, else the first: facts of its media and its conversations."""
    row: dict[str, Any] | None = None
    for file in output.files("samples"):
        if not storage.exists(file):
            continue
        with parquet.open_parquet(file) as opened:
            group = opened.read_row_group(0).to_pylist() if opened.num_row_groups else []
        row = next((line for line in group if line["media"]), row or next(iter(group), None))
        if row is not None and row["media"]:
            break
    if row is None:
        return "samples: missing"
    lines = [f"sample {row['sample_id']}: {row['dataset']}, {row['split']}, {row['modality']}"]
    for medium in row["media"] or []:
        size = "not in the table" if medium["bytes"] is None else bytes_text(len(medium["bytes"]))
        length = (
            f", {seconds_text(medium['duration_s'])}, {medium['num_frames']} frames" if medium["duration_s"] is not None else ""
        )
        shape = f"{medium['width']} x {medium['height']}"
        lines.append(
            f"  {printable(medium['path'] or '')}: {medium['format']}, {shape}, {size}{length}, sha256 {medium['sha256'][:12]}"
        )
    for number, conversation in enumerate(row["conversations"] or []):
        category = f", {printable(conversation['category'])}" if conversation["category"] else ""
        source = printable(conversation["source_id"] or "")
        lines.append(f"  conversation {number} ({source}{category}), placeholder {conversation['placeholder']}")
        lines += [f"    {turn['role']}: {printable(turn['text'] or '')}" for turn in conversation["turns"] or []]
        if conversation["answers"]:
            lines.append(f"    answers: {printable(' | '.join(conversation['answers']))}")
    return "\n".join(lines)


def _rejects(output: Output) -> str:
    table = output.read("rejects")
    if table is None:
        return "rejects: none" if not output.manifest.tables.get("rejects") else "rejects: missing"
    held = table.to_pylist()
    lines = []
    for reason, count in Counter(row["reason"] for row in held).most_common():
        lines.append(f"rejected, {reason}: {count:,}")
        chosen = [row for row in held if row["reason"] == reason][:REJECTS_SHOWN]
        lines += [f"  {printable(row['source'] or '')}: {printable(row['detail'] or '')}" for row in chosen]
    return "\n".join(lines) or "rejects: none"


def _answers(output: Output) -> str:
    table = output.read("answers")
    if table is None:
        return "answers: missing"
    lines = [f"answers: {table.num_rows:,}, the first {min(ANSWERS_SHOWN, table.num_rows)}"]
    for row in table.slice(0, ANSWERS_SHOWN).to_pylist():
        mark = "right" if row["correct"] == 1 else "wrong" if row["correct"] == 0 else f"{row['correct']:.2f}"
        lines.append(f"  [{mark}] {printable(row['prompt'] or '')}")
        lines.append(
            f"      said {printable(row['prediction'] or '')!r}, reference {printable(' | '.join(row['references'] or []))!r}"
        )
    return "\n".join(lines)


def _scores(output: Output) -> str:
    table = output.read("scores")
    return "scores: missing" if table is None else text_table(table.to_pylist())


def _summary(output: Output) -> str:
    lines = [text_table(comparison.rows) for comparison in compare(gather_outputs([output.uri]))]
    return "\n\n".join([*lines, storage.join(output.uri, "report.html")])


def _checkpoint(output: Output) -> str:
    """The first sample that a training job read, as it read it: kinds, positions, trained text, mask."""
    from voco.model import weights
    from voco.model.show_tokens import show_sample
    from voco.sequence.sequence import build_sample
    from voco.store.samples import SampleTables, sizes_of

    model = weights.load_checkpoint(output.uri)
    uris = output.samples_inputs()
    if not all(storage.list_names(storage.join(uri, "samples")) for uri in uris):
        return f"layout {model.layout.model_dump()}\nsamples: missing"
    group = SampleTables(uris, [1.0] * len(uris)).read(0)
    row = next((row for row in group if row["media"]), group[0])
    media = [one["sha256"] for one in row["media"] or []]
    cache = output.input("frame_cache")
    if media and cache is not None:  # each frame is a view
        from voco.precompute.frame_store import FrameStore

        media = [str(place) for place in range(FrameStore(cache).frames(row["sample_id"]))]
    turns, sizes = [one["turns"] for one in row["conversations"]], None if cache is not None else sizes_of(row)
    sample = build_sample(row["sample_id"], turns, media, model.tokenizer, model.layout, sizes=sizes)
    shown = show_sample(sample, model.tokenizer, model.layout)
    return f"compressor {model.compressor}\nlayout {model.layout.model_dump()}\n\n{shown}"


def _frames(output: Output) -> str:
    """The first medium's frames, and what must match before any is read."""
    from voco.precompute.frame_store import FrameStore

    store = FrameStore(output.uri)
    lines = [f"{key} {value}" for key, value in store.facts.items()]
    index = parquet.read_table(storage.join(output.uri, "index.parquet")).to_pylist()
    if index:
        first = index[0]
        with parquet.open_parquet(storage.join(output.uri, "frame_cache", first["file"])) as file:
            held = file.read_row_group(first["row_group"], columns=["frame_index", "timestamp_s"]).to_pylist()
        times = ", ".join(f"{row['frame_index']} at {row['timestamp_s']:.2f} s" for row in held[:FRAMES_SHOWN])
        more = " ..." if len(held) > FRAMES_SHOWN else ""
        lines.append(f"sample {first['sample_id']}, medium {first['media_index']}: {len(held)} frames: {times}{more}")
    return "\n".join(lines)


def _sweep(output: Output) -> str:
    """The trials' scores, as a report has them."""
    return "\n\n".join(text_table(comparison.rows) for comparison in compare(gather_outputs([output.uri])))


def _flow(output: Output) -> str:
    stages = gather_outputs([output.uri]).outputs
    return "\n".join(f"  {stage.name}: {stage.kind}, {seconds_text(stage.manifest.seconds)}, {stage.uri}" for stage in stages)


def _tables(output: Output) -> str:
    return "\n".join(
        f"{name}: {sum(entry.get('rows', 0) for entry in entries):,} rows, {bytes_text(sum(entry['bytes'] for entry in entries))}"
        for name, entries in output.manifest.tables.items()
    )


SECTIONS = {
    "ingest": [_samples, _rejects],
    "align": [_checkpoint],
    "image_sft": [_checkpoint],
    "frame_cache": [_frames, _rejects],
    "video_sft": [_checkpoint],
    "sweep": [_sweep],
    "evaluate": [_answers, _scores],
    "report": [_summary],
    "flow": [_flow],
}
