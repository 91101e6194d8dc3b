"""Checkpoints in the layouts of other projects: reading and writing."""
