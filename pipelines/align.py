"""Reads samples/ of captions, features/ if given, and a model (or a new one); writes a checkpoint with a trained projector.

LLaVA's first stage: only the projector is trained, for a frozen language model and without <voco> tokens.
"""

from voco.train.launch import run_training as run

__all__ = ["run"]
