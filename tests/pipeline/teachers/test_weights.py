"""Reading weights, loading them strictly, and initialising from a seed."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kpu.errors import TeacherError
from kpu.torch.weights import initialise, seeded, weights_digest
from pipeline.teachers.weights import load_strictly, read_weights

PINNED = [
    "-0x1.c4b3000000000p-1",
    "-0x1.a93d580000000p-1",
    "-0x1.1c26100000000p-3",
    "-0x1.0bfa200000000p-1",
    "0x1.a1ebbc0000000p-1",
    "0x1.73bfa00000000p-4",
]


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_reads_safetensors(tmp_path: Path) -> None:
    save_file(tiny().state_dict(), tmp_path / "w.safetensors")
    assert read_weights(str(tmp_path / "w.safetensors"), "t").keys() == tiny().state_dict().keys()


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_unwraps_checkpoints(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    state = tiny().state_dict()
    named = {prefix + name: tensor for name, tensor in state.items()}
    torch.save(named if wrapper is None else {wrapper: named, "epoch": 3}, tmp_path / "w.pth")
    read = read_weights(str(tmp_path / "w.pth"), "t")
    assert read.keys() == state.keys()
    assert torch.equal(read["0.weight"], state["0.weight"])


class Evil:
    """Something that only code can unpickle."""


@pytest.mark.parametrize("content", [b"", b"not weights", b"\x80\x04garbage"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_refuses_what_is_no_weights_file(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(TeacherError, match=rf"teacher 't': weights: .*w\{suffix}.*save the model's") as caught:
        read_weights(str(path), "teacher 't'")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(("newer", "found"), [(True, r".*\.Evil besides"), (False, "something other than")])
def test_refuses_pickled_code(tmp_path: Path, newer: bool, found: str) -> None:
    torch.save({"a": Evil()}, tmp_path / "w.pth", _use_new_zipfile_serialization=newer)
    with pytest.raises(TeacherError, match=rf"w\.pth .*\(it holds {found} tensors\); save the") as caught:
        read_weights(str(tmp_path / "w.pth"), "t")
    assert "trust" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_refuses_a_file_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(TeacherError, match="expected tensors by name"):
        read_weights(str(tmp_path / "w.pth"), "t")


def test_names_an_absent_file() -> None:
    with pytest.raises(TeacherError, match=r"found none at nowhere\.pth"):
        read_weights("nowhere.pth", "t")


def test_names_every_tensor_that_does_not_fit() -> None:
    state = tiny().state_dict()
    state["0.weight"] = torch.zeros(5, 3)
    state["extra"] = torch.zeros(2)
    del state["1.bias"]
    with pytest.raises(TeacherError) as caught:
        load_strictly(tiny(), state, "teacher 't'", "w.pth")
    message = str(caught.value)
    assert "0.weight: expected shape [4, 3], found [5, 3]" in message
    assert "1.bias: expected shape [4], found no such tensor" in message
    assert "extra: expected no such tensor, found [2]" in message


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_two_sets_of_weights_are_never_chosen_from_silently(tmp_path: Path, wrapper: str) -> None:
    """As timm's trainer writes them: the weights, and their moving average."""
    plain, average = tiny().state_dict(), tiny().state_dict()
    place = str(tmp_path / "w.pth")
    wrapped = {f"module.{name}": tensor for name, tensor in average.items()}
    torch.save({"epoch": 3, wrapper: plain, f"{wrapper}_ema": wrapped, "optimizer": {"state": {}}}, place)
    with pytest.raises(TeacherError) as caught:
        read_weights(place, "teacher 't'")
    assert f"{place} holds several sets of weights, {wrapper}, {wrapper}_ema; write #{wrapper} or" in str(caught.value)
    assert torch.equal(read_weights(f"{place}#{wrapper}", "t")["0.weight"], plain["0.weight"])
    read = read_weights(f"{place}#{wrapper}_ema", "t")
    assert read.keys() == average.keys()
    assert torch.equal(read["0.weight"], average["0.weight"])
    with pytest.raises(
        TeacherError, match=f"expected an entry 'ema' of tensors by name, found {wrapper}, {wrapper}_ema"
    ):
        read_weights(f"{place}#ema", "t")
    torch.save({wrapper: plain, "ema": plain}, place)
    assert torch.equal(read_weights(place, "t")["0.weight"], plain["0.weight"])


