"""Whose Python code may run, and running it."""
