"""What `make demo` needs besides the product: its data, written in a dataset's own format, and its own local cluster."""
