"""Vision features and per-frame VoCo caches: computed once, read many times."""
