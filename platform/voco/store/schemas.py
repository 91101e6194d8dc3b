"""The Arrow schema of every table, and the names and sizes that writers and readers share (docs/data.md)."""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = "1"
FEATURES_METADATA, FRAME_CACHE_METADATA = "voco.features", "voco.frame_cache"  # keys of file metadata, with JSON values
REJECTED_METADATA = "voco.rejected"  # of a frame cache's index: JSON list of the samples without a cache
INDEX_FILE, METRICS_FILE = "index.parquet", "metrics.parquet"  # tables that are one file in the output itself
ALL = "all"  # the category of every question

ROW_GROUP_BYTES = 8 << 20  # of media or tensors in one row group; a larger row is a row group alone

TURN = pa.struct([("role", pa.string()), ("text", pa.string())])

CONVERSATION = pa.struct(
    [
        ("source_id", pa.string()),  # the row's id in the source file
        ("turns", pa.list_(TURN)),  # roles user and assistant, alternating
        ("placeholder", pa.string()),  # where the text had the media placeholder: before, after or none
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
        ("format", pa.string()),  # by content, not by file name: jpeg, png, ...
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

# The index of `samples/`: one row per row group, with what the driver and the training order must know of it.
SAMPLES_INDEX = pa.schema(
    [
        ("part", pa.string()),  # name of the file in `samples/`
        ("part_bytes", pa.int64()),  # its size, so that no reader asks for it
        ("row_group", pa.int32()),
        ("rows", pa.int32()),
        ("conversations", pa.int32()),
        ("tokens_at_most", pa.int64()),  # bytes of all turns, and one a turn: no tokenizer with byte fallback makes more of them
        ("views_at_most", pa.int32()),  # most media of one row
        ("image_rows", pa.int32()),
        ("video_rows", pa.int32()),
        ("sizes", pa.list_(pa.list_(pa.int32()))),  # each distinct list of height, width, height, ... that rows have
        ("first_id", pa.string()),  # sample_id of the first row
        ("first_asks", pa.bool_()),  # every conversation of the first row ends on a user turn
    ]
)

# The index of `features/`: `length` bytes from `offset` of the part are the value.
FEATURES_INDEX = pa.schema(
    [
        ("sha256", pa.binary(32)),
        ("part", pa.string()),
        ("row_group", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int32()),
    ]
)

# One row per unique image, which is a row group: `features` is (V, C) row-major. Dtype, shape, tower hash and preprocessing are
# file metadata.
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
        ("cache_hit", pa.bool_()),  # the cache existed before this question
        ("margin", pa.float64()),  # of the first token: probability of the likeliest less that of the next; null under FastV
        ("tokens_read", pa.int32()),  # <voco> tokens of a view, all readings; 0 without views, null of other methods
    ]
)

ADDED_TO_ANSWERS, ADDED_TO_SCORES = ("margin", "tokens_read"), ("mean_tokens",)  # earlier versions did not write them

SCORES = pa.schema(
    [
        ("checkpoint", pa.string()),
        ("benchmark", pa.string()),
        ("category", pa.string()),  # ALL or one question type
        ("method", pa.string()),
        ("n", pa.int32()),
        ("metric", pa.string()),  # what marked the answers
        ("seed", pa.int64()),
        ("score", pa.float64()),  # mean of `correct`, 0 to 1
        ("score_low", pa.float64()),  # 95 % interval by bootstrap over samples
        ("score_high", pa.float64()),
        ("lower_bound", pa.float64()),
        ("upper_bound", pa.float64()),
        ("official_name", pa.string()),  # the figure that the set's authors publish: accuracy, f1, perception, ...
        ("official", pa.float64()),  # equal to `score` where that is the mean mark
        ("official_low", pa.float64()),
        ("official_high", pa.float64()),
        ("official_lower_bound", pa.float64()),
        ("official_upper_bound", pa.float64()),
        ("retention", pa.float64()),  # (official - lower) / (upper - lower): the paper's Table 1
        ("retention_low", pa.float64()),
        ("retention_high", pa.float64()),
        ("share_of_upper", pa.float64()),  # official / upper: the supplement's Table 4
        ("share_of_upper_low", pa.float64()),
        ("share_of_upper_high", pa.float64()),
        ("questions", pa.int64()),
        ("samples", pa.int64()),
        ("mean_tokens", pa.float64()),  # <voco> tokens of a view that a question read on average, all readings
        ("cache_bytes", pa.int64()),  # per image
        ("full_cache_bytes", pa.int64()),  # keys and values of the complete, uncompressed prefix
        ("prefill_flops", pa.float64()),  # the language model's, of one question with a cache; FastV has no cache
        ("uncached_flops", pa.float64()),  # the same without a cache
        ("latency_s", pa.float64()),  # answering, seconds per question
        ("seconds", pa.float64()),
    ]
)

