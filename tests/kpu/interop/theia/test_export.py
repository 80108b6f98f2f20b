"""What Theia's loader reads from an export is what stands in the cache."""

import io
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import load

from kpu import open_cache
from kpu.errors import ConfigError, FullDiskError, MismatchError, StorageError
from kpu.interop.theia.export import export_theia
from tests.support.builders import MASKED_ROW, NONFINITE_ROW, ROWS, SmallCache, key_of
from tests.support.theia import build_pictured, members, pixels_of

KEPT = [row for row in range(ROWS) if row not in (MASKED_ROW, NONFINITE_ROW)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images` and a cache `small.kpu` of them; not to be written to."""
    folder = tmp_path_factory.mktemp("pictured")
    build_pictured(folder / "small.kpu", folder / "images")
    return folder


def export(place: Path, root: Path, **options: object):
    options = {"dataset": "small", "split": "train", "images": str(place / "images"), **options}
    return export_theia(place / "small.kpu", root, **options)


def decoded(key: str, data: bytes):
    """A member as Theia makes a sample's field of it: tokens from maps, RGB from .npy files."""
    if ".safetensors" in key:
        tensors = load(data)
        fields = {"embedding": tensors["embedding"].flatten(1).T}
        return fields | ({"cls": tensors["cls_token"]} if "cls_token" in tensors else {})
    return np.load(io.BytesIO(data)) if key == ".image" else data


def loaded(folder: Path, field: str, split: str = "train") -> list:
    """A column through the `webdataset` library, as Theia opens it."""
    tars = sorted(str(tar) for tar in folder.glob(f"*-{split}.tar"))
    dataset = webdataset.WebDataset(tars, shardshuffle=False).decode(decoded)
    return [(sample["__key__"], sample[field]) for sample in dataset]


def test_theias_loader_reads_it(place: Path, tmp_path: Path) -> None:
    done = export(place, tmp_path)
    assert (done.samples, done.masked, done.teachers, done.sizes) == (18, 2, ("alpha", "gamma"), 3)
    folder = tmp_path / "small"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "alpha/small_train-000000-train.tar",
        "gamma/small_train-000000-train.tar",
        "images/small_train-000000-train.tar",
        "splits.json",
    ]
    assert json.loads((folder / "splits.json").read_text()) == {"train": 18}
    keys = [f"{row:012d}" for row in KEPT]
    images, alpha, gamma = (
        loaded(folder / name, field)
        for name, field in [("images", "image"), ("alpha", "alpha.safetensors"), ("gamma", "gamma.safetensors")]
    )
    assert [key for key, _ in images] == [key for key, _ in alpha] == [key for key, _ in gamma] == keys
    for row, (_, image) in zip(KEPT, images, strict=True):
        np.testing.assert_array_equal(image, pixels_of(row))
    cache = open_cache(place / "small.kpu")
    for name, column in [("alpha", alpha), ("gamma", gamma)]:
        patch = torch.from_numpy(cache.read(name, "patch", KEPT)).bfloat16()
        assert torch.equal(torch.stack([fields["embedding"] for _, fields in column]), patch)
    vectors = torch.from_numpy(cache.read("alpha", "global", KEPT)).bfloat16()
    assert torch.equal(torch.stack([fields["cls"] for _, fields in alpha]), vectors)
    assert set(gamma[0][1]) == {"embedding"}


def test_rows_masked_for_a_teacher_that_is_left_out_are_kept(place: Path, tmp_path: Path) -> None:
    assert export(place, tmp_path, teachers=["gamma"]).samples == 19


def test_a_thousand_samples_a_tar(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kpu.interop.theia.writer.SAMPLES_PER_TAR", 7)
    export(place, tmp_path)
    for column in ("images", "alpha", "gamma"):
        tars = sorted((tmp_path / "small" / column).iterdir())
        assert [tar.name for tar in tars] == [f"small_train-{n:06d}-train.tar" for n in range(3)]
        assert [name[:12] for name, _ in members(tmp_path / "small" / column)] == [f"{row:012d}" for row in KEPT]


def test_splits_are_merged_and_never_overwritten(place: Path, tmp_path: Path) -> None:
    export(place, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.tar")}
    with pytest.raises(ConfigError, match="has 'train' already"):
        export(place, tmp_path)
    export(place, tmp_path, split="val", teachers=["gamma"])
    assert json.loads((tmp_path / "small/splits.json").read_text()) == {"train": 18, "val": 19}
    (tmp_path / "small/splits.json").unlink()
    with pytest.raises(ConfigError, match=r"train\.tar exists"):
        export(place, tmp_path)
    assert all(path.read_bytes() == raw for path, raw in before.items())
    assert not list(tmp_path.glob("small/.*"))


def test_what_a_killed_export_left_is_cleared(place: Path, tmp_path: Path) -> None:
    left = tmp_path / "small/.train.unfinished/alpha"
    left.mkdir(parents=True)
    (left / "small_train-000000-train.tar").write_bytes(b"half")
    (left.parent / "splits.json").write_bytes(b"{}")
    assert export(place, tmp_path).samples == 18
    assert not left.exists()


def test_what_cannot_be_exported(place: Path, built_cache, tmp_path: Path) -> None:
    small: SmallCache = built_cache("uniform")
    with pytest.raises(ConfigError, match=r"'beta': expected an output 'patch'.*choose the others with -t"):
        export_theia(small.path, tmp_path / "a", dataset="small", split="train")
    for options, reason in [
        ({"split": "my-train"}, "--split"),
        ({"dataset": "a/b"}, "--dataset"),
        ({"images": str(tmp_path / "elsewhere")}, "set --images to where they are now"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            export(place, tmp_path / "b", **options)
    with pytest.raises(ConfigError, match="local folder"):
        export(place, "s3://bucket/x")  # type: ignore[arg-type]
    assert not list(tmp_path.rglob("*.tar"))


def test_another_image_under_the_same_name_is_refused(place: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    build_pictured(tmp_path / "other.kpu", images)
    (images / key_of(3)).write_bytes((images / key_of(4)).read_bytes())
    with pytest.raises(MismatchError, match=r"0003\.png"):
        export(place, tmp_path / "out", images=str(images))
    assert not list((tmp_path / "out").rglob("*.tar"))


@pytest.mark.parametrize("file", ["small", "small/.train.unfinished", "small/gamma"])
def test_where_it_cannot_be_written(place: Path, tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"no folder")
    with pytest.raises(StorageError, match=rf"^cannot write {tmp_path}/{file}: File exists$"):
        export(place, tmp_path)
    assert (tmp_path / file).read_bytes() == b"no folder"


def test_a_full_disk_ends_it_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(
            FullDiskError, match=rf"^cannot write {tmp_path}/small/.*; free some space and start again$"
        ):
            export(place, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "small").iterdir()) == []
    assert export(place, tmp_path).samples == 18
