"""Image and video files: where they are read from, and the checks that they pass."""
