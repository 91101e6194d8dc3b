"""Job files: their blocks, their checks, and the jobs inside a flow or a sweep."""
