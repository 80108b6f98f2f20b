"""Exported students: what they give on images, what they refuse, and that nothing else is needed to run them."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from kpu import open_cache
from kpu.errors import ConfigError, CorruptError, MismatchError, SourceError
from kpu.format.plan import DEFAULT_MAX_PIXELS, Decoding
from tests.support.trained import blocks_cache, labelled_cache, labelled_images, small_run, timm_cache
from trainer import load_student
from trainer.evaluation.trained import load_trained
from trainer.export.description import BASE, CONFIG, STUDENT
from trainer.export.export import export
from trainer.export.exported import Affine
from trainer.export.program import PROGRAM, relative_rmse
from trainer.objective.normalize import make_normalizer

SIDE = (("width", 8), ("depth", 1), ("merge", "add"))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def exported(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(small_run(place), tmp_path_factory.mktemp("exported") / "out").path


def files_of(place: Path, count: int = 5) -> list[Path]:
    return sorted(labelled_images(place).glob("*/*.png"))[:count]


def expected_of(run: Path, place: Path, count: int = 5) -> dict[str, torch.Tensor]:
    """Z' of the first rows as the run computes it from the cache."""
    trained, cache = load_trained(run), open_cache(labelled_cache(place))
    given = {}
    for output, statistics in trained.sources["general"].statistics.items():
        x = (cache.read("general", output, slice(0, count)) - statistics.centre) / statistics.std
        given[output] = torch.from_numpy(x.astype(np.float32))
    with torch.no_grad():
        found: dict[str, torch.Tensor] = trained.model.student(given, None)
    return found


def test_images_give_what_the_cache_gave(exported: Path, place: Path) -> None:
    student = load_student(exported)
    assert not student.training
    found = student(files_of(place))
    for output, z in expected_of(small_run(place), place).items():
        mine = found[output].detach()
        assert relative_rmse(mine, z) < 4 * (0.05 / 12**0.5 + 0.005)  # the step is 0.05; an adapter amplifies
        assert relative_rmse(mine[[1, 2, 3, 4, 0]], z) > 0.15  # other images of the same class
    cache = open_cache(labelled_cache(place))
    head = cache.teachers["general"].head
    assert head is not None
    statistics = cache.teachers["general"].statistics["global"]
    raw = found["global"].detach().double().numpy() * statistics.std + statistics.centre
    assert np.allclose(found["logits"].detach().numpy(), raw @ head[0].T + head[1], atol=1e-4)


def test_predictions_are_in_the_teachers_own_units(exported: Path, place: Path) -> None:
    trained = load_trained(small_run(place))
    student = load_student(exported)
    found = student(files_of(place))
    z = {output: found[output] for output in ("global", "patch")}
    source = trained.sources["big"]
    for output, x in trained.model.predict(z, "big").items():
        statistics = source.statistics[output]
        raw = x.detach().double().numpy() * statistics.std + statistics.centre
        assert np.allclose(found["teachers"]["big"][output].detach().numpy(), raw, atol=1e-4)
    assert source.head is not None
    logits = found["teachers"]["big"]["global"].detach().numpy() @ source.head[0].T + source.head[1]
    assert np.allclose(found["teachers"]["big"]["logits"].detach().numpy(), logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["standardize", "raw", "phi-s"])
def test_every_normaliser_becomes_one_map(kind: str, place: Path) -> None:
    statistics = open_cache(labelled_cache(place)).teachers["big"].statistics["global"]
    normalizer = make_normalizer(kind, statistics, 0)  # type: ignore[arg-type]
    affine = Affine(9, matrix=kind == "phi-s")
    affine.become(normalizer)
    target = torch.randn(4, 9)
    assert torch.allclose(affine(target), normalizer.raw(target), atol=1e-5)


def test_any_form_of_an_image(exported: Path, place: Path) -> None:
    student, files = load_student(exported), files_of(place, 3)
    sink = io.BytesIO()
    Image.open(files[1]).save(sink, "PNG")
    by_file = student(files)["global"]
    mixed = student([Image.open(files[0]), sink.getvalue(), files[2]])["global"]
    assert torch.equal(by_file, mixed)
    assert torch.equal(by_file, student(student.pixels(files))["global"])
    with pytest.raises(MismatchError, match=r"expected uint8 \[B, 8, 8, 3\], found torch.uint8 \[1, 9, 8, 3\]"):
        student(torch.zeros(1, 9, 8, 3, dtype=torch.uint8))
    with pytest.raises(MismatchError, match="NOT_AN_IMAGE"):
        student([b"no image"])


