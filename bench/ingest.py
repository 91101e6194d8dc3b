"""`make bench-ingest`: files to Parquet with their bytes, compared with other ways to do the same work on the same machine.

Contenders run in turn, each in a separate process, over 4,000 and over 12,000 JPEGs. Slope: images per second between the two
sizes; fixed: the seconds that remain at zero images. Before any timing, the ids and bytes of every output are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import source
from side_by_side import OUT, PEERS, call, in_turn, median, write

SMALL, SIZES, URLS, VIDEOS = 200, (4_000, 12_000), 2_000, (60, 240)
SMALL_ROUNDS = 7  # the start of Ray varies by half a second, and the job's time is a difference
WORK = (
    "640x480 JPEGs of 100 KB + LLaVA JSON -> Parquet with the bytes: read, sha256, header and end checked; "
    "4,000 and 12,000 images, 2 cores"
)
OWN = sys.executable
CONTENDERS = {
    "voco_ingest": OWN, "pyarrow_loop": OWN, "daft": PEERS, "ray_data": OWN, "hf_datasets": PEERS, "img2dataset": PEERS,
}  # fmt: skip


def row_hashes(name: str, out: Path) -> dict[str, str]:
    """sha256 of the bytes of every row of an output, by the row's id."""
    hashes: dict[str, str] = {}
    for file in sorted((out / "samples" if name.startswith("voco") else out).glob("*.parquet")):
        table = pq.read_table(file)
        if name.startswith("voco"):
            ids = [talks[0]["source_id"] for talks in table["conversations"].to_pylist()]
            data = [media[0]["bytes"] for media in table["media"].to_pylist()]
        else:
            column = "jpg" if "jpg" in table.column_names else "bytes"
            complete = table.filter(table[column].is_valid())
            ids, data = complete["id"].to_pylist(), complete[column].to_pylist()
        hashes |= {row: hashlib.sha256(medium).hexdigest() for row, medium in zip(ids, data, strict=True)}
    return hashes


def run_once(name: str, folder: Path, scratch: Path) -> dict[str, Any]:
    """One run of a contender over a source. Its output is deleted."""
    out = scratch / f"{name}-{folder.name}"
    try:
        return call("ingest_runs.py", name, folder, out, python=CONTENDERS.get(name.split("+")[0], OWN))
    finally:
        shutil.rmtree(out, ignore_errors=True)


def check(names: list[str], folder: Path, scratch: Path) -> None:
    """Run every contender once over the smaller source and compare the ids and bytes with its files. Raises SystemExit."""
    files = sorted((folder / "images").iterdir())
    expected = {f"{index:012d}": hashlib.sha256(file.read_bytes()).hexdigest() for index, file in enumerate(files)}
    for name in names:
        out = scratch / f"check-{name}"
        call("ingest_runs.py", name, folder, out, python=CONTENDERS[name])
        got = row_hashes(name, out)
        if got != expected:
            raise SystemExit(f"{name}: {len(got)} rows; {len(expected.items() - got.items())} rows of the source are missing")
        shutil.rmtree(out)
        print(f"  {name}: {len(got):,} rows, byte-equal", flush=True)


def line(
    results: dict[str, list[dict[str, Any]]], name: str, sizes: tuple[int, int] = SIZES, unit: str = "images"
) -> dict[str, float]:
    """Slope and fixed cost of a contender from its medians at both sizes."""
    few, many = (median(results[f"{name} {size}"], "seconds") for size in sizes)
    slope = (sizes[1] - sizes[0]) / (many - few)
    return {f"{unit}_per_s": slope, f"{unit}_fixed_s": few - sizes[0] / slope, f"s_{sizes[0]}": few, f"s_{sizes[1]}": many}


