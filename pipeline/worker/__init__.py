"""One worker: images in, committed units out."""
