"""`voco show OUTPUT`: counts and a few rows of an output as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from voco.errors import Refused
from voco.report.comparison import compare
from voco.report.outputs import Output, gather_outputs
from voco.report.table import bytes_text, seconds_text, text_table
from voco.run import manifest
from voco.run.manifest import Manifest
from voco.store import parquet, samples, schemas, storage

LONGEST_TEXT = 400  # characters of one text
ANSWERS_SHOWN = 8
FRAMES_SHOWN = 12
REJECTS_SHOWN = 3  # of each reason


def show_output(output: str) -> str:
    """The contents of an output as text: its counts, then a few rows of each of its tables.

    Control characters are shown by their code. Raises Refused for an output that is not finished.
    """
    uri = storage.resolve(output)
    finished = manifest.read_manifest(uri)
    if finished is None:
        state = "is not finished: it has no manifest.json" if storage.list_names(uri) else "does not exist"
        raise Refused(f"{output}: {state}")
    opened = Output(uri, finished)
    sections = [SECTIONS[name](opened) if name in SECTIONS else _size(opened, name) for name in finished.tables]
    head = f"{finished.name}: {finished.kind}, run {finished.run_id}, {seconds_text(finished.seconds)}"
    parts = [head, _counts(finished), *(sections or [_stages(opened)])]
    return "\n\n".join(part for part in parts if part)


def printable(text: str) -> str:
    """Text without control or formatting characters, which a terminal would obey; long text is cut."""
    cut = text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
    return "".join(
        char if char.isprintable() else "\\n" if char == "\n" else char.encode("unicode_escape").decode() for char in cut
    )


def _counts(finished: Manifest) -> str:
    counts = {name: value for name, value in finished.counts.items() if not isinstance(value, dict)}
    return ", ".join(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in counts.items())


def _samples(output: Output) -> str:
    """The first sample that has media, else the first: facts about its media, and its conversations."""
    row = samples.first_sample(output.files("samples"))
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
    rejects = table.to_pylist()
    lines = []
    for reason, count in Counter(row["reason"] for row in rejects).most_common():
        lines.append(f"rejected, {reason}: {count:,}")
        chosen = [row for row in rejects if row["reason"] == reason][:REJECTS_SHOWN]
        lines += [f"  {printable(row['source'] or '')}: {printable(row['detail'] or '')}" for row in chosen]
    return "\n".join(lines) or "rejects: none"


def _answers(output: Output) -> str:
    table = output.read("answers")
    if table is None:
        return "answers: missing"
    lines = [f"answers: {table.num_rows:,}, the first {min(ANSWERS_SHOWN, table.num_rows)}"]
    for row in table.slice(0, ANSWERS_SHOWN).to_pylist():
        marks = {None: "no reference", 1.0: "right", 0.0: "wrong"}
        mark = marks.get(row["correct"]) or f"{row['correct']:.2f}"
        lines.append(f"  [{mark}] {printable(row['prompt'] or '')}")
        lines.append(
            f"      answered {printable(row['prediction'] or '')!r}, reference {printable(' | '.join(row['references'] or []))!r}"
        )
    return "\n".join(lines)


def _scores(output: Output) -> str:
    table = output.read("scores")
    return "scores: missing" if table is None else text_table(table.to_pylist())


def _summary(output: Output) -> str:
    lines = [text_table(comparison.rows) for comparison in compare(gather_outputs([output.uri]))]
    return "\n\n".join([*lines, storage.join(output.uri, "report.html")])


def _checkpoint(output: Output) -> str:
    """The first sample that a training job read, in the checkpoint's layout: kinds, positions, trained text, mask."""
    from voco.model import weights
    from voco.model.show_tokens import show_sample
    from voco.sequence.sequence import Layout, build_sample

    config, tokenizer = weights.read_config(output.uri), weights.read_tokenizer(output.uri)
    layout = Layout(**config["layout"])
    uris = output.samples_inputs()
    facts = f"compressor {config['compressor']}\nlayout: {_facts(layout.model_dump())}"
    if not all(any(samples.part_uris([uri])) for uri in uris):
        return f"{facts}\n\nno sample is shown: the samples that this job read are not there any more"
    group = samples.SampleTables(uris).read(0)
    row = next((row for row in group if row["media"]), group[0])
    media = [medium["sha256"] for medium in row["media"] or []]
    cache = output.input("frame_cache")
    if media and cache is not None:  # each frame is a view
        from voco.precompute.frame_store import FrameStore

        media = [str(frame) for frame in range(FrameStore(cache).frames(row["sample_id"]))]
    turns = [conversation["turns"] for conversation in row["conversations"]]
    sizes = None if cache is not None else samples.sizes_of(row)
    sample = build_sample(row["sample_id"], turns, media, tokenizer, layout, sizes=sizes)
    shown = show_sample(sample, tokenizer, layout)
    return f"{facts}\n\n{shown}"


def _facts(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def _frames(output: Output) -> str:
    """The first medium's frames, and what must match before any frame is read."""
    from voco.precompute.frame_store import FrameStore

    store = FrameStore(output.uri)
    lines = [f"{key} {_facts(value) if isinstance(value, dict) else value}" for key, value in store.facts.items()]
    index = parquet.read_table(storage.join(output.uri, schemas.INDEX_FILE)).to_pylist()
    if index:
        first = index[0]
        with parquet.open_parquet(storage.join(output.uri, "frame_cache", first["file"])) as file:
            frames = file.read_row_group(first["row_group"], columns=["frame_index", "timestamp_s"]).to_pylist()
        times = ", ".join(f"{row['frame_index']} at {row['timestamp_s']:.2f} s" for row in frames[:FRAMES_SHOWN])
        dots = " ..." if len(frames) > FRAMES_SHOWN else ""
        lines.append(f"sample {first['sample_id']}, medium {first['media_index']}: {len(frames)} frames: {times}{dots}")
    return "\n".join(lines)


def _trials(output: Output) -> str:
    """The trials' scores, as a report shows them."""
    return "\n\n".join(text_table(comparison.rows) for comparison in compare(gather_outputs([output.uri])))


def _stages(output: Output) -> str:
    """The stages of a flow, which has no tables."""
    stages = gather_outputs([output.uri]).outputs
    lines = (f"  {stage.name}: {stage.kind}, {seconds_text(stage.manifest.seconds)}, {stage.uri}" for stage in stages)
    return "\n".join(["stages and trials, by directory:", *lines])


def _size(output: Output, table: str) -> str:
    entries = output.manifest.tables[table]
    size = bytes_text(sum(entry["bytes"] for entry in entries))
    return f"{table}: {sum(entry.get('rows', 0) for entry in entries):,} rows, {size}"


# by table, so that a new kind of stage is shown by the tables that it writes
SECTIONS: dict[str, Callable[[Output], str]] = {
    "samples": _samples,
    "rejects": _rejects,
    "model": _checkpoint,
    "frame_cache": _frames,
    "answers": _answers,
    "scores": _scores,
    "trials": _trials,
    "summary": _summary,
}