# The row groups of each medium in a frame cache; no row group has frames of two media. File metadata: that of the parts, and
# REJECTED_METADATA.
FRAME_INDEX = pa.schema(
    [
        ("sample_id", pa.string()),
        ("media_index", pa.int32()),
        ("file", pa.string()),
        ("row_group", pa.int32()),
        ("frames", pa.int32()),  # rows of the group
        ("part_bytes", pa.int64()),  # size of the file
    ]
)

# A sweep's result: a row of scores and its trial.
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
        ("loss", pa.float64()),  # the value that is minimised
        ("kl", pa.float64()),  # its part under distillation: KL(teacher || student) per supervised token, without weight and T^2
        ("tokens", pa.int64()),  # supervised
        ("cut", pa.int64()),  # text tokens beyond max_tokens
        ("sample_ids_sha256", pa.string()),  # of the ids of this step, in order
        ("lr", pa.float64()),
        ("grad_norm", pa.float64()),
        ("seconds", pa.float64()),
        ("wait", pa.float64()),  # seconds of it that the slowest worker waited for its data
        ("time", pa.float64()),  # when it ended, Unix seconds: gaps between attempts are what interruptions cost
        ("samples_per_s", pa.float64()),
        ("tokens_read", pa.int64()),  # positions of the language model's pass over the step: text, vision and <voco>
        ("tokens_per_s", pa.float64()),  # tokens_read over seconds
        ("mfu", pa.float64()),  # model FLOPs over seconds and the workers' peak; null where no peak is known
        ("memory_bytes", pa.int64()),  # most of any worker so far: allocated on its device, or resident where there is none
        ("voco_norm", pa.float64()),  # L2 norm of the embedding of <voco>; null where it is not trained
        ("attempt", pa.int64()),  # starts of the workers before this step: 0, and 1 more after each interruption
        ("val_loss", pa.float64()),  # of inputs.val after this step; null at all steps but those of a validation
        ("val_score", pa.float64()),  # mean mark of the answers about inputs.val
    ]
)


def frame_cache_schema(tensor_bytes: int, scale_bytes: int = 0) -> pa.Schema:
    """Schema of `frame_cache/`, one row a frame: keys and values of `tensor_bytes` bytes, row-major (layer, kv_head, token, dim),
    and of scaled types their scales, row-major (layer, kv_head) fp32.

    File metadata FRAME_CACHE_METADATA has dtypes, shape, compressor, N, prefix ids, preprocessing and rope parameters.
    """
    scales = [(name, pa.binary(scale_bytes)) for name in ("keys_scales", "values_scales") if scale_bytes]
    return pa.schema(
        [
            ("sample_id", pa.string()),
            ("media_index", pa.int32()),
            ("frame_index", pa.int64()),
            ("timestamp_s", pa.float64()),
            ("keys", pa.binary(tensor_bytes)),
            ("values", pa.binary(tensor_bytes)),
            *scales,
        ]
    )


UNCOMPRESSED = {"bytes", "features", "keys", "values", "keys_scales", "values_scales"}  # leaf columns of media or tensors
