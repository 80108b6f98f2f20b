"""Teachers from a Python file or module of the user's."""
