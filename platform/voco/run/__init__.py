"""How a run proceeds: its manifest, its claim on the cluster, its work units, and what W&B records of it."""
