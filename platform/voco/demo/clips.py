"""The demo's video data: `python -m voco.demo.clips OUT` writes clips of moving shapes in the forms of two datasets.

    OUT/webvid/results_2M_train.csv                 videoid, name (the caption), page_idx, page_dir, duration, contentUrl
    OUT/webvid/videos/<page_dir>/<videoid>.mp4
    OUT/video-chatgpt/{train,test}.json             lists of {"q", "a", "video_id", "category"}, four per clip
    OUT/video-chatgpt/videos/<video_id>.mp4         named as in ActivityNet: v_ and eleven characters
    OUT/clips_written.json                          the parameters, written last: a second call with the same ones does nothing

`category` is an extra key that evaluation groups by. Some train answers end in the marker of the real file. Test clips use
only test images of the easy-vqa package, the others only its train images. `motion_questions` decides what happens in a clip,
and writes its questions and caption. Clips are 128x128, H.264, four frames per second, eight seconds long.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import string
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from voco.demo import easy_vqa_shapes, motion_questions, scenes
from voco.demo.motion_questions import CLIP_SECONDS, Clip
from voco.demo.scenes import CELL
from voco.ingest.formats.video_chatgpt import MARKER

FPS = 4
FRAMES = FPS * CLIP_SECONDS
SIDE = 2 * CELL
BACKGROUND = (96, 160)  # darkest and lightest grey; the package's images are lighter
NOISY = f"\n{MARKER}"  # the real file has this at the end of some answers
NOISY_SHARE = 0.03
ID_CHARACTERS = string.ascii_letters + string.digits + "-_"
CLIPS_PER_PAGE, PAGES_PER_FOLDER = 10, 50
# One thread, so that the bytes do not depend on the machine. The group of pictures is two seconds.
ENCODER = {"preset": "ultrafast", "crf": "16", "threads": "1"}
KEYFRAME_EVERY = 2 * FPS
VERSION = 1  # of the data; raise it when the same parameters would write other bytes

RgbImage = NDArray[np.uint8]  # (height, width, 3)


class DrawnClip(NamedTuple):
    """A clip and the images that show its shapes."""

    clip: Clip
    mover: RgbImage  # CELL x CELL
    blinker: RgbImage
    background: int


def write_clips(out: Path, train_clips: int = 1200, test_clips: int = 300, webvid_clips: int = 300, seed: int = 0) -> None:
    """Write all files, or nothing when a call with the same parameters has finished.

    The bytes depend only on the arguments and the version of PyAV's libraries. A call with other parameters replaces the data.
    """
    parameters = {
        "version": VERSION,
        "train_clips": train_clips,
        "test_clips": test_clips,
        "webvid_clips": webvid_clips,
        "seed": seed,
    }
    marker = out / "clips_written.json"
    if marker.exists() and json.loads(marker.read_text()) == parameters:
        return
    marker.unlink(missing_ok=True)
    for name in ("webvid", "video-chatgpt"):
        shutil.rmtree(out / name, ignore_errors=True)
    _write_webvid(out / "webvid", webvid_clips, random.Random(f"{seed} webvid"))
    _write_video_chatgpt(
        out / "video-chatgpt", {"train": train_clips, "test": test_clips}, random.Random(f"{seed} video-chatgpt")
    )
    marker.write_text(json.dumps(parameters) + "\n")


def _write_webvid(folder: Path, count: int, rng: random.Random) -> None:
    videos: list[tuple[Path, DrawnClip]] = []
    folder.mkdir(parents=True)
    with (folder / "results_2M_train.csv").open("w", newline="") as handle:
        rows = csv.writer(handle, lineterminator="\n")
        rows.writerow(["videoid", "name", "page_idx", "page_dir", "duration", "contentUrl"])
        numbers = rng.sample(range(1_000_000, 40_000_000), count)
        for index, (number, drawn) in enumerate(zip(numbers, _draw_clips("train", count, rng), strict=True)):
            page = index // CLIPS_PER_PAGE + 1
            first = (page - 1) // PAGES_PER_FOLDER * PAGES_PER_FOLDER + 1
            page_dir = f"{first:06d}_{first + PAGES_PER_FOLDER - 1:06d}"
            url = f"https://example.org/videos/{number}/preview/{number}.mp4"
            caption = motion_questions.caption(drawn.clip, rng)
            rows.writerow([number, caption, page, page_dir, f"PT00H00M{CLIP_SECONDS:02d}S", url])
            videos.append((folder / "videos" / page_dir / f"{number}.mp4", drawn))
    _encode_all(videos)


def _write_video_chatgpt(folder: Path, clips: dict[str, int], rng: random.Random) -> None:
    videos: dict[Path, DrawnClip] = {}
    for split, count in clips.items():
        rows: list[dict[str, Any]] = []
        for drawn in _draw_clips(split, count, rng):
            path = _new_name(folder / "videos", videos, rng)
            videos[path] = drawn
            for category, question, answer in motion_questions.clip_questions(drawn.clip, rng):
                noisy = NOISY if split == "train" and rng.random() < NOISY_SHARE else ""
                rows.append({"q": question, "a": answer + noisy, "video_id": path.stem, "category": category})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.json").write_text(json.dumps(rows))
    _encode_all(list(videos.items()))


def _new_name(folder: Path, videos: dict[Path, DrawnClip], rng: random.Random) -> Path:
    while (path := folder / f"v_{''.join(rng.choices(ID_CHARACTERS, k=11))}.mp4") in videos:
        pass
    return path


def _draw_clips(split: str, count: int, rng: random.Random) -> Iterator[DrawnClip]:
    """`count` clips of the package's images of a split."""
    labels = easy_vqa_shapes.labels(easy_vqa_shapes.shape_questions(split))
    tiles = {label: [np.asarray(tile) for tile in images] for label, images in scenes.tiles(split, labels).items()}
    for clip in motion_questions.draw_clips(count, rng):
        yield DrawnClip(clip, rng.choice(tiles[clip.mover]), rng.choice(tiles[clip.blinker]), rng.randint(*BACKGROUND))


