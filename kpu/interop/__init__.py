"""Caches in other formats."""
