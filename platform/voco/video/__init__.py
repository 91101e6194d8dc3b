"""Videos: which frames, their pixels, and the cache of every frame."""
