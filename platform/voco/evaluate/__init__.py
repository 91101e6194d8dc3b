"""Answers by the cached path, their marks and their scores."""
