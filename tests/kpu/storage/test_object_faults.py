"""An object store that fails: over a real S3 protocol, by a proxy that loses answers and gives errors of its own."""

import http.client
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kpu.errors import ConfigError, CorruptError, SourceError, StorageError, StorageFault
from kpu.sources import open_source
from kpu.storage.open import open_storage
from tests.support.sources import Data

ROOT = Path(__file__).parents[3]
Fault = Callable[[BaseHTTPRequestHandler], bool]
"""Answers a request by itself, or not at all, and says so."""


class Proxy:
    """Passes requests on to the real server, but for what `fault` answers."""

    def __init__(self, target: str) -> None:
        self.fault: Fault = lambda _request: False
        self.seen: list[tuple[str, str]] = []
        proxy, (host, _, port) = self, target.removeprefix("http://").partition(":")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy.seen.append((self.command, self.path))
                if not proxy.fault(self):
                    self.answer(self.forward())

            do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

            def forward(self) -> tuple[int, list[tuple[str, str]], bytes]:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                connection = http.client.HTTPConnection(host, int(port), timeout=60)
                connection.request(self.command, self.path, body, dict(self.headers))
                found = connection.getresponse()
                answer = found.status, found.getheaders(), found.read()
                connection.close()
                return answer

            def answer(self, answer: tuple[int, list[tuple[str, str]], bytes]) -> None:
                status, headers, body = answer
                self.send_response_only(status)
                kept = [each for each in headers if each[0].lower() not in ("transfer-encoding", "connection")]
                if not any(name.lower() == "content-length" for name, _ in kept):
                    kept.append(("Content-Length", str(len(body))))
                for name, value in kept:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else body)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def proxy(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """In front of the server of `s3_bucket`, and in its place; clients give up after two attempts."""
    import s3fs

    del s3_bucket
    running = Proxy(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    s3fs.S3FileSystem.clear_instance_cache()
    yield running
    s3fs.S3FileSystem.clear_instance_cache()
    running.server.shutdown()
    running.server.server_close()


def always(status: int, code: str) -> Fault:
    body = f"<Error><Code>{code}</Code><Message>said by the test</Message></Error>".encode()

    def fault(request: BaseHTTPRequestHandler) -> bool:
        request.rfile.read(int(request.headers.get("Content-Length") or 0))
        request.answer((status, [("Content-Type", "application/xml")], body))  # type: ignore[attr-defined]
        return True

    return fault


def once(fault: Fault, method: str) -> Fault:
    """The fault, of the first request of a method."""
    left = [True]

    def first(request: BaseHTTPRequestHandler) -> bool:
        if request.command != method or not left:
            return False
        left.clear()
        return fault(request)

    return first


def lost(request: BaseHTTPRequestHandler) -> bool:
    """Do what is asked for, and hang up."""
    request.forward()  # type: ignore[attr-defined]
    request.close_connection = True
    request.connection.close()
    return True


def test_a_lost_answer_to_the_first_put_is_no_store_that_overwrites(proxy: Proxy, s3_bucket: str) -> None:
    proxy.fault = once(lost, "PUT")
    storage = open_storage(f"{s3_bucket}/lost/my.kpu", create=True)
    puts = [path for method, path in proxy.seen if method == "PUT"]
    assert len(puts) == 3, "the first was tried again"
    assert storage.publish("plan.json", b"x", run="r") is True


@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "OperationAborted"])
def test_a_conflict_is_tried_again(proxy: Proxy, s3_bucket: str, code: str) -> None:
    storage = open_storage(f"{s3_bucket}/conflict-{code}/my.kpu", create=True)
    proxy.fault = once(always(409, code), "PUT")
    assert storage.publish("plan.json", b"x", run="r") is True
    assert storage.publish("plan.json", b"y", run="r") is False
    proxy.fault = once(always(409, code), "PUT")
    storage.replace("runs/r.json", b"x", run="r")
    assert storage.read("runs/r.json") == b"x"


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (503, "SlowDown", 1),
        (500, "InternalError", 1),
        (400, "ExpiredToken", 1),
        (403, "AccessDenied", 2),
        (403, "InvalidAccessKeyId", 2),
    ],
)
def test_a_failing_store_ends_with_code_1_and_a_wrong_request_with_2(
    proxy: Proxy, s3_bucket: str, status: int, code: str, exit_code: int
) -> None:
    storage = open_storage(f"{s3_bucket}/faults/my.kpu")
    proxy.fault = always(status, code)
    for use in (
        lambda: storage.publish("plan.json", b"x", run="r"),
        lambda: storage.replace("runs/r.json", b"x", run="r"),
        lambda: list(storage.names("runs")),
        lambda: storage.read("plan.json"),
        lambda: open_storage(f"{s3_bucket}/faults/my.kpu", create=True),
    ):
        with pytest.raises(StorageError) as caught:
            use()
        assert (caught.value.exit_code, isinstance(caught.value, StorageFault)) == (exit_code, exit_code == 1), code
    with pytest.raises(SourceError) as failed:
        open_source(Data(f"{s3_bucket}/images"))
    assert failed.value.exit_code == exit_code


def test_an_unreachable_store_ends_with_code_1(proxy: Proxy, s3_bucket: str) -> None:
    storage = open_storage(f"{s3_bucket}/gone/my.kpu")
    proxy.server.shutdown()
    proxy.server.server_close()
    with pytest.raises(StorageFault) as caught:
        storage.read("plan.json")
    assert caught.value.exit_code == 1
    proxy.server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # for the fixture to close
    threading.Thread(target=proxy.server.serve_forever, daemon=True).start()


def test_an_empty_object_and_a_large_one(s3_bucket: str) -> None:
    storage = open_storage(f"{s3_bucket}/sizes/my.kpu", create=True)
    storage.publish("empty.json", b"", run="r")
    storage.publish("large.json", bytes(3_000_000), run="r")
    assert storage.read("empty.json") == b""
    assert len(storage.read("large.json")) == 3_000_000
    with pytest.raises(CorruptError, match="holds 1,001 bytes: expected at most 1,000"):
        storage.read("large.json", limit=1000)


def test_a_command_on_a_failing_store_ends_with_code_1(proxy: Proxy, s3_bucket: str) -> None:
    proxy.fault = always(503, "SlowDown")
    command = [sys.executable, "-c", "from cli.cache import app; app()", "status", f"{s3_bucket}/status/my.kpu"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert ended.returncode == 1, ended.stderr
    assert "start the same command again once the store answers" in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr


def test_a_location_with_a_password_is_refused(s3_bucket: str) -> None:
    with pytest.raises(ConfigError, match=r"s3://key:\*\*\*@bucket/x"):
        open_storage("s3://key:hunter2@bucket/x")
    del s3_bucket
