"""Which pictures an encoded video shows, and when: read from its packets where they can be trusted, else by decoding it once."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

# Codecs of which each packet is one shown picture (VP8: unless it says otherwise), and whose decoders keep the packet's time
COUNTED = {"h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg"}
UNTIMED = {"avi", "gif"}  # FFmpeg's names of containers without presentation times, or whose pictures build on each other


class FrameIndex(NamedTuple):
    """The pictures of a video in the order in which they are shown.

    `ticks` are their times in units of `tick` seconds, ascending; the last picture ends at `end`. `stored` gives the position in
    the file of each packet by its time, and `keys` the (time, position) of each picture at which a decoder can start; both are
    empty when the pictures can only be counted while decoding from the start.
    """

    ticks: Sequence[int]
    end: int
    tick: Fraction
    stored: dict[int, int]
    keys: Sequence[tuple[int, int]]

    def key_before(self, time: int) -> tuple[int, int]:
        """The last picture at which decoding can start so that the one shown at `time` comes out."""
        return self.keys[bisect.bisect_right(self.keys, (time, len(self.stored))) - 1]


def read_index(container: Any, stream: Any) -> FrameIndex | None:
    """The index of an opened container by its packets alone; None where they do not say which pictures will be shown.

    A picture's place is its presentation time, so it does not matter in which order pictures are stored. Packets that an edit
    list hides are decoded but not shown.
    """
    if stream.codec_context.codec.canonical_name not in COUNTED or UNTIMED & set(container.format.name.split(",")):
        return None
    shown: dict[int, int] = {}  # duration by time
    stored: dict[int, int] = {}
    keys: list[tuple[int, int]] = []
    for position, packet in enumerate(packet for packet in container.demux(stream) if packet.size):
        if packet.pts is None or packet.pts in stored:
            return None
        stored[packet.pts] = position
        if packet.is_keyframe:
            keys.append((packet.pts, position))
        if not packet.is_discard and _is_shown(stream, packet):
            shown[packet.pts] = packet.duration or 0
    if not shown or not keys or keys != sorted(keys) or keys[0][0] > min(stored):
        return None  # pictures before the first key cannot be decoded: what a decoder shows of them is its own choice
    return _index(sorted(shown), shown[max(shown)], stream, stored, keys)


def _is_shown(stream: Any, packet: Any) -> bool:
    """False for a VP8 picture that others refer to and that is never shown (RFC 6386 section 9.1)."""
    return stream.codec_context.codec.canonical_name != "vp8" or bool(bytes(packet)[0] >> 4 & 1)


def count_frames(frames: Iterator[Any], packet_times: Sequence[int], stream: Any) -> FrameIndex:
    """The index of a video of which all `frames` were decoded in order, without their pictures.

    AVI has no times, only an order of packets: FFmpeg's guess for a picture is off where pictures are stored in another order,
    so the k-th one is shown at the k-th of `packet_times`. Without times that ascend, pictures follow at the stated rate.
    """
    times, duration = [], 0
    for frame in frames:
        times.append(frame.pts)
        duration = frame.duration or 0
    count = len(times)
    if stream.container.format.name == "avi":
        times = sorted(packet_times)
    if len(times) != count or not _ascends(times):
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        times, duration = [round(number / rate / stream.time_base) for number in range(count)], 0
    return _index(times, duration, stream, {}, [])


def _ascends(times: Sequence[int | None]) -> bool:
    known = [time for time in times if time is not None]
    return len(known) == len(times) and all(before < after for before, after in itertools.pairwise(known))


def _index(
    times: Sequence[int], duration: int, stream: Any, stored: dict[int, int], keys: Sequence[tuple[int, int]]
) -> FrameIndex:
    """The last picture lasts as long as its packet says; without that, as the mean of those before it, or at the stated rate."""
    if times and duration <= 0:
        if len(times) > 1:
            duration = round((times[-1] - times[0]) / (len(times) - 1))
        elif stream.average_rate:
            duration = round(1 / stream.average_rate / stream.time_base)
    return FrameIndex(times, times[-1] + max(1, duration) if times else 0, Fraction(stream.time_base), stored, keys)
