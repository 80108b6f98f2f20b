"""What needs torch, or is about its checkpoints."""
