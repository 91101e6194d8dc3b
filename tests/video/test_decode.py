"""Which picture comes out: the number that a picture spells, real files against decoders of others, and damage."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numbered_clips import CELLS, FRAMES, Cell, clip, picture, read_number, shown_at
from real_data import SHARED

from voco.video.decode import Video

CLIPS = sorted(
    path for path in SHARED.glob("**/*") if path.suffix in (".mp4", ".mov", ".mkv", ".avi", ".webm") and path.is_file()
)
PICKS = [47, 5, 95, 0, 60, 61, 11, 12, 23, 80, 5]  # backwards, across groups of pictures, and one twice


def numbers(cell: Cell, frames: np.ndarray) -> list[int]:
    upright = np.rot90(frames, -1, axes=(1, 2)) if cell.variant == "turned" else frames
    return [read_number(frame) for frame in upright]


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_the_picture_that_was_asked_for(cell: Cell) -> None:
    video = Video(clip(cell))
    assert video.num_frames == FRAMES
    assert numbers(cell, video.frames(PICKS)) == PICKS
    assert [numbers(cell, Video(clip(cell)).frames([number]))[0] for number in (95, 37)] == [95, 37]
    shown = shown_at(cell)
    assert video.times(list(range(FRAMES))) == pytest.approx(shown, abs=0.006)  # GIF counts in hundredths
    at_second = [
        max(number for number in range(FRAMES) if shown[number] <= second + 0.001) for second in range(int(shown[-1]) + 1)
    ]
    assert video.at_rate(1.0)[: len(at_second)] == at_second
    assert video.duration_s == pytest.approx(shown[-1] + 1 / 24, abs=0.05)
    assert video.fps == pytest.approx(FRAMES / video.duration_s)


@pytest.mark.parametrize("width", [16, 24, 48, 50])
def test_narrow_pictures(width: int) -> None:
    cell = Cell("mp4", "h264", "closed B")
    assert numbers(cell, Video(clip(cell, width)).frames([3, 80])) == [3, 80]


def test_a_clip_cut_without_encoding_shows_what_its_edit_list_shows() -> None:
    """Cut in the middle of a group of pictures: those before the cut are in the file, hidden, and only decoded."""
    data = _cut(clip(Cell("mp4", "h264", "closed B"), group=24), 30)
    video = Video(data)
    assert video.num_frames == FRAMES - 30
    cell = Cell("mp4", "h264", "plain")
    assert numbers(cell, video.frames([0, 1, 40, FRAMES - 31])) == [30, 31, 70, FRAMES - 1]
    assert (video.times([0]), video.duration_s) == ([0.0], pytest.approx((FRAMES - 30) / 24, abs=0.05))


def _cut(data: bytes, first: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="mp4") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        cut = round(Fraction(first, 24) / stream.time_base)
        kept = [packet for packet in source.demux(stream) if packet.size]
        key = max(number for number, packet in enumerate(kept) if packet.is_keyframe and packet.pts <= cut)
        for packet in kept[key:]:
            packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, copy
            target.mux(packet)
    return buffer.getvalue()


def test_a_vp8_picture_that_is_only_referred_to_is_not_counted() -> None:
    """The show_frame bit of picture 30 cleared (RFC 6386 section 9.1): decoded, never shown. One encoder pass makes none."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(clip(Cell("webm", "vp8", "plain")))) as source, av.open(buffer, "w", format="webm") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for number, packet in enumerate(packet for packet in source.demux(stream) if packet.size):
            if number == 30:
                hidden = av.Packet(bytes([bytes(packet)[0] & ~0x10]) + bytes(packet)[1:])
                hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
                packet = hidden
            packet.stream = copy
            target.mux(packet)
    video = Video(buffer.getvalue())
    assert video.num_frames == FRAMES - 1
    assert [read_number(frame) for frame in video.frames([29, 30, 94])] == [29, 31, 95]


def test_a_recording_without_duration_and_index() -> None:
    """A browser's MediaRecorder writes WebM as a live stream: no duration, no cues, a segment of unknown size."""
    cell = Cell("webm", "vp8", "plain")
    buffer = io.BytesIO()
    with av.open(io.BytesIO(clip(cell))) as source, av.open(buffer, "w", format="webm", options={"live": "1"}) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                packet.stream = copy
                target.mux(packet)
    video = Video(buffer.getvalue())
    assert (video.num_frames, video.duration_s) == (FRAMES, pytest.approx(4, abs=0.05))
    assert numbers(cell, video.frames([90, 13])) == [90, 13]


