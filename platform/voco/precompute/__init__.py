"""What is computed once and read many times: vision features and per-frame VoCo caches."""
