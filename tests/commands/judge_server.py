"""An OpenAI-compatible server on loopback that behaves badly. The judged question says how: `flaky-3` fails twice, and so on."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar


class BadJudge(BaseHTTPRequestHandler):
    """POST /v1/chat/completions. `requests` counts them by question, `headers_seen` keeps the last Authorization header."""

    protocol_version = "HTTP/1.1"
    requests: ClassVar[Counter[str]] = Counter()
    bodies: ClassVar[list[dict[str, Any]]] = []
    authorization: ClassVar[list[str | None]] = []
    delay_s: ClassVar[float] = 0.0
    prints: ClassVar[bool] = False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = re.search(r"^Question: (.*)$", body["messages"][1]["content"], re.MULTILINE)
        assert question is not None
        name = question[1]
        BadJudge.requests[name] += 1
        BadJudge.bodies.append(body)
        BadJudge.authorization.append(self.headers["Authorization"])
        if BadJudge.prints:
            os.write(1, f"{name}\n".encode())  # one write, whatever other threads do
        time.sleep(BadJudge.delay_s)
        try:
            getattr(self, f"_{name.split('-')[0]}")(BadJudge.requests[name])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _send(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def _say(self, text: str | None) -> None:
        completion = {"model": "judge-0613", "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
        self._send(json.dumps(completion).encode(), Content_Type="application/json")

    def _yes(self, _: int) -> None:
        self._say("{'pred': 'yes', 'score': 5}")

    def _no(self, _: int) -> None:
        self._say('{"pred": "no", "score": 1.9}')

    def _flaky(self, count: int) -> None:
        """500, then a body that is no JSON, then a verdict."""
        if count == 1:
            self._send(b"oops", 500)
        elif count == 2:
            self._send(b"<html>gateway</html>")
        else:
            self._yes(count)

    def _busy(self, count: int) -> None:
        if count == 1:
            self._send(b'{"error": "too many requests"}', 429, Retry_After="0.2")
        else:
            self._yes(count)

    def _closed(self, count: int) -> None:
        if count == 1:
            self.close_connection = True  # without a byte
        elif count == 2:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices"')  # cut
            self.close_connection = True
        else:
            self._no(count)

    def _rambling(self, count: int) -> None:
        self._say("I think that the answer is right.")

    def _refusing(self, count: int) -> None:
        self._say(None)

    def _second(self, count: int) -> None:
        """A verdict when the question comes again."""
        self._say("hm" if count == 1 else "{'pred': 'no', 'score': 0}")

    def _dripping(self, _: int) -> None:
        """A byte every 50 ms, for ever."""
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        while True:
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.05)

    def _dead(self, _: int) -> None:
        self._send(b"out of order", 503)

    def _rejected(self, _: int) -> None:
        self._send(b'{"error": "the content was filtered"}', 400)

    def _denied(self, _: int) -> None:
        self._send(f"wrong key {self.headers['Authorization']}".encode(), 401)

    def _moved(self, _: int) -> None:
        self._send(b"", 307, Location="http://127.0.0.1:9/v1/chat/completions")

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


def start() -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), BadJudge)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    BadJudge.delay_s, BadJudge.prints = float(sys.argv[1]), True
    print(start().server_port, flush=True)
    sys.stdin.read()
