"""Keys, classes and bytes are the same under every locale: names are UTF-8 whatever the process thinks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LISTING = """
import json, sys
from tests.support.sources import Data, listed
from kpu.sources import open_source, source_reader
found = []
for name in sys.argv[1:]:
    source = open_source(Data(name))
    table = listed(source)
    data = [each.decode() for each in source_reader(source.spec).read(table)]
    found.append([source.spec.root, source.classes, table["key"].to_pylist(), table["label"].to_pylist(), data])
print(json.dumps([sys.getfilesystemencoding(), found]))
"""


def run(source: str, **environment: str) -> list[Any]:
    """The file system's encoding, root, classes, keys, labels and bytes, as a process of this locale finds them."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONUTF8"))
    }
    command = [sys.executable, "-c", LISTING, source]
    done = subprocess.run(
        command, env={**inherited, **environment}, capture_output=True, check=True, cwd=Path(__file__).parents[3]
    )
    found: list[Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in (b"dog/b.jpg", b"dog/caf\xe9.jpg", "é/ü.jpg".encode(), "é/\uff5e.jpg".encode(), "é/🐈.jpg".encode()):
        path = os.path.join(os.fsencode(tmp_path / "images"), name)  # noqa: PTH118
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        with open(path, "wb") as file:
            file.write(ascii(name).encode())
    return tmp_path / "images"


def test_a_listing_is_the_same_under_every_locale(images: Path, tmp_path: Path) -> None:
    encoding, expected = run(images, LC_ALL="C.UTF-8")
    assert encoding == "utf-8"
    assert expected[0][2] == ["dog/b.jpg", "dog/caf\\xe9.jpg", "é/ü.jpg", "é/\uff5e.jpg", "é/🐈.jpg"]
    encoding, found = run(images, LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert encoding == "ascii"
    assert found == expected
    if shutil.which("localedef") is None:
        pytest.skip("needs localedef for a locale of ISO 8859-1")
    locale = tmp_path / "locales" / "en_US.ISO-8859-1"
    locale.parent.mkdir()
    made = subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(locale)], capture_output=True)
    if not locale.exists():
        pytest.skip(f"localedef makes no locale of ISO 8859-1 here: {made.stderr.decode()[:200]}")
    encoding, found = run(images, LOCPATH=str(locale.parent), LC_ALL="en_US.ISO-8859-1")
    assert encoding == "iso8859-1"
    assert found == expected
