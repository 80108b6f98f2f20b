"""Where the commands begin.

Nothing is imported before an interruption can end with one line, and this distribution's own packages are found first.
"""

import sys
from typing import NoReturn

from kpu.own_packages import find_own_packages_first


def kpu_cache() -> None:
    """Run `kpu-cache`."""
    find_own_packages_first()
    try:
        from cli.cache import app
    except KeyboardInterrupt:
        _stopped()
    app()


def kpu_train() -> None:
    """Run `kpu-train`."""
    find_own_packages_first()
    try:
        from cli.train import app
    except KeyboardInterrupt:
        _stopped()
    app()


def _stopped() -> NoReturn:
    print("stopped: nothing was begun", file=sys.stderr)
    sys.exit(1)
