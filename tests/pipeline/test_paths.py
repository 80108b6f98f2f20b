"""Paths of a configuration mean the same in a process that runs in another directory."""

import os
from pathlib import Path

import pytest
from fsspec.core import url_to_fs

from pipeline.config import ExtractConfig, validate_config
from pipeline.paths import absolute, resolve_paths


def config(**values: object) -> ExtractConfig:
    teachers = {
        "a": {"model": "torch:code/net.py:make", "weights": "w.pth"},
        "b": {"model": "timm:vit", "weights": "random"},
    }
    return validate_config({"data": {"source": "images"}, "out": "o.kpu", "teachers": teachers, **values}, "test")


def test_every_path_is_resolved_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    teachers = {
        "file": {"model": "torch:code/net.py:make", "weights": "w.pth"},
        "module": {"model": "torch:package.module:make", "weights": "random"},
        "folder": {"model": "hf:model"},
        "hub": {"model": "hf:owner/model"},
        "timm-folder": {"model": "timm:local-dir:model"},
        "timm-hub": {"model": "timm:hf-hub:owner/model"},
    }
    resolved = resolve_paths(config(teachers=teachers, calibration_from="../other.kpu"))
    assert resolved.data.source == f"{tmp_path}/images"
    assert resolved.out == f"{tmp_path}/o.kpu"
    assert resolved.calibration_from == f"{tmp_path.parent}/other.kpu"
    assert [(teacher.model, teacher.weights) for teacher in resolved.teachers.values()] == [
        (f"torch:{tmp_path}/code/net.py:make", f"{tmp_path}/w.pth"),
        ("torch:package.module:make", "random"),
        (f"hf:{tmp_path}/model", None),
        ("hf:owner/model", None),
        (f"timm:local-dir:{tmp_path}/model", None),
        ("timm:hf-hub:owner/model", None),
    ]


def test_a_list_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = ["s3://bucket/{00..01}.tar", "b/*.tar", "/c.tar"]
    resolved = resolve_paths(config(data={"source": source})).data.source
    assert resolved == ("s3://bucket/{00..01}.tar", f"{tmp_path}/b/*.tar", "/c.tar")


def test_links_and_home() -> None:
    assert absolute("~/x") == os.path.expanduser("~/x")  # noqa: PTH111
    assert absolute("s3://bucket/../x") == "s3://bucket/../x"
    assert absolute("/a/./b/../c") == "/a/c"


@pytest.mark.parametrize("url", ["file:///a/b%20c/d%20e.kpu", "file://x.kpu", "file://~/x.kpu", "file:///a/*.tar"])
def test_file_urls_are_local_paths(url: str) -> None:
    """As fsspec and the cache's own storage understand them."""
    path = absolute(url)
    assert path == url_to_fs(url)[1] == absolute(path)
    assert "://" not in path


def test_resolving_twice_changes_nothing() -> None:
    once = resolve_paths(config())
    assert resolve_paths(once) == once
