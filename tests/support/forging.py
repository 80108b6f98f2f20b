"""Changes to the files of a cache under honest checksums: digests and seals are recomputed, so that they count."""

import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kpu.shards.chunk import CRC_BYTES, crc
from kpu.shards.layout import ArrayLayout
from kpu.util.digests import DIGEST_BYTES, digest, digest_of

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
    write_document(file, document)


def write_document(file: Path, document: Document) -> None:
    """As `seal_document`, of what that refuses as well: NaN, infinity, half a surrogate pair."""
    text = partial(json.dumps, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    sealed = {**document, "digest": digest(text(document).encode(errors="surrogatepass"))}
    file.write_bytes(text(sealed).encode(errors="surrogatepass"))


def forge_group(file: Path, edit: Callable[[Document], object]) -> None:
    """Change the attribute `kpu` of a teacher's `zarr.json`, which carries a digest of its bytes."""
    document = json.loads(file.read_bytes())
    attributes = document["attributes"]["kpu"]
    edit(attributes)
    attributes["digest"] = _PLACEHOLDER
    raw = json.dumps(document).encode()
    file.write_bytes(raw.replace(_PLACEHOLDER.encode(), digest(raw).encode()))


def reseal(root: Path) -> None:
    """Recompute, from the leaves up, every digest in a cache that a changed file has made wrong.

    What makes no sense any more stays as it is.
    """
    for folder in sorted(path for path in (root / "teachers").iterdir() if path.is_dir()):
        with suppress(*_SENSELESS):
            forge_group(folder / "zarr.json", lambda kpu, folder=folder: _renew(kpu["files"], folder))
    with suppress(*_SENSELESS):
        forge_document(root / "plan.json", lambda document: _renew_plan(document["plan"], root))
    for owner in (root / "images", *sorted((root / "teachers").iterdir())):
        for record in sorted(owner.glob("commits/*.json")):
            with suppress(*_SENSELESS):
                forge_document(record, partial(_renew_record, root=root, owner=owner))


_SENSELESS = (KeyError, TypeError, ValueError, AttributeError, OSError, RecursionError)


def _renew(digests: dict[str, str], folder: Path) -> None:
    for name in digests:
        digests[name] = digest((folder / name).read_bytes())


def _renew_plan(plan: Document, root: Path) -> None:
    _renew(plan["metadata"], root)
    for part in range(len(plan["samples_digests"])):
        plan["samples_digests"][part] = digest((root / f"samples/part-{part:06d}.parquet").read_bytes())


def _renew_record(record: Document, root: Path, owner: Path) -> None:
    record["plan"] = digest_of(json.loads((root / "plan.json").read_bytes())["plan"])
    if "files" in record:
        raw = (owner / "zarr.json").read_bytes()
        kpu = json.loads(raw)["attributes"]["kpu"]
        record["fingerprint"] = digest_of([kpu["model_fingerprint"], kpu["encoding_fingerprint"]])
        record["files"] = {"zarr.json": digest(raw)}
