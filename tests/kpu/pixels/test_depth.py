"""Images of other depths than 8 bits come out as an independent decoder says, or are refused by name."""

import base64
import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kpu.format.commits import ImageStatus
from kpu.format.plan import Decoding
from kpu.pixels.decode import decode_image, image_to_rgb
from tests.support.pictures import chunk, encode, pixels, png, tiff

RNG = np.random.default_rng(0)

# Made with OpenJPEG (imagecodecs): a ramp over 16 columns; in colour also its mirror image, and white.
COLOUR_12_REVERSIBLE = (
    "/0//UQAvAAAAAAAQAAAABAAAAAAAAAAAAAAAEAAAAAQAAAAAAAAAAAADCwEBCwEBCwEB/1IADAAAAAEBAAQEAAH/XAAEQGD/ZAAlAAFDcmVhdGVk"
    "IGJ5IE9wZW5KUEVHIHZlcnNpb24gMi41LjT/kAAKAAAAAAEIAAH/k8fskhQAWxkKv6zSQBg5ZAdds0FolYJ/U8vLy8tcdBBHpjCQVVa2rT9iObD5"
    "DIraXVtLq2l6vujy8vLy9ieD3ymEfco6B+7HiUubD8zf4Wg7uQ8K14g494lelb0GzQjhw9Ty8vLy0WWk1EQlQJADaEAGPEpc2ILPcBxtdXCdb8fH"
    "LCtuvm+b5v3lG7lNEgbJsAY8SlzYgWikONrq4TrfjJCArbr5vm+b/3/f4TgRUEI/5KlfriDAtFpc6BgbCcrz44/RLZQgLeahi9M3p/0H0fYJrrKd"
    "X7r5xHhw2GvxpZMYAAwjvlMIzZ90H0fYJrrKdX7r5xHhw2Gvxpf/2Q=="
)
COLOUR_12_IRREVERSIBLE = (
    "AAAADGpQICANCocKAAAAFGZ0eXBqcDIgAAAAAGpwMiAAAAAtanAyaAAAABZpaGRyAAAABAAAABAAAwsHAAAAAAAPY29scgEAAAAAABAAAAF6anAy"
    "Y/9P/1EALwAAAAAAEAAAAAQAAAAAAAAAAAAAABAAAAAEAAAAAAAAAAAAAwsBAQsBAQsBAf9SAA0BAgABAQAEBAAAiP9cAAVCYAD/ZAAlAAFDcmVh"
    "dGVkIGJ5IE9wZW5KUEVHIHZlcnNpb24gMi41LjT/kAAKAAAAAAEAAAH/k8fqlBQASlr8+FWNGP8YkIOJfX09+rG2ruaKZc3/CdkX/xromw16sa+R"
    "zR4Ya0XdVbVeRegWusprKdrDTFT3cGdoq/diOraXVslLQYg/z+FMO7kPDsPCNYAADCIr9ABgQUYWY1lNZTWU7WF7CZwJ2i1hn2vawz5GdcBmphzl"
    "cg3DiMkUPJfW0urajFYc5XHdfN839IU/Yk3p+iCTIHYfyjiuovPP1TARUEv0ZHcTh8gwP6y/zhsSKm6pqhRGQnHCPKY0fiwkAGCrjzYVjugoYFmN"
    "ZTUf5Xi0fV4L8JoVw3GZ7jtFYCcK47RWAbjM91F6BJC8/9k="
)
GREY_9 = (
    "AAAADGpQICANCocKAAAAFGZ0eXBqcDIgAAAAAGpwMiAAAAAtanAyaAAAABZpaGRyAAAABAAAABAAAQgHAAAAAAAPY29scgEAAAAAABEAAAC7anAy"
    "Y/9P/1EAKQAAAAAAEAAAAAQAAAAAAAAAAAAAABAAAAAEAAAAAAAAAAAAAQgBAf9SAAwAAAABAAAEBAAB/1wABEBI/2QAJQABQ3JlYXRlZCBieSBP"
    "cGVuSlBFRyB2ZXJzaW9uIDIuNS40/5AACgAAAAAASQAB/5PfmcARaUsYzmdd52Z29VyfWqmo9/cgg9cijDGhLg7CwWzejzV0ONrrKauE64Bw2Gw2"
    "Gw2Gw1+MSJfCP//Z"
)


