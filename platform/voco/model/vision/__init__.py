"""Frozen vision towers, and the pixels that they take."""
