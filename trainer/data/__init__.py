"""From caches to batches: rows, order, splits, resident tensors."""
