"""The on-disk feature cache: a plain Zarr v3 hierarchy with a plan, commit records and checks on every read.

from cache import open_cache

features = open_cache("my.kpu").read("dino", "global", [0, 1, 2])
"""

from cache.opened import Teacher
from cache.reader import Cache, Encoded, open_cache

__distribution__ = "kpu"
__all__ = ["Cache", "Encoded", "Teacher", "open_cache"]
