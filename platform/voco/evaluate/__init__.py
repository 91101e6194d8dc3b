"""Answers by the cached path, and what they are worth."""
