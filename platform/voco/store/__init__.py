"""Storage: local paths and S3, the schema of every table, and the one reader of `samples/`."""
