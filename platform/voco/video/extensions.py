"""The extensions under which video files are looked up. Their content is recognised by its bytes, not by the extension."""

VIDEO_EXTENSIONS = (".mp4", ".mkv", ".webm", ".mov", ".avi")  # lookups try them in this order
