"""Files of a run that are held against a digest when they are read: what was damaged since is told apart."""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from kpu.config.strict_yaml import parse_yaml
from kpu.errors import CorruptError
from kpu.util.digests import digest, digest_of
from kpu.util.strict_json import parse_json_object
from trainer.util.files import read_file

_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
DIGEST: Final = "digest"
"""The key of a document's digest of itself."""
DIGESTS: Final = "digests"
"""The key of the digests, by name, of files that were written before it."""
_HEAD: Final = b"# digest of what decides what is learned: "
ADVICE: Final = "copy the run again from where it is whole, or train again into another folder"
"""What to do about a damaged file of a run."""


def read_sealed(path: Path, expected: str | None) -> bytes:
    """The bytes of a file whose digest was kept; those of older releases have none, and are not checked.

    Raises:
        CorruptError: it cannot be read, or is not what was kept.
    """
    try:
        data = read_file(path)
    except OSError as error:
        raise CorruptError(str(path), f"cannot be read ({error.strerror}); {ADVICE}") from None
    if expected is not None:
        _check(path, digest(data), expected)
    return data


def dump_json(value: Mapping[str, Any] | Sequence[Any]) -> bytes:
    """Indented, with null for what is no finite number."""
    return (json.dumps(to_json(value), indent=1, ensure_ascii=False) + "\n").encode()


def seal_json(document: Mapping[str, Any]) -> bytes:
    """`dump_json` with a `digest` of the document added."""
    return dump_json({**document, DIGEST: digest_of(to_json(document))})


def open_json(path: Path, keys: Sequence[str], advice: str = ADVICE) -> dict[str, Any]:
    """What `seal_json` wrote, its `digest` left in; `keys` must be there.

    `advice` is what to do about a damaged file.

    Raises:
        CorruptError: it cannot be read, or is not what was written.
    """
    try:
        document = parse_json_object(read_sealed(path, None))
    except ValueError as error:
        raise CorruptError(str(path), f"is not JSON ({error}); {advice}") from None
    if DIGEST in document:
        body = {key: value for key, value in document.items() if key != DIGEST}
        _check(path, digest_of(to_json(body)), document[DIGEST])
    missing = [key for key in keys if key not in document]
    if missing:
        raise CorruptError(str(path), f"expected the keys {', '.join(keys)}, found no {missing[0]}; {advice}")
    return document


def digests_in(document: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The digests, by name, of files beside `path` that a document keeps; none in those of older releases.

    Raises:
        CorruptError: they are none, or of files elsewhere.
    """
    found = document.get(DIGESTS, {})
    if not isinstance(found, dict) or not all(
        _PLAIN_NAME.fullmatch(name) and isinstance(value, str) for name, value in found.items()
    ):
        raise CorruptError(str(path), f"{DIGESTS}: expected digests by the names of files, found {found!r}; {ADVICE}")
    return found


def seal_yaml(values: Mapping[str, Any], free: Collection[str]) -> bytes:
    """A YAML file below a comment with the digest of all values but those of the keys `free`, which may be edited."""
    head = _HEAD + _digest_without(values, free).encode()
    return head + b"\n" + yaml.safe_dump(dict(values), sort_keys=False).encode()


def open_yaml(path: Path, data: bytes, free: Collection[str]) -> dict[str, Any]:
    """The keys in the bytes of a file that `seal_yaml` wrote.

    Raises:
        CorruptError: they are not what was written.
    """
    head = data.partition(b"\n")[0]
    try:
        values = parse_yaml(data)
        found = _digest_without(values, free) if isinstance(values, dict) else ""
    except (ValueError, TypeError) as error:  # the last where a value is of YAML's own, such as a date
        raise CorruptError(str(path), f"cannot be understood ({error}); {ADVICE}") from None
    if not isinstance(values, dict):
        raise CorruptError(str(path), f"expected a mapping of keys, found {type(values).__name__}; {ADVICE}")
    if head.startswith(_HEAD):
        _check(path, found, head.removeprefix(_HEAD).decode(errors="replace"))
    return values


def to_json(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _digest_without(values: Mapping[str, Any], free: Collection[str]) -> str:
    return digest_of(to_json({str(key): value for key, value in values.items() if key not in free}))


def _check(path: Path, found: str, expected: Any) -> None:
    if found != expected:
        raise CorruptError(
            str(path), f"expected what the run kept (digest {expected}), found other bytes ({found}); {ADVICE}"
        )
