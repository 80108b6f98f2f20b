"""The folder of a run: what is in it, and what is checked before training."""
