"""One contender of `make bench-ingest` in its own process: `ingest_runs.py NAME SOURCE OUT` prints its figures as one JSON line.

SOURCE has `mix.json` (LLaVA's list) and `images/`. Every contender reads each file, computes its sha256, checks header and end
like `ingest/media/image.py` with `validate: header`, and writes Parquet with the bytes uncompressed and the text in zstd.
`seconds` start at this file's first line and include imports, except `import ray` and `ray.init`, reported as `init_s`.
"""

import time

STARTED = time.perf_counter()

import hashlib  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from concurrent.futures import ProcessPoolExecutor  # noqa: E402
from pathlib import Path  # noqa: E402

CHECK = {"validate": "header"}
ENCODED_VIDEOS = 4
BATCH = 80  # rows of 100 kB: voco's row groups of 8 MiB


def listed(source):
    """Rows of `mix.json` with the file to read, without bytes."""
    raw = json.loads((source / "mix.json").read_text())
    text = [json.dumps(row["conversations"]) for row in raw]
    return [
        {"id": row["id"], "file": str(source / "images" / row["image"]), "conversations": talk}
        for row, talk in zip(raw, text, strict=True)
    ]


def checked(data):
    """sha256, width and height of a JPEG. Without an end marker after its last scan it is decoded."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        if data.find(b"\xff\xd9", data.rfind(b"\xff\xda")) < 0:
            image.load()
    return hashlib.sha256(data).hexdigest(), width, height


def row_of(row):
    data = Path(row["file"]).read_bytes()
    digest, width, height = checked(data)
    text = {"id": row["id"], "conversations": row["conversations"]}
    return {**text, "bytes": data, "sha256": digest, "width": width, "height": height}


def start_ray():
    """Start a local Ray with four logical CPUs, two more than the work needs. Returns the seconds."""
    before = time.perf_counter()
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    return time.perf_counter() - before


def job(source, out, **block):
    """The content of a job file: two workers; JPEGs are checked by their header unless `block` has another `validate`."""
    return {
        "name": "bench-ingest",
        "kind": "ingest",
        "inputs": {"annotations": str(source / "mix.json"), "media": str(source / "images")},
        "output": str(out),
        "resources": {"workers": 2},
        "tracking": {"wandb": False},
        "ingest": {"format": "llava_json", "dataset": "bench", **CHECK, **block},
    }


def run_job(raw):
    import pipelines
    from voco.job.load import build_job

    manifest = pipelines.run(build_job("bench", raw))
    return manifest.counts


def voco_ingest(source, out):
    """The product on its cluster: `pipelines.run` of a job, as `voco run` does."""
    init = start_ray()
    run_job(job(source, out))
    return {"init_s": init}


def voco_full(source, out):
    init = start_ray()
    run_job(job(source, out, validate="full"))
    return {"init_s": init}


def voco_small(source, out):
    """A small job and the local Ray that it starts, as in `voco run`; `ray_alone` is the same without the job."""
    import pipelines
    from voco.run import ray_init

    ray_init.start_ray(2, [pipelines.stage_module("ingest"), "pandas"])
    run_job(job(source, out))
    return {}


def ray_alone(source, out):
    from voco.run import ray_init

    ray_init.start_ray(2)
    return {}


def voco_videos(source, out):
    init = start_ray()
    raw = job(source, out, format="webvid_csv", in_process_rows=0, unit_rows=15)
    raw["inputs"] = {"annotations": str(source / "videos.csv"), "media": str(source / "videos")}
    run_job(raw)
    return {"init_s": init}


def _write_videos(source, out, probe):
    """One process, one file: the CSV's rows with bytes, sha256 and what `probe(bytes)` measures by decoding the first frame."""
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = {
        "width": pa.int32(),
        "height": pa.int32(),
        "duration_s": pa.float64(),
        "fps": pa.float64(),
        "num_frames": pa.int64(),
    }
    schema = pa.schema({"id": pa.string(), "name": pa.string(), "bytes": pa.large_binary(), "sha256": pa.string(), **numbers})
    compression = {name: "none" if name == "bytes" else "zstd" for name in schema.names}
    text = [name for name in schema.names if name != "bytes"]
    out.mkdir()
    with (
        (source / "videos.csv").open(newline="") as listed,
        pq.ParquetWriter(
            out / "part.parquet", schema, compression=compression, use_dictionary=text, write_statistics=text
        ) as file,
    ):
        for row in csv.DictReader(listed):
            data = (source / "videos" / row["page_dir"] / f"{row['videoid']}.mp4").read_bytes()
            columns = {"id": row["videoid"], "name": row["name"], "bytes": data, "sha256": hashlib.sha256(data).hexdigest()}
            file.write_table(pa.Table.from_pylist([{**columns, **probe(data)}], schema=schema))
    return {}


def decord_loop(source, out):
    from decord import VideoReader

    def probe(data):
        video = VideoReader(io.BytesIO(data))
        height, width, _ = video[0].shape
        fps = video.get_avg_fps()
        return {"width": width, "height": height, "duration_s": len(video) / fps, "fps": fps, "num_frames": len(video)}

    return _write_videos(source, out, probe)


