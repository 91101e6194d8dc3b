"""Reads samples/, frame_cache/ and an image checkpoint; writes a checkpoint directory that keeps its frozen compressor.

Temporal fine-tuning on caches: only pass 2 is trained; the model that wrote the caches stays unchanged and is copied with it.
"""

from voco.train.launch import run_training as run

__all__ = ["run"]
