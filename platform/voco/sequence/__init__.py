"""Text and images to token ids at their final length."""
