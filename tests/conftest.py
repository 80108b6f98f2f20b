"""Fixtures shared by all tests."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def trusted_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of trusted code for the session's tests and their processes, instead of the user's own."""
    place = tmp_path_factory.mktemp("trust") / "trusted-code"
    os.environ["KPU_TRUSTED_CODE"] = str(place)
    return place


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is remembered between runs out of the user's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and teachers beside the repository (see CONTRIBUTING.md); skips where it is absent."""
    path = Path(os.environ.get("KPU_TEST_DATA", Path(__file__).parents[2] / "shared")).resolve()
    if not (path / "data").is_dir():
        pytest.skip(f"no test data at {path}: set KPU_TEST_DATA")
    return path


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """URL of a bucket on a real S3 server (moto) that listens on this machine for the session."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import fsspec

        name = f"kpu-{secrets.token_hex(4)}"
        fsspec.filesystem("s3").mkdir(name)
        yield f"s3://{name}"
    server.stop()
