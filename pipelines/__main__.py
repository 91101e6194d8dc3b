"""`python -m pipelines ...` is the command `voco ...`; a Ray job starts its driver this way."""

from pipelines.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