def pyav_loop(source, out):
    import av

    def probe(data):
        with av.open(io.BytesIO(data)) as file:
            stream = file.streams.video[0]
            frame = next(file.decode(stream))
            duration, fps = float(stream.duration * stream.time_base), float(stream.average_rate)
            return {
                "width": frame.width, "height": frame.height, "duration_s": duration, "fps": fps, "num_frames": stream.frames
            }  # fmt: skip

    return _write_videos(source, out, probe)


def make_videos(source, out):
    """`ENCODED_VIDEOS` mp4 files like WebVid's previews: 15 s, 596x336, 25 frames a second."""
    import av
    import numpy as np

    out.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for index in range(ENCODED_VIDEOS):
        soft = np.kron(draw.integers(0, 256, (12, 20, 3), dtype=np.uint8), np.ones((28, 32, 1), dtype=np.uint8))[:336, :596]
        with av.open(str(out / f"{index}.mp4"), "w") as file:
            stream = file.add_stream("libx264", rate=25, options={"preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = 596, 336, "yuv420p"
            for at in range(15 * 25):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(soft, (at, 2 * at), (0, 1))), format="rgb24")
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
    return {}


def pyarrow_loop(source, out):
    """The usual hand-written loop: one process, one file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("id", "conversations")), ("bytes", pa.large_binary()), ("sha256", pa.string()),
            ("width", pa.int32()), ("height", pa.int32()),
        ]
    )  # fmt: skip
    rows = listed(source)
    compression = {name: "none" if name == "bytes" else "zstd" for name in schema.names}
    text = [name for name in schema.names if name != "bytes"]
    out.mkdir()
    with pq.ParquetWriter(
        out / "part.parquet", schema, compression=compression, use_dictionary=text, write_statistics=text
    ) as file:
        for start in range(0, len(rows), BATCH):
            file.write_table(pa.Table.from_pylist([row_of(row) for row in rows[start : start + BATCH]], schema=schema))
    return {}


def daft(source, out):
    """Daft's readers and writer on its own threads; a batch function where it has no expression."""
    import daft
    from daft import DataType, Series, col

    facts = DataType.struct({"sha256": DataType.string(), "width": DataType.int32(), "height": DataType.int32()})

    @daft.func.batch(return_dtype=facts)
    def check(data: Series):
        results = [checked(image) for image in data.to_pylist()]
        return [{"sha256": digest, "width": width, "height": height} for digest, width, height in results]

    rows = listed(source)
    frame = daft.from_pydict({name: [row[name] for row in rows] for name in rows[0]}).into_batches(BATCH)
    frame = frame.with_column("bytes", daft.functions.download(col("file")))
    frame = frame.with_column("facts", check(col("bytes"))).exclude("file")
    frame.write_parquet(str(out), compression="none")
    return {}


def ray_data(source, out):
    """from_items, map, write_parquet with defaults, except for the codec of each column."""
    init = start_ray()
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    compression = {"bytes": "none", **dict.fromkeys(("id", "conversations", "sha256", "width", "height"), "zstd")}
    ray.data.from_items(listed(source)).map(row_of).write_parquet(str(out), compression=compression)
    return {"init_s": init}


def hf_datasets(source, out):
    import datasets

    datasets.disable_progress_bars()
    rows = listed(source)
    dataset = datasets.Dataset.from_generator(lambda: map(row_of, rows), cache_dir=str(out / "cache"))
    dataset.to_parquet(str(out / "part.parquet"))
    return {}


def img2dataset(source, out, *, threads=256, decode=False, annotations=None):
    """img2dataset's settings for two processes; `decode`: decode every pixel and keep the bytes, else do not read the header."""
    import logging

    from img2dataset import download

    logging.disable(logging.WARNING)
    keep = {"resize_mode": "no", "skip_reencode": True} if decode else {"disable_all_reencoding": True}
    download(
        url_list=str(annotations or source / "urls.parquet"), output_folder=str(out), processes_count=2, thread_count=threads,
        input_format="parquet", output_format="parquet", url_col="url", caption_col="caption", save_additional_columns=["id"],
        number_sample_per_shard=500 if decode else 1000, compute_hash="sha256", enable_wandb=False, **keep,
    )  # fmt: skip
    return {}


def voco_urls(source, out):
    init = start_ray()
    raw = job(
        source, out, format="cc3m_tsv", validate="full", allow_private_addresses=True, download_threads=32, in_process_rows=0
    )
    raw["inputs"] = {"annotations": str(source / "urls.tsv")}
    raw["ingest"] |= {"max_missing_share": 1.0, "max_reject_share": 1.0, "unit_rows": 500}
    run_job(raw)
    return {"init_s": init}


def img2dataset_urls(source, out):
    return img2dataset(source, out, threads=32, decode=True)


def _decode(files):
    from PIL import Image

    for file in files:
        with Image.open(file) as image:
            image.load()
    return len(files)


def codec(source, out):
    """Pillow's decoder alone: two processes over the same files."""
    files = [row["file"] for row in listed(source)]
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(_decode, [files[:8]] * 2))  # both processes have loaded Pillow
        before = time.perf_counter()
        list(pool.map(_decode, [files[start : start + 50] for start in range(0, len(files), 50)]))
        return {"rate": len(files) / (time.perf_counter() - before)}


if __name__ == "__main__":
    name, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    figures = globals()[name](source, out)
    seconds = time.perf_counter() - STARTED - figures.get("init_s", 0.0)
    print(json.dumps({"seconds": seconds, **figures}))
