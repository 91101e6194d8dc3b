"""JSON files of any size, parsed as streams."""