def test_an_entry_of_another_name_is_advised(tmp_path: Path) -> None:
    torch.save({"student": tiny().state_dict(), "teacher": tiny().state_dict()}, tmp_path / "w.pth")
    with pytest.raises(TeacherError, match=r"expected tensors by name; it has student, teacher: write #student behind"):
        read_weights(str(tmp_path / "w.pth"), "t")


def test_a_file_may_have_a_hash_in_its_name(tmp_path: Path) -> None:
    save_file(tiny().state_dict(), tmp_path / "w#1.safetensors")
    assert read_weights(str(tmp_path / "w#1.safetensors"), "t").keys() == tiny().state_dict().keys()


def test_weights_under_other_names_are_shown() -> None:
    state = {f"backbone.{name}": tensor for name, tensor in tiny().state_dict().items()}
    with pytest.raises(TeacherError) as caught:
        load_strictly(tiny(), state, "teacher 't'", "w.pth")
    message = str(caught.value)
    assert "Of the file's 7 tensors 0 fit; unknown are backbone.0.weight, backbone.0.bias, backbone.1.weight" in message
    assert "All 6 have, in order, the shapes that are expected" in message
    assert "(backbone.0.weight for 0.weight, backbone.0.bias for 0.bias): rename them in the file" in message
    state["backbone.0.weight"] = torch.zeros(3, 4)
    with pytest.raises(TeacherError, match=r"unknown are backbone\.0\.weight") as caught:
        load_strictly(tiny(), state, "teacher 't'", "w.pth")
    assert "in order" not in str(caught.value)


def test_batch_counters_may_be_absent() -> None:
    with seeded(1):
        state = tiny().state_dict()
    del state["1.num_batches_tracked"]
    with seeded(2):
        module = tiny()
    assert not torch.equal(module.state_dict()["0.weight"], state["0.weight"])
    load_strictly(module, state, "t", "w.pth")
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1])
def test_any_seed_that_a_configuration_may_have(seed: int) -> None:
    with seeded(seed):
        first = tiny()
    with seeded(seed):
        assert weights_digest(tiny()) == weights_digest(first)


def test_digest_is_of_names_dtypes_shapes_and_values() -> None:
    with seeded(0):
        module = nn.Linear(4, 4)
    digest = weights_digest(module)
    other = nn.Linear(4, 4)
    other.load_state_dict(module.state_dict())
    assert weights_digest(other) == digest
    assert weights_digest(nn.Sequential(other)) != digest
    assert weights_digest(other.double()) != digest
    with torch.no_grad():
        module.bias[0] += 1
    assert weights_digest(module) != digest


def test_initialisation_depends_on_identity_and_seed_alone() -> None:
    torch.manual_seed(1)
    first = weights_digest(initialise(tiny, "model", 0))
    torch.manual_seed(2)
    initialise(tiny, "another", 0)
    assert weights_digest(initialise(tiny, "model", 0)) == first
    assert weights_digest(initialise(tiny, "model", 1)) != first
    assert weights_digest(initialise(tiny, "another", 0)) != first


def test_initialisation_has_the_same_bits_everywhere() -> None:
    """Pinned: these are float32 values, exact on every machine."""
    weight = initialise(lambda: nn.Linear(3, 2), "model", 0).state_dict()["weight"]
    assert [value.hex() for value in weight.flatten().tolist()] == PINNED


def test_initialisation_keeps_what_the_model_fixes() -> None:
    module = initialise(tiny, "model", 0)
    assert torch.equal(module.state_dict()["1.weight"], torch.ones(4))
    big = initialise(lambda: nn.Linear(400, 400), "model", 0).state_dict()["weight"]
    assert big.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert abs(big.mean().item()) < 1e-3


def test_seeding_leaves_global_generators_as_they_were() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    initialise(tiny, "model", 0)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected  # noqa: NPY002
