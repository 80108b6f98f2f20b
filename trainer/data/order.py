"""The order in which rows come: a pure function of (digest, seed, epoch), never of who asks or for how much at once.

A row is named by its global number: the rows of several caches, or of the kept part of one, counted through.
"""

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.sections import OrderConfig

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

_ROUNDS: Final = 8  # a round takes one word of a key
_LEAST_BITS: Final = 6  # halves of fewer bits mix badly
_BLOCK: Final = 1 << 16  # places that are permuted at a time, so that they stay in the processor's cache


def scramble(x: U64) -> U64:
    """The output function of SplitMix64, a bijection of 64-bit words (Steele, Lea and Flood 2014; Stafford's mix 13).

    Args:
        x: uint64 of any shape, left as it is.

    Returns:
        uint64 of the same shape.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Order(ABC):
    """A permutation of the rows for each epoch."""

    rows: int
    """How many rows an epoch has."""

    def take(self, epoch: int, start: int, stop: int) -> I64:
        """Rows at the places start..stop of an epoch's order.

        Returns:
            int64 [stop - start], each in 0..rows-1; the places 0..rows of one epoch give every row once.

        Raises:
            ValueError: The epoch is negative, or the places are not inside 0..rows.
        """
        if epoch < 0:
            raise ValueError(f"epoch: expected a number from 0, found {epoch}")
        if not 0 <= start <= stop <= self.rows:
            raise ValueError(f"places: expected a range inside 0..{self.rows}, found {start}..{stop}")
        return self._take(epoch, start, stop)

    @abstractmethod
    def _take(self, epoch: int, start: int, stop: int) -> I64: ...


class FullOrder(Order):
    """All rows mixed with all: a keyed permutation, without a table, whatever the number of rows."""

    def __init__(self, rows: int, digest: str, seed: int) -> None:
        """An order of `rows` rows of the data with this `digest`."""
        self.rows = rows
        self._digest, self._seed = digest, seed

    def _take(self, epoch: int, start: int, stop: int) -> I64:
        return _permute(start, stop, self.rows, _key("rows", self._digest, self._seed, epoch))


class _Windows(NamedTuple):
    """One epoch's windows. The units in their order: `units` int64 [U], `ends` int64 [U] the places where each would
    end were rows not mixed. Window w holds the places `bounds[w]`..`bounds[w + 1]`.
    """

    epoch: int
    units: I64
    ends: I64
    bounds: I64


class WindowedOrder(Order):
    """Units permuted, then rows mixed inside each window of `window` consecutive units of that order.

    A reader that keeps one window reads each unit once, from beginning to end.
    """

    def __init__(self, unit_starts: Sequence[int] | I64, digest: str, seed: int, window: int) -> None:
        """An order of the units that hold the rows `unit_starts[i]`..`unit_starts[i + 1]`; they may be empty.

        Args:
            unit_starts: int64 [U + 1]: the first row of each unit, ascending from 0, and the number of rows.
            digest: What the rows are rows of.
            seed: The seed of the run.
            window: How many units are mixed.

        Raises:
            ValueError: `unit_starts` does not ascend from 0, or `window` is below 1.
        """
        self._starts = _checked_starts(unit_starts)
        if window < 1:
            raise ValueError(f"window: expected a number above 0, found {window}")
        self.rows = int(self._starts[-1])
        self._digest, self._seed, self._window = digest, seed, window
        self._latest: _Windows | None = None

    def _take(self, epoch: int, start: int, stop: int) -> I64:
        windows = self._windows(epoch)
        parts = [np.empty(0, np.int64)]
        window = int(np.searchsorted(windows.bounds, start, side="right")) - 1
        while start < stop:
            first, last = int(windows.bounds[window]), int(windows.bounds[window + 1])
            end = min(stop, last)
            if start < end:
                key = _key("window", self._digest, self._seed, epoch, window)
                parts.append(self._rows_at(windows, first + _permute(start - first, end - first, last - first, key)))
                start = end
            window += 1
        return np.concatenate(parts)

    def _rows_at(self, windows: _Windows, places: I64) -> I64:
        """The rows at `places` of the order of the units, before rows are mixed."""
        unit = np.searchsorted(windows.ends, places, side="right")
        backwards = windows.ends[unit] - places
        rows: I64 = self._starts[windows.units[unit] + 1] - backwards
        return rows

    def _windows(self, epoch: int) -> _Windows:
        latest = self._latest  # read once: threads may take from different epochs
        if latest is None or latest.epoch != epoch:
            count = len(self._starts) - 1
            units = _permute(0, count, count, _key("units", self._digest, self._seed, epoch))
            ends = np.cumsum(np.diff(self._starts)[units])
            inner = ends[self._window - 1 : -1 : self._window]
            self._latest = latest = _Windows(epoch, units, ends, np.r_[0, inner, self.rows])
        return latest


def make_order(config: OrderConfig, unit_starts: Sequence[int] | I64, digest: str, seed: int) -> Order:
    """The order that `config` names.

    Args:
        config: The section `order`.
        unit_starts: int64 [U + 1]: the first row of each unit, ascending from 0, and the number of rows.
        digest: What the rows are rows of: the plan digests of all caches.
        seed: The seed of the run.

    Raises:
        ValueError: `unit_starts` does not ascend from 0.
    """
    if config.name == "windowed":
        return WindowedOrder(unit_starts, digest, seed, config.window)
    return FullOrder(int(_checked_starts(unit_starts)[-1]), digest, seed)


def _checked_starts(unit_starts: Sequence[int] | I64) -> I64:
    starts = np.asarray(unit_starts, np.int64)
    if starts.ndim != 1 or not len(starts) or starts[0] != 0 or (np.diff(starts) < 0).any():
        raise ValueError(f"unit_starts: expected row numbers that ascend from 0, found {starts}")
    return starts


def _key(purpose: str, digest: str, seed: int, epoch: int, window: int = 0) -> U64:
    """uint64 [_ROUNDS], one word for each round of a permutation."""
    message = struct.pack("<QQQ", seed, epoch, window) + f"{purpose}\0{digest}".encode()
    state = hashlib.blake2b(message, digest_size=8 * _ROUNDS, person=b"kpu-order")
    return np.frombuffer(state.digest(), "<u8").astype(np.uint64)


def _permute(start: int, stop: int, size: int, key: U64) -> I64:
    """Images of start..stop-1 under the permutation of 0..size-1 that `key` picks; int64 [stop - start].

    A Feistel network permutes the next power of two; what leaves 0..size-1 walks on until it is back inside (Black and
    Rogaway 2002), which takes fewer than two steps on average.
    """
    bits = max(_LEAST_BITS, (size - 1).bit_length())
    images = np.arange(start, stop, dtype=np.uint64)
    for begin in range(0, len(images), _BLOCK):
        part = images[begin : begin + _BLOCK]
        outside = np.arange(len(part))
        while len(outside):
            walked = _feistel(part[outside], bits, key)
            part[outside] = walked
            outside = outside[walked >= size]
    return images.astype(np.int64)


def _feistel(x: U64, bits: int, key: U64) -> U64:
    """A bijection of words of `bits` bits, at least 2: each half in turn is masked by a hash of the other."""
    low = bits // 2
    left, right = x >> np.uint64(low), x & np.uint64((1 << low) - 1)
    for word in key.reshape(-1, 2):
        left = left ^ (scramble(right ^ word[0]) >> np.uint64(64 - bits + low))
        right = right ^ (scramble(left ^ word[1]) >> np.uint64(64 - low))
    return (left << np.uint64(low)) | right
