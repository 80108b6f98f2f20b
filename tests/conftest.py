"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and teachers beside the repository (see CONTRIBUTING.md); skips where it is absent."""
    path = Path(os.environ.get("KPU_TEST_DATA", Path(__file__).parents[2] / "shared")).resolve()
    if not (path / "data").is_dir():
        pytest.skip(f"no test data at {path}: set KPU_TEST_DATA")
    return path