def test_one_image_or_several_however_they_come(exported: Path, place: Path) -> None:
    student, files = load_student(exported), files_of(place, 2)
    both = student(files)["global"]
    arrays = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    one: list[Any] = [files[0], str(files[0]), files[0].read_bytes(), Image.open(files[0]), arrays[0]]
    for image in [*one, torch.from_numpy(arrays[0].copy())]:
        for given in (image, [image], (image,)):
            found = student(given)
            assert found["global"].shape == (1, both.shape[1])
            assert torch.equal(found["global"], student(files[:1])["global"])
    for several in (iter(files), arrays, np.stack(arrays), [files[0], arrays[1]], student.pixels(files)):
        assert torch.equal(student(several)["global"], both)
    tall = np.random.default_rng(0).integers(0, 256, (40, 13, 3), dtype=np.uint8)
    assert torch.equal(student(tall)["global"], student(Image.fromarray(tall))["global"])


@pytest.mark.parametrize(
    ("given", "kind", "fragments"),
    [
        ("{place}", SourceError, ["images: {place}: expected an image file, found a folder", ".rglob("]),
        ("{place}/none.png", SourceError, ["images: {place}/none.png", "No such file", "check the path"]),
        ([], MismatchError, ["expected an image", "or several in a list, found none"]),
        (None, MismatchError, ["expected an image", "found NoneType"]),
        ({"a": 1}, MismatchError, ["expected an image", "found dict"]),
        ([3.5], MismatchError, ["images[0]: expected an image", "found float"]),
        (np.zeros((8, 8, 3)), MismatchError, ["images: expected uint8 [H, W, 3]", "found float64 [8, 8, 3]"]),
        ([np.zeros((3, 8, 8), np.uint8)], MismatchError, ["images[0]: expected", "found uint8 [3, 8, 8]"]),
        (np.zeros((8, 8), np.uint8), MismatchError, ["found uint8 [8, 8]"]),
        (np.zeros((0, 8, 8, 3), np.uint8), MismatchError, ["found none"]),
        (torch.zeros(2, 3, 8, 8), MismatchError, ["expected uint8 [B, 8, 8, 3]", "runs at 8 x 8 alone"]),
        ([b"", b"x"], MismatchError, ["images[0]: expected an image, found one that is EMPTY"]),
    ],
)  # fmt: skip
def test_names_values_that_are_not_an_image(
    given: Any, kind: type[Exception], fragments: list[str], exported: Path, tmp_path: Path
) -> None:
    if isinstance(given, str):
        given = given.format(place=tmp_path)
    with pytest.raises(kind) as refused:
        load_student(exported)(given)
    for fragment in fragments:
        assert fragment.format(place=tmp_path) in str(refused.value)


def test_images_are_decoded_as_for_the_cache(exported: Path, place: Path, tmp_path: Path) -> None:
    decoding = open_cache(labelled_cache(place)).plan.source.decoding
    assert load_student(exported).description.decoding == decoding == Decoding(max_pixels=DEFAULT_MAX_PIXELS)
    earlier = tmp_path / "earlier"
    shutil.copytree(exported, earlier)
    document = json.loads((earlier / "config.json").read_text())
    del document["decoding"], document["digest"]
    (earlier / "config.json").write_text(json.dumps(document))
    with pytest.warns(UserWarning, match="older release"):
        assert load_student(earlier).description.decoding == Decoding()


@pytest.mark.parametrize("kind", ["alpha", "palette", "16 bits", "turned"])
def test_pillows_image_gives_the_pixels_of_its_bytes(kind: str, exported: Path) -> None:
    grey = np.arange(144).reshape(9, 16)
    image = Image.fromarray((grey * 400).astype(np.uint16) if kind == "16 bits" else grey.astype(np.uint8))
    options: dict[str, Any] = {}
    if kind == "alpha":
        image = image.convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    elif kind == "palette":
        image, options = image.convert("RGB").quantize(8), {"transparency": 3}
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif}
    sink = io.BytesIO()
    image.save(sink, "PNG", **options)
    student = load_student(exported)
    assert torch.equal(student.pixels([Image.open(sink)]), student.pixels([sink.getvalue()]))


def test_the_program_runs_for_any_number_of_images(exported: Path, place: Path) -> None:
    student = load_student(exported)
    program = torch.export.load(exported / PROGRAM).module()
    for count in (1, 5):
        pixels = student.pixels(files_of(place, count))
        found, expected = program(pixels), student(pixels)
        assert torch.allclose(found["patch"], expected["patch"], atol=1e-5)
        assert torch.allclose(found["teachers"]["big"]["logits"], expected["teachers"]["big"]["logits"], atol=1e-5)


