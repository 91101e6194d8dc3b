"""One video file: containers by content, damage, measures, and a decoder that dies."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numbered_clips
import pytest
from ingest.clips import clip, shipped
from ingest.source import image

from voco.ingest.media.decoder import Decoder
from voco.ingest.media.folder import MediaRoot
from voco.ingest.media.source import MediaLimits
from voco.ingest.media.video import check_container, read_video
from voco.ingest.source_row import BadRow

HEADER = MediaLimits("header", 1 << 21, 10**6, 200.0, 1 << 21)
FULL = replace(HEADER, check="full")
KINDS = {"mp4": "mp4", "mov": "mov", "matroska": "mkv", "webm": "webm", "avi": "avi"}
MP4_LAYOUTS = ({}, {"movflags": "faststart"}, {"movflags": "frag_keyframe+empty_moov"})


@pytest.fixture(scope="module")
def probe() -> Iterator[Decoder]:
    decoder = Decoder()
    yield decoder
    decoder.close()


def reason(tmp_path, probe: Decoder, data: bytes, limits: MediaLimits = HEADER) -> str:
    (tmp_path / "x.mp4").write_bytes(data)
    with pytest.raises(BadRow) as caught:
        read_video(MediaRoot(str(tmp_path)), "x.mp4", limits, probe)
    assert "x.mp4" in caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize("limits", [HEADER, FULL], ids=["header", "full"])
@pytest.mark.parametrize("container", KINDS)
def test_measures_of_our_own_clips(tmp_path, probe, container: str, limits: MediaLimits) -> None:
    data = clip(container, frames=25, fps=10, size=(80, 48))
    (tmp_path / "x.mp4").write_bytes(data)  # the format does not depend on the name
    medium = read_video(MediaRoot(str(tmp_path)), "x.mp4", limits, probe)
    assert (medium["bytes"], medium["format"], medium["width"], medium["height"]) == (data, KINDS[container], 80, 48)
    assert (medium["num_frames"], medium["fps"]) == (25, pytest.approx(10))
    assert medium["duration_s"] == pytest.approx(2.5, abs=0.01)


def test_measures_of_shipped_files(tmp_path, probe) -> None:
    for name, expected in {"bikes.mp4": (640, 272, 250, 25, 10), "carphone_pristine.mp4": (176, 144, 120, 29.97, 4.004)}.items():
        (tmp_path / name).write_bytes(shipped(name))
        medium = read_video(MediaRoot(str(tmp_path)), name, FULL, probe)
        measures = [medium[key] for key in ("width", "height", "num_frames", "fps", "duration_s")]
        assert measures == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("container", KINDS)
def test_a_truncated_video_is_corrupt(tmp_path, probe, container: str, share: float) -> None:
    """Even where the decoder would continue: a Matroska file cut in the middle opens with fewer frames."""
    for options in MP4_LAYOUTS if container == "mp4" else ({},):
        data = clip(container, frames=40, **options)
        assert reason(tmp_path, probe, data[: max(16, int(len(data) * share))]) == "corrupt_media"
    assert reason(tmp_path, probe, shipped("bikes.mp4")[:300_000]) == "corrupt_media"


@pytest.mark.parametrize(
    "data", [b"hello, not a video", b"%PDF-1.7 ....", b"\0\0\0\x18ftypavif\0\0\0\0avif", b"RIFF\0\0\0\0WAVEfmt "]
)
def test_other_content_is_unsupported(tmp_path, probe, data: bytes) -> None:
    assert reason(tmp_path, probe, data) == "unsupported_format"


def test_images_and_foreign_containers_are_unsupported(tmp_path, probe) -> None:
    assert reason(tmp_path, probe, image(1)) == "unsupported_format"
    assert reason(tmp_path, probe, image(1, "WEBP")) == "unsupported_format"
    assert reason(tmp_path, probe, clip("webm").replace(b"webm", b"mesh", 1)) == "unsupported_format"


def test_an_empty_file_and_a_file_without_a_picture(tmp_path, probe) -> None:
    assert reason(tmp_path, probe, b"") == "corrupt_media"
    assert reason(tmp_path, probe, b"\0\0\0\x10ftypisom\0\0\0\0") == "corrupt_media"
    assert reason(tmp_path, probe, b"RIFF\x04\0\0\0AVI ") == "corrupt_media"


def test_trailing_bytes_after_a_video_are_no_fault() -> None:
    assert check_container(clip() + b"\0" * 100) == "mp4"
    assert check_container(clip() + b"\0\0\xff\xfffree") == "mp4"  # cut inside a box without content
    assert check_container(clip("matroska") + b"more") == "mkv"
    assert check_container(clip("matroska", live="1")) == "mkv"  # a segment of unknown size


def test_an_avi_above_a_gigabyte_is_several_lists() -> None:
    """OpenDML: the list AVI, then lists AVIX with more streams. A cut in any list is detected; bytes after them are no fault."""
    data = clip("avi")
    streams = b"LIST" + (4 + 8 + 6).to_bytes(4, "little") + b"movi" + b"00dc" + (6).to_bytes(4, "little") + b"frames"
    large = data + 2 * (b"RIFF" + (4 + len(streams)).to_bytes(4, "little") + b"AVIX" + streams)
    for complete in (large, large + b"behind it", data + image(1, "WEBP"), data + b"\0"):
        assert check_container(complete) == "avi"
    never_finished = bytearray(data)
    never_finished[4:8] = bytes(4)
    short_streams = bytearray(data)
    movi = data.index(b"movi") - 4
    short_streams[movi : movi + 4] = (len(data)).to_bytes(4, "little")
    for damaged in (
        large[:-1],
        large[: len(data) + 20],
        data[:-1],
        never_finished,
        short_streams,
        data.replace(b"movi", b"none"),
    ):
        with pytest.raises(BadRow, match="corrupt_media"):
            check_container(bytes(damaged))


def test_an_animated_gif_is_a_video(tmp_path, probe) -> None:
    data = numbered_clips.clip(numbered_clips.Cell("gif", "gif", "plain"))
    (tmp_path / "x.gif").write_bytes(data)
    medium = read_video(MediaRoot(str(tmp_path)), "x.gif", FULL, probe)
    assert (medium["path"], medium["format"], medium["num_frames"]) == ("x.gif", "gif", numbered_clips.FRAMES)
    assert medium["duration_s"] == pytest.approx(4.0, abs=0.05)
    assert reason(tmp_path, probe, data[:-20]) == "corrupt_media"


@pytest.mark.parametrize("cell", [cell for cell in numbered_clips.CELLS if cell.variant == "open B"], ids="-".join)
def test_measures_where_pictures_are_stored_in_another_order(tmp_path, probe, cell) -> None:
    """AVI has no presentation times, and Matroska no frame count: durations stay those of the pictures."""
    (tmp_path / "x.mp4").write_bytes(numbered_clips.clip(cell))
    medium = read_video(MediaRoot(str(tmp_path)), "x.mp4", FULL, probe)
    assert (medium["num_frames"], medium["duration_s"]) == (numbered_clips.FRAMES, pytest.approx(4.0, abs=0.1))
    assert medium["fps"] == pytest.approx(24, rel=0.02)


def test_limits(tmp_path, probe) -> None:
    data = clip(size=(80, 48))
    assert reason(tmp_path, probe, data, replace(HEADER, max_media_bytes=len(data) - 1)) == "media_too_large"
    assert reason(tmp_path, probe, data, replace(HEADER, max_media_bytes=len(data), max_pixels=80 * 48 - 1)) == "media_too_large"


def test_a_path_without_extension_is_tried_with_each(tmp_path, probe) -> None:
    root = MediaRoot(str(tmp_path))
    (tmp_path / "v_a.webm").write_bytes(clip("webm"))
    assert read_video(root, "v_a", HEADER, probe)["path"] == "v_a.webm"
    (tmp_path / "v_a.mkv").write_bytes(clip("matroska"))
    assert read_video(root, "v_a", HEADER, probe)["path"] == "v_a.mkv"
    (tmp_path / "v_a.mp4").symlink_to("/etc/passwd")
    for path, expected in {"v_a": "unsafe_path", "v_b": "missing_media", "v_a.avi": "missing_media"}.items():
        with pytest.raises(BadRow) as caught:
            read_video(root, path, HEADER, probe)
        assert caught.value.reason == expected


def test_full_looks_further_than_the_header(probe) -> None:
    """Damage in the second half of a file with a complete index: the full check always rejects it, the header check may not.

    Not every time: the decoder's thread runs ahead of the requested frame and may reach the damage first.
    """
    data = bytearray(clip(frames=300))
    for at in range((data.index(b"mdat") + data.index(b"moov")) // 2, data.index(b"moov") - 4):
        data[at] ^= 0x5A
    assert check_container(bytes(data)) == "mp4"
    for _ in range(3):
        with pytest.raises(BadRow, match="corrupt_media"):
            probe.video(bytes(data), True)
    assert any(_passes(probe, bytes(data)) for _ in range(20))


def _passes(probe: Decoder, data: bytes) -> bool:
    try:
        return bool(probe.video(data, False)["num_frames"] == 300)
    except BadRow:
        return False


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGSEGV, "corrupt_media"), (signal.SIGALRM, "decode_timeout")])
def test_a_decoder_that_dies_costs_a_single_video(tmp_path, number: signal.Signals, expected: str) -> None:
    probe = Decoder()
    assert probe.video(clip(), False)["num_frames"] == 20
    assert probe.child is not None
    os.kill(probe.child.pid, number)
    with pytest.raises(BadRow) as caught:
        probe.video(clip(), False)
    assert (caught.value.reason, caught.value.detail) == (expected, f"the decoder ended by {number.name}")
    assert probe.video(clip(), False)["num_frames"] == 20


def test_damage_of_any_kind_is_measured_or_rejected() -> None:
    """Bits flipped in the index of a real file: some crash the decoder's process, none crashes this one."""
    probe, data = Decoder(), shipped("carphone_distorted.mp4")
    start, reasons = data.index(b"moov"), []
    for seed in range(40):
        drawn, damaged = random.Random(seed), bytearray(data)
        for _ in range(40):
            damaged[drawn.randrange(start, len(data))] ^= 1 << drawn.randrange(8)
        try:
            assert probe.video(bytes(damaged), True)["num_frames"] > 0
        except BadRow as bad:
            reasons.append(bad.reason)
    assert len(reasons) > 5
    assert set(reasons) == {"corrupt_media"}
    assert probe.video(data, True)["num_frames"] == 120


ORPHAN = """
import sys, time
from ingest.clips import clip
from voco.ingest.media.decoder import Decoder
probe = Decoder()
probe.video(clip(), False)
print(probe.child.pid, flush=True)
time.sleep(100)
"""


def test_no_decoder_outlives_a_killed_worker() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    worker = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, env=environment)
    assert worker.stdout is not None
    decoder = int(worker.stdout.readline())
    assert b"voco.ingest.media.decoder" in Path(f"/proc/{decoder}/cmdline").read_bytes()
    worker.kill()
    worker.wait()
    deadline = time.monotonic() + 20
    while _alive(decoder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(decoder)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
