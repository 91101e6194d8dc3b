"""Arrow schemas of every table, and the one way in which a Parquet file is written (design section 4).

Text columns are zstd; media and tensors are stored as they are: zstd saves nothing on a JPEG and costs a third of the rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from voco import storage

SCHEMA_VERSION = "1"
ROW_GROUP_BYTES = 8 << 20  # of media or tensors in one row group; a larger row is a group of its own

TURN = pa.struct([("role", pa.string()), ("text", pa.string())])

CONVERSATION = pa.struct(
    [
        ("source_id", pa.string()),  # the row's id in its own file
        ("turns", pa.list_(TURN)),  # roles user and assistant, alternating
        ("placeholder", pa.string()),  # where the media placeholder stood: before, after or none
        ("answers", pa.list_(pa.string())),  # evaluation rows: the references; their last turn is the user's
        ("choices", pa.list_(pa.string())),
        ("category", pa.string()),
        ("extra", pa.string()),  # JSON
    ]
)

MEDIUM = pa.struct(
    [
        ("bytes", pa.large_binary()),  # as encoded at the source, never decoded pixels
        ("path", pa.string()),
        ("format", pa.string()),  # by content, not by name: jpeg, png, ...
        ("sha256", pa.string()),
        ("width", pa.int32()),  # EXIF orientation ignored, as LLaVA does
        ("height", pa.int32()),
        ("duration_s", pa.float64()),
        ("fps", pa.float64()),
        ("num_frames", pa.int64()),
    ]
)

SAMPLES = pa.schema(
    [
        ("sample_id", pa.string()),
        ("dataset", pa.string()),
        ("split", pa.string()),
        ("modality", pa.string()),  # text, image or video
        ("media", pa.list_(MEDIUM)),
        ("conversations", pa.list_(CONVERSATION)),
    ]
)

REJECTS = pa.schema([("dataset", pa.string()), ("source", pa.string()), ("reason", pa.string()), ("detail", pa.string())])

REASONS = (
    "missing_media", "corrupt_media", "unsupported_format", "media_too_large", "unsafe_path", "bad_record",
    "bad_conversation", "empty_text", "duplicate", "download_failed", "download_refused", "decode_timeout", "text_too_large",
)  # fmt: skip

# One row per unique image; `features` is (V, C) row-major. Dtype, shape, tower hash and preprocessing are file metadata.
FEATURES = pa.schema([("sha256", pa.string()), ("features", pa.large_binary())])

ANSWERS = pa.schema(
    [
        ("sample_id", pa.string()),
        ("conversation_index", pa.int32()),
        ("source_id", pa.string()),
        ("benchmark", pa.string()),
        ("category", pa.string()),
        ("method", pa.string()),
        ("n", pa.int32()),
        ("checkpoint", pa.string()),
        ("prompt", pa.string()),
        ("prediction", pa.string()),
        ("references", pa.list_(pa.string())),
        ("correct", pa.float64()),
        ("new_tokens", pa.int32()),
        ("cache_hit", pa.bool_()),  # the image's cache was made for an earlier question
    ]
)

SCORES = pa.schema(
    [
        ("checkpoint", pa.string()),
        ("benchmark", pa.string()),
        ("category", pa.string()),  # "all" or one question type
        ("method", pa.string()),
        ("n", pa.int32()),
        ("seed", pa.int64()),
        ("score", pa.float64()),  # mean of `correct`, 0 to 1
        ("score_low", pa.float64()),  # 95 % interval by bootstrap over samples
        ("score_high", pa.float64()),
        ("lower_bound", pa.float64()),
        ("upper_bound", pa.float64()),
        ("retention", pa.float64()),  # (score - lower) / (upper - lower): the paper's Table 1
        ("retention_low", pa.float64()),
        ("retention_high", pa.float64()),
        ("share_of_upper", pa.float64()),  # score / upper: the supplement's Table 4
        ("share_of_upper_low", pa.float64()),
        ("share_of_upper_high", pa.float64()),
        ("questions", pa.int64()),
        ("samples", pa.int64()),
        ("cache_bytes", pa.int64()),  # kept per image
        ("full_cache_bytes", pa.int64()),  # keys and values of the whole prefix
        ("prefill_flops", pa.float64()),  # the language model's, of one question on a ready cache; FastV has none
        ("uncached_flops", pa.float64()),  # the same where its views have no cache yet
        ("latency_s", pa.float64()),  # answering, seconds per question
        ("seconds", pa.float64()),
    ]
)

# Which row groups of which file of a frame cache are whose; a row group is never of two videos.
FRAME_INDEX = pa.schema(
    [
        ("sample_id", pa.string()),
        ("media_index", pa.int32()),
        ("file", pa.string()),
        ("row_group", pa.int32()),
        ("frames", pa.int32()),  # rows of the group
    ]
)

# A sweep's result: a row of scores and the trial that it is of.
TRIALS = pa.schema(
    [
        ("trial", pa.string()),
        ("output", pa.string()),
        ("final_loss", pa.float64()),
        ("train_seconds", pa.float64()),
        *SCORES,
    ]
)

METRICS = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.int64()),
        ("loss", pa.float64()),  # what is minimised
        ("kl", pa.float64()),  # of it under distillation: KL(teacher || student) of a supervised token, without weight and T^2
        ("tokens", pa.int64()),  # supervised
        ("cut", pa.int64()),  # tokens of text for which max_tokens left no room
        ("sample_ids_sha256", pa.string()),  # of the ids of this step, in order
        ("lr", pa.float64()),
        ("grad_norm", pa.float64()),
        ("seconds", pa.float64()),
    ]
)

FRAME_GROUP_BYTES = 16 << 20  # of keys and values in one row group of a frame cache


def frame_cache(bytes_each: int) -> pa.Schema:
    """Schema of `frame_cache/`, one row a frame: keys and values of `bytes_each` bytes, row-major (layer, kv_head, token, dim).

    File metadata `voco.frame_cache` holds dtype, shape, compressor, N, prefix ids, preprocessing and rope parameters.
    """
    return pa.schema(
        [
            ("sample_id", pa.string()),
            ("media_index", pa.int32()),
            ("frame_index", pa.int64()),
            ("timestamp_s", pa.float64()),
            ("keys", pa.binary(bytes_each)),
            ("values", pa.binary(bytes_each)),
        ]
    )


UNCOMPRESSED = {"bytes", "features", "keys", "values"}  # leaf columns that hold media or tensors


def _leaves(schema: pa.Schema) -> list[tuple[str, str]]:
    """Parquet column paths of a schema, each with the name of its innermost field."""

    def walk(prefix: str, name: str, kind: pa.DataType) -> list[tuple[str, str]]:
        if pa.types.is_struct(kind):
            return [leaf for field in kind for leaf in walk(f"{prefix}.{field.name}", field.name, field.type)]
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return walk(f"{prefix}.list.element", name, kind.value_type)
        return [(prefix, name)]

    return [leaf for field in schema for leaf in walk(field.name, field.name, field.type)]


def column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """The values as an array, level by level: several times as fast as pyarrow's own way from nested dicts.

    No struct or list may be null.
    """
    if pa.types.is_struct(kind):
        return pa.StructArray.from_arrays(
            [column([one[field.name] for one in values], field.type) for field in kind], fields=kind
        )
    if pa.types.is_list(kind):
        offsets = pa.array(list(accumulate(map(len, values), initial=0)), pa.int32())
        return pa.ListArray.from_arrays(offsets, column(list(chain.from_iterable(values)), kind.value_type), type=kind)
    if pa.types.is_large_binary(kind) and None not in values:
        places = pa.array(list(accumulate(map(len, values), initial=0)), pa.int64())
        return pa.LargeBinaryArray.from_buffers(kind, len(values), [None, places.buffers()[1], pa.py_buffer(b"".join(values))])
    return pa.array(values, kind)


def table(listed: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows given as dicts that have every key of the schema."""
    columns = [column([one[field.name] for one in listed], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def write_table(
    uri: str, groups: Iterable[pa.Table], schema: pa.Schema, metadata: dict[str, str] | None = None
) -> dict[str, Any]:
    """Write one Parquet file whose row groups are `groups`, whole or not at all.

    Returns the file's entry of a manifest: path (its name), rows, bytes, sha256. The same rows give the same bytes.
    """
    schema = schema.with_metadata({"voco.schema_version": SCHEMA_VERSION, **(metadata or {})})
    plain = {path for path, name in _leaves(schema) if name in UNCOMPRESSED}
    compression = {path: "none" if path in plain else "zstd" for path, _ in _leaves(schema)}
    coded = [path for path, _ in _leaves(schema) if path not in plain]
    rows = 0
    with (
        storage.writing(uri) as handle,
        pq.ParquetWriter(
            handle, schema, compression=compression, use_dictionary=coded, write_statistics=coded, store_schema=True
        ) as writer,
    ):
        for group in groups:
            writer.write_table(group.cast(schema), row_group_size=max(1, group.num_rows))
            rows += group.num_rows
    return {"path": uri.rsplit("/", 1)[-1], "rows": rows, "bytes": handle.size, "sha256": handle.sha256()}


def slices_by_bytes(sizes: list[int], limit: int = ROW_GROUP_BYTES) -> list[tuple[int, int]]:
    """Cut consecutive rows into [start, stop) groups of at most `limit` bytes; a larger row is a group of its own."""
    cuts: list[tuple[int, int]] = []
    start, held = 0, 0
    for index, size in enumerate(sizes):
        if index > start and held + size > limit:
            cuts.append((start, index))
            start, held = index, 0
        held += size
    if start < len(sizes):
        cuts.append((start, len(sizes)))
    return cuts


def blob_uri(output: str, sha256: str) -> str:
    """Where a medium lies that is too large for its table."""
    return storage.join(output, "blobs", sha256)


def medium_bytes(medium: dict[str, Any], table_uri: str) -> bytes:
    """The encoded bytes of a medium of a row in the `samples/` part at `table_uri`, from the row or from `blobs/`."""
    if medium["bytes"] is not None:
        return bytes(medium["bytes"])
    return storage.read_bytes(blob_uri(table_uri.rsplit("/", 2)[0], medium["sha256"]))


def open_parquet(uri: str) -> pq.ParquetFile:
    fs, path = storage.arrow_filesystem(uri)
    return pq.ParquetFile(fs.open_input_file(path))


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    with open_parquet(uri) as file:
        return file.read(columns=columns)
