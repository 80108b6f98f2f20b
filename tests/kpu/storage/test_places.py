"""Locations: passwords are never kept or shown, and what an artefact names is a folder or an object store."""

import pytest

from kpu.errors import ConfigError
from kpu.sources.locate import locate
from kpu.storage.open import open_storage
from kpu.storage.places import is_plain, redact, refuse_password, require_plain


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("sftp://me:hunter2@host/images", "sftp://me:***@host/images"),
        ("https://ghp_token@host/x.tar", "https://***@host/x.tar"),
        ("https://me:hunter2@host:8443/x", "https://me:***@host:8443/x"),
        ("simplecache::https://me:hunter2@host/x", "simplecache::https://me:***@host/x"),
        (
            "https://b.s3.amazonaws.com/x.tar?X-Amz-Algorithm=A&X-Amz-Credential=AKIA%2F1&X-Amz-Signature=abc",
            "https://b.s3.amazonaws.com/x.tar?X-Amz-Algorithm=A&X-Amz-Credential=***&X-Amz-Signature=***",
        ),
        (
            "https://a.blob.core.windows.net/c/x?sv=2022&sig=abc%3D",
            "https://a.blob.core.windows.net/c/x?sv=2022&sig=***",
        ),
        ("https://h/x?access_token=abc&y=1", "https://h/x?access_token=***&y=1"),
        (
            "https://h/x?AWSAccessKeyId=A&Signature=B&Expires=1",
            "https://h/x?AWSAccessKeyId=***&Signature=***&Expires=1",
        ),
    ],
)
def test_passwords_are_hidden_and_refused(place: str, shown: str) -> None:
    assert redact(place) == shown
    assert redact(f"cannot read '{place}': 403") == f"cannot read '{shown}': 403"
    with pytest.raises(ConfigError) as caught:
        refuse_password(place, "data.source")
    assert shown in str(caught.value)
    assert place not in str(caught.value)
    assert "AWS_PROFILE" in str(caught.value)
    for use in (open_storage, locate):
        with pytest.raises(ConfigError, match="expected a location without a password"):
            use(place)


@pytest.mark.parametrize(
    "place",
    [
        "/data/images",
        "/data/a:b@c",
        "s3://bucket/prefix",
        "s3://bucket/user@example.com/x",
        "abfs://container@account.dfs.core.windows.net/x",
        "sftp://me@host/images",
        "github://org:repository@main/x",
        "hf://datasets/me/set@main/train",
        "https://host/x.tar?download=true&versionId=3",
    ],
)
def test_locations_without_a_password_are_as_they_are(place: str) -> None:
    assert redact(place) == place
    refuse_password(place, "out")


@pytest.mark.parametrize(
    ("place", "plain"),
    [
        ("/data/images", True),
        ("/data/odd::name", True),
        ("s3://bucket/x", True),
        ("S3://bucket/x", True),
        ("gs://bucket/x", True),
        ("hf://datasets/me/set", True),
        ("http://host/x", False),
        ("https://host/x", False),
        ("ftp://host/x", False),
        ("simplecache::s3://bucket/x", False),
        ("s3://bucket/x::http://host/y", False),
        ("zip://::http://host/x.zip", False),
        ("zip://x.png::/data/x.zip", False),
        ("reference://::/data/x.json", False),
        ("file:///etc/passwd", False),
        ("github://org:repository@main/x", False),
    ],
)
def test_what_an_artefact_may_name(place: str, plain: bool) -> None:
    assert is_plain(place) == plain
    if plain:
        assert require_plain(place, said_by="plan.json", advice="set --images") == place
        return
    with pytest.raises(ConfigError) as caught:
        require_plain(place, said_by="plan.json", advice="set --images to where they are")
    assert str(caught.value).startswith(f"plan.json: names {place!r}: expected a local path or an object store (")
    assert str(caught.value).endswith("set --images to where they are")


@pytest.mark.parametrize(
    "place",
    [
        "sftp://user:pa'ss@host/x", 'sftp://user:pa"ss@host/x', "sftp://user:pa ss@host/x", "sftp://user:p@ss@host/x",
        "s3://key:sec/ret@bucket/x", "git+https://ss@host/x", "az://c/x?account_key=ss", "https://h/x?jwt=ss",
        "https://h/x#token=ss",
    ],
)  # fmt: skip
def test_unusual_passwords_are_refused_and_not_shown(place: str) -> None:
    with pytest.raises(ConfigError, match="expected a location without a password") as error:
        refuse_password(place, "out")
    shown = str(error.value).partition(": expected")[0]
    assert not any(part in shown for part in ("ss", "ret", "sec"))


@pytest.mark.parametrize(
    "place", ["s3://bucket/icon@2x.png", "s3://bucket:9000/a@b", "abfs://container@account/x", "/home/me@work/x"]
)
def test_names_with_an_at_sign_are_no_passwords(place: str) -> None:
    refuse_password(place, "out")  # raises otherwise
    assert redact(place) == place
    with pytest.raises(ConfigError, match="out: "):
        refuse_password("s3://key:secret@bucket/x", "out")
