"""Ray Train workers with DeepSpeed: order, batches, one step, checkpoints."""
