"""Benchmark metrics, one file a rule."""
