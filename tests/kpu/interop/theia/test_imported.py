"""A dataset of Theia's becomes a cache, or an error that names tar and member."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from kpu import open_cache
from kpu.errors import ConfigError, CorruptError, KpuError, MismatchError, SourceError
from kpu.format.teacher import CodecSpec, TeacherSpec
from kpu.interop.theia.export import export_theia
from kpu.interop.theia.imported import import_theia
from kpu.pixels.decode import decode_image
from kpu.sources import source_reader
from kpu.tools.verify import verify
from tests.kpu.interop.theia.test_export import KEPT
from tests.support.builders import tree
from tests.support.theia import build_pictured, members, pixels_of, rewrite

Content = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache `small.kpu`, and `root` with a dataset of it in one tar a column."""
    folder = tmp_path_factory.mktemp("theia")
    build_pictured(folder / "small.kpu", folder / "images")
    export_theia(folder / "small.kpu", folder / "root", dataset="small", split="train", images=str(folder / "images"))
    return folder


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    """A copy of the dataset, to damage at will."""
    return Path(shutil.copytree(original / "root", tmp_path / "root"))


def take_in(root: Path, out: Path, codec: str = "uniform", **options: object):
    options = {"dataset": "small", "split": "train", "shards": "zarr", "run": "r", **options}
    return import_theia(str(root), str(out), codec=CodecSpec(name=codec), unit_rows=lambda *_: 8, **options)


def change(root: Path, column: str, edit: Callable[[Content], Content | None]) -> None:
    """Write the one tar of a column anew after `edit`, which may change the list or return another."""
    content = list(members(root / "small" / column))
    content = edit(content) or content
    (tar,) = (root / "small" / column).iterdir()
    rewrite(tar, content)


@pytest.mark.parametrize("shards", ["zarr", "webdataset"])
@pytest.mark.parametrize("codec", ["uniform", "rotated", "bf16", "fp32"])
def test_features_are_the_exported_ones(original: Path, tmp_path: Path, codec: str, shards: str) -> None:
    out = tmp_path / "o.kpu"
    done = take_in(original / "root", out, codec, shards=shards)
    assert (done.teachers, done.samples, done.masked, done.committed) == (("alpha", "gamma"), 18, 0, 6)
    assert verify(out).ok
    source, cache = open_cache(original / "small.kpu"), open_cache(out)
    for name, outputs in [("alpha", ("global", "patch")), ("gamma", ("patch",))]:
        teacher = cache.teachers[name]
        assert tuple(teacher.outputs) == outputs
        assert {o.name: o.grid for o in teacher.spec.outputs} == {
            o: source.teachers[name].outputs[o].grid for o in outputs
        }
        for output in outputs:
            expected = torch.from_numpy(source.read(name, output, KEPT)).bfloat16().float().numpy()
            found = cache.read(name, output, slice(None))
            error = (found - expected) / teacher.statistics[output].std
            if codec == "uniform":
                assert np.abs(error).max() < 0.0251
            elif codec == "rotated":
                assert np.sqrt(np.mean(error**2, axis=-1)).max() < 0.0251
            else:
                np.testing.assert_array_equal(found, expected)
            flat = expected.reshape(-1, expected.shape[-1]).astype(np.float64)
            np.testing.assert_allclose(teacher.statistics[output].mean, flat.mean(0))
            np.testing.assert_allclose(teacher.statistics[output].variance, flat.var(0))


