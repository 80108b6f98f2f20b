"""Every kind of image comes out as a viewer shows it; everything else gets the status that says why not."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from kpu.format.commits import ImageStatus
from kpu.format.plan import Decoding
from kpu.pixels.decode import decode_image, image_to_rgb
from tests.support.pictures import chunk, encode, pixels, png

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth colours, 40 x 30, no two corners alike."""
    y, x = np.mgrid[0:30, 0:40]
    return Image.fromarray(np.stack([x * 6, y * 8, 255 - x * 3 - y * 2], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_are_exact(photo: Image.Image, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(pixels(encode(photo, kind, **options)), np.asarray(photo))


def test_jpeg_is_decoded_at_full_size_as_pillow_does(photo: Image.Image) -> None:
    data = encode(photo.resize((1600, 1200)), "JPEG")
    np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_has_three_equal_channels(photo: Image.Image, mode: str) -> None:
    found = pixels(encode(photo.convert(mode), "PNG"))
    np.testing.assert_array_equal(found, np.asarray(photo.convert(mode).convert("RGB")))


def test_one_pixel() -> None:
    assert pixels(encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")).tolist() == [[[9, 8, 7]]]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(photo: Image.Image, kind: str) -> None:
    found = pixels(encode(photo.convert("CMYK"), kind)).astype(int)
    assert np.abs(found - np.asarray(photo)).mean() < 3


def test_ycck(photo: Image.Image) -> None:
    # Adobe's YCCK is the YCbCr form of the CMY inks beside K, all inverted. Pillow writes no such file, but it inverts
    # CMYK on its way out; then the last byte of the Adobe marker says how to read it.
    inks = ImageOps.invert(photo).convert("YCbCr").split()
    inverted = Image.merge("CMYK", [*map(ImageOps.invert, inks), Image.new("L", photo.size, 0)])
    data = bytearray(encode(inverted, "JPEG", quality=95, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2
    assert np.abs(pixels(bytes(data)).astype(int) - np.asarray(photo)).mean() < 3


def test_palette_with_and_without_transparency(photo: Image.Image) -> None:
    indexed = photo.quantize(16)
    colours = np.asarray(indexed.convert("RGB")).copy()
    np.testing.assert_array_equal(pixels(encode(indexed, "PNG")), colours)
    colours[np.asarray(indexed) == 3] = 255
    np.testing.assert_array_equal(pixels(encode(indexed, "PNG", transparency=3)), colours)
    np.testing.assert_array_equal(pixels(encode(indexed, "GIF", transparency=3)), colours)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    grey = (np.arange(1200).reshape(30, 40) * 54).astype(np.uint16)
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(grey), kind))[..., 0], grey >> 8)


def test_sixteen_bit_colour_and_grey_agree() -> None:
    colour = np.random.default_rng(0).integers(0, 65536, (5, 7, 3))
    np.testing.assert_array_equal(pixels(png(colour)), colour >> 8)
    grey = colour[..., :1]
    np.testing.assert_array_equal(pixels(png(grey)), np.repeat(grey >> 8, 3, axis=-1))


def test_sixteen_bit_transparent_colour_becomes_white() -> None:
    colour = np.full((2, 2, 3), 1000)
    colour[0, 0] = 65535, 0, 0
    assert pixels(png(colour, chunk(b"tRNS", struct.pack(">HHH", 65535, 0, 0))))[0, 0].tolist() == [255, 255, 255]
    assert pixels(png(colour[..., :1], chunk(b"tRNS", struct.pack(">H", 1000))))[1, 1].tolist() == [255, 255, 255]


def test_an_opened_image_stays_as_it_is() -> None:
    colour = np.full((2, 2, 3), 1000)
    colour[0, 0] = 65535, 0, 0
    data = png(colour, chunk(b"tRNS", struct.pack(">HHH", 65535, 0, 0)))
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(np.asarray(image_to_rgb(image)), pixels(data))
        assert image.info["transparency"] == (65535, 0, 0)


def test_white_is_zero_tiff_is_not_a_negative() -> None:
    grey = Image.fromarray(np.array([[0, 65535]], np.uint16))
    data = encode(grey, "TIFF", tiffinfo={262: 0})
    assert pixels(data)[0, :, 0].tolist() == [255, 0]


def test_floating_point_is_taken_as_zero_to_one_or_stretched() -> None:
    unit = np.array([[0.0, 0.5, 1.0]], np.float32)
    assert pixels(encode(Image.fromarray(unit), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    wide = np.array([[-500.0, np.nan, 1500.0]], np.float32)
    assert pixels(encode(Image.fromarray(wide), "TIFF"))[0, :, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparent_pixels_show_white_not_the_colour_hidden_below(photo: Image.Image, kind: str) -> None:
    image = photo.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(photo.size))
    found = pixels(encode(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))).astype(int)
    alpha = np.asarray(image)[..., 3:] / 255
    np.testing.assert_allclose(found, np.asarray(photo) * alpha + 255 * (1 - alpha), atol=1)


def test_grey_with_alpha(photo: Image.Image) -> None:
    image = photo.convert("LA")
    image.putalpha(0)
    assert (pixels(encode(image, "PNG")) == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(photo: Image.Image, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo, kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    found = pixels(data)
    assert found.shape == ((40, 30, 3) if orientation >= 5 else (30, 40, 3))
    np.testing.assert_array_equal(found, np.asarray(expected.convert("RGB")))


def test_broken_exif_is_ignored(photo: Image.Image) -> None:
    data = encode(photo, "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 40)
    assert pixels(data).shape == (30, 40, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (pixels(data) == [255, 0, 0]).all()


def test_oversized_or_broken_comments_do_not_hide_a_png(photo: Image.Image) -> None:
    plain = encode(photo, "PNG")
    for extra in (chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(5_000_000))), struct.pack(">I", 4) + b"tEXtabcdXXXX"):
        np.testing.assert_array_equal(pixels(plain[:33] + extra + plain[33:]), np.asarray(photo))


@pytest.mark.parametrize("data", [b"no image at all", b"<html></html>", bytes(500), b"\xff\xd8", b"Pyramid"])
def test_not_an_image(data: bytes) -> None:
    assert decode_image(data) is ImageStatus.NOT_AN_IMAGE


def test_no_bytes() -> None:
    assert decode_image(b"") is ImageStatus.EMPTY


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.9])
def test_truncated(kind: str, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    assert decode_image(data[: max(int(len(data) * part), 30)]) is ImageStatus.TRUNCATED


def test_truncated_even_where_other_code_allows_it(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encode(photo, "JPEG")
    assert decode_image(data[: len(data) // 2]) is ImageStatus.TRUNCATED


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
def test_bomb_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch, limit: int | None) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    side = int(Decoding().max_pixels ** 0.5) + 1
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    assert decode_image(bomb) is ImageStatus.TOO_LARGE


def test_large_image_below_the_limit_is_decoded() -> None:
    assert pixels(encode(Image.new("1", (9500, 9500)), "PNG")).shape == (9500, 9500, 3)


def test_broken_files_print_nothing(tmp_path: Path, photo: Image.Image) -> None:
    damages: list[Callable[[bytes], bytes]] = [
        lambda data: data[: len(data) // 2],
        lambda data: data[:200] + bytes(50) + data[250:],
        lambda data: data.replace(b"\x02", b"\x7f"),
        lambda data: data.replace(b"\x03\0", b"\xff\0"),
    ]
    for kind, options in [
        ("JPEG", {}),
        ("PNG", {}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("WEBP", {}),
    ]:
        for number, damage in enumerate(damages):
            name = f"{kind}-{options.get('compression')}-{number}"
            (tmp_path / name).write_bytes(damage(encode(photo, kind, **options)))
    script = (
        "import sys, pathlib, kpu.pixels.decode as i\n"
        "for p in pathlib.Path(sys.argv[1]).iterdir(): i.decode_image(p.read_bytes())"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def npy(values: np.ndarray[Any, Any], **options: Any) -> bytes:
    data = io.BytesIO()
    np.save(data, values, **options)
    return data.getvalue()


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_is_an_image(photo: Image.Image, order: Any) -> None:
    values = np.asarray(photo)
    np.testing.assert_array_equal(pixels(npy(np.array(values, order=order))), values)
    grey = np.array(values[..., 0], order=order)
    np.testing.assert_array_equal(pixels(npy(grey)), np.stack([grey] * 3, axis=-1))
    second = io.BytesIO()
    np.lib.format.write_array(second, values, version=(2, 0))
    np.testing.assert_array_equal(pixels(second.getvalue()), values)


def test_npy_with_transparency_lies_over_white(photo: Image.Image) -> None:
    rgba = np.asarray(photo.convert("RGBA")).copy()
    rgba[:10, :, 3] = 0
    found = pixels(npy(rgba))
    assert (found[:10] == 255).all()
    np.testing.assert_array_equal(found[10:], rgba[10:, :, :3])


def test_npy_of_anything_else_is_not_an_image() -> None:
    image = np.zeros((4, 5, 3), np.uint8)
    for values in (image[:, :0], image[None], image[0, 0]):
        assert decode_image(npy(values)) == ImageStatus.NOT_AN_IMAGE
    for values in (image.astype(np.float32), image.astype(np.int8), image.astype(">u2")):
        assert decode_image(npy(values)) == ImageStatus.UNSUPPORTED_PIXELS
    for values in (image[..., :2], np.zeros((4, 5, 12), np.uint8)):
        assert decode_image(npy(values)) == ImageStatus.SEVERAL_BANDS
    assert decode_image(npy(np.array([{"a": 1}]), allow_pickle=True)) == ImageStatus.NOT_AN_IMAGE
    forged = npy(image).replace(b"'shape': (4, 5, 3)", b"'shape': (4**9, 3)")
    assert decode_image(forged) == ImageStatus.NOT_AN_IMAGE


def test_npy_cut_short_or_too_large(photo: Image.Image) -> None:
    whole = npy(np.asarray(photo))
    for length in (6, 9, 60, 127, 128, len(whole) - 1):
        assert decode_image(whole[:length]) == ImageStatus.TRUNCATED
    assert decode_image(whole + b"more") not in list(ImageStatus)
    large = npy(np.zeros((1, 1, 3), np.uint8)).replace(b"(1, 1, 3)", b"(99999, 99999, 3)")
    assert decode_image(large) == ImageStatus.TOO_LARGE
