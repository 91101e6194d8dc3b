"""An outside package that adds one of everything to VoCo; `tests/test_extending.py` runs it."""
