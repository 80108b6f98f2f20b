"""Runs and exports that others made, and folders of the user's own: what lies outside stays untouched."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kpu.errors import ConfigError, CorruptError, LinkError
from kpu.interop.theia.writer import beside
from kpu.trust.list import Trust
from kpu.util.digests import digest
from tests.support.trained import small_run
from tests.trainer.conftest import Configure
from trainer.config import load_config
from trainer.data.corpus import Corpus
from trainer.data.targets import choose_outputs
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.trained import load_trained
from trainer.export.description import StudentDescription, read_bytes, read_description
from trainer.export.export import _publish, export
from trainer.ray_train import _storage
from trainer.run.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from trainer.run.runs import RunFolder
from trainer.util.files import lock, publish_folder, remove_folder, replace_file
from trainer.util.sealed import seal_json


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the user's."""
    folder = tmp_path / "outside"
    for name in ("step-000000001/model.safetensors", "step-000000009/notes.txt", "events/x", "tars/d-0-train.tar"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"precious")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, step * 32, {"w": torch.full((2,), float(step))}, None, {"state": {}}, {})


@pytest.fixture
def begun(configure: Configure, tmp_path: Path) -> RunFolder:
    config = configure()
    return RunFolder.create(tmp_path / "run", config, Corpus(config.caches, choose_outputs(config), config.base))


@pytest.mark.parametrize("name", ["checkpoints", "best", "tensorboard"])
def test_a_run_with_a_linked_folder_is_refused(
    begun: RunFolder, configure: Configure, outside: Path, name: str
) -> None:
    before, config = contents(outside), configure()
    if (begun.path / name).exists():
        (begun.path / name).rmdir()
    (begun.path / name).symlink_to(outside)
    corpus = Corpus(config.caches, choose_outputs(config), config.base)
    for use in (begun.config, lambda: RunFolder.resume(begun.path, config, corpus), lambda: evaluate(begun.path, [])):
        with pytest.raises(LinkError, match=f"found the symbolic link {name}") as caught:
            use()
        assert caught.value.exit_code == 2
    (begun.path / "config.yaml").unlink()
    with pytest.raises(LinkError):
        RunFolder.create(begun.path, config, corpus)
    assert contents(outside) == before