def test_the_folder_is_enough(exported: Path, place: Path, tmp_path: Path) -> None:
    """In another process, with another working directory, without the run, the cache or the code of the base."""
    moved = Path(shutil.copytree(exported, tmp_path / "moved"))
    code = (
        f"from pathlib import Path; from trainer import load_student; student = load_student({str(moved)!r}); "
        f"print(student([Path({str(files_of(place)[0])!r})])['global'].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    here = load_student(exported)(files_of(place, 1))["global"]
    assert np.allclose(json.loads(done.stdout), here.detach().numpy(), atol=1e-5)
    assert "toy.py" not in (exported / CONFIG).read_text()


def test_by_reference(place: Path, tmp_path: Path) -> None:
    done = export(small_run(place), tmp_path / "out", bundle=False, program=False)
    assert BASE not in done.files and PROGRAM not in done.files
    assert "not in this folder" in (tmp_path / "out/README.md").read_text()
    student = load_student(tmp_path / "out")
    z = expected_of(small_run(place), place)["global"]
    assert (student(files_of(place))["global"] - z).abs().max() < 0.1


@pytest.mark.parametrize("kind", ["frozen", "concat", "full", "parallel"])
def test_every_kind_of_student(kind: str, place: Path, tmp_path: Path) -> None:
    student = {
        "frozen": (("kind", "frozen"),),
        "concat": (("width", 8), ("depth", 1)),
        "full": (("kind", "full"), ("model", "timm:test_resnet"), ("weights", "random")),
        "parallel": (("kind", "parallel"), ("width", 4)),
    }[kind]
    more: dict[str, Any] = {"optim": (("epochs", 1),)} if kind == "full" else {}
    if kind == "parallel":
        more["caches"] = (str(blocks_cache(place)),)
    run = small_run(place, f"run-{kind}", student=student, **more)
    done = export(run, tmp_path / "out", program=kind == "concat")
    assert done.notes == []
    found = load_student(tmp_path / "out")(files_of(place))
    if kind in ("frozen", "concat"):
        z = expected_of(run, place)
        errors = {o: ((found[o] - z[o]).square().mean() / z[o].square().mean()).sqrt().item() for o in z}
        assert all(error < done.checked.student_limit for error in errors.values()), errors
    else:
        assert max(done.checked.student.values()) < 1e-5
        assert all(value < done.checked.base_limit for value in done.checked.base.values())
        assert bool(done.checked.base) == (kind == "parallel")
    if kind == "full":
        plain = timm.create_model("test_resnet", num_classes=0)
        plain.load_state_dict(load_file(tmp_path / "out/timm.safetensors"))
        assert "timm.create_model('test_resnet', num_classes=0)" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("model", ["test_vit", "test_resnet"])
def test_a_timm_base_with_layers(model: str, place: Path, tmp_path: Path) -> None:
    cache = timm_cache(place, model)
    student = (*SIDE, ("layers", ("layer1.patch",)))
    run = small_run(place, f"run-{model}", caches=(str(cache),), student=student, optim=(("epochs", 1),))
    done = export(run, tmp_path / "out", program=False)
    assert set(done.checked.base) == {"global", "patch", "layer1.patch"}
    found = load_student(tmp_path / "out")(files_of(place))
    assert found["global"].shape == (5, open_cache(cache).teachers["general"].outputs["global"].channels)


def test_other_images_or_another_base_are_refused_before_anything_is_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.export import export as module

    pixels = module._pixels
    monkeypatch.setattr(module, "_pixels", lambda *arguments: pixels(*arguments).flip(1))
    with pytest.raises(
        MismatchError, match=r"base 'general': \w+: expected features from images within .*, found 0?\.?\d"
    ):
        export(small_run(place), tmp_path / "out")
    monkeypatch.undo()
    run = Path(shutil.copytree(small_run(place), tmp_path / "run"))
    sources = json.loads((run / "sources.json").read_text())
    sources["teachers"]["general"]["weights_digest"] = "0" * 32
    del sources["digest"]
    (run / "sources.json").write_text(json.dumps(sources))
    with pytest.raises(MismatchError, match=r"base\.weights: .*expected the weights that the cache was extracted with"):
        export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_rejects_existing_places_and_damaged_exports(exported: Path, place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a path where nothing exists"):
        export(small_run(place), exported)
    with pytest.raises(ConfigError, match="expected a student of `kpu-train export`, found an empty folder"):
        load_student(tmp_path)
    broken = Path(shutil.copytree(exported, tmp_path / "broken"))
    data = bytearray((broken / STUDENT).read_bytes())
    data[-1] ^= 1
    (broken / STUDENT).write_bytes(data)
    with pytest.raises(CorruptError, match="is not what was exported"):
        load_student(broken)


def test_the_card(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "Student of general and big" in card
    assert "uint8 pixels [B, 8, 8, 3]" in card
    assert "On 32 cached rows" in card
    assert "R2 on" in card
