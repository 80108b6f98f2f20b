"""What the tests of sources share."""

import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from kpu.sources import ImageSource, open_source, source_reader

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@dataclass(frozen=True)
class Data:
    """The `data` section of a configuration."""

    source: str | Sequence[str]
    image: str | None = None
    label: str | Literal[False] | None = None
    key: str | None = None
    limit: int | None = None


def listed(source: ImageSource) -> pa.Table:
    """The whole listing."""
    return pa.Table.from_batches(list(source.batches()))


def listing(source: Any, **options: Any) -> pa.Table:
    """The whole listing of a source; paths may be Path objects."""
    names = [str(name) for name in source] if isinstance(source, list | tuple) else str(source)
    return listed(open_source(Data(names, **options)))


def contents(source: Any, **options: Any) -> dict[str, bytes]:
    """What a reader finds under each key of the listing."""
    names = [str(name) for name in source] if isinstance(source, list | tuple) else str(source)
    opened = open_source(Data(names, **options))
    table = listed(opened)
    found = source_reader(opened.spec).read(table)
    assert len(found) == table.num_rows
    return dict(zip(table["key"].to_pylist(), found, strict=True))


def left_out(source: Any, **options: Any) -> dict[str, tuple[int, str]]:
    """What a listing of a source leaves out: counts and examples by reason."""
    names = [str(name) for name in source] if isinstance(source, list | tuple) else str(source)
    opened = open_source(Data(names, **options))
    listed(opened)
    return {item.reason: (item.count, item.example) for item in opened.left_out}


def fill(root: Path, *names: str) -> Path:
    """Create files that hold their own name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def pack(path: Path, members: Iterable[tuple[str, bytes]], kind: str = "ustar", mtime: float = 0) -> Path:
    """Write a tar of files; a name that ends in `->x` or `=>x` is a symbolic or a hard link to x."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for name, data in members:
            name, soft, target = name.partition("->") if "->" in name else name.partition("=>")
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            if target:
                info.type, info.linkname = tarfile.SYMTYPE if soft == "->" else tarfile.LNKTYPE, target
            tar.addfile(info, io.BytesIO(data))
    return path
