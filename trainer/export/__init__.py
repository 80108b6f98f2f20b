"""A trained student as its user runs it, on images."""
