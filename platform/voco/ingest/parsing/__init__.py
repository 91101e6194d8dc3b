"""JSON files parsed as streams."""