@pytest.mark.parametrize("text", [COLOUR_12_REVERSIBLE, COLOUR_12_IRREVERSIBLE])
def test_jpeg_2000_of_more_than_8_bits_keeps_white(text: str) -> None:
    ramp = np.linspace(0, 255, 16)
    expected = np.stack([ramp, ramp[::-1], np.full(16, 255)], axis=-1)
    found = pixels(base64.b64decode(text)).astype(float)
    np.testing.assert_allclose(found, np.broadcast_to(expected, (4, 16, 3)), atol=1.5)


def test_jpeg_2000_grey_of_9_bits_keeps_white() -> None:
    found = pixels(base64.b64decode(GREY_9)).astype(float)
    np.testing.assert_allclose(found[..., 0], np.broadcast_to(np.linspace(0, 255, 16), (4, 16)), atol=1)


def test_jpeg_2000_with_signed_samples_is_refused() -> None:
    data = bytearray(base64.b64decode(COLOUR_12_REVERSIBLE))
    data[data.index(b"\xff\x51") + 40] |= 0x80
    assert decode_image(bytes(data)) is ImageStatus.UNSUPPORTED_PIXELS


@pytest.mark.parametrize("channels", [1, 3])
def test_png_of_12_bits_in_16_is_scaled_by_what_is_known(channels: int) -> None:
    values = RNG.integers(0, 4096, (6, 7, channels))
    expected = np.broadcast_to(values >> 4, (6, 7, 3))
    assert decode_image(png(values)) is ImageStatus.DEPTH_UNKNOWN
    stated = chunk(b"sBIT", bytes([12] * channels))
    np.testing.assert_array_equal(pixels(png(values, stated)), expected)
    np.testing.assert_array_equal(pixels(png(values << 4, stated)), expected)  # where PNG wants them
    np.testing.assert_array_equal(pixels(png(values), Decoding(bits=12)), expected)
    np.testing.assert_array_equal(pixels(png(values), Decoding(bits=16)), np.broadcast_to(values >> 8, (6, 7, 3)))
    assert decode_image(png(values), Decoding(bits=10)) is ImageStatus.DEPTH_UNKNOWN


def test_a_black_image_is_black_at_any_depth() -> None:
    for channels in (1, 3):
        assert not pixels(png(np.zeros((2, 3, channels), int))).any()
    assert not pixels(tiff(np.zeros((2, 3), np.uint16))).any()


