"""Videos: which frames are used, and their pixels."""
