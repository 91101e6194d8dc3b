"""The method: masks, positions, the model, its caches. Torch and transformers only, never Ray or DeepSpeed."""
