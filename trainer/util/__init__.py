"""Small things that all of training uses."""
