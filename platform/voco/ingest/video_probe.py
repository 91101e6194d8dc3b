"""Measures videos in a process of its own: the decoder is native code, and a damaged file can crash it or hang it.

One child process serves all videos of a worker: it is sent a file and answers with one line of JSON. When it dies of a
signal, the one video is rejected and the next gets a new child.
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

from voco.ingest.items import BadRow

SECONDS = 120  # to open one video and decode up to three frames; then the child ends itself
REASONS = {signal.SIGALRM: "decode_timeout"}  # by the signal that ended the child; any other is the file's damage


class VideoProbe:
    """Calls give width and height in pixels as decoded, duration_s, fps and num_frames of an encoded video."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """End the child; the next call starts a new one. It ends too when this object or its process does."""
        if self.child is not None:
            self._end()
            self.child = None

    def __call__(self, data: bytes, full: bool) -> dict[str, Any]:
        """Open the video and decode its first frame; `full`: the middle and the last one too.

        Raises BadRow: corrupt_media, decode_timeout. Raises RuntimeError when the child fails by itself, as without decord.
        """
        child = self._running()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(len(data).to_bytes(8, "big") + bytes([full]))
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
            raise BadRow("corrupt_media", answer["error"])
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        if self.child is None:
            path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            command = [sys.executable, "-P", "-m", "voco.ingest.video_probe"]
            self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            self._end = weakref.finalize(self, _end, self.child)
        return self.child


def _ended(code: int) -> Exception:
    if code >= 0:
        return RuntimeError(f"the video decoder's process ended with {code}; its message is above")
    name = signal.Signals(-code)
    return BadRow(REASONS.get(name, "corrupt_media"), f"the decoder ended by {name.name}")


def _end(child: subprocess.Popen[bytes]) -> None:
    """A closed pipe is the child's sign to end; one that is still at work ends with its own alarm."""
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # the rest of a file that killed the child
                pipe.close()
    child.wait()


def measure(data: bytes, full: bool) -> dict[str, Any]:
    """What the parent is told of one video, in the child."""
    from voco.video.decode import Video

    try:
        video = Video(data)
        last = video.num_frames - 1
        numbers = sorted({0, last // 2, last}) if full else [0]
        _, height, width, _ = video.frames(numbers).shape
        (start, _), (_, end) = video.reader.get_frame_timestamp([0, last]).tolist()
    except ValueError as error:
        return {"error": str(error)}
    duration = end - start
    if not 0 < duration < float("inf"):
        return {"error": f"a video of {duration} s"}
    return {"width": width, "height": height, "duration_s": duration, "fps": video.fps, "num_frames": video.num_frames}


def serve(asked: IO[bytes], answers: IO[bytes]) -> None:
    """Answer until the pipe is closed."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    while len(head := asked.read(9)) == 9:
        data = asked.read(int.from_bytes(head[:8], "big"))
        signal.alarm(SECONDS)
        answer = measure(data, bool(head[8]))
        signal.alarm(0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def main() -> None:
    # The decoder's own messages, one for each damaged block, are not for the log; ours are.
    sys.stderr = os.fdopen(os.dup(2), "w")
    answers = os.fdopen(os.dup(1), "wb")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