def frames(drawn: DrawnClip) -> Iterator[RgbImage]:
    """FRAMES pictures of SIDE x SIDE pixels.

    Frame FPS * s shows the state of second s. Shapes appear and disappear halfway between two seconds. The mover slides from
    its last state in the first cell to its first state in the second cell.
    """
    timeline = drawn.clip.timeline
    corners = [np.array(divmod(cell, 2)) * CELL for cell in (*drawn.clip.mover_cells, drawn.clip.blinker_cell)]  # (row, column)
    for frame in range(FRAMES):
        picture = np.full((SIDE, SIDE, 3), drawn.background, dtype=np.uint8)
        state = (frame + FPS // 2) // FPS  # the nearest second
        if timeline.enters <= state < timeline.leaves:
            slid = min(max(frame - FPS * (timeline.moves - 1), 0), FPS)
            _paste(picture, drawn.mover, corners[0] + (corners[1] - corners[0]) * slid // FPS)
        if state < CLIP_SECONDS and timeline.shown[state]:
            _paste(picture, drawn.blinker, corners[2])
        yield picture


def _paste(picture: RgbImage, tile: RgbImage, corner: NDArray[np.int64]) -> None:
    row, column = corner
    picture[row : row + CELL, column : column + CELL] = tile


def _encode_all(videos: list[tuple[Path, DrawnClip]]) -> None:
    """Encode every clip. The encoder releases the GIL, so two threads use two cores."""
    for folder in {path.parent for path, _ in videos}:
        folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda video: _encode(*video), videos):
            pass


def _encode(path: Path, drawn: DrawnClip) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=ENCODER)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.gop_size = KEYFRAME_EVERY
        for index, picture in enumerate(frames(drawn)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's clips in the forms of WebVid and Video-ChatGPT.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--train-clips", type=int, default=1200)
    parser.add_argument("--test-clips", type=int, default=300)
    parser.add_argument("--webvid-clips", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_clips(options.out, options.train_clips, options.test_clips, options.webvid_clips, options.seed)


if __name__ == "__main__":
    main()
