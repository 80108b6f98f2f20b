"""Looking after a cache: verify, repair, status, bench."""
