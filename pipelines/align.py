"""Reads samples/ of captions, features/ and a language model (or a new one); writes a checkpoint with a trained projector.

LLaVA's first stage: the projector alone learns to speak to the frozen language model, without <voco> tokens.
"""

from voco.train.launch import run_training as run

__all__ = ["run"]
