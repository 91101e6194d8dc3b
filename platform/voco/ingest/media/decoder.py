"""Decodes media in a child process: decoders are native code, and a damaged file can crash them or make them hang.

One child serves all media of a worker: it reads a file from its pipe and answers with one line of JSON. When a signal kills the
child, the current medium is rejected and the next one gets a new child.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from contextlib import suppress
from typing import IO, Any

from voco.ingest.source_row import BadRow

DECODE_S = 120  # for one image, or to open one video and decode up to three frames; then an alarm ends the child
REASONS = {signal.SIGALRM: "decode_timeout"}  # by the signal that ended the child; any other means a damaged file
IMAGE, VIDEO_START, VIDEO = 0, 1, 2  # tasks: all pixels of an image; a video's first frame; its middle and last frame too


class Decoder:
    """A child process that decodes. It starts at the first file."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """End the child; the next call starts a new one. The child also ends with this object and with its process."""
        if self.child is not None:
            self._end()
            self.child = None

    def image(self, data: bytes) -> None:
        """Decode every pixel of an image whose header was read, to RGB. Raises the same as `video`, and unsupported_format."""
        self._request(IMAGE, data)

    def video(self, data: bytes, full: bool) -> dict[str, Any]:
        """Width and height in pixels as decoded, duration_s, fps and num_frames of an encoded video.

        Opens it and decodes its first frame; `full`: the middle and the last frame too.
        Raises BadRow: corrupt_media, decode_timeout. Raises RuntimeError when the child itself fails.
        """
        return self._request(VIDEO if full else VIDEO_START, data)

    def _request(self, task: int, data: bytes) -> dict[str, Any]:
        child = self._running()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(len(data).to_bytes(8, "big") + bytes([task]))
            child.stdin.write(data)
            child.stdin.flush()
            line = child.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            self.close()
            raise _ended(child.returncode)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BadRow(answer.get("reason", "corrupt_media"), answer["error"])
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        if self.child is None:
            path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            command = [sys.executable, "-P", "-m", "voco.ingest.media.decoder"]
            self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            self._end = weakref.finalize(self, _end, self.child)
        return self.child


def _ended(code: int) -> Exception:
    if code >= 0:
        return RuntimeError(f"the decoder's process ended with {code}; its message is above")
    name = signal.Signals(-code)
    return BadRow(REASONS.get(name, "corrupt_media"), f"the decoder ended by {name.name}")


def _end(child: subprocess.Popen[bytes]) -> None:
    """A closed pipe tells the child to end; a busy child ends with its alarm."""
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # unsent bytes of a file that killed the child
                pipe.close()
    child.wait()


def decode_image(data: bytes) -> dict[str, Any]:
    """The child's answer about one image: nothing, or the reason and the error."""
    from voco.image.encoded import read_rgb
    from voco.image.fault import ImageFault

    try:
        read_rgb(data)
    except ImageFault as fault:
        return {"reason": fault.reason, "error": fault.detail}
    return {}


def measure_video(data: bytes, full: bool) -> dict[str, Any]:
    """The child's answer about one video: its measures, or the error."""
    from voco.video.decode import Video

    try:
        video = Video(data)
        last = video.num_frames - 1
        numbers = sorted({0, last // 2, last}) if full else [0]
        _, height, width, _ = video.frames(numbers).shape
    except ValueError as error:
        return {"error": str(error)}
    return {"width": width, "height": height, "duration_s": video.duration_s, "fps": video.fps, "num_frames": video.num_frames}


def serve_requests(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer until the pipe is closed. A request is 8 bytes of size, 1 byte of task and the file."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    while len(head := requests.read(9)) == 9:
        data = requests.read(int.from_bytes(head[:8], "big"))
        signal.alarm(DECODE_S)
        answer = decode_image(data) if head[8] == IMAGE else measure_video(data, head[8] == VIDEO)
        signal.alarm(0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def main() -> None:
    # Hide the decoders' own messages, one for each damaged block; Python's stderr still reaches the log
    sys.stderr = os.fdopen(os.dup(2), "w")
    answers = os.fdopen(os.dup(1), "wb")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    serve_requests(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
