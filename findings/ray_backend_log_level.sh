#!/usr/bin/env bash
# Ray 2.60.0, seen 2026-11-29: RAY_BACKEND_LOG_LEVEL=fatal makes the driver's stderr longer, not shorter.
#
# One would guess that a process whose C++ log is limited to fatal errors prints nothing on a healthy run. In fact each process that
# reads the variable first reports, at level INFO and past Python's sys.stderr, that it has set the level, as a number. The driver
# prints the line itself; the lines of worker processes are forwarded to it as well. Without the variable a healthy driver is silent.
# To keep both this line and, say, Ray Data's notice about `max_restarts` out of a log, file descriptor 2 has to be filtered while
# ray.init runs.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check ray==2.60.0

cat > "$folder/healthy.py" <<'PYTHON'
import ray

ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="WARNING")
assert ray.get(ray.remote(lambda: 1).remote()) == 1
PYTHON

run() {
  env "$@" RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=disabled "$folder/venv/bin/python" "$folder/healthy.py" 2>&1 >/dev/null
}
line='Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL to'
default=$(run -u RAY_BACKEND_LOG_LEVEL)
quiet=$(run RAY_BACKEND_LOG_LEVEL=fatal)
printf 'without the variable:\n%s\nwith fatal:\n%s\n' "$default" "$quiet"
if grep -q "$line" <<< "$default"; then echo "changed: the line is printed without the variable"; exit 1; fi
grep -q " I .*$line" <<< "$quiet" || { echo "changed: no line at level INFO"; exit 1; }
