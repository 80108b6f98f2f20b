"""Checkpoints come back as they were saved; the last whole one counts."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from kpu.errors import CorruptError, FullDiskError
from trainer.run.checkpoint import KEPT, Checkpoint, load_checkpoint, pack_tensors, save_checkpoint
from trainer.util import files


def checkpoint(step: int, average: bool = True) -> Checkpoint:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {name: value.detach() for name, value in layer.state_dict().items()}
    generators = {"cpu": torch.get_rng_state()}
    return Checkpoint(step, 10 * step, state, state if average else None, optimizer.state_dict(), generators)


def assert_equal(a: Checkpoint, b: Checkpoint) -> None:
    assert (a.step, a.position) == (b.step, b.position)
    for x, y in [(a.model, b.model), (a.average or {}, b.average or {}), (a.generators, b.generators)]:
        assert x.keys() == y.keys()
        assert all(torch.equal(x[name], y[name]) for name in x)
    assert a.optimizer["param_groups"] == b.optimizer["param_groups"]
    for key, values in a.optimizer["state"].items():
        assert all(torch.equal(value, b.optimizer["state"][key][name]) for name, value in values.items())


@pytest.mark.parametrize("average", [True, False])
def test_a_checkpoint_comes_back(tmp_path: Path, average: bool) -> None:
    saved = checkpoint(3, average)
    save_checkpoint(tmp_path, saved)
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert_equal(saved, found)


def test_a_layer_under_two_names_is_kept_under_both() -> None:
    model = torch.nn.ModuleDict({"net": torch.nn.Linear(3, 2)})
    model["head"] = model["net"]
    found = load(pack_tensors(model.state_dict()))
    assert set(found) == {"net.weight", "net.bias", "head.weight", "head.bias"}
    assert torch.equal(found["head.weight"], model["net"].weight)


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, checkpoint(step))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000010", "step-000000100"]
    assert KEPT == 2
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 100


@pytest.mark.parametrize("name", ["model.safetensors", "average.safetensors", "state.pt", "seal.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint(step))
    file = tmp_path / "step-000000002" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes({"flip": bytes(data), "cut": bytes(data[:-1]), "empty": b""}[damage])
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


def test_a_seal_that_names_too_few_files_is_damage(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint(step))
    (tmp_path / "step-000000002" / "seal.json").write_text("{}")
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


def test_none_and_none_that_is_whole(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, checkpoint(1))
    (tmp_path / "step-000000001" / "state.pt").write_bytes(b"")
    with pytest.raises(CorruptError, match=r"no checkpoint that is whole.*state\.pt"):
        load_checkpoint(tmp_path)


def test_a_full_disk_keeps_what_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, checkpoint(1))

    def full(path: Path, _data: bytes) -> None:
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(FullDiskError, match="--resume"):
        save_checkpoint(tmp_path, checkpoint(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    assert load_checkpoint(tmp_path) is not None


def test_a_checkpoint_that_stands_damaged_can_be_saved_again(tmp_path: Path) -> None:
    """A run that went back to the checkpoint before comes to the same step again."""
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint(step))
    (tmp_path / "step-000000002" / "state.pt").write_bytes(b"")
    again = checkpoint(2)
    save_checkpoint(tmp_path, again)
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert_equal(found, again)
