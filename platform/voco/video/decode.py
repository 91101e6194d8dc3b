"""Frames of an encoded video by PyAV (FFmpeg): frame k is the k-th picture in the order in which they are shown."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from voco.errors import message_line
from voco.video.frame_index import FrameIndex, count_frames, read_index
from voco.video.sample_frames import frames_at_rate

NEVER = -(1 << 62)  # before every mark
MAX_SECONDS = 1e6  # eleven days; a damaged time stamp makes more of a short clip

Frames = npt.NDArray[np.uint8]


class Video:
    """An encoded video in memory. Raises ValueError when it cannot be opened or shows no picture.

    A container with trustworthy times is only demuxed here, and later decoded from the nearest key picture on. Any other (AVI,
    GIF, a cut stream) is decoded once to count its pictures, and read in order.
    """

    def __init__(self, data: bytes) -> None:
        import av

        self._av, self._data = av, data
        try:
            self._open()
            index = read_index(self._container, self._stream)
            self._running: Iterator[tuple[int, Any]] = iter(())  # at its end; opening again costs as much as many frames
            self.index: FrameIndex = self._count() if index is None else index
        except (av.FFmpegError, ValueError) as error:
            raise ValueError(f"not a video that can be opened: {message_line(error)}") from error
        ticks = self.index.ticks
        if not ticks:
            raise ValueError("a video without a picture that can be decoded")
        self.num_frames = len(ticks)
        self.duration_s = float((self.index.end - ticks[0]) * self.index.tick)
        if self.duration_s > MAX_SECONDS:
            raise ValueError(f"a video of {self.num_frames} frames and {self.duration_s:.3g} s: its times are damaged")
        self.fps = self.num_frames / self.duration_s  # the mean
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._size: tuple[int, int] | None = None

    def times(self, numbers: list[int]) -> list[float]:
        """Seconds from the first picture to each of those with these numbers."""
        ticks = self.index.ticks
        return [float((ticks[number] - ticks[0]) * self.index.tick) for number in numbers]

    def at_rate(self, rate: float) -> list[int]:
        """Numbers of the pictures that are shown at 0, 1/rate, 2/rate ... seconds, each once."""
        return frames_at_rate(self.index.ticks, self.index.end, self.index.tick, rate)

    def frames(self, numbers: list[int]) -> Frames:
        """(F, H, W, 3) uint8 RGB of the pictures with these numbers, turned as the video's display matrix says.

        Raises ValueError for pictures that cannot be decoded, and for those that the container counts but that are not in it.
        """
        marks = {self._mark(number): number for number in sorted(set(numbers))}
        pictures: dict[int, Frames] = {}
        try:
            for mark in marks:
                if mark not in pictures and not (self._seek(mark) and self._read(mark, marks, pictures)):
                    self._open()  # whatever the seek did: in order, every picture comes out
                    self._read(mark, marks, pictures)
                if mark not in pictures:
                    raise ValueError(f"frame {marks[mark]} of the {self.num_frames} that the container counts cannot be decoded")
        except self._av.FFmpegError as error:
            raise ValueError(f"frames cannot be decoded: {message_line(error)}") from error
        return np.stack([pictures[self._mark(number)] for number in numbers])

    def _mark(self, number: int) -> int:
        """What identifies a decoded picture: its time, or its number where pictures are counted."""
        return self.index.ticks[number] if self.index.keys else number

    def _open(self) -> None:
        """Start reading from the beginning."""
        self._container = self._av.open(io.BytesIO(self._data), metadata_errors="ignore")
        stream = self._container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise ValueError("no video stream that can be decoded")
        stream.codec_context.thread_count = 1
        self._stream = stream
        self._fed, self._last, self._from_start = -1, NEVER, True
        self._running = self._decode(self._container.demux(stream))

    def _count(self) -> FrameIndex:
        self._open()
        times: list[int] = []
        frames = (frame for _, frame in self._decode(self._container.demux(self._stream), times))
        index = count_frames(frames, times, self._stream)
        self._open()
        return index

    def _decode(self, packets: Iterator[Any], times: list[int] | None = None) -> Iterator[tuple[int, Any]]:
        """(mark, frame) in the decoder's order. Notes the position of the last packet that the decoder got."""
        counted, by_time = 0, times is None and bool(self.index.keys)
        for packet in packets:
            if by_time and packet.size:
                self._fed = max(self._fed, self.index.stored.get(packet.pts, self._fed))
            if times is not None and packet.size and packet.dts is not None:
                times.append(packet.dts)
            for frame in packet.decode():
                mark = frame.pts if by_time else counted
                counted += 1
                if mark is not None:
                    self._last = max(self._last, mark)
                    yield mark, frame

    def _seek(self, mark: int) -> bool:
        """Continue, or start at the key picture before; False when the container does not lead there."""
        index = self.index
        if not index.keys:
            if self._last >= mark:
                self._open()
            return True
        time, position = index.key_before(mark)
        if self._last < mark and position <= self._fed:
            return True
        self._container.seek(time, stream=self._stream)
        packets = self._container.demux(self._stream)
        first = next(packets, None)
        if first is None or index.stored.get(first.pts, len(index.stored)) > position:
            return False
        self._fed, self._last, self._from_start = -1, NEVER, False
        self._running = self._decode(itertools.chain([first], packets))
        return True

    def _read(self, mark: int, marks: dict[int, int], pictures: dict[int, Frames]) -> bool:
        """Decode on until this picture is there; others of `marks` that come out before it are kept too."""
        for decoded, frame in self._running:
            if decoded in marks and decoded not in pictures:
                if frame.is_corrupt and not self._from_start:
                    return False  # what it refers to lies before the key picture
                pictures[decoded] = self._pixels(frame)
            if decoded == mark:
                return True
        return False

    def _pixels(self, frame: Any) -> Frames:
        """RGB in the size of the first picture that was read."""
        self._size = self._size or (frame.width, frame.height)
        width, height = self._size
        # by default each call starts new threads, which takes several times as long as the conversion
        pixels: Frames = self._reformatter.reformat(frame, width, height, "rgb24", threads=1).to_ndarray()
        return np.rot90(pixels, frame.rotation // 90) if frame.rotation % 360 else pixels
