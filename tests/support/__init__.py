"""What tests share: caches, runs, models and images made on the spot."""
