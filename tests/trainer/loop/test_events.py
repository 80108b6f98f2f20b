"""Failures of the disk while a training logs, by a real limit on the size of files."""

import errno
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from kpu.errors import ConfigError, FullDiskError, StorageError
from kpu.storage import leases
from trainer.loop.events import Events
from trainer.loop.world import World
from trainer.run.runs import RunFolder
from trainer.util.files import lock

SCORES = {f"score{number}": 0.5 for number in range(40)}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the kernel refuse to make any file larger."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def log(run: Path, steps: int) -> None:
    with Events(RunFolder(run), World(0, 1, torch.device("cpu"), "fp32"), 0, None) as events:
        for step in range(1, steps + 1):
            events.validated(step, SCORES)


def test_events_that_do_not_fit_on_the_disk_are_said_in_a_line(tmp_path: Path) -> None:
    hook = threading.excepthook
    with largest_file(8_192), pytest.raises(FullDiskError, match=r"tensorboard: cannot write: File too large"):
        log(tmp_path, 9)  # 27,000 bytes of events beside 7,000 of metrics
    assert 0 < len(RunFolder(tmp_path).metrics()) <= 9
    assert threading.excepthook is hook


def test_metrics_that_do_not_fit_on_the_disk_are_said_in_a_line(tmp_path: Path) -> None:
    with largest_file(10), pytest.raises(FullDiskError, match=r"metrics.jsonl: cannot write: File too large"):
        RunFolder(tmp_path).log({"step": 1})


def test_events_where_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(StorageError, match="tensorboard: cannot write"):
        log(tmp_path, 1)


def test_a_lock_that_cannot_be_closed_ends_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As network file systems do; there is none here to make it fail by itself."""
    failed = []

    def close(descriptor: int) -> None:
        os.dup2(descriptor, descriptor)  # it is one of ours
        failed.append(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "lock"
    with monkeypatch.context() as patch:
        patch.setattr(leases.os, "close", close)
        with lock(path):
            pass
    with pytest.raises(ConfigError, match="another process"), lock(path):
        pass  # for the lock is still held
    (descriptor,) = failed
    os.close(descriptor)
    with lock(path):
        pass
