#!/usr/bin/env bash
# Ray 2.60.0 with torch 2.13.0, seen 2026-11-30: a Ray Train run of one worker, without any dataset, starts five further processes.
#
# One would guess two processes: the controller and the worker. In fact there are also a PlacementGroupCleaner, a
# SynchronizationActor, a PreemptionWatcher and, although the trainer got no datasets, a DatasetManager and Ray Data's
# _AutoscalingCoordinatorActor. Each is an actor in a process that imports ray.train, pandas and pyarrow: two to five CPU seconds
# apiece on the machine where this was seen, so on a laptop a training of a few seconds spends most of its time on them.
# RAY_TRAIN_ENABLE_PREEMPTION_WATCHER=0 leaves out the watcher; the DatasetManager has no switch. This prints the actors' classes and
# fails when they change.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "ray[train,default]==2.60.0" torch==2.13.0

cat > "$folder/train.py" <<'PYTHON'
import os

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.state import list_actors


def work():
    return 1


info = ray.init(address="local", num_cpus=3, include_dashboard=True, dashboard_port=0, log_to_driver=False, logging_level="ERROR")
os.environ["RAY_API_SERVER_ADDRESS"] = f"http://{info.dashboard_url}"
TorchTrainer(work, scaling_config=ScalingConfig(num_workers=1), run_config=RunConfig(storage_path=os.environ["STORE"])).fit()
classes = sorted(actor.class_name.split(".")[-1] for actor in list_actors(limit=100))
print(*classes)
PYTHON

run() {
  env "$@" STORE="$folder/runs" RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=disabled \
    "$folder/venv/bin/python" "$folder/train.py" 2>/dev/null | tail -1
}
default=$(run -u RAY_TRAIN_ENABLE_PREEMPTION_WATCHER)
without=$(run RAY_TRAIN_ENABLE_PREEMPTION_WATCHER=0)
printf 'by default:          %s\nwithout the watcher: %s\n' "$default" "$without"
for class in _AutoscalingCoordinatorActor DatasetManager PlacementGroupCleaner PreemptionWatcher SynchronizationActor TrainController RayTrainWorker; do
  grep -qw "$class" <<< "$default" || { echo "changed: no $class"; exit 1; }
done
if grep -qw PreemptionWatcher <<< "$without"; then echo "changed: the variable has no effect"; exit 1; fi
