"""What the tests of sources share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from cache.sources import Source, open_source, source_reader


@dataclass(frozen=True)
class Data:
    """The `data` section of a configuration."""

    source: str | Sequence[str]
    image: str | None = None
    label: str | Literal[False] | None = None
    key: str | None = None
    limit: int | None = None


def listed(source: Source) -> pa.Table:
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
