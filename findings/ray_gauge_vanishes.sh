#!/usr/bin/env bash
# A gauge of ray.util.metrics that is set once disappears from the node's endpoint while its actor lives.
#
# Guess: a Prometheus gauge keeps the last value that was set until its process ends, as prometheus_client's does, so a value that
# changes rarely (a total, the number of an attempt, the best score) is set when it changes.
# Seen on 2026-11-30, Ray 2.60.0: a gauge that is set once is exported for about two report intervals
# (`metrics_report_interval_ms`, 10 s by default) and then no more; one that is set again each second stays. A dashboard shows gaps,
# and an alert on an absent series fires, for a healthy run. What must stay has to be set again by a thread.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "ray[default]==2.60.0"
cd "$folder"
cat > gauges.py <<'PY'
import os, threading, time, urllib.request

os.environ |= {
    "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_metrics_report_interval_ms": "2000",
    "RAY_gcs_server_port_wait_time_s": "120",
}
import ray

ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
port = ray.nodes()[0]["MetricsExportPort"]


@ray.remote(num_cpus=0)
class Reporter:
    def __init__(self):
        from ray.util.metrics import Gauge

        self.once, self.often = Gauge("set_once"), Gauge("set_often")
        self.once.set(1)
        threading.Thread(target=self.repeat, daemon=True).start()

    def repeat(self):
        while True:
            self.often.set(1)
            time.sleep(1)

    def ping(self):
        return True


reporter = Reporter.remote()
ray.get(reporter.ping.remote())
seen = {"set_once": [], "set_often": []}
started = time.monotonic()
while time.monotonic() - started < 30:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    for name, times in seen.items():
        if f"ray_{name}{{" in text:
            times.append(time.monotonic() - started)
    time.sleep(0.5)
assert ray.get(reporter.ping.remote())  # the actor is still there
for name, times in seen.items():
    print(f"{name}: first after {times[0]:.1f} s, last after {times[-1]:.1f} s of 30" if times else f"{name}: never")
once, often = seen["set_once"], seen["set_often"]
assert once and once[-1] < 20, "the gauge that was set once stays: the finding no longer holds"
assert often and often[-1] > 28, "the gauge that is set again disappears too"
PY
"$folder/venv/bin/python" gauges.py