@pytest.mark.parametrize("name", ["config.yaml", "sources.json", "statistics.safetensors", "metrics.jsonl"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_only_regular_files_of_a_run_are_read(begun: RunFolder, tmp_path: Path, name: str, kind: str) -> None:
    moved = tmp_path / "moved"
    if (begun.path / name).exists():
        (begun.path / name).rename(moved)
    else:
        moved.write_bytes(b"")
    if kind == "link":
        (begun.path / name).symlink_to(moved)
    else:
        os.mkfifo(begun.path / name)
    before = moved.read_bytes()
    with pytest.raises(LinkError, match=name):
        begun.config(), begun.sources(), begun.metrics()
    assert moved.read_bytes() == before


def test_nothing_is_written_through_a_link(begun: RunFolder, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    for name in ("metrics.jsonl", "lock", "summary.json"):
        (begun.path / name).symlink_to(target)
    with pytest.raises(LinkError, match=r"metrics\.jsonl"):
        begun.log({"step": 1})
    with pytest.raises(LinkError, match="lock"), lock(begun.lock):
        pass
    replace_file(begun.path / "summary.json", b"{}")
    assert not (begun.path / "summary.json").is_symlink()
    assert target.read_bytes() == b"precious"


def test_discarding_a_run_removes_what_it_wrote_alone(begun: RunFolder) -> None:
    (begun.path / "notes.txt").write_bytes(b"precious")
    (begun.checkpoints / "mine").mkdir()
    (begun.checkpoints / "mine/weights").write_bytes(b"precious")
    with lock(begun.lock):
        begun.discard()
    assert contents(begun.path) == {"notes.txt": b"precious", "checkpoints/mine/weights": b"precious"}


def test_discarding_a_run_leaves_a_folder_that_was_there(configure: Configure, tmp_path: Path) -> None:
    config = configure()
    for name, is_there in (("old", True), ("new", False)):
        if is_there:
            (tmp_path / name).mkdir()
        corpus = Corpus(config.caches, choose_outputs(config), config.base)
        RunFolder.create(tmp_path / name, config, corpus).discard()
        assert (tmp_path / name).exists() == is_there
    assert list((tmp_path / "old").iterdir()) == []


def test_checkpoints_remove_checkpoints_alone(tmp_path: Path, outside: Path) -> None:
    before, folder = contents(outside), tmp_path / "run/checkpoints"
    for name in ("step-by-step", ".step-notes", "step-1"):
        (folder / name).mkdir(parents=True)
        (folder / name / "notes.txt").write_bytes(b"precious")
    (folder / "step-000000000").symlink_to(outside / "step-000000001")
    (folder / "step-000000099").symlink_to(outside)
    (folder / ".step-000000007.killed").mkdir()
    for step in range(1, 5):
        save_checkpoint(folder, checkpoint(step))
    found = load_checkpoint(folder)
    assert found is not None and found.step == 4
    assert contents(outside) == before
    names = sorted(path.name for path in folder.iterdir() if not path.is_symlink())
    assert names == [".step-notes", "step-000000003", "step-000000004", "step-1", "step-by-step"]


def test_a_seal_leads_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, checkpoint(1))
    seal = folder / "step-000000001/seal.json"
    whole, secret = seal.read_text(), tmp_path / "secret"
    os.mkfifo(secret)
    seal.write_text(json.dumps({**json.loads(whole), "../../secret": digest(b"x"), "/dev/zero": "y"}))
    with pytest.raises(CorruptError, match="holds no checkpoint that is whole"):
        load_checkpoint(folder)
    seal.write_text(whole)
    (folder / "step-000000001/state.pt").unlink()
    (folder / "step-000000001/state.pt").symlink_to("/dev/zero")
    with pytest.raises(CorruptError, match="holds no checkpoint that is whole"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["../secret", "/dev/zero", "", ".."])
def test_digests_of_a_run_lead_nowhere(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    run = Path(shutil.copytree(small_run(tmp_path_factory.getbasetemp()), tmp_path / "run"))
    document: dict[str, Any] = json.loads((run / "summary.json").read_text())
    del document["digest"]
    document["digests"][name] = "00" * 16
    (run / "summary.json").write_bytes(seal_json(document))
    with pytest.raises(CorruptError, match="digests: expected digests by the names of files"):
        RunFolder(run).model()


@pytest.mark.parametrize("named", ["http://127.0.0.1:9/c.kpu", "simplecache::s3://bucket/c.kpu", "zip://::http://h/x"])
def test_caches_that_a_run_names_elsewhere_are_not_opened(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, named: str
) -> None:
    run = Path(shutil.copytree(small_run(tmp_path_factory.getbasetemp()), tmp_path / "run"))
    head, _, body = (run / "config.yaml").read_text().partition("\n")
    values = yaml.safe_load(body)
    own = values["caches"]
    (run / "config.yaml").write_text(f"{head}\n{yaml.safe_dump({**values, 'caches': [named]}, sort_keys=False)}")
    for use in (lambda: evaluate(run), lambda: export(run, tmp_path / "out", program=False)):
        with pytest.raises(ConfigError, match=r"config\.yaml: caches: names .* give the cache with --cache"):
            use()
    with pytest.raises(ConfigError, match=r"config\.yaml: caches: names .* give it with --cache"):
        load_config(run / "config.yaml", resolved=True)
    assert load_config(run / "config.yaml", caches=own, resolved=True).caches == tuple(own)
    assert load_config(run / "config.yaml").caches == (named,), "what the user gives with -c is his own"
    assert evaluate(run, own)["rows"], "a cache that the user names is opened"
    trained = load_trained(run)
    images = trained.config.images.model_copy(update={"root": named})
    elsewhere = replace(trained, config=trained.config.model_copy(update={"images": images}))
    with pytest.raises(ConfigError, match=r"config\.yaml: images\.root: names .* give it with --images"):
        _ = elsewhere.images_root


def test_files_of_an_export_are_regular(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(LinkError, match=r"regular file config\.json"):
        read_description(tmp_path)
    (tmp_path / "student.safetensors").symlink_to("/dev/zero")
    with pytest.raises(LinkError, match=r"symbolic link student\.safetensors"):
        read_bytes(tmp_path, "student.safetensors", StudentDescription.model_construct(digests={}))


def test_an_export_that_fails_leaves_other_hidden_folders(tmp_path: Path) -> None:
    for name in (".out.unchecked", ".out.former", ".out.ray"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_bytes(b"precious")
    before = contents(tmp_path)
    with pytest.raises(ConfigError):  # there is no config.json in it
        _publish(tmp_path / "out", {"README.md": b"x"}, None, None, Trust())  # type: ignore[arg-type]
    with _storage(tmp_path / "out") as ray:
        (Path(ray) / "fit").mkdir()
    publish_folder(tmp_path / "out", {"README.md": b"x"})
    publish_folder(tmp_path / "out", {"README.md": b"y"})
    assert contents(tmp_path) == {**before, "out/README.md": b"y"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.former", ".out.ray", ".out.unchecked", "out"]


def test_removing_a_folder_follows_no_link(tmp_path: Path, outside: Path) -> None:
    before = contents(outside)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/best").symlink_to(outside)
    remove_folder(tmp_path / "run", "best")
    remove_folder(tmp_path / "run", "best/step-000000001")
    assert contents(outside) == before


def test_an_unfinished_split_that_is_a_link_or_not_ours_is_refused(tmp_path: Path, outside: Path) -> None:
    before = contents(outside)
    (tmp_path / ".train.unfinished").symlink_to(outside)
    with pytest.raises(LinkError, match=r"\.train\.unfinished"), beside(tmp_path, "train"):
        pass
    (tmp_path / ".train.unfinished").unlink()
    (tmp_path / ".train.unfinished/tars").mkdir(parents=True)
    (tmp_path / ".train.unfinished/tars/notes.txt").write_bytes(b"precious")
    (tmp_path / ".train.unfinished/tars/d-000000-train.tar").write_bytes(b"half")
    with pytest.raises(ConfigError, match="found 'tars'; move it elsewhere"), beside(tmp_path, "train"):
        pass
    assert (tmp_path / ".train.unfinished/tars/notes.txt").read_bytes() == b"precious"
    (tmp_path / ".train.unfinished/tars/notes.txt").unlink()
    with beside(tmp_path, "train") as place:
        assert list(place.iterdir()) == []
        (place / "tars").mkdir()
        (place / "tars/d-000000-train.tar").write_bytes(b"half")
    assert not (tmp_path / ".train.unfinished").exists()
    assert contents(outside) == before
