"""One contender of `make bench-loader` in a separate process: `loader_runs.py NAME DATA` prints its figures as one JSON line.

DATA has the same images as `parquet/samples` (our own tables), `tar` and `litdata`. Figures, in images a second: the encoded
bytes, batches of 64 as 336x336 uint8 pixels (`fast`) and as LLaVA's normalised fp32 (`llava`); and the seconds to the first fast
batch from the start and from the middle, after imports and `ray.init`. One core and one decoding thread, except for NAME_two.
"""

import hashlib
import io
import itertools
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not sys.argv[1].endswith("_two") and sys.argv[1] != "make_litdata":
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import numpy as np
import torch
from PIL import Image

SIZE, BATCH, DECODED, PAIRS = 336, 64, 768, 5
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
FILL = tuple(int(255 * value) for value in MEAN)


def jpeg(data):
    import simplejpeg

    return simplejpeg.decode_jpeg(data)


def padded(picture):
    square = torch.tensor(FILL, dtype=torch.uint8).repeat(SIZE, SIZE, 1)
    top, left = (SIZE - picture.shape[0]) // 2, (SIZE - picture.shape[1]) // 2
    square[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return square


def inside(pixels):
    side = max(pixels.shape[:2])
    return round(pixels.shape[0] * SIZE / side), round(pixels.shape[1] * SIZE / side)


def fast(data):
    """The codec: libjpeg-turbo, torch's antialiased bicubic filter."""
    pixels = jpeg(data)
    picture = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return padded(torch.nn.functional.interpolate(picture, inside(pixels), mode="bicubic", antialias=True)[0].permute(1, 2, 0))


def area(data):
    """Another codec: libjpeg-turbo, OpenCV's area filter."""
    import cv2

    pixels = jpeg(data)
    return padded(torch.from_numpy(cv2.resize(pixels, inside(pixels)[::-1], interpolation=cv2.INTER_AREA)))


def llava(data):
    """LLaVA's transform: expand2square, then the steps of CLIP's processor, (3, S, S) fp32."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), FILL)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32) / 255.0
    return torch.from_numpy(((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1))


def parts(data):
    return sorted(str(file) for file in (data / "parquet" / "samples").iterdir())


def in_memory(data):
    """Every encoded image, without a loader."""
    import pyarrow.parquet as pq

    tables = (pq.ParquetFile(file).read(columns=["media.list.element.bytes"]) for file in parts(data))
    return [row[0]["bytes"] for table in tables for row in table["media"].to_pylist()]


def webdataset(data):
    import webdataset

    files = sorted(str(file) for file in (data / "tar").iterdir())

    def read(start):
        rows = webdataset.WebDataset(files, shardshuffle=False)
        return (row["jpg"] for row in itertools.islice(rows, start, None))

    return read


def hf_datasets(data):
    import datasets

    def read(start):
        rows = datasets.load_dataset("parquet", data_files=parts(data), split="train", streaming=True, columns=["media"])
        return (row["media"][0]["bytes"] for row in (rows.skip(start) if start else rows))

    return read


def litdata(data):
    import litdata

    def read(start):
        images = litdata.StreamingDataset(str(data / "litdata"), shuffle=False)
        return (images[index] for index in range(start, len(images)))

    return read


def batches(pixels):
    while batch := list(itertools.islice(pixels, BATCH)):
        yield torch.stack(batch)


def rate(name, results):
    """Images a second, and a second of processor time of this process, which other work on the machine slows less.

    `results` yields encoded images (name `bytes`) or batches.
    """
    started, used = time.perf_counter(), time.process_time()
    count = sum(len(result) if name != "bytes" else 1 for result in results)
    return {
        f"{name}_per_s": count / (time.perf_counter() - started),
        f"{name}_per_cpu_s": count / (time.process_time() - used),
    }


def first(load):
    """Seconds to the first result that `load()` yields, and the result."""
    started = time.perf_counter()
    batch = next(load())
    return time.perf_counter() - started, batch


def digest(tensor):
    return hashlib.sha256(np.ascontiguousarray(tensor.numpy()).tobytes()).hexdigest()


def measure(encoded, fast_batches, llava_batches, total):
    """All figures of a loader, and digests to compare: `encoded(start)` yields bytes, the other two batches."""
    first_s, batch = first(lambda: fast_batches(0))
    half_s, middle = first(lambda: fast_batches(total // 2))
    names = hashlib.sha256()
    for image in encoded(0):
        names.update(hashlib.sha256(image).digest())
    _, normal = first(lambda: llava_batches(0))
    digests = {"bytes": names.hexdigest(), "fast": digest(batch), "half": digest(middle), "llava": digest(normal)}
    count = DECODED // BATCH
    return {
        "first_batch_s": first_s,
        "resume_s": half_s,
        **rate("bytes", encoded(0)),
        **rate("fast", itertools.islice(fast_batches(0), count)),
        **rate("llava", itertools.islice(llava_batches(0), count)),
        "digests": digests,
    }


def peer(name, data, total):
    """A loader of bytes, with a codec in a loop after it."""
    read = {"webdataset": webdataset, "hf_datasets": hf_datasets, "litdata": litdata}[name](data)
    fast(in_memory(data)[0])  # imports and caches of a first call
    return measure(read, lambda start: batches(map(fast, read(start))), lambda start: batches(map(llava, read(start))), total)


def tower(decoder):
    from voco.model.vision.tower import CLIP, VisionTower

    config = {"name": "clip", "image_size": SIZE, "layer": -2, "decoder": decoder}
    return VisionTower(config, torch.nn.Conv2d(3, 1, 3), *CLIP)


def voco(data, total, threads=1):
    from voco.precompute import pixel_loader
    from voco.store.samples import unique_images

    uri, quick, parity = str(data / "parquet"), tower("fast"), tower("pil")

    def load(start, vision):
        loader = pixel_loader.PixelLoader(unique_images([uri]), vision.preprocess, BATCH, threads)
        return (batch.pixels for batch in loader.batches(start))

    def encoded(start):
        with ThreadPoolExecutor(1) as reader:
            listed = itertools.islice(unique_images([uri]), start, None)
            yield from (image for _, image in pixel_loader.read_encoded(listed, reader))

    quick.preprocess(in_memory(data)[0])
    normalised = lambda start, vision: map(vision.normalise, load(start, vision))  # noqa: E731
    figures = measure(encoded, lambda start: load(start, quick), lambda start: normalised(start, parity), total)
    return figures | rate("fast_normalised", itertools.islice(normalised(0, quick), DECODED // BATCH))


def voco_two(data, total):
    start_ray()
    return voco(data, total, threads=2)


def interleaved(data, total, threads=1):
    """Our loader and the codec alone over the same images, by turns in one process: the machine's speed drifts by a quarter from
    one process to the next. The median of the pairs' ratios, by wall and by processor time.
    """
    from voco.precompute import pixel_loader
    from voco.store.samples import unique_images

    images, quick = in_memory(data)[:DECODED], tower("fast")
    quick.preprocess(images[0]), fast(images[0])
    ratios = {"wall": [], "cpu": []}
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PAIRS):
            loader = pixel_loader.PixelLoader(unique_images([str(data / "parquet")]), quick.preprocess, BATCH, threads)
            own = rate("fast", itertools.islice((batch.pixels for batch in loader.batches()), DECODED // BATCH))
            alone = rate("fast", batches(map(fast, images) if threads == 1 else pool.map(fast, images)))
            ratios["wall"].append(own["fast_per_s"] / alone["fast_per_s"])
            ratios["cpu"].append(own["fast_per_cpu_s"] / alone["fast_per_cpu_s"])
    return {key: statistics.median(values) for key, values in ratios.items()}


def interleaved_two(data, total):
    return interleaved(data, total, threads=2)


def codecs(data, total):
    """Each codec alone over bytes in memory."""
    import cv2

    cv2.setNumThreads(1)
    images = in_memory(data)[:DECODED]
    for codec in (fast, area, llava):
        codec(images[0])
    figures = {}
    for codec in (fast, area, llava):
        figures |= rate(codec.__name__, batches(map(codec, images)))
    return figures


def start_ray():
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)


def ray_data_two(data, total):
    """read_parquet, map, iter_batches, all defaults."""
    import ray.data

    start_ray()
    ray.data.DataContext.get_current().enable_progress_bars = False

    def decode(row):
        return {"pixels": fast(row["media"][0]["bytes"]).numpy()}

    def load(limit=None):
        read = ray.data.read_parquet(parts(data), columns=["media"])
        return (read if limit is None else read.limit(limit)).map(decode).iter_batches(batch_size=BATCH)

    first_s, _ = first(lambda: iter(load()))
    figures = rate("fast", (batch["pixels"] for batch in load(DECODED)))
    return {"first_batch_s": first_s, "fast_per_s": figures["fast_per_s"]}  # its workers' time is not in this process


def make_litdata(data, total):
    import litdata

    images = in_memory(data)
    litdata.optimize(fn=images.__getitem__, inputs=list(range(total)), output_dir=str(data / "litdata"), chunk_bytes="64MB",
                     num_workers=1, keep_data_ordered=True)  # fmt: skip
    return {}


def make_tar(data, total):
    import webdataset

    (data / "tar").mkdir()
    with webdataset.ShardWriter(str(data / "tar" / "%05d.tar"), maxsize=128 << 20, verbose=0) as file:
        for index, image in enumerate(in_memory(data)):
            file.write({"__key__": f"{index:06d}", "jpg": image})
    return {}


if __name__ == "__main__":
    name, data, total = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    run = peer if name in ("webdataset", "hf_datasets", "litdata") else globals()[name]
    print(json.dumps(run(name, data, total) if run is peer else run(data, total)))
