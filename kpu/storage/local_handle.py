"""An open file of a cache in a folder."""

import os

from kpu.errors import CorruptError, StorageError, StorageFault
from kpu.util.faults import FAULTS


class LocalHandle:
    """An open file. The descriptor lives until the last read that uses it has ended."""

    remote = False
    fetch_bytes = 128 << 10

    def __init__(self, descriptor: int, size: int, key: str) -> None:
        self._key, self.size = key, size
        self._descriptor: _Descriptor | None = _Descriptor(descriptor)

    def read(self, offset: int, length: int) -> bytes:
        descriptor = self._descriptor
        if descriptor is None:
            raise StorageError(f"{self._key}: read after close")
        try:
            data = os.pread(descriptor.number, length, offset)
            while len(data) < length:  # a signal, or more than the kernel gives at once
                more = os.pread(descriptor.number, length - len(data), offset + len(data))
                if not more:
                    raise CorruptError(self._key, f"ends before byte {offset + length}")
                data += more
        except OSError as error:
            kind = StorageFault if error.errno in FAULTS else StorageError
            raise kind(f"{self._key}: cannot read: {error.strerror}") from error
        return data

    def close(self) -> None:
        self._descriptor = None


class _Descriptor:
    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)