def test_alpha_of_16_bits_says_nothing_of_the_depth_of_colours() -> None:
    values = RNG.integers(0, 4096, (4, 5, 4))
    values[..., 3] = 65535
    assert decode_image(png(values)) is ImageStatus.DEPTH_UNKNOWN
    np.testing.assert_array_equal(pixels(png(values), Decoding(bits=12)), values[..., :3] >> 4)
    assert decode_image(png(values[..., 2:])) is ImageStatus.DEPTH_UNKNOWN


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_with_a_transparent_level(bits: int) -> None:
    top = 2**bits - 1
    values = np.arange(16).reshape(2, 8, 1) % (top + 1)
    expected = (values * (255 // top))[..., 0]
    np.testing.assert_array_equal(pixels(png(values, bits=bits))[..., 0], expected)
    found = pixels(png(values, chunk(b"tRNS", struct.pack(">H", top // 2)), bits=bits))[..., 0]
    np.testing.assert_array_equal(found, np.where(values[..., 0] == top // 2, 255, expected))


def test_one_transparent_colour_of_16_bits_is_compared_with_all_of_them() -> None:
    values = np.full((1, 4, 3), 0x8000)
    values[0, :, 0] += [0, 1, 2, 0]
    found = pixels(png(values, chunk(b"tRNS", struct.pack(">HHH", 0x8001, 0x8000, 0x8000))))
    assert found[0].tolist() == [[128, 128, 128], [255, 255, 255], [128, 128, 128], [128, 128, 128]]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packed", [False, True])
def test_tiff_of_16_bits(order: str, packed: bool) -> None:
    how: dict[str, Any] = {"order": order, "packed": packed}
    colour = RNG.integers(0, 65536, (5, 7, 3)).astype(np.uint16)
    np.testing.assert_array_equal(pixels(tiff(colour, 2, **how)), colour >> 8)
    np.testing.assert_array_equal(pixels(tiff(colour[..., 0], **how))[..., 0], colour[..., 0] >> 8)
    low = colour >> 4
    assert decode_image(tiff(low, 2, **how)) is ImageStatus.DEPTH_UNKNOWN
    np.testing.assert_array_equal(pixels(tiff(low, 2, **how), Decoding(bits=12)), low >> 4)
    np.testing.assert_array_equal(pixels(tiff(low, 2, tags={281: (4095,)}, **how)), low >> 4)


@pytest.mark.parametrize("packed", [False, True])
def test_tiff_of_16_bits_with_channels_apart_is_right_or_refused(packed: bool) -> None:
    """Pillow mistakes their bytes where they are not compressed."""
    colour = RNG.integers(0, 65536, (5, 7, 3)).astype(np.uint16)
    data = tiff(colour, 2, packed=packed, apart=True)
    if packed:
        np.testing.assert_array_equal(pixels(data), colour >> 8)
    else:
        assert decode_image(data) is ImageStatus.UNSUPPORTED_PIXELS


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["i2", "u4", "i4", "f4"])
def test_numbers_without_an_agreed_white_are_stretched(kind: str, order: str, packed: bool) -> None:
    """Up to 2**32 - 1, down to negative ones, and in either order of bytes."""
    least, most = {"i2": (-30000, 30000), "u4": (0, 2**32 - 1), "i4": (-(2**31), 2**31 - 1), "f4": (-1e3, 1e6)}[kind]
    values = np.array([[least, (least + most) / 2, most]]).astype(kind)
    data = tiff(values, order=order, packed=packed)
    if kind == "u4" and order == ">":
        assert decode_image(data) is ImageStatus.UNSUPPORTED_PIXELS
    else:
        np.testing.assert_allclose(pixels(data)[0, :, 0], [0, 127.5, 255], atol=0.5)


@pytest.mark.parametrize("kind", ["i1", "f2", "f8", "u8"])
def test_samples_that_are_not_decoded_are_not_called_truncated(kind: str) -> None:
    data = tiff((RNG.random((4, 5)) * 100).astype(kind))
    assert decode_image(data) is ImageStatus.UNSUPPORTED_PIXELS
    assert decode_image(data[:-20]) is ImageStatus.TRUNCATED  # its directory comes last


def test_float_colour_is_not_called_truncated() -> None:
    assert decode_image(tiff(np.ones((4, 5, 3), np.float32), 2)) is ImageStatus.UNSUPPORTED_PIXELS


def test_jpeg_of_12_bits_is_not_called_truncated() -> None:
    data = bytearray(encode(Image.new("RGB", (8, 8)), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    assert decode_image(bytes(data)) is ImageStatus.UNSUPPORTED_PIXELS


@pytest.mark.parametrize("levels", [100, 1023, 4095, 65535])
def test_pgm_is_scaled_by_the_white_that_it_names(levels: int) -> None:
    values = np.linspace(0, levels, 8).round().astype(">u2" if levels > 255 else "u1")
    found = pixels(b"P5 8 1 %d\n" % levels + values.tobytes())[0, :, 0]
    np.testing.assert_allclose(found, np.linspace(0, 255, 8), atol=1.3)


def test_an_opened_image_gives_what_its_bytes_give() -> None:
    low = RNG.integers(0, 4096, (5, 7, 3))
    clear = np.full((1, 2, 3), 0x8000) + np.arange(6).reshape(1, 2, 3)
    for data, how in [
        (png(low), Decoding()),
        (png(low), Decoding(bits=12)),
        (png(clear, chunk(b"tRNS", struct.pack(">HHH", 0x8000, 0x8001, 0x8002))), Decoding()),
        (png(np.arange(4).reshape(1, 4, 1), chunk(b"tRNS", b"\0\1"), bits=2), Decoding()),
        (tiff(low.astype(np.uint16), 2), Decoding(bits=12)),
        (tiff(np.array([[0, 2**32 - 1]], np.uint32)), Decoding()),
        (base64.b64decode(COLOUR_12_IRREVERSIBLE), Decoding()),
    ]:
        with Image.open(io.BytesIO(data)) as image:
            found, expected = image_to_rgb(image, how), decode_image(data, how)
        if isinstance(expected, ImageStatus):
            assert found is expected
        else:
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_an_array_of_16_bits_needs_a_known_depth_too() -> None:
    image = Image.fromarray(np.array([[0, 4095]], np.uint16))
    assert image_to_rgb(image) is ImageStatus.DEPTH_UNKNOWN
    found = image_to_rgb(image, Decoding(bits=12))
    assert isinstance(found, Image.Image) and found.getpixel((1, 0)) == (255, 255, 255)


def test_a_transparent_colour_of_8_bits_is_its_lower_byte() -> None:
    data = encode(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), "PNG")
    found = pixels(data[:33] + chunk(b"tRNS", struct.pack(">HHH", 0x101, 2, 3)) + data[33:])
    assert found.tolist() == [[[255, 255, 255], [4, 5, 6]]]