@pytest.mark.parametrize("codec", ["h264", "hevc", "mpeg4"])
def test_a_stream_that_starts_inside_an_open_group(codec: str) -> None:
    """The pictures before its first key picture need one that is not there: what can be decoded is counted, in order."""
    buffer = io.BytesIO()
    with (
        av.open(io.BytesIO(clip(Cell("matroska", codec, "open B")))) as source,
        av.open(buffer, "w", format="matroska") as target,
    ):
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        second = [number for number, packet in enumerate(packets) if packet.is_keyframe][1]
        for packet in packets[second:]:
            packet.stream = copy
            target.mux(packet)
    video = Video(buffer.getvalue())
    everything = [read_number(frame) for frame in video.frames(list(range(video.num_frames)))]
    clean = [number for number in everything if number >= 12]
    assert clean == list(range(clean[0], FRAMES))
    assert clean[0] <= 13
    assert [read_number(frame) for frame in Video(buffer.getvalue()).frames([video.num_frames - 1, 20])] == [95, everything[20]]
    assert 3 < video.duration_s < 4


def test_a_container_that_counts_pictures_that_are_not_there() -> None:
    """The last packets are empty of pictures: an error that names the frame, never an older picture in its place."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(clip(Cell("webm", "vp8", "plain")))) as source, av.open(buffer, "w", format="webm") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for number, packet in enumerate(packet for packet in source.demux(stream) if packet.size):
            if number >= 84:
                broken = av.Packet(bytes(packet)[:2])
                broken.pts, broken.dts, broken.time_base = packet.pts, packet.dts, packet.time_base
                packet = broken
            packet.stream = copy
            target.mux(packet)
    video = Video(buffer.getvalue())
    assert read_number(video.frames([40])[0]) == 40
    with pytest.raises(ValueError, match=r"frames? "):
        video.frames([40, 90])


def test_a_time_stamp_that_is_damaged_is_an_error() -> None:
    """A last packet ten years after the others: no duration of that size reaches a table."""
    buffer, complete = io.BytesIO(), clip(Cell("matroska", "mjpeg", "plain"))
    with av.open(io.BytesIO(complete)) as source, av.open(buffer, "w", format="matroska") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                packet.stream = copy
                if packet.pts > 3900:
                    packet.pts = packet.dts = packet.pts + 315_000_000_000
                target.mux(packet)
    with pytest.raises(ValueError, match="its times are damaged"):
        Video(buffer.getvalue())


def test_a_picture_with_cover_art_first() -> None:
    """A cover is a video stream too, of one picture: the moving one is read."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(clip(Cell("mp4", "h264", "plain")))) as source, av.open(buffer, "w", format="matroska") as target:
        stream = source.streams.video[0]
        cover = target.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 128, "yuvj420p"
        copy = target.add_stream_from_template(stream)
        target.mux(cover.encode(av.VideoFrame.from_ndarray(picture(255), format="rgb24")))
        target.mux(cover.encode())
        for packet in source.demux(stream):
            if packet.size:
                packet.stream = copy
                target.mux(packet)
    video = Video(buffer.getvalue())
    assert (video.num_frames, read_number(video.frames([33])[0])) == (FRAMES, 33)


@pytest.mark.skipif(not CLIPS, reason="no ../shared/data")
@pytest.mark.parametrize("path", CLIPS, ids=lambda path: path.name)
def test_real_files_by_a_sequential_decode(path: Path) -> None:
    """Every picture of a decode from start to end, by FFmpeg through PyAV in the plainest way, is found by its number."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        expected = [np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) for frame in container.decode(stream)]
    video = Video(path.read_bytes())
    assert video.num_frames == len(expected)
    picks = [(7 * k + 3) % len(expected) for k in range(12)]
    for number, frame in zip(picks, video.frames(picks), strict=True):
        assert np.array_equal(frame, expected[number]), number
    last = len(expected) - 1
    assert np.array_equal(Video(path.read_bytes()).frames([last])[0], expected[last])


@pytest.mark.skipif(not CLIPS, reason="no ../shared/data")
def test_times_of_a_real_file_by_its_publishers() -> None:
    """`nasa_13013.mp4` has six streams; torchcodec's own list has the time of every frame of the one that is read."""
    file = SHARED / "clips" / "nasa_13013.mp4"
    listed = json.loads(Path(f"{file}.stream3.all_frames_info.json").read_text())
    video = Video(file.read_bytes())
    expected = [float(frame["pts_time"]) for frame in listed]
    assert video.times(list(range(video.num_frames))) == pytest.approx([time - expected[0] for time in expected], abs=1e-3)
    assert video.times(video.at_rate(2.0)) == pytest.approx([k / 2 for k in range(len(video.at_rate(2.0)))], abs=0.034)


@pytest.mark.parametrize("name", ["video_0.mov", "video_90.mov", "video_180.mov", "video_270.mov"])
@pytest.mark.skipif(not CLIPS, reason="no ../shared/data")
def test_turned_as_another_decoder_turns(name: str) -> None:
    decord = pytest.importorskip("decord")
    data = (SHARED / "clips" / name).read_bytes()
    expected = decord.VideoReader(io.BytesIO(data), num_threads=1)[0].asnumpy().astype(int)
    frame = Video(data).frames([0])[0].astype(int)
    assert frame.shape == expected.shape
    assert np.abs(frame - expected).mean() < 3
