"""Changes to the files of a cache under honest checksums: digests and seals are recomputed, so that they count."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cache.chunks import CRC_BYTES, crc
from cache.digests import DIGEST_BYTES, digest, digest_of, seal_document
from cache.shards import ArrayLayout

_PLACEHOLDER = "." * (2 * DIGEST_BYTES)
Document = dict[str, Any]


def forge_shard(data: bytes, layout: ArrayLayout, rows: int, edit: Callable[[int, bytes], bytes]) -> tuple[bytes, str]:
    """A Zarr shard whose chunks are what `edit(chunk, bytes without checksum)` gives, and its seal."""
    tail = DIGEST_BYTES + 16 * layout.chunks_per_shard + CRC_BYTES
    index = np.frombuffer(data[-tail + DIGEST_BYTES : -CRC_BYTES], "<u8").reshape(-1, 2).copy()
    parts, offset = [], 0
    for chunk in range(-(-rows // layout.chunk_rows)):
        start, size = (int(word) for word in index[chunk])
        body = edit(chunk, data[start : start + size - CRC_BYTES])
        parts.append(body + crc(body))
        index[chunk] = offset, len(parts[-1])
        offset += len(parts[-1])
    payload, raw = b"".join(parts), index.tobytes()
    seal = digest(payload, raw)
    return payload + bytes.fromhex(seal) + raw + crc(raw), seal


def forge_unit(root: Path, layout: ArrayLayout, folder: str, unit: int, edit: Callable[[int, bytes], bytes]) -> None:
    """`forge_shard` for one unit of the array in `folder` of a cache, whose commit record then describes it."""
    shard, (owner, array) = root / layout.key(folder, unit), folder.rsplit("/", 1)
    data, seal = forge_shard(shard.read_bytes(), layout, layout.valid_rows(unit), edit)
    shard.write_bytes(data)

    def describe(record: Document) -> None:
        record["outputs" if owner != "images" else "arrays"][array] |= {"bytes": len(data), "seal": seal}

    forge_document(root / f"{owner}/commits/{unit:06d}.json", describe)


def forge_document(file: Path, edit: Callable[[Document], object]) -> None:
    """Change a document that carries a digest of itself, such as a commit record or the plan."""
    document = json.loads(file.read_bytes())
    del document["digest"]
    edit(document)
    file.write_bytes(seal_document(document))


def plan_digest(root: Path) -> str:
    """What commit records say of the plan as it is written in the cache."""
    return digest_of(json.loads((root / "plan.json").read_bytes())["plan"])


def forge_group(file: Path, edit: Callable[[Document], object]) -> None:
    """Change the attribute `kpu` of a teacher's `zarr.json`, which carries a digest of its bytes."""
    document = json.loads(file.read_bytes())
    edit(document["attributes"]["kpu"])
    document["attributes"]["kpu"]["digest"] = _PLACEHOLDER
    seal_group(file, json.dumps(document).encode())


def seal_group(file: Path, raw: bytes) -> None:
    """Write a teacher's `zarr.json` from bytes with dots in the place of its digest."""
    file.write_bytes(raw.replace(_PLACEHOLDER.encode(), digest(raw).encode()))
