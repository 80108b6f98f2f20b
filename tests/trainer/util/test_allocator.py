"""Freed memory is kept: the second tensor of a size needs no new pages."""

import resource
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from trainer.util.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
np.ones(2**25)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    np.ones(2**25)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone")
def test_freed_memory_is_taken_again() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", SCRIPT, how], check=True, capture_output=True).stdout)
        for how in ("keep", "plain")
    }
    assert faults["keep"] < 100
    assert faults["plain"] > 4 * 2**28 / resource.getpagesize() / 1024
