"""Small things that every room uses: digests, errors of the machine, strict JSON, an LRU cache."""
