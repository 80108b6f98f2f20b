"""Caches that are one and the same, or of the same images: their rows would count twice."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from kpu.errors import ConfigError
from kpu.reading.cache import Cache
from trainer.run.sources import images_of


def require_distinct(caches: Sequence[Cache]) -> None:
    """Refuse a cache that is given twice, be it by a link or as a copy.

    Raises:
        ConfigError: naming both paths.
    """
    for one, two in combinations(caches, 2):
        if _place(one) == _place(two) or (one.plan.digest == two.plan.digest and _teachers(one) == _teachers(two)):
            known = "" if one.path == two.path else f" (it is {one.path}, or a copy of it)"
            raise ConfigError(f"caches: expected each cache once, found {two.path} again{known}; remove one")


def shared_images(caches: Sequence[Cache]) -> list[str]:
    """A note for each two caches of the same images, with other teachers or views."""
    return [
        f"{one.path} and {two.path} are of the same images: what both have of an image counts twice"
        for one, two in combinations(caches, 2)
        if one.plan.digest == two.plan.digest or images_of(one) == images_of(two)
    ]


def _place(cache: Cache) -> str:
    """Where a cache is, whatever links lead there."""
    return cache.path if "://" in cache.path else str(Path(cache.path).resolve())


def _teachers(cache: Cache) -> dict[str, str]:
    return {name: teacher.published.fingerprint for name, teacher in cache.teachers.items()}