def command_line(folder: Path, scratch: Path) -> dict[str, Any]:
    """`voco run` of a small job as a user calls it, with the start of Python and Ray."""
    import yaml
    from ingest_runs import job

    file, out = scratch / "job.yaml", scratch / "small"
    file.write_text(yaml.safe_dump(job(folder, out)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "RAY_AUTH_MODE": "disabled"}
    path = os.pathsep.join(str(Path(__file__).parents[1] / part) for part in ("platform", "."))
    environment = {**environment, "PYTHONPATH": f"{path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    started = time.perf_counter()
    command = [OWN, "-c", "import sys; from pipelines.cli import main; sys.exit(main(['run', sys.argv[1]]))", str(file)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return {"seconds": seconds}


def files(scratch: Path, rounds: int, names: list[str], extra: bool) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """a1: the figures of every contender and, with `extra`, further figures of voco."""
    sources = {size: source.llava(scratch / f"images-{size}", size) for size in SIZES}
    print("outputs compared", flush=True)
    check(names, sources[SIZES[0]], scratch)
    timed = [*names, "voco_full"] if extra else names
    runs = {
        f"{name} {size}": lambda name=name, size=size: run_once(name, sources[size], scratch) for name in timed for size in SIZES
    }
    if extra:
        runs["codec"] = lambda: run_once("codec", sources[SIZES[0]], scratch)
    results = in_turn(runs, rounds)
    for folder in sources.values():
        shutil.rmtree(folder)
    figures = {name: line(results, name) for name in names}
    if not extra:
        return figures, {}
    own = {
        "validate_full_images_per_s": line(results, "voco_full")["images_per_s"],
        "codec_alone_images_per_s": median(results["codec"], "rate"),
    }
    return figures, own


def small(scratch: Path) -> dict[str, float]:
    """Seconds of a job of 200 rows beyond the start of Ray, and of its complete `voco run`."""
    folder = source.llava(scratch / f"images-{SMALL}", SMALL)
    runs = {
        "job": lambda: run_once("voco_small", folder, scratch),
        "ray": lambda: run_once("ray_alone", folder, scratch),
        "voco run": lambda: command_line(folder, scratch),
    }
    seconds = {name: median(results, "seconds") for name, results in in_turn(runs, SMALL_ROUNDS).items()}
    return {
        "small_job_beyond_ray_init_s": seconds["job"] - seconds["ray"], "ray_init_s": seconds["ray"],
        "small_voco_run_s": seconds["voco run"],
    }  # fmt: skip


def downloads(scratch: Path, rounds: int) -> dict[str, dict[str, float]]:
    """a2: URLs over loopback, 2 % dead links and 1 % no image, every pixel decoded; each with 2 processes of 32 threads."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    folder = source.urls(scratch / "web", URLS, address)
    rclone = Path(OWN).parent / "rclone"
    server = subprocess.Popen(
        [str(rclone), "serve", "http", str(folder / "served"), "--addr", address, "--read-only"], stderr=subprocess.DEVNULL
    )
    names = {"voco_urls": OWN, "img2dataset_urls": PEERS}
    try:
        time.sleep(1)
        hashes = {}
        for name, python in names.items():
            out = scratch / f"check-{name}"
            call("ingest_runs.py", name, folder, out, python=python)
            hashes[name] = sorted(row_hashes(name, out).values())
            shutil.rmtree(out)
        if hashes["voco_urls"] != hashes["img2dataset_urls"] or len(hashes["voco_urls"]) != URLS * 97 // 100:
            raise SystemExit(f"downloads differ: { {name: len(files) for name, files in hashes.items()} }")
        CONTENDERS.update(names)
        results = in_turn({name: lambda name=name: run_once(name, folder, scratch) for name in names}, rounds)
    finally:
        server.terminate()
        server.wait(10)
    return {name: {"urls_per_s": URLS / median(runs, "seconds")} for name, runs in results.items()}


def videos(scratch: Path, rounds: int) -> dict[str, dict[str, float]]:
    """a3: WebVid's CSV and mp4 files to Parquet, the first frame of each decoded, compared with loops around the decoders."""
    call("ingest_runs.py", "make_videos", scratch, scratch / "encoded", python=PEERS)
    encoded = [file.read_bytes() for file in sorted((scratch / "encoded").iterdir())]
    sources = {size: source.videos(scratch / f"videos-{size}", size, encoded) for size in VIDEOS}
    names = {"voco_videos": OWN, "decord_loop": OWN, "pyav_loop": PEERS}
    CONTENDERS.update(names)
    expected = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in (sources[VIDEOS[0]] / "videos").rglob("*.mp4"))
    for name, python in names.items():
        out = scratch / f"check-{name}"
        call("ingest_runs.py", name, sources[VIDEOS[0]], out, python=python)
        if sorted(row_hashes(name, out).values()) != expected:
            raise SystemExit(f"{name}: its videos differ from the source's")
        shutil.rmtree(out)
    runs = {
        f"{name} {size}": lambda name=name, size=size: run_once(name, sources[size], scratch) for name in names for size in VIDEOS
    }
    results = in_turn(runs, rounds)
    return {name: line(results, name, VIDEOS, "videos") for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", nargs="*", choices=[*CONTENDERS, "small", "videos"], help="compare with these only, and write no file"
    )
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=OUT) as directory:
        scratch = Path(directory)
        if options.only is not None:
            if names := [name for name in options.only if name in CONTENDERS]:
                print(files(scratch, options.rounds, ["voco_ingest", *names], extra=False)[0])
            print(small(scratch) if "small" in options.only else "")
            print(videos(scratch, options.rounds) if "videos" in options.only else "", f"load before {load:.1f}")
            return
        figures, own = files(scratch, options.rounds, list(CONTENDERS), extra=True)
        own |= small(scratch)
        web = downloads(scratch, options.rounds)
        clips = videos(scratch, options.rounds)
    product = figures.pop("voco_ingest") | own
    slope = product["images_per_s"]
    ratio = {f"{name}, slope": slope / peer["images_per_s"] for name, peer in figures.items()}
    ratio["codec alone, validate: full"] = own["validate_full_images_per_s"] / own["codec_alone_images_per_s"]
    product |= web.pop("voco_urls") | clips.pop("voco_videos")
    ratio["img2dataset, URLs"] = product["urls_per_s"] / web["img2dataset_urls"]["urls_per_s"]
    ratio |= {f"{name}, slope over videos": product["videos_per_s"] / peer["videos_per_s"] for name, peer in clips.items()}
    figures |= web | clips
    write("ingest", WORK, product, figures, ratio, load)


if __name__ == "__main__":
    main()
