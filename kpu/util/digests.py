"""Digests of bytes, and JSON documents that carry a digest of themselves."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from kpu.errors import CorruptError
from kpu.util.strict_json import parse_json

DIGEST_BYTES = 16


def digest_bytes(*parts: bytes | bytearray | memoryview) -> bytes:
    """BLAKE2b-128 of the concatenated parts, raw (16 bytes)."""
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        state.update(part)
    return state.digest()


def digest(*parts: bytes | bytearray | memoryview) -> str:
    """BLAKE2b-128 of the concatenated parts as 32 hexadecimal digits."""
    return digest_bytes(*parts).hex()


def canonical_json(value: Any) -> bytes:
    """The canonical byte string of `value`: sorted keys, no spaces, UTF-8, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def digest_of(value: Any) -> str:
    """Digest of a JSON value's canonical form."""
    return digest(canonical_json(value))


def seal_document(document: Mapping[str, Any]) -> bytes:
    """Serialise `document` with a `digest` of itself added. The result is canonical: any changed byte shows."""
    return canonical_json({**document, "digest": digest_of(dict(document))})


def open_document(raw: bytes, file: str, *, unit: int | None = None, teacher: str | None = None) -> dict[str, Any]:
    """Parse what `seal_document` wrote and check it byte for byte; the `digest` key is left in.

    Raises:
        CorruptError: not JSON, no digest, or any byte differs from the canonical form.
    """
    try:
        document = parse_json(raw)
    except ValueError as error:
        raise CorruptError(file, f"is not JSON ({error})", unit=unit, teacher=teacher) from None
    if not isinstance(document, dict) or "digest" not in document:
        raise CorruptError(file, "carries no digest of itself", unit=unit, teacher=teacher)
    body = {key: value for key, value in document.items() if key != "digest"}
    if raw != seal_document(body):
        raise CorruptError(file, "does not match the digest it carries", unit=unit, teacher=teacher)
    return document
