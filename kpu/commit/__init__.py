"""Writing a cache: publish, resolve conflicts, commit."""
