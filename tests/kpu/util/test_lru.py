from concurrent.futures import ThreadPoolExecutor

import pytest

from kpu.util.lru import LRUCache


def test_the_values_used_last_are_kept() -> None:
    made: list[int] = []
    recent: LRUCache[int, int] = LRUCache(2)

    def make(key: int) -> int:
        made.append(key)
        return key * 10

    assert [recent.get(key, make) for key in (1, 2, 1, 3, 1, 2)] == [10, 20, 10, 30, 10, 20]
    assert made == [1, 2, 3, 2]


def test_a_size_that_changes() -> None:
    size = 3
    recent: LRUCache[int, int] = LRUCache(lambda: size)
    for key in range(3):
        recent.get(key, int)
    size = 1
    recent.get(3, int)
    assert [recent.get(key, lambda key: -key) for key in (3, 2)] == [3, -2]


def test_what_cannot_be_made_is_not_kept() -> None:
    recent: LRUCache[int, int] = LRUCache(2)
    with pytest.raises(ZeroDivisionError):
        recent.get(0, lambda key: 1 // key)
    assert recent.get(0, lambda key: key) == 0


def test_threads_get_the_value_of_their_key() -> None:
    recent: LRUCache[int, int] = LRUCache(3)
    with ThreadPoolExecutor(8) as pool:
        keys = [key % 7 for key in range(2000)]
        assert list(pool.map(lambda key: recent.get(key, lambda key: key + 1), keys)) == [key + 1 for key in keys]
