"""What is no single RGB image, or would cost too much, is refused from its header, each kind by its own name."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from kpu.format.commits import ImageStatus
from kpu.format.plan import Decoding
from kpu.format.reasons import reason, remedy
from kpu.pixels.decode import decode_image
from kpu.pixels.sizes import pixels_before_opening
from tests.support.pictures import chunk, encode, pixels, png, tiff

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


@pytest.mark.parametrize(("bands", "photometric"), [(2, 1), (4, 1), (12, 1), (4, 2), (5, 2), (5, 5)])
@pytest.mark.parametrize("apart", [False, True])
def test_bands_beyond_colour_and_alpha_are_refused_by_name(bands: int, photometric: int, apart: bool) -> None:
    values = np.repeat(GREY[..., None], bands, axis=2)
    extra = bands - {1: 1, 2: 3, 5: 4}[photometric]
    data = tiff(values, photometric, apart=apart, tags={338: (0,) * extra})
    assert decode_image(data) is ImageStatus.SEVERAL_BANDS


def test_a_fourth_band_that_is_alpha_is_alpha() -> None:
    values = np.repeat(GREY[..., None], 4, axis=2)
    values[..., 3] = 255
    values[:3, :, 3] = 0
    for tags in ({338: (2,)}, {}):
        found = pixels(tiff(values, 2, tags=tags))
        assert (found[:3] == 255).all()
        np.testing.assert_array_equal(found[3:], values[3:, :, :3])


def test_several_pages_are_refused_but_smaller_copies_and_masks_are_not() -> None:
    assert decode_image(tiff([GREY] * 12)) is ImageStatus.SEVERAL_PAGES
    for order in "<>":
        found = pixels(tiff([GREY, GREY[::2, ::2], GREY], order=order, kinds=(0, 1, 4)))
        np.testing.assert_array_equal(found[..., 0], GREY)


def test_a_preview_before_the_picture_is_not_taken_for_it() -> None:
    assert decode_image(tiff([GREY, GREY], kinds=(1, 0))) in (ImageStatus.SEVERAL_PAGES, ImageStatus.CAMERA_RAW)
    assert decode_image(tiff(GREY, kinds=(1,))) is ImageStatus.CAMERA_RAW


def test_directories_that_lead_in_a_circle_end() -> None:
    data = bytearray(tiff(GREY))
    data[-4:] = data[4:8]  # the next directory is this one
    np.testing.assert_array_equal(pixels(bytes(data))[..., 0], GREY)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", ImageStatus.EPS),
        (b"\xc5\xd0\xd3\xc6" + bytes(30), ImageStatus.EPS),
        (b"%PDF-1.7\n", ImageStatus.PDF),
        (b'<?xml version="1.0"?>\n<!-- a --><svg xmlns="http://www.w3.org/2000/svg"/>', ImageStatus.SVG),
        (b"8BPS\0\1" + bytes(30), ImageStatus.PSD),
        (bytes(128) + b"DICM" + bytes(30), ImageStatus.DICOM),
        (b"\x76\x2f\x31\x01" + bytes(30), ImageStatus.OTHER_FORMAT),
        (b"FUJIFILMCCD-RAW " + bytes(30), ImageStatus.CAMERA_RAW),
        (b"<html><body>404</body></html>", ImageStatus.NOT_AN_IMAGE),
    ],
)
def test_other_formats_are_named(data: bytes, status: ImageStatus) -> None:
    assert decode_image(data) is status


@pytest.mark.parametrize(
    ("module", "data", "status", "extra"),
    [
        ("pillow_heif", b"\0\0\0\x18ftypheic" + bytes(30), ImageStatus.HEIC_WITHOUT_PLUGIN, "kpu[heic]"),
        (
            "pillow_jxl",
            bytes.fromhex("ff0a414024080401001c004b188b15820300"),
            ImageStatus.JXL_WITHOUT_PLUGIN,
            "kpu[jxl]",
        ),
    ],
)
def test_a_missing_plugin_is_named(module: str, data: bytes, status: ImageStatus, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; from kpu.pixels.decode import decode_image; "
        f"print(decode_image({data!r}).name)"
    )
    found = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert found.stdout.strip() == status.name
    assert extra in (remedy(reason(status)) or "")


def test_every_status_has_words_and_every_refusal_advice() -> None:
    texts = [reason(status) for status in ImageStatus]
    assert len(set(texts)) == len(texts)
    silent = {ImageStatus.OK, ImageStatus.EMPTY, ImageStatus.NOT_AN_IMAGE, ImageStatus.NOT_WRITTEN}
    assert all(remedy(reason(status)) for status in set(ImageStatus) - silent)
    assert reason(200) == "reason 200 of a later release"


def scans_repeated(times: int) -> bytes:
    """A progressive JPEG whose last scan comes again so many times."""
    data = encode(Image.fromarray(GREY.repeat(8, 0).repeat(8, 1)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * times + b"\xff\xd9"


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded() -> None:
    assert isinstance(decode_image(scans_repeated(20)), Image.Image)
    assert decode_image(scans_repeated(2000)) is ImageStatus.TOO_MANY_SCANS


def test_scans_of_embedded_pictures_do_not_count() -> None:
    data = scans_repeated(0)
    embedded = b"\xff\xe2" + struct.pack(">H", 2 + 400) + b"\xff\xda" * 200
    np.testing.assert_array_equal(pixels(data[:2] + embedded + data[2:]), pixels(data))


def test_the_limit_of_pixels_is_a_setting() -> None:
    data = encode(Image.new("L", (20, 30)), "PNG")
    assert decode_image(data, Decoding(max_pixels=599)) is ImageStatus.TOO_LARGE
    assert isinstance(decode_image(data, Decoding(max_pixels=600)), Image.Image)


def test_a_limit_above_pillows_own_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encode(Image.new("L", (20, 30)), "PNG")
    assert isinstance(decode_image(data, Decoding(max_pixels=600)), Image.Image)


def test_a_picture_inside_an_icon_is_measured_too() -> None:
    picture = png(np.full((20, 30, 1), 40000))
    icon = b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(picture), 22) + picture
    assert pixels_before_opening(icon) == 600
    assert decode_image(icon, Decoding(max_pixels=599)) is ImageStatus.TOO_LARGE


@pytest.mark.parametrize(
    ("head", "size"),
    [
        ("ff0a414024080401", 64),
        ("ff0aba5de8708248", 15_000_000),
        ("ff0a221008408048", 513 * 517),
        ("ff0ac741240804", 2048),
    ],
)
def test_the_size_of_jpeg_xl_is_known_before_it_is_opened(head: str, size: int) -> None:
    assert pixels_before_opening(bytes.fromhex(head) + bytes(20)) == size


def test_tiles_larger_than_the_limit_are_refused() -> None:
    data = tiff(GREY, tags={322: (2**16,), 323: (2**16,)})
    assert decode_image(data) is ImageStatus.TOO_LARGE


def test_orientation_in_xmp_alone_is_not_followed() -> None:
    photo = Image.fromarray(GREY)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    jpeg = encode(photo, "JPEG", xmp=xmp)
    assert pixels(jpeg).shape == (6, 8, 3)
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    data = encode(photo, "PNG")
    np.testing.assert_array_equal(pixels(data[:33] + text + data[33:])[..., 0], GREY)
    packet = encode(photo, "TIFF", tiffinfo={700: xmp})
    np.testing.assert_array_equal(pixels(packet)[..., 0], GREY)


def test_text_after_the_pixels_of_a_png_hides_nothing() -> None:
    data = encode(Image.fromarray(GREY), "PNG")
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(5_000_000)))
    np.testing.assert_array_equal(pixels(data[:-12] + bomb + data[-12:])[..., 0], GREY)


def test_a_sequential_jpeg_with_a_scan_for_each_channel_is_counted_too() -> None:
    """Its decoder goes on to the end of the file as well."""
    whole = encode(Image.fromarray(GREY.repeat(8, 0).repeat(8, 1)).convert("RGB"), "JPEG", subsampling=0)
    start = whole.index(b"\xff\xda")
    header = bytearray(whole[start : start + 14])
    one = b"\xff\xda\0\x08\x01" + bytes(header[5:7]) + bytes(header[11:14])
    data = whole[:start] + (one + whole[start + 14 : -2]) * 200 + b"\xff\xd9"
    assert decode_image(data) is ImageStatus.TOO_MANY_SCANS


@pytest.mark.parametrize(("module", "kind"), [("pillow_heif", "HEIF"), ("pillow_jxl", "JXL")])
def test_an_installed_plugin_decodes_its_format(module: str, kind: str) -> None:
    plugin = pytest.importorskip(module)
    if kind == "HEIF":
        plugin.register_heif_opener()
    y, x = np.mgrid[:48, :64]
    pixels = np.stack([4 * x, 5 * y, 255 - 2 * (x + y)], axis=-1).astype(np.uint8)
    decoded = decode_image(encode(Image.fromarray(pixels), kind, quality=95))
    assert isinstance(decoded, Image.Image)
    assert np.abs(np.asarray(decoded).astype(int) - pixels).mean() < 2


@pytest.mark.parametrize(("canvas", "frame"), [((100, 100), (1, 1)), ((1, 1), (100, 100)), ((60, 10), (10, 100))])
def test_a_gif_counts_by_its_canvas_however_small_its_frame(canvas: tuple[int, int], frame: tuple[int, int]) -> None:
    head = b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x80, 0, 0) + bytes(6)
    data = head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x44\x01\x00;"
    assert decode_image(data, Decoding(max_pixels=5999)) is ImageStatus.TOO_LARGE
