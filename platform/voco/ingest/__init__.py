"""Source files of every dataset to `samples/` and `rejects/`. Never imports torch."""
