"""Rows gathered by tensorstore are those of the other reader, and whatever is wrong is said by that one."""

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kpu import open_cache
from kpu.errors import CorruptError
from kpu.reading import tensorstore
from kpu.tools.verify import verify
from tests.support.builders import MASKED_ROW, ROWS
from tests.support.forging import forge_unit

ALL = [("alpha", "global"), ("alpha", "patch"), ("beta", "global"), ("beta", "layer6.patch")]
ORDER = np.random.default_rng(0).permutation(np.tile(np.arange(ROWS), 2))


@pytest.fixture(autouse=True)
def _many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorstore, "FEWEST_CORES", 1)


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Of every gather, the number of rows and whether they came."""
    calls: list[tuple[int, bool]] = []
    read = tensorstore.Gather.read

    def noted(self: tensorstore.Gather, rows: Any, out: Any, valid: Any) -> bool:
        done = read(self, rows, out, valid)
        calls.append((len(rows), done))
        return done

    monkeypatch.setattr(tensorstore.Gather, "read", noted)
    return calls


def own(path: Path, teacher: str, output: str, rows: Any) -> np.ndarray:
    """What the other reader gives: it serves few rows."""
    cache = open_cache(path)
    return np.concatenate([cache.read_encoded(teacher, output, [row]).values for row in rows])


def test_it_is_used_for_many_rows_on_many_cores(
    built_cache: Any, gathered: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for codec, cores, expected in (("uniform", 1, [(ROWS, True)]), ("uniform", 10**6, []), ("uniform in tars", 1, [])):
        monkeypatch.setattr(tensorstore, "FEWEST_CORES", cores)
        cache = open_cache(built_cache(codec).path)
        cache.read_encoded("alpha", "patch", slice(None))
        cache.read_encoded("alpha", "patch", [0, 1])
        assert gathered == expected
        gathered.clear()


@pytest.mark.parametrize("codec", ["uniform", "rotated", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("teacher", "output"), ALL)
def test_both_readers_give_the_same(
    built_cache: Any, gathered: list[tuple[int, bool]], codec: str, teacher: str, output: str
) -> None:
    path = built_cache(codec).path
    found = open_cache(path).read_encoded(teacher, output, ORDER).values
    assert gathered == [(len(ORDER), True)]
    assert found.tobytes() == own(path, teacher, output, ORDER).tobytes()


@pytest.mark.parametrize("codec", ["uniform", "fp32"])
def test_a_shard_that_disappears_is_no_zeros(cache_of: Any, codec: str) -> None:
    path = cache_of(codec).path
    cache = open_cache(path)
    (path / "teachers/alpha/patch/c/1/0/0").unlink()
    with pytest.raises(CorruptError, match="patch/c/1") as raised:
        cache.read_encoded("alpha", "patch", slice(None))
    assert raised.value.unit == 1 and raised.value.teacher == "alpha"


def test_a_shard_that_disappears_later_is_noticed(cache_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorstore, "_MEMORY", 0)  # else what was read before may serve
    tensorstore._engine.cache_clear()
    path = cache_of("uniform").path
    cache = open_cache(path)
    cache.read_encoded("alpha", "patch", slice(None))
    (path / "teachers/alpha/patch/c/1/0/0").unlink()
    with pytest.raises(CorruptError, match="patch/c/1"):
        cache.read_encoded("alpha", "patch", slice(None))


@pytest.mark.parametrize("output", ["global", "patch"])
def test_a_flipped_byte_is_named(cache_of: Any, output: str) -> None:
    path = cache_of("uniform").path
    shard = next(file for file in (path / f"teachers/alpha/{output}/c/0").rglob("*") if file.is_file())
    raw = bytearray(shard.read_bytes())
    raw[10] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(CorruptError, match="does not match its crc32c") as raised:
        open_cache(path).read_encoded("alpha", output, slice(None))
    assert raised.value.unit == 0


@pytest.mark.parametrize("codec", ["uniform", "rotated"])
@pytest.mark.parametrize("output", ["global", "patch"])
def test_a_header_that_promises_other_bytes_is_named(
    cache_of: Any, gathered: list[tuple[int, bool]], codec: str, output: str
) -> None:
    """Tensorstore alone would take two gigabytes of memory for it."""
    path = cache_of(codec).path
    layout = open_cache(path).teachers["alpha"].published.layouts[output]

    def edit(chunk: int, body: bytes) -> bytes:
        return body[:4] + (2**31 - 17).to_bytes(4, "little") + body[8:] if chunk == 0 else body

    forge_unit(path, layout, f"teachers/alpha/{output}", 1, edit)
    cache = open_cache(path)
    for _ in range(2):
        with pytest.raises(CorruptError, match="chunk 0 cannot be decoded") as raised:
            cache.read_encoded("alpha", output, slice(None))
        assert raised.value.unit == 1
    assert gathered == []
    assert not verify(path).ok


def test_swapped_shards_are_named(cache_of: Any) -> None:
    path = cache_of("fp32").path
    first, second = (path / f"teachers/alpha/patch/c/{unit}/0/0" for unit in (0, 1))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(CorruptError, match="not the shard that was committed"):
        open_cache(path).read_encoded("alpha", "patch", slice(None))


@pytest.mark.parametrize("codec", ["uniform", "rotated", "fp32", "fp16", "bf16"])
def test_masked_rows_are_no_alarm(built_cache: Any, gathered: list[tuple[int, bool]], codec: str) -> None:
    values = open_cache(built_cache(codec).path).read("alpha", "patch", slice(None), masked="nan")
    assert gathered == [(ROWS, True)]
    assert np.isnan(values[MASKED_ROW]).all()


def _sum(cache: Any, found: Any) -> None:
    found.put(int(cache.read_encoded("alpha", "patch", slice(None)).values.astype(np.int64).sum()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_reads_on(built_cache: Any) -> None:
    """As the workers of a data loader do; tensorstore's threads do not survive a fork."""
    cache = open_cache(built_cache("uniform").path)
    expected = int(cache.read_encoded("alpha", "patch", slice(None)).values.astype(np.int64).sum())
    context = multiprocessing.get_context("fork")
    for each in (cache, open_cache(cache.path)):
        found = context.Queue()
        worker = context.Process(target=_sum, args=(each, found))
        worker.start()
        assert found.get(timeout=60) == expected
        worker.join(60)
        assert worker.exitcode == 0
