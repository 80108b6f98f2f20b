"""Tar headers (POSIX ustar and pax, GNU, v7), read strictly.

`tarfile` takes a header that it cannot parse, and a file that ends early, for the end of the archive. Here both are
errors, and so is an archive without its end.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from kpu.errors import SourceError
from kpu.sources.files import Files, Piece

_BLOCK: Final = 512
_ZERO: Final = bytes(_BLOCK)
_LOCAL_WINDOW, _REMOTE_WINDOW = 8 * 2**10, 4 * 2**20
_LONGEST_NAME: Final = 2**20
_COMPRESSED: Final = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}


class Member(NamedTuple):
    """A file in a tar; `offset` and `length` are of its content, of which `head` is as much as was at hand.

    `kind` is the type flag of its header: `0` a regular file, `1` a hard and `2` a symbolic link to `target`, which has
    no content of its own, others are devices and pipes.
    """

    name: str
    offset: int
    length: int
    head: bytes
    kind: bytes = b"0"
    target: str = ""

    def text(self) -> bytes:
        """The content of a small member (up to 64 bytes)."""
        return self.head[: self.length]


class _Header(NamedTuple):
    name: bytes
    kind: bytes
    length: int
    target: bytes


class _Said(NamedTuple):
    """What pax and GNU headers say of the next member; -1 is no size."""

    name: bytes = b""
    target: bytes = b""
    size: int = -1


_NOTHING_SAID: Final = _Said()


def members(files: Files, tar: str) -> Iterator[Member]:
    """Regular files of a tar, in order. Raises SourceError as `all_members` does."""
    return (member for member in all_members(files, tar) if member.kind == b"0")


def all_members(files: Files, tar: str) -> Iterator[Member]:
    """Regular files, links, devices and pipes of a tar, in order; folders are passed over.

    Raises:
        SourceError: naming the tar and the offset: compressed, truncated, corrupt, or not a tar.
    """
    window = _Window(files, tar)
    offset, said = 0, _NOTHING_SAID
    if compression := next((kind for magic, kind in _COMPRESSED.items() if window.read(0, 8).startswith(magic)), None):
        raise SourceError(
            f"{files.name(tar)}: is compressed ({compression}); expected an uncompressed tar, whose images can be "
            "read in place: uncompress it (images hardly shrink)"
        )
    while True:
        block = window.read(offset, _BLOCK)
        if block == _ZERO:
            window.check_end(offset)
            return
        header = _parse(block)
        if header is None:
            raise window.failure(offset, "the header is corrupt" if len(block) == _BLOCK else "the tar ends too early")
        kind, start = header.kind, offset + _BLOCK
        length = header.length if said.size < 0 or kind in b"xgLK" else said.size
        if kind in b"123456":  # links, devices, folders, pipes have no content whatever their size says
            length = 0
        offset = start + -(-length // _BLOCK) * _BLOCK
        if start + length > window.size:
            raise window.failure(start - _BLOCK, f"the tar ends {start + length - window.size} bytes too early")
        if kind in b"xLK":
            if length > _LONGEST_NAME:
                raise window.failure(start - _BLOCK, f"a name of {length} bytes")
            said = _extended(window, kind, window.read(start, length), start, said)
            continue
        if kind == b"S":
            raise window.failure(start - _BLOCK, "a sparse member; pack the tar without --sparse")
        if kind in b"07" and not (said.name or header.name).endswith(b"/"):
            yield Member(_text(said.name or header.name), start, length, window.read(start, min(length, 64)))
        elif kind not in b"057g":
            yield Member(_text(said.name or header.name), start, 0, b"", kind, _text(said.target or header.target))
        if kind != b"g":
            said = _NOTHING_SAID


def is_header_of(block: bytes, length: int) -> bool:
    """Whether a block is the header of a regular file of `length` bytes."""
    header = _parse(block)
    return header is not None and header.length == length and header.kind in b"07"


def _parse(block: bytes) -> _Header | None:
    """The fields of a header, or None if its checksum is wrong."""
    if len(block) < _BLOCK:
        return None
    try:
        checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
        if int(block[148:156].strip(b" \0") or b"0", 8) != checksum:
            return None
        length = _number(block[124:136])
    except ValueError:
        return None
    name = block[:100].partition(b"\0")[0]
    if block[257:265] == b"ustar\x0000":  # GNU keeps other things where POSIX has the prefix
        prefix = block[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    kind = block[156:157]
    if kind in b"0\0":
        return _Header(name, b"0", length, b"") if length >= 0 else None
    return _Header(name, kind, length, block[157:257].partition(b"\0")[0]) if length >= 0 else None


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU: binary, for what octal digits cannot hold
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _extended(window: "_Window", kind: bytes, data: bytes, offset: int, said: _Said) -> _Said:
    """What a GNU long name or pax records add to what is `said` of the next member."""
    if kind == b"L":
        return said._replace(name=data.partition(b"\0")[0])
    if kind == b"K":
        return said._replace(target=data.partition(b"\0")[0])
    at = 0
    while at < len(data.rstrip(b"\0")):
        digits, _, _ = data[at : at + 20].partition(b" ")
        record = data[at : at + int(digits)] if digits.isdigit() else b""
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or not record.endswith(b"\n"):
            raise window.failure(offset - _BLOCK, "a corrupt pax record")
        if key == b"path":
            said = said._replace(name=value)
        elif key == b"linkpath":
            said = said._replace(target=value)
        elif key == b"size":
            said = said._replace(size=int(value) if value.isdigit() else -1)
        elif key.startswith(b"GNU.sparse."):
            raise window.failure(offset - _BLOCK, "a sparse member; pack the tar without --sparse")
        at += len(record)
    return said


class _Window:
    """The part of a tar that was read last: small members lie in it together with their headers."""

    def __init__(self, files: Files, tar: str) -> None:
        self._files, self._tar = files, tar
        self.size = files.size(tar)
        self._length = _LOCAL_WINDOW if files.local else _REMOTE_WINDOW
        self._start, self._data = 0, b""

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes, fewer only where the tar ends."""
        stop = min(offset + length, self.size)
        if offset < self._start or stop > self._start + len(self._data):
            wanted = max(min(max(length, self._length), self.size - offset), 0)
            self._start = offset
            self._data = self._files.fetch([Piece(self._tar, self._tar, offset, wanted)])[0] if wanted else b""
        return self._data[offset - self._start : offset - self._start + length]

    def check_end(self, offset: int) -> None:
        """Require the two blocks of zeros that end a tar, and nothing but zeros after them."""
        if self.size - offset < 2 * _BLOCK:
            raise self.failure(offset, "the tar ends within its end-of-archive blocks")
        for at in range(offset, self.size, 2**20):
            data = self.read(at, min(2**20, self.size - at))
            if data.count(0) != len(data):
                beyond = at + len(data) - len(data.lstrip(b"\0"))
                raise self.failure(beyond, "data after the end of the archive (joined tars, or a hole in this one)")

    def failure(self, offset: int, reason: str) -> SourceError:
        what = "is not a tar, or" if offset == 0 else "is truncated or corrupt:"
        if self.size == 0:
            what, reason = "is not a tar:", "it is empty"
        tar = self._files.name(self._tar)
        return SourceError(f"{tar}: {what} {reason} at offset {offset}; restore it or leave it out")
