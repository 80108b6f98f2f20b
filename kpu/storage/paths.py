"""The keys of everything in a cache: POSIX paths relative to the cache's root."""

import re

from kpu.errors import ConfigError

ROOT = "zarr.json"
PLAN = "plan.json"
TEMPORARY = ".tmp"
QUARANTINE = ".tmp/quarantine"
RUNS = "runs"
TEACHERS = "teachers/zarr.json"
IMAGES = "images"
IMAGE_ARRAYS = ("digest", "status", "size")
UNITS_PER_PART = 64
RESERVED = frozenset({"commits", "stats", "runs", "c"})

_LARGEST = {"json": 2**28, "jsonl": 2**28, "parquet": 2**31, "safetensors": 2**32}
_LARGEST_SHARD = 2**34

_NAME = re.compile(r"[a-z0-9_.-]+")


def check_name(kind: str, name: str) -> str:
    """Return `name` if it can be a folder of the cache; `kind` is what the message calls it.

    Raises:
        ConfigError: the name has other characters than a-z 0-9 _ . -, starts with a dot, or is reserved.
    """
    if (
        not _NAME.fullmatch(name)
        or name.startswith(".")
        or name in RESERVED
        or name.endswith((".json", ".safetensors"))
    ):
        raise ConfigError(
            f"{kind} name {name!r}: expected lower-case letters, digits, '_', '.' and '-', not starting with a dot, "
            f"not ending in .json or .safetensors and none of {sorted(RESERVED)}; choose another name"
        )
    return name


def samples_part(part: int) -> str:
    return f"samples/part-{part:06d}.parquet"


def group(folder: str) -> str:
    return f"{folder}/zarr.json"


def teacher(name: str) -> str:
    return f"teachers/{name}"


def commit(folder: str, unit: int) -> str:
    """Commit record of one unit of `images` or of a teacher's folder."""
    return f"{folder}/commits/{unit:06d}.json"


def shard(array: str, unit: int, item_dims: int) -> str:
    """The one object that holds `unit` of the Zarr array in folder `array`; `item_dims` is the rank of one row."""
    return "/".join([array, "c", str(unit), *["0"] * item_dims])


def tar(array: str, unit: int) -> str:
    """The one object that holds `unit` of the column of tars in folder `array`."""
    return f"{array}/{unit:06d}.tar"


def largest(key: str) -> int:
    """Bytes that an object under `key` has at most: the bound on what is read into memory before it is understood.

    Far above what a cache of 1e9 rows needs: its plan has 9 MB, rotated axes of 4,096 channels 90 MB.
    """
    return _LARGEST.get(key.rpartition(".")[2], _LARGEST_SHARD)
