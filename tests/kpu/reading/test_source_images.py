"""A cache's images are found, moved or not, and are those that were extracted; whoever cannot find them hears how."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from kpu import open_cache
from kpu.errors import ConfigError, MismatchError, SourceError
from kpu.interop.theia.export import export_theia
from kpu.reading.source_images import SourceImages
from kpu.sources.files import MOST_BYTES
from tests.support.builders import key_of
from tests.support.theia import build_pictured

ROW = 3


def test_images_are_checked_wherever_they_are(tmp_path: Path) -> None:
    images = tmp_path / "images"
    build_pictured(tmp_path / "small.kpu", images)
    cache = open_cache(tmp_path / "small.kpu")
    record, digest = cache.samples.take(np.array([ROW])), cache.image_digests([ROW])[0]
    moved = images.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"--where: expected the folder .*images; set --where to where they are now"):
        SourceImages(cache, str(images), option="--where")
    originals = SourceImages(cache, str(moved), option="--where")
    (data,) = originals.read(record)
    assert data == (moved / key_of(ROW)).read_bytes()
    with originals.decode(data, digest, record) as image:
        assert image.size[0] > 0
    (other,) = originals.read(cache.samples.take(np.array([ROW + 1])))
    with pytest.raises(MismatchError, match=rf"{key_of(ROW)}.*found other bytes.*set --where"):
        originals.decode(other, digest, record).__enter__()
    (moved / key_of(ROW)).unlink()
    with pytest.raises(SourceError, match=rf"{key_of(ROW)}.*set --where"):
        originals.read(record)


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A web server's URL, and the paths that it was asked for."""
    asked: list[str] = []

    class Noting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    running = ThreadingHTTPServer(("127.0.0.1", 0), Noting)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"127.0.0.1:{running.server_port}", asked
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.mark.parametrize(
    "root",
    [
        "http://{}/x",
        "simplecache::http://{}/x",
        "zip://::http://{}/x.zip",
        "reference://::http://{}/x.json",
        "filecache::s3://bucket/x",
        "ftp://{}/x",
        "file:///etc",
        "images",
        "../images",
    ],
)
def test_a_place_that_the_cache_alone_names_is_not_opened(
    tmp_path: Path, server: tuple[str, list[str]], root: str
) -> None:
    host, asked = server
    build_pictured(tmp_path / "small.kpu", tmp_path / "images", root=root.format(host))
    cache = open_cache(tmp_path / "small.kpu")
    for use in (
        lambda: SourceImages(cache, None, option="images.root"),
        lambda: export_theia(tmp_path / "small.kpu", tmp_path / "theia", dataset="d", split="train"),
    ):
        with pytest.raises(
            ConfigError, match=r"small\.kpu: plan\.json: .*expected .*set (images\.root|--images) to"
        ) as caught:
            use()
        assert caught.value.exit_code == 2
        assert root.format(host) in str(caught.value)
    assert asked == []
    assert not (tmp_path / "theia").exists()
    images = str(tmp_path / "images")
    done = export_theia(tmp_path / "small.kpu", tmp_path / "theia", dataset="d", split="train", images=images)
    assert done.samples


def test_a_place_that_the_user_names_is_opened(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    pytest.importorskip("aiohttp")
    host, asked = server
    build_pictured(tmp_path / "small.kpu", tmp_path / "images", root=f"http://{host}/x")
    cache = open_cache(tmp_path / "small.kpu")
    originals = SourceImages(cache, f"http://{host}/x", option="images.root")
    with pytest.raises(SourceError, match="no such file"):
        originals.read(cache.samples.take(np.array([ROW])))
    assert asked == [f"/x/{quote(key_of(ROW))}"]


def test_a_password_that_an_older_release_recorded_is_not_shown(tmp_path: Path) -> None:
    build_pictured(tmp_path / "small.kpu", tmp_path / "images", root="https://me:hunter2@host/x?sig=abc")
    cache = open_cache(tmp_path / "small.kpu")
    with pytest.raises(ConfigError) as caught:
        SourceImages(cache, None, option="images.root")
    assert "https://me:***@host/x?sig=***" in str(caught.value)
    with pytest.raises(ConfigError, match="--where: expected the folder of the images") as caught:
        SourceImages(cache, str(tmp_path / "nowhere"), option="--where")
    with pytest.raises(ConfigError, match="expected a location without a password"):
        SourceImages(cache, "https://me:hunter2@host/x", option="--images")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "zero", "huge"])
def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path, kind: str) -> None:
    images = tmp_path / "images"
    build_pictured(tmp_path / "small.kpu", images)
    cache = open_cache(tmp_path / "small.kpu")
    file = images / key_of(ROW)
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "zero":
        file.symlink_to("/dev/zero")
    else:
        file.touch()
        os.truncate(file, 2**41)
    found: list[str] = []

    def read() -> None:
        with pytest.raises(SourceError) as caught:
            SourceImages(cache, str(images), option="--images").read(cache.samples.take(np.array([ROW])))
        found.append(str(caught.value))

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    reading.join(60)
    assert not reading.is_alive(), "it waits for the other end"
    expected = f"at most {MOST_BYTES:,} bytes" if kind == "huge" else "expected a regular file, found a pipe"
    assert key_of(ROW) in found[0]
    assert expected in found[0]


@pytest.mark.parametrize("file", ["../secret.png", "/etc/passwd", "a/../../secret.png", "a\0b"])
def test_addresses_stay_below_the_root(tmp_path: Path, file: str) -> None:
    images = tmp_path / "images"
    build_pictured(tmp_path / "small.kpu", images)
    (tmp_path / "secret.png").write_bytes(b"secret")
    cache = open_cache(tmp_path / "small.kpu")
    record = cache.samples.take(np.array([ROW]))
    hostile = record.set_column(record.schema.get_field_index("file"), record.schema.field("file"), [[file]])
    with pytest.raises(SourceError, match="the sample table names a file outside it"):
        SourceImages(cache, str(images), option="--images").read(hostile)
