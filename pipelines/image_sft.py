"""Reads samples/, features/ if it is given, and a checkpoint (or a new model); writes a checkpoint directory.

Supervised fine-tuning under the job's compression method, on Ray Train workers with DeepSpeed.
"""

from voco.train.launch import run_training as run

__all__ = ["run"]
