"""Where the commands begin: nothing is imported before an interruption can end with one line."""

import sys
from typing import NoReturn


def kpu_cache() -> None:
    """Run `kpu-cache`."""
    try:
        from cli.cache import app
    except KeyboardInterrupt:
        _stopped()
    app()


def kpu_train() -> None:
    """Run `kpu-train`."""
    try:
        from cli.train import app
    except KeyboardInterrupt:
        _stopped()
    app()


def _stopped() -> NoReturn:
    print("stopped: nothing was begun", file=sys.stderr)
    sys.exit(1)
