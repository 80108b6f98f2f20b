"""Locations of caches and images as text: what may be opened, what may be printed, and what an artefact may name.

A location may hold a password (`sftp://user:password@host`, a signed URL). It would travel with a cache in its plan, so
it is refused where the user gives it; what older releases recorded is hidden wherever it is shown.
"""

import re
from typing import Final

from kpu.errors import ConfigError

STORES: Final = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "oci", "oss", "memory"})
"""Protocols of object stores, which a cache or run may name: they lead to one place, and run and unpack nothing.
(`memory` is of this process alone.)"""
_PLAIN_COLON: Final = frozenset({"github", "git"})  # org:repository@branch, path:repository@branch: no password
_WHOLE_USER: Final = frozenset(
    {"http", "https", "git+http", "git+https", "webdav", "webdavs"}
)  # a user name alone is a token here; `abfs://container@account` is not
_HIDDEN: Final = "***"

_USER: Final = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)://(?P<user>[^/\s]*)@")
_SECRET: Final = re.compile(
    r"(?P<key>[?&;#](?:x-(?:amz|goog)-(?:signature|credential|security-token)|(?:aws)?accesskeyid|signature|sig|"
    r"[a-z_-]*(?:token|secret|passw(?:or)?d|passwd|pwd|api_?key|account_?key|access_?key|authorization|jwt|session|credential)"
    r"[a-z_-]*|key|auth|code)=)[^&;\s'\"]+",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """A location, or a message with some in it, without passwords, tokens and signatures."""
    if "://" not in text:
        return text
    return _SECRET.sub(rf"\g<key>{_HIDDEN}", _USER.sub(_without_user, text))


def refuse_password(place: str, option: str) -> None:
    """Refuse a location that the user gives with a password, token or signature in it; `option` is where he gives it.

    Raises:
        ConfigError: it has one.
    """
    hidden = redact(place)
    protocol, separator, rest = place.partition("://")
    host, _, path = rest.partition("/")
    if separator and "@" in path and ":" in host and not host.rpartition(":")[2].isdecimal() and "@" not in host:
        hidden = f"{protocol}://{_HIDDEN}@{path.rpartition('@')[2]}"  # a password with a slash in it
    elif separator and hidden == place and re.search(r":[^/]*\s[^/]*@", rest):
        hidden = f"{protocol}://{_HIDDEN}@{rest.rpartition('@')[2]}"  # or with a space
    if hidden != place:
        raise ConfigError(
            f"{option}: {hidden}: expected a location without a password, token or signature, which would be kept with "
            "what is made and printed; give it by the environment (AWS_PROFILE or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_*), or in fsspec's own "
            'configuration (~/.config/fsspec/*.json: {"sftp": {"username": ..., "password": ...}})'
        )


def is_plain(place: str) -> bool:
    """Whether a location is a local path or an object store, without a chain of file systems (`a::b`)."""
    protocol, separator, _ = place.partition("://")
    return not separator or (protocol.lower() in STORES and "::" not in place)


def require_plain(place: str, *, said_by: str, advice: str) -> str:
    """Return a location that a cache, run or export names, if it may be opened without the user naming it himself.

    `said_by` is the file that names it, `advice` what the user can do, as a clause.

    Raises:
        ConfigError: it leads elsewhere than to a local path or an object store.
    """
    if is_plain(place):
        return place
    known = ", ".join(sorted(STORES - {"memory"}))
    raise ConfigError(
        f"{said_by}: names {redact(place)!r}: expected a local path or an object store ({known}); any other place is "
        f"opened only where you name it yourself: {advice}"
    )


def _without_user(found: "re.Match[str]") -> str:
    protocol, user = found["protocol"], found["user"]
    name, colon, _ = user.partition(":")
    if protocol.lower() in _PLAIN_COLON or not user or (not colon and protocol.lower() not in _WHOLE_USER):
        return found[0]
    return f"{protocol}://{name if colon else _HIDDEN}{':' + _HIDDEN if colon else ''}@"
