"""The extensions of video files that are read. Says nothing about content: containers are recognised by their bytes."""

VIDEO_EXTENSIONS = (".mp4", ".mkv", ".webm", ".mov", ".avi")  # lookups try them in this order
