"""What is said where Ray does not start, or cannot be reached."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.executors.addresses import not_reached
from tests.support.toys import write_images, write_teacher


def test_ray_that_is_slow_to_start_is_tried_again() -> None:
    assert "try again when it is less busy" in not_reached(None, TimeoutError("no raylet"))
    assert "start one with `ray start --head`" in not_reached("a:1", ConnectionRefusedError("refused"))


def test_a_path_too_long_for_sockets_is_no_reason_to_wait() -> None:
    from ray._private.utils import validate_socket_filepath

    with pytest.raises(OSError) as caught:
        validate_socket_filepath("/" + "t" * 108)
    message = not_reached(None, caught.value)
    assert "set RAY_TMPDIR to a short folder, such as /tmp, or use --executor inline" in message
    assert "less busy" not in message


@pytest.mark.slow
def test_extraction_under_a_long_temporary_folder(tmp_path: Path) -> None:
    images, model = write_images(tmp_path / "images", 3), write_teacher(tmp_path)
    temporary = tmp_path / ("t" * 90)
    temporary.mkdir()
    command = [sys.executable, "-c", "from cli.cache import app; app()", "extract", str(images), "--executor", "ray"]
    run = [*command, "-t", f"t={model}:toy", "-o", str(tmp_path / "o.kpu")]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    environment.pop("RAY_TMPDIR", None)
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 2
    assert "set RAY_TMPDIR to a short folder, such as /tmp" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "o.kpu").exists()
