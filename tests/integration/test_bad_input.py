"""What bad input gets: a masked row with its reason, or one message and exit code 2, with nothing made or changed."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import save_file

from kpu import open_cache
from tests.support.toys import assert_refused, kpu, kpu_json, noise, write_images, write_teacher
from trainer.data.images import ImageReader

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad-input")


@pytest.fixture(scope="module")
def model(place: Path) -> str:
    return write_teacher(place)


@pytest.fixture(scope="module")
def images(place: Path) -> Path:
    return write_images(place / "images", 6)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# --- images ---


def test_undecodable_images_are_masked_rows_with_a_reason(tmp_path: Path, model: str) -> None:
    folder = write_images(tmp_path / "images", 4)
    (folder / "bomb.png").write_bytes(encoded(Image.new("1", (15000, 15000))))
    (folder / "empty.png").write_bytes(b"")
    jpeg = encoded(noise(0, (64, 64)), "JPEG")
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "text.jpg").write_bytes(b"no image at all")
    out = tmp_path / "o.kpu"

    result = kpu("extract", folder, "-t", f"t={model}:toy", "-o", out)
    assert result.exit_code == 0, result.output
    status = kpu_json("status", out)
    assert status["complete"]
    assert {entry["key"]: entry["reason"] for entry in status["masked"]} == {
        "bomb.png": "too large",
        "cut.jpg": "truncated",
        "empty.png": "empty",
        "text.jpg": "not an image",
    }
    assert [entry["row"] for entry in status["masked"]] == [4, 5, 6, 7]
    assert "masked row 5: cut.jpg (truncated)" in kpu("status", out).stdout
    assert kpu("verify", "--deep", out).exit_code == 0


def test_sixteen_bits_of_which_twelve_are_used_are_masked_until_that_is_said(tmp_path: Path, model: str) -> None:
    folder, level = tmp_path / "images", np.arange(256, dtype=np.uint16).reshape(16, 16)
    folder.mkdir()
    (folder / "deep.png").write_bytes(encoded(Image.fromarray(level * 16 + 5)))
    (folder / "plain.png").write_bytes(encoded(Image.fromarray(level.astype(np.uint8))))
    command = ["extract", folder, "-t", f"t={model}:toy", "--set", "codec.name=fp32"]
    reason = "16 bits of which at most 12 are used, or more than data.bits"

    result = kpu(*command, "-o", tmp_path / "masked.kpu")
    assert f"1 row masked (1 {reason})" in result.output
    status = kpu_json("status", tmp_path / "masked.kpu")
    assert status["masked"] == [{"key": "deep.png", "row": 0, "reason": reason}]
    assert "extract into a new cache with data.bits" in kpu("status", tmp_path / "masked.kpu").stdout
    (run,) = (tmp_path / "masked.kpu/runs").glob("*.json")
    assert json.loads(run.read_text())["masked_reasons"] == {reason: 1}

    assert kpu(*command, "-o", tmp_path / "o.kpu", "--set", "data.bits=12").exit_code == 0
    cache = open_cache(tmp_path / "o.kpu")
    deep, plain = cache.read("t", "patch", [0, 1])
    np.testing.assert_array_equal(deep, plain)
    assert kpu("verify", "--deep", tmp_path / "o.kpu").exit_code == 0
    pixels, valid = ImageReader(cache, cache.teachers["t"].spec.known_input, root=None, threads=1).load(np.arange(2))
    assert valid.all()
    np.testing.assert_array_equal(pixels[0], pixels[1])


def test_odd_images_are_extracted_as_a_viewer_shows_them(tmp_path: Path, model: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    plain, upright = noise(1, (16, 16)), noise(2, (24, 16))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise
    pictures = {
        "a plain.png": encoded(plain),
        "b upright.png": encoded(upright),
        "c cmyk.jpg": encoded(plain.convert("CMYK"), "JPEG"),
        "d palette.png": encoded(plain.quantize(16)),
        "e deep.png": encoded(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)),
        "f clear.png": encoded(plain.convert("RGBA")),
        "g turned.png": encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=turned),
        "h moving.gif": encoded(plain, "GIF", save_all=True, append_images=[upright]),
        "i dot.png": encoded(noise(3, (1, 1))),
        "j grey.png": encoded(plain.convert("L")),
    }
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    out = tmp_path / "o.kpu"

    result = kpu("extract", folder, "-t", f"t={model}:toy", "-o", out, "--set", "codec.name=fp32")
    assert result.exit_code == 0, result.output
    cache = open_cache(out)
    assert cache.samples.to_table()["key"].to_pylist() == list(pictures)
    assert cache.valid().all()
    row = {name[0]: features for name, features in zip(pictures, cache.read("t", "patch", slice(None)), strict=True)}
    np.testing.assert_array_equal(row["g"], row["b"])
    np.testing.assert_array_equal(row["f"], row["a"])


# --- keys ---


@pytest.mark.parametrize("key", ["a b", "ключ/日本", "../../up", "/etc/absolute", "a/../b", "x" * 300, "a'\"\\%00&"])
def test_any_key_of_a_tar_keeps_its_row_and_makes_no_file(tmp_path: Path, model: str, key: str) -> None:
    shard = tmp_path / "in" / "s.tar"
    shard.parent.mkdir()
    write_tar(shard, [("0.png", encoded(noise(0))), (f"{key}.png", encoded(noise(1))), ("2.png", encoded(noise(2)))])
    out = tmp_path / "out" / "o.kpu"

    result = kpu("extract", shard, "-t", f"t={model}:toy", "-o", out, "--set", "codec.name=fp32")
    assert result.exit_code == 0, result.output
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*")} == {"in", "out"}
    assert list(tmp_path.glob("in/*")) == [shard]
    cache = open_cache(out)
    assert cache.samples.to_table()["key"].to_pylist() == ["s/0", f"s/{key}", "s/2"]
    assert cache.valid().all()
    assert len(np.unique(cache.read("t", "global", slice(None)), axis=0)) == 3


def test_any_name_of_a_file_is_a_key(tmp_path: Path, model: str) -> None:
    folder = tmp_path / "images"
    names = ["a b.png", "zwölf.png", "日本/x y.png", "quo'te\".png", "new\nline.png"]
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(seed).save(folder / name)
    out = tmp_path / "o.kpu"
    assert kpu("extract", folder, "-t", f"t={model}:toy", "-o", out).exit_code == 0
    assert sorted(open_cache(out).samples.to_table()["key"].to_pylist()) == sorted(names)
    assert kpu("info", out).exit_code == 0


# --- what cannot start ---


def cut_tar(place: Path) -> list[object]:
    path = write_tar(place / "cut.tar", [(f"{seed}.png", encoded(noise(seed))) for seed in range(20)])
    os.truncate(path, 5000)
    return [path]


def corrupt_tar(place: Path) -> list[object]:
    path = write_tar(place / "corrupt.tar", [(f"{seed}.png", encoded(noise(seed))) for seed in range(20)])
    raw = bytearray(path.read_bytes())
    raw[1024 + 100 : 1024 + 200] = b"\xff" * 100
    path.write_bytes(raw)
    return [path]


def repeated_key(place: Path) -> list[object]:
    return [write_tar(place / "twice.tar", [(name, encoded(noise(0))) for name in ("a.png", "b.png", "a.png")])]


def parquet(place: Path, **columns: list[object]) -> Path:
    path = place / "table.parquet"
    pq.write_table(pa.table({"picture": [encoded(noise(seed)) for seed in range(3)], **columns}), path)
    return path


def wrong_weights(place: Path) -> list[object]:
    path = place / "wrong.safetensors"
    save_file({"head.weight": np.zeros((3, 7), np.float32)}, path)
    return ["--set", f"teachers.t.weights={path}"]


def empty_folder(place: Path) -> list[object]:
    (place / "nothing").mkdir(exist_ok=True)
    return [place / "nothing"]


SOURCES: dict[str, tuple[Callable[[Path], list[object]], tuple[str, ...]]] = {
    "absent": (lambda place: [place / "images" / "none"], ("data.source", "none", "no such file or folder")),
    "empty": (empty_folder, ("data.source", "nothing to extract", "nothing", "holds no image")),
    "truncated tar": (cut_tar, ("cut.tar", "truncated or corrupt", "offset 4096")),
    "corrupt tar": (corrupt_tar, ("corrupt.tar", "truncated or corrupt", "offset 1024")),
    "duplicate keys": (repeated_key, ("duplicate key 'twice/a'", "(offset 512, ", "(offset 2560, ")),
    "no such column": (
        lambda place: [parquet(place), "--set", "data.image=image"],
        ("table.parquet", "'image' (data.image)", "its columns are picture"),
    ),
    "no such label": (lambda place: [parquet(place), "--set", "data.label=class"], ("'class' (data.label)", "picture")),
    "repeated key column": (
        lambda place: [parquet(place, name=["a", "b", "a"]), "--set", "data.key=name"],
        ("duplicate key 'a'", "row group 0, row 0", "row group 0, row 2"),
    ),
    "option of another kind": (lambda place: [place / "images", "--set", "data.image=x"], ("data.image", "a folder")),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_cannot_be_listed(name: str, images: Path, model: str, tmp_path: Path) -> None:
    arguments, fragments = SOURCES[name]
    out = tmp_path / "deep" / "o.kpu"
    result = kpu("extract", *arguments(images.parent), "-t", f"t={model}:toy", "-o", out)
    assert_refused(result, *fragments)
    assert list(tmp_path.iterdir()) == []


SETTINGS: dict[str, tuple[Callable[[Path], list[object]], tuple[str, ...]]] = {
    "unknown timm model": (
        lambda _: ["--set", "teachers.t.model='timm:vit_smal_patch14_dinov2'"],
        ("teacher 't'", "'vit_smal_patch14_dinov2'", "did you mean vit_small_patch14_dinov2"),
    ),
    "unknown factory": (
        lambda place: ["--set", f"teachers.t.model='torch:{place}/toy.py:tiy'"],
        ("no factory 'tiy'", "did you mean toy"),
    ),
    "no such file": (
        lambda place: ["--set", f"teachers.t.model='torch:{place}/none.py:toy'"],
        ("none.py", "No such file"),
    ),
    "wrong weights": (wrong_weights, ("wrong.safetensors", "head.weight", "[3, 6]", "[3, 7]")),
    "no weights": (lambda _: ["--set", "teachers.t.weights=none.pth"], ("weights", "none.pth")),
    "unknown key": (lambda _: ["--set", "veiws=2"], ("unknown key 'veiws'", "did you mean 'views'")),
    "wrong value": (lambda _: ["--set", "unit_rows=100"], ("unit_rows", "power of two from 64 to 4096", "found 100")),
    "unknown layer": (lambda _: ["--set", "teachers.t.layers=[stem]"], ("teacher 't'", "stem")),
    "labels": (lambda _: ["--set", "teachers.t.labels=[1]"], ("labels", "expected 3", "found 1")),
    "negative label": (lambda _: ["--set", "teachers.t.labels=[0, null, -2]"], ("labels", "from 0, or null", "-2")),
    "no cache to calibrate from": (
        lambda place: ["--set", f"calibration_from={place}/images"],
        ("calibration_from", "images", "expected a cache"),
    ),
    "unknown executor": (lambda _: ["--executor", "spark"], ("executor.kind", "inline or ray", "'spark'")),
    "lonely address": (lambda _: ["--ray-address", "127.0.0.1:9"], ("--ray-address", "--executor ray")),
    "no out": (lambda _: ["-o", ""], ("out", "path or URL", "found ''")),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("mode", [(), ("--dry-run",)], ids=["extract", "dry-run"])
def test_settings_that_cannot_be_used(
    name: str, mode: tuple[str, ...], place: Path, images: Path, model: str, tmp_path: Path
) -> None:
    arguments, fragments = SETTINGS[name]
    out = tmp_path / "deep" / "o.kpu"
    result = kpu("extract", images, "-t", f"t={model}:toy", "-o", out, *arguments(place), *mode)
    assert_refused(result, *fragments)
    assert list(tmp_path.iterdir()) == []


def test_images_of_which_none_can_be_decoded(tmp_path: Path, model: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    result = kpu("extract", tmp_path / "images", "-t", f"t={model}:toy", "-o", tmp_path / "o.kpu")
    assert_refused(result, "teacher 't'", "at least one usable row", "found none among 1: 1 masked (not an image)")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


# --- from a real process ---


def command(*arguments: object) -> "subprocess.CompletedProcess[str]":
    code = "from cli.cache import app; app()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_exit_codes_of_a_real_process(tmp_path: Path, images: Path, model: str) -> None:
    out = tmp_path / "o.kpu"
    refused = command("extract", images, "-t", f"t={model}:missing", "-o", out)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: teacher 't'")
    assert "Traceback" not in refused.stderr
    assert not out.exists()
    kpu("extract", images, "-t", f"t={model}:toy", "-o", out)
    assert command("status", out).returncode == 0
    (out / "teachers/t/commits/000000.json").unlink()
    assert command("status", out).returncode == 1
