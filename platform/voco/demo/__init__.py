"""What `make demo` needs besides the product: data in the formats of real datasets, and a local Ray cluster."""