def test_the_plan_is_one_that_extract_can_go_on_with(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kpu.interop.theia.imported.usable_cores", lambda: 3)
    take_in(original / "root", tmp_path / "o.kpu")
    cache = open_cache(tmp_path / "o.kpu")
    assert cache.plan.source.options == {"image": "image", "label": None}
    assert cache.plan.threads == 3
    table = cache.samples.to_table()
    assert table["key"][3].as_py() == f"small_train-000000-train/{KEPT[3]:012d}"
    for row, data in zip(KEPT, source_reader(cache.plan.source).read(table), strict=True):
        np.testing.assert_array_equal(np.asarray(decode_image(data)), pixels_of(row))
    assert cache.valid().all()


def test_a_teacher_that_cannot_be_run(original: Path, tmp_path: Path) -> None:
    take_in(original / "root", tmp_path / "o.kpu")
    spec = open_cache(tmp_path / "o.kpu").teachers["alpha"].spec
    assert (spec.model, spec.input, spec.precision) == ("theia:alpha", None, "bf16")
    assert TeacherSpec.model_validate(spec.model_dump(mode="json")) == spec
    with pytest.raises(ConfigError, match=r"'alpha' \(theia:alpha\).*imported.*cannot be run again"):
        _ = spec.known_input


def test_an_import_goes_on(original: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.kpu"
    take_in(original / "root", out)
    whole = tree(out)
    for left in ("teachers/gamma/commits/000001.json", "teachers/alpha/commits/000002.json"):
        (out / left).unlink()
    shutil.rmtree(out / "teachers/gamma/patch/c/1")
    assert take_in(original / "root", out, run="again").committed == 2
    assert tree(out) == whole
    assert take_in(original / "root", out, run="again").committed == 0
    with pytest.raises(MismatchError, match="codec"):
        take_in(original / "root", out, "bf16", run="again")


def features_anew(content: Content) -> None:
    """Other features under the same keys: those of the first and the last sample change places."""
    (first, one), (last, other) = content[0], content[-1]
    content[0], content[-1] = (first, other), (last, one)


@pytest.mark.parametrize("codec", ["uniform", "rotated", "bf16", "fp32"])
@pytest.mark.parametrize("interrupted", [True, False])
def test_a_column_that_was_made_anew_is_noticed(root: Path, tmp_path: Path, codec: str, interrupted: bool) -> None:
    out = tmp_path / "o.kpu"
    take_in(root, out, codec)
    if interrupted:
        (out / "teachers/gamma/commits/000002.json").unlink()
    before = tree(out)
    change(root, "gamma", features_anew)
    with pytest.raises(MismatchError) as caught:
        take_in(root, out, codec, run="again")
    message = str(caught.value)
    assert f"gamma/small_train-000000-train.tar, member '{KEPT[0]:012d}.gamma.safetensors'" in message
    assert "expected the features that were imported as row 0 of gamma/patch, found others (value " in message
    assert tree(out) == before


def test_a_tar_that_was_made_anew_is_noticed(root: Path, tmp_path: Path) -> None:
    """The second of two whose rows are in the same unit."""
    (tar,) = (root / "small/gamma").iterdir()
    content = list(members(tar.parent))
    second = tar.with_name(tar.name.replace("000000", "000001"))
    rewrite(tar, content[:13])
    rewrite(second, content[13:])
    take_in(root, tmp_path / "o.kpu")
    values = torch.ones(5, 2, 3).bfloat16()
    rewrite(second, [(content[13][0], save({"embedding": values})), *content[14:]])
    with pytest.raises(MismatchError, match=r"small_train-000001-train\.tar.*as row 13 of gamma/patch"):
        take_in(root, tmp_path / "o.kpu", run="again")


def test_an_image_that_cannot_be_decoded_is_masked(root: Path, tmp_path: Path) -> None:
    def break_one(content: Content) -> None:
        content[4] = (content[4][0], content[4][1][:-1])

    change(root, "images", break_one)
    assert take_in(root, tmp_path / "o.kpu").masked == 1
    cache = open_cache(tmp_path / "o.kpu")
    assert np.flatnonzero(~cache.valid(teacher="gamma")).tolist() == [4]
    assert verify(cache.path).ok
    teacher = cache.teachers["gamma"]
    features = [load(raw)["embedding"].double().numpy() for _, raw in members(root / "small/gamma")]
    tokens = np.stack([each.reshape(len(each), -1).T for row, each in enumerate(features) if row != 4]).reshape(-1, 5)
    assert teacher.statistics["patch"].count == len(tokens) == 17 * 6
    np.testing.assert_allclose(teacher.statistics["patch"].mean, tokens.mean(0))
    np.testing.assert_allclose(teacher.statistics["patch"].variance, tokens.var(0))


def swap(content: Content) -> None:
    (one, first), (two, second) = content[2:4]
    content[2:4] = [(two, first), (one, second)]


def duplicate(content: Content) -> Content:
    return [*content[:5], content[2], *content[6:]]


def renamed(column: str) -> Callable[[Content], Content]:
    """Every column the same, with one key twice."""

    def edit(content: Content) -> Content:
        name = content[2][0].partition(".")[0]
        return [*content[:9], (f"{name}.{column}", content[9][1]), *content[10:]]

    return edit


def poisoned(content: Content) -> None:
    values = torch.zeros(5, 2, 3).bfloat16()
    values[1, 1, 1] = torch.nan
    content[7] = (content[7][0], save({"embedding": values}))


def of_shape(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[Content], None]:
    def edit(content: Content) -> None:
        content[11] = (content[11][0], save({"embedding": torch.zeros(*shape, dtype=dtype)}))

    return edit


def cut(content: Content) -> None:
    content[17] = (content[17][0], content[17][1][:-8])


@pytest.mark.parametrize(
    ("edit", "fragments"),
    [
        (swap, ("sample 2", "'000000000002'", "'000000000003'", "images", "gamma", "joins columns by position")),
        (lambda content: content[:-1], ("sample 17", "the end of", "gamma")),
        (lambda content: content[1:], ("sample 0", "'000000000001'")),
        (lambda content: [*content, ("x.gamma.safetensors", content[0][1])], ("sample 18", "the end of", "images")),
        (duplicate, ("sample 5", "'000000000006'", "'000000000002'")),
        (poisoned, ("000000000008.gamma.safetensors'", "finite")),
        (of_shape(5, 3, 2), ("000000000012.gamma.safetensors'", "(5, 3, 2)")),
        (of_shape(5, 2, 3, dtype=torch.float32), ("000000000012.gamma.safetensors'", "F32")),
        (cut, ("000000000019.gamma.safetensors'", "not a sound safetensors file")),
        (lambda content: [(name.replace("gamma", "delta"), raw) for name, raw in content], ("sample 0", "the end")),
    ],
)
def test_an_unsound_column_is_named(root: Path, tmp_path: Path, edit, fragments: tuple[str, ...]) -> None:
    change(root, "gamma", edit)
    with pytest.raises(SourceError) as caught:
        take_in(root, tmp_path / "o.kpu")
    assert not [fragment for fragment in fragments if fragment not in str(caught.value)], str(caught.value)


def test_a_key_that_repeats_in_every_column(root: Path, tmp_path: Path) -> None:
    for column, extension in [
        ("images", "image"),
        ("alpha", "alpha.safetensors"),
        ("gamma", "gamma.safetensors"),
    ]:
        change(root, column, renamed(extension))
    with pytest.raises(SourceError, match="duplicate key"):
        take_in(root, tmp_path / "o.kpu")


def test_a_tar_that_ends_too_early(root: Path, tmp_path: Path) -> None:
    (tar,) = (root / "small/alpha").iterdir()
    tar.write_bytes(tar.read_bytes()[:-2000])
    with pytest.raises(SourceError, match=r"alpha/small_train-000000-train\.tar"):
        take_in(root, tmp_path / "o.kpu")
    assert not (tmp_path / "o.kpu").exists()


@pytest.mark.parametrize(
    ("text", "error", "fragment"),
    [('{"train": 19}', SourceError, "expected 19 samples of 'train', found 18"), ("[", CorruptError, "not JSON")],
)
def test_splits_that_say_otherwise(root: Path, tmp_path: Path, text: str, error: type[KpuError], fragment: str) -> None:
    (root / "small/splits.json").write_text(text)
    with pytest.raises(error, match=fragment):
        take_in(root, tmp_path / "o.kpu")
    (root / "small/splits.json").unlink()
    assert take_in(root, tmp_path / "o.kpu").samples == 18


def test_no_such_dataset(root: Path, tmp_path: Path) -> None:
    for options in ({"dataset": "other"}, {"split": "val"}):
        with pytest.raises(SourceError, match="expected"):
            take_in(root, tmp_path / "o.kpu", **options)
